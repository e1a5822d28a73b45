# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: allocates results and hands addresses to ``_C_cpu``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import HELD_DTYPES, bitmask_bytes
from mosaic_kernels.ops import isa, reference
from mosaic_kernels.ops.missing import why_missing
from mosaic_kernels.ops.threads import threads

try:  # `from mosaic_kernels import _C_cpu` would report a circular import if the file is missing
    import mosaic_kernels._C_cpu as _C_cpu
except ImportError as error:
    _IMPORT_ERROR: str | None = why_missing("_C_cpu", error)
else:
    _IMPORT_ERROR, BEST_ISA = None, isa.limit(_C_cpu)  # BEST_ISA ignores MOSAIC_ISA
    unchanged = _C_cpu.unchanged

__all__ = [
    "BEST_ISA",
    "DENSE_ROWS",
    "KERNELS",
    "TILES",
    "Group",
    "address",
    "bytes_of",
    "dense_linear_raw",
    "holds",
    "linear_at",
    "prepared_block",
    "sparse_linear_int8_raw",
    "sparse_linear_raw",
    "threads",
    "unchanged",
    "why_not",
]

# values, scales, words, offsets and bias of one weight
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCOPES = {"matrix": 0, "row": 1, "group": 2}


# True if the kernels multiply bf16 in tiles (AMX): then they are faster than torch at many rows, too.
TILES = _IMPORT_ERROR is None and _C_cpu.isa() == "amx"
# True if dense_linear_raw runs here; it needs AVX2.
DENSE_ROWS = _IMPORT_ERROR is None and _C_cpu.isa() != "scalar"


def why_not() -> str | None:
    """``None`` if the CPU kernels can run, else the reason why not."""
    return _IMPORT_ERROR


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def _fitting(
    x: Tensor, values: Tensor, words: Tensor | None, bias: Tensor | None, in_features: int, out_features: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x``, ``values`` and ``bias``, checked and contiguous.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    dtype = x.dtype
    if x.shape[-1] != in_features:
        raise KernelError(f"x has {x.shape[-1]} features but this projection takes {in_features}")
    if dtype is not values.dtype and (values.dtype is not torch.int8 or dtype not in HELD_DTYPES):
        raise KernelError(f"x is {dtype} but the packed values are {values.dtype}")
    if not (x.is_cpu and values.is_cpu and (words is None or words.is_cpu)):
        raise KernelError(
            f"x is on {x.device} but the packed weight is on {values.device}: move one of them with .to()"
        )
    if bias is not None:
        if bias.dtype is not dtype or bias.numel() != out_features or not bias.is_cpu:
            raise KernelError(f"bias must be [{out_features}] {dtype} on {x.device}, got {bias.dtype} on {bias.device}")
        bias = bias.contiguous()
    return x.contiguous(), values.contiguous(), bias


def sparse_linear_raw(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """``sparse_linear`` without dispatcher and autograd; x's shape and dtype are checked."""
    out_features = words.shape[0]
    x, values, bias = _fitting(x, values, words, bias, in_features, out_features)
    if x.dtype is torch.float64:
        return reference.sparse_linear(x, values, words, offsets, bias, in_features)
    shape = x.shape[:-1]
    out = x.new_empty((*shape, out_features))
    _C_cpu.sparse_linear(
        x.data_ptr(), values.data_ptr(), words.data_ptr(), offsets.data_ptr(), address(bias), out.data_ptr(),
        shape.numel(), in_features, out_features, values.numel(), _DTYPES[x.dtype], threads(),
    )  # fmt: skip
    return out


def sparse_linear_int8_raw(
    x: Tensor, values: Tensor, scales: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None,
    in_features: int, quantize_x: bool,
) -> Tensor:  # fmt: skip
    """``sparse_linear_int8`` without dispatcher and autograd; x's shape and dtype are checked."""
    out_features = words.shape[0]
    x, values, bias = _fitting(x, values, words, bias, in_features, out_features)
    if x.dtype is torch.float64:
        return reference.sparse_linear_int8(x, values, scales, words, offsets, bias, in_features, quantize_x)
    scales, shape = scales.contiguous(), x.shape[:-1]
    out = x.new_empty((*shape, out_features))
    _C_cpu.sparse_linear_int8(
        x.data_ptr(), values.data_ptr(), words.data_ptr(), offsets.data_ptr(), address(bias), out.data_ptr(),
        shape.numel(), in_features, out_features, values.numel(), _DTYPES[x.dtype], threads(),
        scales.data_ptr(), scales.shape[1], quantize_x,
    )  # fmt: skip
    return out


def linear_at(operands: Operands, in_features: int, dtype: torch.dtype, quantize_x: bool = False) -> Any:
    """Prepare the kernel of one weight.

    The weight is checked, and the addresses of its tensors are read, only here. The tensors must stay where they are.

    Args:
        operands: the weight, contiguous.
        in_features: the number of its columns.
        dtype: the dtype of the activations.
        quantize_x: see ``sparse_linear_int8``.

    Returns:
        A function that runs the kernel only if the weight is still where it was. It takes the
        arguments of ``unchanged``, the address of ``x``, the address of the result, the number of rows of ``x`` and
        the number of threads, and returns whether the kernel ran.

    Raises:
        KernelError: activations of that dtype do not fit the weight.
    """
    values, scales, words, offsets, bias = operands
    out_features = words.shape[0]
    _fitting(torch.empty(0, in_features, dtype=dtype, device="cpu"), values, words, bias, in_features, out_features)
    return _C_cpu.PreparedLinear(
        values.data_ptr(), words.data_ptr(), offsets.data_ptr(), address(bias), in_features, out_features,
        values.numel(), _DTYPES[dtype], address(scales), 0 if scales is None else scales.shape[1], quantize_x,
    ).run_if  # fmt: skip


def bytes_of(x: Tensor) -> bytes:
    """A copy of the contents of a CPU tensor."""
    x = x.contiguous()
    return _C_cpu.bytes_at(x.data_ptr(), x.numel() * x.element_size())


def holds(x: Tensor, copy: bytes) -> bool:
    """True if ``x`` holds the bytes in ``copy``, from :func:`bytes_of` a tensor of that size; -0 differs from 0."""
    x = x.contiguous()  # keeps a contiguous copy alive during the comparison
    return _C_cpu.holds(x.data_ptr(), copy)


class Group:
    """Multiplies one ``x`` by several weights in one native call, as ``sparse_linear`` or ``sparse_linear_int8`` would.

    Query, key and value projections read the same activations, and so do gate and up. In one call ``x`` is prepared
    once, and the threads share the rows of all weights. The constructor checks the weights and reads their addresses,
    so calls need not.

    Args:
        parts: the weights, all float or all int8.
        in_features: of each of them.
        quantize_x: see ``sparse_linear_int8``.

    Raises:
        KernelError: a part does not fit the first one.
    """

    def __init__(self, parts: Sequence[Operands], in_features: int, quantize_x: bool = False) -> None:
        rounded = parts[0][0].dtype is torch.int8
        kinds = {bias.dtype for *_, bias in parts if bias is not None} if rounded else {parts[0][0].dtype}
        self.dtype = next(iter(kinds), None)  # int8 without biases takes any x
        self.in_features, self.quantize_x = in_features, quantize_x
        like = torch.empty(0, in_features, dtype=self.dtype, device="cpu")
        # Keeps the memory behind the addresses below alive. Detached, because a parameter's storage may be replaced.
        self._held: list[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]] = []
        self._sizes: list[int] = []
        addresses: list[tuple[int, ...]] = []
        for values, scales, words, offsets, bias in parts:
            out_features = words.shape[0]
            _, values, bias = _fitting(like, values.detach(), words, bias, in_features, out_features)
            scales = None if scales is None else scales.detach().contiguous()
            bias = None if bias is None else bias.detach()
            self._held.append((values, scales, words, offsets, bias))
            self._sizes.append(out_features)
            addresses.append((
                values.data_ptr(), words.data_ptr(), offsets.data_ptr(), address(bias), out_features, values.numel(),
                address(scales), 0 if scales is None else scales.shape[1],
            ))  # fmt: skip
        self._run = _C_cpu.PreparedGroup(addresses, in_features, quantize_x).run

    def __call__(self, x: Tensor) -> list[Tensor]:
        """``x`` is ``[..., in_features]``; the results are in the order of the parts."""
        dtype = x.dtype
        *lead, features = x.shape
        if (self.dtype or dtype) is not dtype or dtype not in _DTYPES or features != self.in_features or not x.is_cpu:
            for (values, _, words, _, bias), size in zip(self._held, self._sizes, strict=True):
                _fitting(x, values, words, bias, self.in_features, size)
        x = x.contiguous()
        results = [x.new_empty(*lead, size) for size in self._sizes]
        self._run(x.data_ptr(), [out.data_ptr() for out in results], math.prod(lead), _DTYPES[dtype], threads())
        return results


def prepared_block(dtype: torch.dtype, *described: Any) -> Any:
    """The native calls of a decoder block, which is described by its layers, norms, epsilons, head_dim and scaling.

    The tensors behind the described addresses must stay where they are.
    """
    return _C_cpu.PreparedBlock(_DTYPES[dtype], *described)


def dense_linear_raw(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, computed by the loop of the sparse kernels.

    Raises:
        BackendError: the instruction set in use has no such kernel (it needs AVX2).
    """
    out_features, in_features = weight.shape
    x, weight, bias = _fitting(x, weight, None, bias, in_features, out_features)
    shape = x.shape[:-1]
    out = x.new_empty((*shape, out_features))
    _C_cpu.sparse_linear(
        x.data_ptr(), weight.data_ptr(), 0, 0, address(bias), out.data_ptr(),
        shape.numel(), in_features, out_features, 0, _DTYPES[x.dtype], threads(),
    )  # fmt: skip
    return out


def _pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    bitmask, offsets = _bits_and_offsets(weight)
    sizes = (*weight.shape, _DTYPES[weight.dtype], threads())
    _C_cpu.pack_bits(weight.data_ptr(), address(keep), bitmask.data_ptr(), offsets.data_ptr(), *sizes)
    return _values_of(weight, bitmask, offsets), bitmask


def _score_pack(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    weight, norms, keep = weight.contiguous(), column_norms.float().contiguous(), keep.contiguous()
    bitmask, offsets = _bits_and_offsets(weight)
    sizes = (*weight.shape, _DTYPES[weight.dtype], _SCOPES[scope], threads())
    inputs = (weight.data_ptr(), norms.data_ptr(), keep.data_ptr())
    _C_cpu.score_bits(*inputs, bitmask.data_ptr(), offsets.data_ptr(), *sizes)
    return _values_of(weight, bitmask, offsets), bitmask


def _bits_and_offsets(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the bits of a weight, and for where each row's values begin."""
    rows, columns = weight.shape
    bitmask = weight.new_empty((rows, bitmask_bytes(columns)), dtype=torch.uint8)
    return bitmask, weight.new_empty(rows + 1, dtype=torch.int64)


def _values_of(weight: Tensor, bitmask: Tensor, offsets: Tensor) -> Tensor:
    """The values of a weight whose bits are set."""
    rows, columns = weight.shape
    nnz = int(offsets[-1])
    values = weight.new_empty(nnz)
    _C_cpu.pack_values(
        weight.data_ptr(), values.data_ptr(), bitmask.data_ptr(), bitmask.stride(0), offsets.data_ptr(),
        rows, columns, nnz, _DTYPES[weight.dtype], threads(),
    )  # fmt: skip
    return values


def _unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    if values.dtype is torch.float64:
        return reference.unpack(values, bitmask, in_features)
    values, bitmask = values.contiguous(), bitmask.contiguous()
    rows, row_bytes = bitmask.shape
    weight = values.new_empty(rows, in_features)
    offsets = values.new_empty(rows + 1, dtype=torch.int64)
    _C_cpu.unpack(
        weight.data_ptr(),
        values.data_ptr(),
        bitmask.data_ptr(),
        row_bytes,
        offsets.data_ptr(),
        rows,
        in_features,
        values.numel(),
        _DTYPES[values.dtype],
        threads(),
    )
    return weight


def _outlier_stats(weight: Tensor, column_norms: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    weight, norms = weight.contiguous(), column_norms.float().contiguous()
    thresholds = torch.tensor(alphas, dtype=torch.float64, device="cpu")
    total, counts = thresholds.new_empty(()), thresholds.new_empty(len(alphas), dtype=torch.int64)
    _C_cpu.outlier_stats(
        weight.data_ptr(),
        norms.data_ptr(),
        thresholds.data_ptr(),
        total.data_ptr(),
        counts.data_ptr(),
        weight.shape[0],
        weight.shape[1],
        len(alphas),
        _DTYPES[weight.dtype],
        threads(),
    )
    return total, counts


def _column_square_sums(x: Tensor) -> Tensor:
    flat = x.flatten(0, -2).contiguous()
    sums = flat.new_empty(flat.shape[1], dtype=torch.float64)
    _C_cpu.column_square_sums(
        flat.data_ptr(), sums.data_ptr(), flat.shape[0], flat.shape[1], _DTYPES[flat.dtype], threads()
    )
    return sums


def _select(scores: Tensor, keep: Tensor, scope: str) -> Tensor:
    scores, keep = scores.contiguous(), keep.contiguous()
    mask = torch.empty_like(scores, dtype=torch.bool)
    rows, columns = scores.shape
    _C_cpu.select(scores.data_ptr(), keep.data_ptr(), mask.data_ptr(), rows, columns, _SCOPES[scope], threads())
    return mask


def _score_select(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> Tensor:
    weight, norms, keep = weight.contiguous(), column_norms.float().contiguous(), keep.contiguous()
    mask = torch.empty_like(weight, dtype=torch.bool)
    _C_cpu.score_select(
        weight.data_ptr(),
        norms.data_ptr(),
        keep.data_ptr(),
        mask.data_ptr(),
        weight.shape[0],
        weight.shape[1],
        _DTYPES[weight.dtype],
        _SCOPES[scope],
        threads(),
    )
    return mask


def _obs_block(weight: Tensor, factor: Tensor, keep: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.clone(memory_format=torch.contiguous_format)
    keep = keep.clone(memory_format=torch.contiguous_format)
    factor, errors = factor.contiguous(), torch.empty_like(weight)
    rows, block = weight.shape
    _C_cpu.obs_block(
        weight.data_ptr(), factor.data_ptr(), keep.data_ptr(), errors.data_ptr(), rows, block, n, m, threads()
    )
    return weight, errors, keep


def _admm_step(proposal: Tensor, keep: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    keep, gradient, target = keep.contiguous(), gradient.contiguous(), torch.empty_like(proposal)
    addresses = (proposal.data_ptr(), keep.data_ptr(), gradient.data_ptr(), target.data_ptr())
    _C_cpu.admm_step(*addresses, penalty, proposal.shape[0], proposal.shape[1], threads())
    return target


def _cg_step(
    solution: Tensor, residual: Tensor, direction: Tensor, energy: Tensor, image: Tensor, keep: Tensor
) -> None:
    image, keep = image.contiguous(), keep.contiguous()
    rows, columns = solution.shape
    _C_cpu.cg_step(
        solution.data_ptr(), residual.data_ptr(), direction.data_ptr(), energy.data_ptr(), image.data_ptr(),
        keep.data_ptr(), rows, columns, threads(),
    )  # fmt: skip


KERNELS: dict[str, Callable[..., Any]] = {
    "sparse_linear": sparse_linear_raw,
    "sparse_linear_int8": sparse_linear_int8_raw,
    "dense_linear": dense_linear_raw,
    "pack": _pack,
    "unpack": _unpack,
    "outlier_stats": _outlier_stats,
    "column_square_sums": _column_square_sums,
    "select": _select,
    "score_select": _score_select,
    "score_pack": _score_pack,
    "obs_block": _obs_block,
    "admm_step": _admm_step,
    "cg_step": _cg_step,
}

# SPDX-License-Identifier: Apache-2.0
"""The operators, with every argument checked; nowhere below is it checked again.

Each operator's meaning is its function in :mod:`mosaic_kernels.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import VALUE_DTYPES, PackedWeight, dequantize
from mosaic_kernels.ops import library as library  # registers the operators with torch
from mosaic_kernels.ops.select import recorded, use_backend

__all__ = [
    "admm_step",
    "cg_step",
    "column_square_sums",
    "obs_block",
    "outlier_stats",
    "pack",
    "score_pack",
    "score_select",
    "select",
    "sparse_linear",
    "unpack",
    "use_backend",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


def pack(weight: Tensor, keep: Tensor | None = None) -> PackedWeight:
    """Pack the zeros of a weight away. No gradient flows through this.

    Args:
        weight: ``[out_features, in_features]``, fp32, bf16 or fp16.
        keep: ``bool``, the weight's shape: the others are packed away as if they were zero.

    Returns:
        The canonical bitmask form; ``unpack`` returns the same weight bit for bit (a negative zero
        comes back as zero).

    Raises:
        KernelError: the weight is not a 2-D tensor of one of these dtypes, or the mask does not fit it.

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> packed = mk.pack(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> packed.values.tolist(), packed.bitmask.tolist()
        ([2.0, 3.0], [[2], [1]])
    """
    _require(weight.dim() == 2, f"weight must be 2-D [out_features, in_features], got {list(weight.shape)}")
    _require(weight.dtype in VALUE_DTYPES, f"weight must be fp32, bf16 or fp16, got {weight.dtype}")
    if keep is not None:
        _require(
            keep.shape == weight.shape and keep.dtype == torch.bool,
            f"keep must be bool {list(weight.shape)}, got {keep.dtype} {list(keep.shape)}",
        )
    values, bitmask = torch.ops.mosaic.pack(weight.detach(), keep)
    return PackedWeight(values, bitmask, (weight.shape[0], weight.shape[1]))


def unpack(packed: PackedWeight) -> Tensor:
    """The dense ``[out_features, in_features]`` weight of a packed one, fp32 where its values are int8.

    Raises:
        FormatError: the number of set bits is not the number of values.

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> mk.unpack(mk.pack(torch.eye(2))).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    packed.validate()
    values = packed.values
    if packed.scales is not None:
        values = dequantize(values, packed.scales, packed.bitmask)
    dense: Tensor = torch.ops.mosaic.unpack(values, packed.bitmask, packed.shape[1])
    return dense


def sparse_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, quantize_x: bool = False) -> Tensor:
    """``F.linear(x, unpack(packed), bias)`` without unpacking; differentiable in ``x``.

    Args:
        x: activations ``[..., in_features]`` on the device of the packed values and in their dtype;
            fp32, bf16 or fp16 where they are int8. Under ``torch.autocast`` all are cast, as by ``F.linear``.
        packed: the weight, ``[out_features, in_features]``.
        bias: ``[out_features]`` or ``None``, dtype of ``x``.
        quantize_x: of int8 values: round each row of ``x`` to int8 too, in steps of absmax / 127, so that
            products are of integers. Faster where the machine has dot products of bytes; adds their error.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``; sums are kept in fp32.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        BackendError: a forced backend cannot run here.

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> mk.sparse_linear(torch.tensor([1.0, 2.0]), mk.pack(torch.tensor([[0.0, 3.0]]))).tolist()
        [6.0]
    """
    rows, columns = packed.shape
    _require(
        x.dim() >= 1 and x.shape[-1] == columns,
        f"x has {x.shape[-1] if x.dim() else 0} features but this projection takes {columns}",
    )
    autocast = torch.is_autocast_enabled(x.device.type)
    if packed.scales is None:
        _require(
            autocast or x.dtype == packed.values.dtype,
            f"x is {x.dtype} but the packed values are {packed.values.dtype}",
        )
        _require(not quantize_x, f"quantize_x is for int8 values, and these are {packed.values.dtype}")
    else:
        _require(x.dtype in VALUE_DTYPES, f"x must be fp32, bf16 or fp16, got {x.dtype}")
    _require(
        x.device == packed.values.device, f"x is on {x.device} but the packed values are on {packed.values.device}"
    )
    if bias is not None:
        _require(list(bias.shape) == [rows], f"bias must be [{rows}], got {list(bias.shape)}")
        _require(autocast or bias.dtype == x.dtype, f"bias is {bias.dtype} but x is {x.dtype}")
    packed.validate()
    index = packed.index()
    where = (index.words, index.offsets, bias, columns)
    if packed.scales is None:
        return recorded(torch.ops.mosaic.sparse_linear, x, packed.values, *where)
    return recorded(torch.ops.mosaic.sparse_linear_int8, x, packed.values, packed.scales, *where, quantize_x)


def _require_scored(weight: Tensor, column_norms: Tensor) -> None:
    _require(
        weight.dim() == 2 and weight.dtype in VALUE_DTYPES,
        f"weight must be 2-D fp32, bf16 or fp16, got {weight.dtype} {list(weight.shape)}",
    )
    _require(
        list(column_norms.shape) == [weight.shape[1]],
        f"column_norms must be [{weight.shape[1]}], got {list(column_norms.shape)}",
    )


def outlier_stats(weight: Tensor, column_norms: Tensor, alphas: Sequence[float]) -> tuple[float, list[int]]:
    """Score sum and outlier counts of one projection: the projection outlier distribution's raw data.

    A weight's score is ``|W_ij| * column_norms_j``; it is an outlier for ``alpha`` when its score
    exceeds ``alpha`` times the projection's mean score (arXiv 2504.06323).

    Args:
        weight: ``[out_features, in_features]``, fp32, bf16 or fp16.
        column_norms: ``[in_features]``, the L2 norm of each input feature over the calibration tokens.
        alphas: thresholds as multiples of the mean score.

    Returns:
        The sum of all scores, and for each alpha the number of outliers.

    Raises:
        KernelError: a shape or dtype does not fit, or there are more than 64 alphas.
    """
    _require_scored(weight, column_norms)
    total, counts = torch.ops.mosaic.outlier_stats(weight, column_norms.float(), list(alphas))
    return float(total), counts.tolist()


def column_square_sums(x: Tensor) -> Tensor:
    """Sum of squares of each feature: ``float64 [features]`` of ``x [..., features]`` (fp32, bf16, fp16)."""
    _require(
        x.dim() >= 2 and x.dtype in VALUE_DTYPES,
        f"x must be [..., features] in fp32, bf16 or fp16, got {x.dtype} {list(x.shape)}",
    )
    sums: Tensor = torch.ops.mosaic.column_square_sums(x)
    return sums


def _counts(shape: Sequence[int], keep: int | Tensor | tuple[int, int], scope: str) -> Tensor:
    """``keep`` as the int64 counts that the kernels take."""
    _require(scope in ("matrix", "row", "group"), f"scope must be 'matrix', 'row' or 'group', got {scope!r}")
    rows, columns = shape
    try:
        counts = torch.as_tensor(keep, dtype=torch.int64, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # 2**70 is a ValueError or a RuntimeError, as torch likes
        raise KernelError(f"keep must be whole numbers of 64 bits: {error}") from error
    if scope == "group":
        _require(counts.numel() == 2, "scope='group' takes keep=(n, m)")
        n, m = counts.tolist()
        _require(0 <= n <= m and m > 0, f"cannot keep {n} of {m}")
        _require(columns % m == 0, f"{columns} columns are not a multiple of the group size {m}")
    else:
        limit = rows * columns if scope == "matrix" else columns
        if scope == "row" and counts.numel() == 1:
            counts = counts.expand(rows).contiguous()
        wanted = 1 if scope == "matrix" else rows
        _require(counts.numel() == wanted, f"scope={scope!r} takes {wanted} counts, got {counts.numel()}")
        _require(
            not counts.numel() or (int(counts.min()) >= 0 and int(counts.max()) <= limit),
            f"counts must lie in [0, {limit}], got {counts.tolist() if counts.numel() < 9 else 'one outside'}",
        )
    return counts


def select(scores: Tensor, keep: int | Tensor | tuple[int, int], scope: str = "matrix") -> Tensor:
    """Exact top-k mask; equal scores are kept in the order of their index.

    Args:
        scores: ``[rows, columns]`` fp32, finite.
        keep: how many to keep. ``scope='matrix'``: one count. ``'row'``: one count for every row, or
            an int64 tensor ``[rows]``. ``'group'``: ``(n, m)``, the n largest of every m neighbours in a row.
        scope: ``'matrix'``, ``'row'`` or ``'group'``.

    Returns:
        ``bool [rows, columns]``, ``True`` where kept, exactly as many as asked for.

    Raises:
        KernelError: a count is out of range, or a row is not a whole number of groups.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> import torch
        >>> from mosaic_kernels import ops
        >>> ops.select(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 1).tolist()
        [[False, True, False, False]]
    """
    _require(
        scores.dim() == 2 and scores.dtype == torch.float32,
        f"scores must be 2-D fp32, got {scores.dtype} {list(scores.shape)}",
    )
    mask: Tensor = torch.ops.mosaic.select(scores, _counts(scores.shape, keep, scope), scope)
    return mask


def score_select(
    weight: Tensor, column_norms: Tensor, keep: int | Tensor | tuple[int, int], scope: str = "matrix"
) -> Tensor:
    """``select(weight.float().abs() * column_norms, keep, scope)``, Wanda's mask, without storing the scores.

    Args:
        weight: ``[out_features, in_features]``, fp32, bf16 or fp16.
        column_norms: ``[in_features]``.
        keep, scope: see :func:`select`.

    Raises:
        KernelError, NonFiniteError: see :func:`select`; or a shape or dtype does not fit.

    Example:
        >>> import torch
        >>> from mosaic_kernels import ops
        >>> ops.score_select(torch.tensor([[-2.0, 3.0]]), torch.tensor([2.0, 1.0]), 1).tolist()
        [[True, False]]
    """
    _require_scored(weight, column_norms)
    counts = _counts(weight.shape, keep, scope)
    mask: Tensor = torch.ops.mosaic.score_select(weight, column_norms.float(), counts, scope)
    return mask


def score_pack(
    weight: Tensor, column_norms: Tensor, keep: int | Tensor | tuple[int, int], scope: str = "matrix"
) -> PackedWeight:
    """``pack(weight, score_select(weight, column_norms, keep, scope))``, without storing the mask.

    Args:
        weight: ``[out_features, in_features]``, fp32, bf16 or fp16.
        column_norms: ``[in_features]``.
        keep, scope: see :func:`select`.

    Returns:
        The canonical bitmask form; of the weights that were kept, those that are zero are packed away, too.

    Raises:
        KernelError, NonFiniteError: see :func:`score_select`.

    Example:
        >>> import torch
        >>> from mosaic_kernels import ops
        >>> packed = ops.score_pack(torch.tensor([[-2.0, 3.0]]), torch.tensor([2.0, 1.0]), 1)
        >>> packed.values.tolist(), packed.bitmask.tolist()
        ([-2.0], [[1]])
    """
    _require_scored(weight, column_norms)
    counts = _counts(weight.shape, keep, scope)
    values, bitmask = torch.ops.mosaic.score_pack(weight, column_norms.float(), counts, scope)
    return PackedWeight(values, bitmask, (weight.shape[0], weight.shape[1]))


def obs_block(
    weight: Tensor, factor: Tensor, keep: Tensor | None = None, *, n: int = 0, m: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of the optimal-brain-surgeon sweep over columns (SparseGPT, arXiv 2301.00774).

    Args:
        weight: ``[rows, block]`` fp32, the columns of this block.
        factor: ``[block, block]`` fp32, this block of the upper Cholesky factor of the inverse Gram.
        keep: ``bool [rows, block]``, or ``None`` with ``n`` and ``m`` to keep n of every m columns,
            chosen when the sweep reaches them.

    Returns:
        The updated weight, the errors ``[rows, block]`` that the columns to the right must absorb
        (``rest -= errors @ factor[block, rest]``), and the mask.

    Raises:
        KernelError: shapes or dtypes do not fit, or neither a mask nor a pattern was given.
    """
    _require(weight.dim() == 2, f"weight must be 2-D [rows, block], got {list(weight.shape)}")
    rows, block = weight.shape
    _require(
        weight.dtype == factor.dtype == torch.float32,
        f"obs_block computes in fp32, got {weight.dtype} and {factor.dtype}",
    )
    _require(list(factor.shape) == [block, block], f"factor must be [{block}, {block}], got {list(factor.shape)}")
    _require((keep is None) == (m > 0), "give either a keep mask or a pattern n of m")
    _require(m == 0 or (0 <= n <= m and block % m == 0), f"cannot keep {n} of every {m} in a block of {block} columns")
    if keep is None:
        keep = torch.ones(rows, block, dtype=torch.bool, device=weight.device)
    _require(keep.shape == weight.shape and keep.dtype == torch.bool, f"keep must be bool {list(weight.shape)}")
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.mosaic.obs_block(weight, factor, keep, n, m)
    return result


def admm_step(proposal: Tensor, keep: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    """What ADMM does between two products: ``proposal`` is split into what is kept and the dual.

    Args:
        proposal: ``[rows, columns]`` fp32, contiguous; becomes the dual, which is 0 where ``keep`` and itself
            elsewhere.
        keep: ``bool``, the same shape.
        gradient: fp32, the same shape.
        penalty: rho.

    Returns:
        ``gradient + penalty * (kept - dual)``, the right-hand side of the next product.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    _require_matrices({"proposal": proposal}, {"gradient": gradient}, keep)
    target: Tensor = torch.ops.mosaic.admm_step(proposal, keep, gradient, penalty)
    return target


def cg_step(solution: Tensor, residual: Tensor, direction: Tensor, energy: Tensor, image: Tensor, keep: Tensor) -> None:
    """What conjugate gradients on a mask do between two products, for all rows at once with a step size each.

    Args:
        solution, residual, direction: ``[rows, columns]`` fp32, contiguous; updated in place.
        energy: ``[rows, 1]`` fp32, the residual's sums of squares; updated in place.
        image: ``direction @ hessian``; what it holds off the mask counts as 0.
        keep: ``bool``, the mask.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    changed = {"solution": solution, "residual": residual, "direction": direction}
    _require_matrices(changed, {"image": image}, keep)
    _require(
        energy.dtype == torch.float32 and list(energy.shape) == [len(solution), 1] and energy.is_contiguous(),
        f"energy must be fp32 [{len(solution)}, 1], got {energy.dtype} {list(energy.shape)}",
    )
    torch.ops.mosaic.cg_step(solution, residual, direction, energy, image, keep)


def _require_matrices(changed: dict[str, Tensor], read: dict[str, Tensor], keep: Tensor) -> None:
    shape = next(iter(changed.values())).shape
    for name, tensor in {**changed, **read}.items():
        _require(
            tensor.dim() == 2 and tensor.shape == shape and tensor.dtype == torch.float32,
            f"{name} must be fp32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}",
        )
        _require(name in read or tensor.is_contiguous(), f"{name} is updated in place and must be contiguous")
    _require(
        keep.shape == shape and keep.dtype == torch.bool,
        f"keep must be bool {list(shape)}, got {keep.dtype} {list(keep.shape)}",
    )

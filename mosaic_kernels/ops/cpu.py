# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: allocates results and hands addresses to ``_C_cpu``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.errors import KernelError, UsageError
from mosaic_kernels.format import bitmask_bytes

try:
    from mosaic_kernels import _C_cpu
except ImportError as error:
    _IMPORT_ERROR: str | None = f"the module _C_cpu did not load ({error}); build it with `pip install .`"
else:
    _IMPORT_ERROR = None

__all__ = ["KERNELS", "sparse_linear_raw", "threads", "why_not"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCOPES = {"matrix": 0, "row": 1, "group": 2}


def _forced_threads() -> int:
    text = os.environ.get("MOSAIC_NUM_THREADS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"MOSAIC_NUM_THREADS={text!r} is not a positive number")
    return int(text or 0)


_FORCED_THREADS = _forced_threads()


def threads() -> int:
    """Threads a kernel may use: ``MOSAIC_NUM_THREADS``, or else what torch uses."""
    return _FORCED_THREADS or torch.get_num_threads()


def why_not() -> str | None:
    """``None`` where the CPU kernels can run, else the reason."""
    return _IMPORT_ERROR


def sparse_linear_raw(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """``sparse_linear`` without dispatcher and autograd; x's shape and dtype are checked."""
    shape = x.shape
    if shape[-1] != in_features:
        raise KernelError(f"x has {shape[-1]} features but this projection takes {in_features}")
    if x.dtype is not values.dtype:
        raise KernelError(f"x is {x.dtype} but the packed values are {values.dtype}")
    out_features = words.shape[0]
    if not (values.is_cpu and words.is_cpu and offsets.is_cpu):
        raise KernelError(
            f"x is on {x.device} but the packed weight is on {values.device}: move one of them with .to()"
        )
    if bias is not None and (bias.dtype is not x.dtype or bias.numel() != out_features or not bias.is_cpu):
        raise KernelError(f"bias must be [{out_features}] {x.dtype} on {x.device}, got {bias.dtype} on {bias.device}")
    rows = x.numel() // in_features if in_features else shape[:-1].numel()
    x = x.contiguous()
    out = x.new_empty((*shape[:-1], out_features))
    _C_cpu.sparse_linear(
        x.data_ptr(),
        values.data_ptr(),
        words.data_ptr(),
        offsets.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        in_features,
        out_features,
        values.numel(),
        _DTYPES[x.dtype],
        _FORCED_THREADS or torch.get_num_threads(),
    )
    return out


def _pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    rows, columns = weight.shape
    dtype = _DTYPES[weight.dtype]
    bitmask = weight.new_empty((rows, bitmask_bytes(columns)), dtype=torch.uint8)
    offsets = weight.new_empty(rows + 1, dtype=torch.int64)
    _C_cpu.pack_bits(
        weight.data_ptr(),
        0 if keep is None else keep.data_ptr(),
        bitmask.data_ptr(),
        offsets.data_ptr(),
        rows,
        columns,
        dtype,
        threads(),
    )
    nnz = int(offsets[-1])
    values = weight.new_empty(nnz)
    _C_cpu.pack_values(
        weight.data_ptr(),
        values.data_ptr(),
        bitmask.data_ptr(),
        bitmask.stride(0),
        offsets.data_ptr(),
        rows,
        columns,
        nnz,
        dtype,
        threads(),
    )
    return values, bitmask


def _unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
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
    thresholds = torch.tensor(alphas, dtype=torch.float64)
    total, counts = torch.empty((), dtype=torch.float64), torch.empty(len(alphas), dtype=torch.int64)
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
    sums = torch.empty(flat.shape[1], dtype=torch.float64)
    _C_cpu.column_square_sums(
        flat.data_ptr(), sums.data_ptr(), flat.shape[0], flat.shape[1], _DTYPES[flat.dtype], threads()
    )
    return sums


def _select(scores: Tensor, keep: Tensor, scope: str) -> Tensor:
    scores, keep = scores.contiguous(), keep.contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool)
    rows, columns = scores.shape
    _C_cpu.select(scores.data_ptr(), keep.data_ptr(), mask.data_ptr(), rows, columns, _SCOPES[scope], threads())
    return mask


def _score_select(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> Tensor:
    weight, norms, keep = weight.contiguous(), column_norms.float().contiguous(), keep.contiguous()
    mask = torch.empty(weight.shape, dtype=torch.bool)
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


KERNELS: dict[str, Callable[..., Any]] = {
    "sparse_linear": sparse_linear_raw,
    "pack": _pack,
    "unpack": _unpack,
    "outlier_stats": _outlier_stats,
    "column_square_sums": _column_square_sums,
    "select": _select,
    "score_select": _score_select,
    "obs_block": _obs_block,
}

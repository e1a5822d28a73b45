# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend. Importing it touches no GPU; ``why_not`` probes for one when it is first asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import bitmask_bytes, bitmask_words, row_offsets, words_from_bits
from mosaic_kernels.ops import reference

try:
    import mosaic_kernels._C_cuda as _C_cuda
except ImportError as error:
    _IMPORT_ERROR: str | None = f"the module _C_cuda was not built or did not load ({error})"
else:
    _IMPORT_ERROR = None

__all__ = ["DTYPES", "KERNELS", "where", "why_not"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# From here on the weight is unpacked into scratch memory and cuBLAS multiplies; at 16 rows the decode
# kernel reads the packed weight twice, about the bytes of the dense one.
_MAX_DECODE_ROWS = 16


@functools.cache
def why_not() -> str | None:
    """``None`` where the CUDA kernels can run, else the reason."""
    if _IMPORT_ERROR is not None:
        return _IMPORT_ERROR
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    reason: str | None = _C_cuda.why_not(torch.cuda.current_device())
    return reason


def where(tensor: Tensor) -> tuple[int, int]:
    """The device's index and its current stream."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _sparse_linear(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    shape = x.shape
    if shape[-1] != in_features:
        raise KernelError(f"x has {shape[-1]} features but this projection takes {in_features}")
    if x.dtype is not values.dtype:
        raise KernelError(f"x is {x.dtype} but the packed values are {values.dtype}")
    if not x.device == values.device == words.device == offsets.device:
        raise KernelError(f"x is on {x.device} but the packed values are on {values.device}")
    if x.dtype is torch.float64:
        return reference.sparse_linear(x, values, words, offsets, bias, in_features)
    values = values.contiguous()
    rows = shape[:-1].numel()
    if rows > _MAX_DECODE_ROWS:
        return F.linear(x, _unpack_words(values, words, offsets, in_features), bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((*shape[:-1], words.shape[0]))
    _C_cuda.linear_rows(
        x.data_ptr(),
        values.data_ptr(),
        words.data_ptr(),
        offsets.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        in_features,
        words.shape[0],
        values.numel(),
        DTYPES[x.dtype],
        *where(x),
    )
    return out


def _unpack_words(values: Tensor, words: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    weight = values.new_empty(words.shape[0], in_features)
    _C_cuda.unpack(
        weight.data_ptr(),
        values.data_ptr(),
        words.data_ptr(),
        0,
        offsets.data_ptr(),
        0,
        words.shape[0],
        in_features,
        DTYPES[values.dtype],
        *where(values),
    )
    return weight


def _unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    if values.dtype is torch.float64:
        return reference.unpack(values, bitmask, in_features)
    bitmask = bitmask.contiguous()
    words, offsets = words_from_bits(bitmask), row_offsets(bitmask)
    return _unpack_words(values.contiguous(), words, offsets, in_features)


def _pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    rows, columns = weight.shape
    words = weight.new_empty((rows, bitmask_words(columns)), dtype=torch.int32)
    counts = weight.new_empty(rows, dtype=torch.int64)
    offsets = weight.new_zeros(rows + 1, dtype=torch.int64)
    shape_and_where = (rows, columns, DTYPES[weight.dtype], *where(weight))
    mask = 0 if keep is None else keep.data_ptr()
    _C_cuda.pack_bits(weight.data_ptr(), 0, words.data_ptr(), counts.data_ptr(), 0, mask, *shape_and_where)
    torch.cumsum(counts, 0, out=offsets[1:])
    values = weight.new_empty(int(offsets[-1]))  # the one wait: the result's size is on the device
    _C_cuda.pack_values(
        weight.data_ptr(), values.data_ptr(), words.data_ptr(), 0, offsets.data_ptr(), 0, *shape_and_where
    )
    return values, words.view(torch.uint8)[:, : bitmask_bytes(columns)].contiguous()


KERNELS: dict[str, Callable[..., Any]] = {
    "sparse_linear": _sparse_linear,
    "pack": _pack,
    "unpack": _unpack,
}

# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend. Importing it touches no GPU; the first call that needs to know probes for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import row_offsets

try:
    from mosaic_kernels import _C_cuda
except ImportError as error:
    _IMPORT_ERROR: str | None = f"the module _C_cuda was not built or did not load ({error})"
else:
    _IMPORT_ERROR = None

__all__ = ["KERNELS", "why_not"]


@functools.cache
def why_not() -> str | None:
    """``None`` where the CUDA kernels can run, else the reason."""
    if _IMPORT_ERROR is not None:
        return _IMPORT_ERROR
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    reason: str | None = _C_cuda.why_not()
    return reason


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Beyond this many rows the dense product of an unpacked weight is expected to be faster. A guess from
# the kernel's arithmetic (it reads x once per output feature), not a measurement.
_DECODE_ROWS = 16


def _sparse_linear(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    if x.shape[-1] != in_features:
        raise KernelError(f"x has {x.shape[-1]} features but this projection takes {in_features}")
    if x.dtype is not values.dtype:
        raise KernelError(f"x is {x.dtype} but the packed values are {values.dtype}")
    rows = x.shape[:-1].numel()
    if rows > _DECODE_ROWS:
        return F.linear(x, _unpack_rows(values, words.view(torch.uint8), offsets, in_features), bias)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], words.shape[0]))
    with torch.cuda.device(x.device):
        _C_cuda.sparse_linear(
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
            _DTYPES[x.dtype],
            torch.cuda.current_stream(x.device).cuda_stream,
        )
    return out


def _unpack_rows(values: Tensor, bitmask: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    weight = values.new_empty(bitmask.shape[0], in_features)
    with torch.cuda.device(values.device):
        _C_cuda.unpack(
            weight.data_ptr(),
            values.data_ptr(),
            bitmask.data_ptr(),
            bitmask.stride(0),
            offsets.data_ptr(),
            bitmask.shape[0],
            in_features,
            values.numel(),
            _DTYPES[values.dtype],
            torch.cuda.current_stream(values.device).cuda_stream,
        )
    return weight


def _unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    bitmask = bitmask.contiguous()
    return _unpack_rows(values.contiguous(), bitmask, row_offsets(bitmask), in_features)


KERNELS: dict[str, Callable[..., Any]] = {"sparse_linear": _sparse_linear, "unpack": _unpack}

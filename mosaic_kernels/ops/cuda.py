# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend. Importing it touches no GPU; ``why_not`` probes for one when it is first asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import bitmask_bytes, bitmask_words, row_offsets, words_from_bits
from mosaic_kernels.ops.reference import expand_tiles
from mosaic_kernels.tiles import TILE_WORDS, UNIT, TileBitmap, tile_counts

try:
    from mosaic_kernels import _C_cuda
except ImportError as error:
    _IMPORT_ERROR: str | None = f"the module _C_cuda was not built or did not load ({error})"
else:
    _IMPORT_ERROR = None

__all__ = ["KERNELS", "TileGroup", "why_not"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# From here on the weight is unpacked into scratch memory and cuBLAS multiplies; at 16 rows the decode
# kernel reads the packed weight twice, about the bytes of the dense one.
_MAX_DECODE_ROWS = 16
# The same for the tile bitmap, whose kernel reads the weight once for every 64 rows.
_MAX_TILE_ROWS = 64

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


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


def _where(tensor: Tensor) -> tuple[int, int]:
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
        _DTYPES[x.dtype],
        *_where(x),
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
        _DTYPES[values.dtype],
        *_where(values),
    )
    return weight


def _unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    bitmask = bitmask.contiguous()
    words, offsets = words_from_bits(bitmask), row_offsets(bitmask)
    return _unpack_words(values.contiguous(), words, offsets, in_features)


def _pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    rows, columns = weight.shape
    words = weight.new_empty((rows, bitmask_words(columns)), dtype=torch.int32)
    counts = weight.new_empty(rows, dtype=torch.int64)
    offsets = weight.new_zeros(rows + 1, dtype=torch.int64)
    shape_and_where = (rows, columns, _DTYPES[weight.dtype], *_where(weight))
    mask = 0 if keep is None else keep.data_ptr()
    _C_cuda.pack_bits(weight.data_ptr(), 0, words.data_ptr(), counts.data_ptr(), 0, mask, *shape_and_where)
    torch.cumsum(counts, 0, out=offsets[1:])
    values = weight.new_empty(int(offsets[-1]))  # the one wait: the result's size is on the device
    _C_cuda.pack_values(
        weight.data_ptr(), values.data_ptr(), words.data_ptr(), 0, offsets.data_ptr(), 0, *shape_and_where
    )
    return values, words.view(torch.uint8)[:, : bitmask_bytes(columns)].contiguous()


def _workspace(device: torch.device, stream: int) -> Tensor:
    """What blocks of one launch hand each other; one for each stream, as torch keeps for cuBLAS.

    Made at a stream's first launch and kept: its counters are zero before and after every launch.
    """
    found = _workspaces.get((device, stream))
    if found is None:
        size = _C_cuda.linear_workspace_bytes(device.index)
        found = _workspaces[device, stream] = torch.zeros(size, dtype=torch.uint8, device=device)
    return found


class TileGroup:
    """Products of one ``x`` with several weights in tile bitmap form, ready for one launch.

    Args:
        parts: at most four weights with the same ``in_features`` and dtype, and the bias of each.
    """

    def __init__(self, parts: Sequence[tuple[TileBitmap, Tensor | None]]) -> None:
        self._parts = [(part, None if bias is None else bias.detach().contiguous()) for part, bias in parts]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """``x [..., in_features]``, of which up to 64 rows are meant; the results in the order of the parts."""
        columns = self._parts[0][0].shape[1]
        if x.shape[-1] != columns:
            raise KernelError(f"x has {x.shape[-1]} features but this projection takes {columns}")
        x = _aligned(x)
        results, rows = [], []
        for part, bias in self._parts:
            if x.dtype is not part.values.dtype or (bias is not None and bias.dtype is not x.dtype):
                raise KernelError(f"x is {x.dtype} but the packed values are {part.values.dtype}")
            if not x.device == part.values.device == part.tiles.device:
                raise KernelError(f"x is on {x.device} but the packed values are on {part.values.device}")
            out = x.new_empty((*x.shape[:-1], part.shape[0]))
            results.append(out)
            rows.append((
                part.tiles.data_ptr(), part.offsets.data_ptr(), part.values.data_ptr(),
                0 if bias is None else bias.data_ptr(), out.data_ptr(), part.shape[0], part.largest_tile,
            ))  # fmt: skip
        device, stream = _where(x)
        work = _workspace(x.device, stream)
        _C_cuda.linear_decode(
            rows, x.data_ptr(), x.shape[:-1].numel(), x.shape[-1], _DTYPES[x.dtype],
            work.data_ptr(), work.numel(), device, stream,
        )  # fmt: skip
        return results


def _aligned(x: Tensor) -> Tensor:
    """``x`` with rows that begin at multiples of 16 bytes, which the copies need; zeros behind the last feature."""
    spare = -x.shape[-1] % UNIT
    if spare:
        return F.pad(x, (0, spare))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _tile_linear(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    largest_tile: int,
) -> Tensor:
    if x.shape[:-1].numel() > _MAX_TILE_ROWS:
        return F.linear(x, expand_tiles(tiles, offsets, values, out_features, in_features), bias)
    part = TileBitmap(tiles, offsets, values, (out_features, in_features), 0, largest_tile)
    return TileGroup([(part, bias)])(x)[0]


def _pack_tiles(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    rows, columns = weight.shape
    down, across = tile_counts(rows, columns)
    tiles = weight.new_empty((down, across, TILE_WORDS), dtype=torch.int32)
    offsets = weight.new_zeros(down * across + 1, dtype=torch.int32)
    source = weight.data_ptr(), 0 if keep is None else keep.data_ptr(), tiles.data_ptr()
    shape_and_where = (rows, columns, _DTYPES[weight.dtype], *_where(weight))
    _C_cuda.pack_tile_bits(*source, 0, 0, *shape_and_where)
    torch.cumsum(tiles[:, :, 2].reshape(-1), 0, dtype=torch.int32, out=offsets[1:])
    values = weight.new_empty(UNIT * (int(offsets[-1]) & 0xFFFFFFFF))
    _C_cuda.pack_tile_values(*source, offsets.data_ptr(), values.data_ptr(), *shape_and_where)
    # A product may start to read weights before the kernel ahead of it has ended (csrc/cuda/stream.cuh), so
    # the last one that writes them ends here.
    torch.cuda.current_stream(weight.device).synchronize()
    return tiles, offsets, values


KERNELS: dict[str, Callable[..., Any]] = {
    "sparse_linear": _sparse_linear,
    "tile_linear": _tile_linear,
    "pack_tiles": _pack_tiles,
    "expand_tiles": expand_tiles,
    "pack": _pack,
    "unpack": _unpack,
}

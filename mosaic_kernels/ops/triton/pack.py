# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking: bits and counts in one pass, the kept values in a second."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels.format import bitmask_bytes
from mosaic_kernels.ops.triton.tiles import TILE, Tiles, launch, tile_places


@triton.jit
def _bits_kernel(weight, keep, bits, counts, rows, columns, row_bytes, in_a_row,
                 HAS_KEEP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The bits of a tile, a byte for every 8 neighbours, and how many are set. Reads the weight and the mask once."""
    tile = tl.program_id(0)
    start, place, _, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    kept = tl.load(weight + start + place, mask=inside, other=0.0).to(tl.float32) != 0.0  # true of NaN
    if HAS_KEEP:
        kept &= tl.load(keep + start + place, mask=inside, other=0) != 0
    ones = kept.to(tl.int32)
    tl.store(counts + tile, tl.sum(ones, axis=0))
    eights = tl.reshape(ones, (SIZE // 8, 8)) << tl.arange(0, 8)[None, :]
    start, place, _, inside = tile_places(tile, rows, row_bytes, in_a_row, SIZE // 8, WIDTH // 8)
    tl.store(bits + start + place, tl.sum(eights, axis=1).to(tl.uint8), mask=inside)


@triton.jit
def _kept(tile, bits, rows, columns, row_bytes, in_a_row, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Ones and zeros from the bits of a tile; a row's bits past its last column count for nothing."""
    lane = tl.arange(0, SIZE)
    row = (tile // in_a_row).to(tl.int64) * (SIZE // WIDTH) + lane // WIDTH
    column = (tile % in_a_row) * WIDTH + lane % WIDTH
    byte = tl.load(bits + row * row_bytes + column // 8, mask=(row < rows) & (column < columns), other=0)
    return (byte.to(tl.int32) >> (column % 8)) & 1


@triton.jit
def _count_kernel(bits, counts, rows, columns, row_bytes, in_a_row, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.program_id(0)
    tl.store(counts + tile, tl.sum(_kept(tile, bits, rows, columns, row_bytes, in_a_row, SIZE, WIDTH), axis=0))


@triton.jit
def _values_kernel(weight, values, bits, ends, counts, rows, columns, row_bytes, in_a_row,
                   UNPACK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Move a tile's values to their places after those of all tiles before it, or back."""
    tile = tl.program_id(0)
    kept = _kept(tile, bits, rows, columns, row_bytes, in_a_row, SIZE, WIDTH)
    packed = values + (tl.load(ends + tile) - tl.load(counts + tile)) + (tl.cumsum(kept, axis=0) - kept)
    start, place, _, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    if UNPACK:
        tl.store(weight + start + place, tl.load(packed, mask=kept != 0, other=0), mask=inside)
    else:
        tl.store(packed, tl.load(weight + start + place, mask=kept != 0), mask=kept != 0)


def pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    rows, columns = weight.shape
    bits = weight.new_empty((rows, bitmask_bytes(columns)), dtype=torch.uint8)
    tiles = Tiles.of(rows, columns)
    if not tiles.programs:
        return weight.new_empty(0), bits
    weight = weight.contiguous()
    counts = weight.new_empty(tiles.programs, dtype=torch.int32)
    shape = (rows, columns, bits.shape[1], tiles.in_a_row)
    mask = bits if keep is None else keep.contiguous().view(torch.uint8)
    meta: Any = {"SIZE": TILE, "WIDTH": tiles.width}
    launch(_bits_kernel, (tiles.programs,), weight, mask, bits, counts, *shape, HAS_KEEP=keep is not None, **meta)
    ends = counts.cumsum(0)
    values = weight.new_empty(int(ends[-1]))  # the one wait: the result's size is on the device
    launch(_values_kernel, (tiles.programs,), weight, values, bits, ends, counts, *shape, UNPACK=False, **meta)
    return values, bits


def unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    rows = bitmask.shape[0]
    weight = values.new_empty((rows, in_features))
    tiles = Tiles.of(rows, in_features)
    if tiles.programs:
        bitmask, values = bitmask.contiguous(), values.contiguous()
        counts = bitmask.new_empty(tiles.programs, dtype=torch.int32)
        shape = (rows, in_features, bitmask.shape[1], tiles.in_a_row)
        meta: Any = {"SIZE": TILE, "WIDTH": tiles.width}
        launch(_count_kernel, (tiles.programs,), bitmask, counts, *shape, **meta)
        ends = counts.cumsum(0)
        launch(_values_kernel, (tiles.programs,), weight, values, bitmask, ends, counts, *shape, UNPACK=True, **meta)
    return weight

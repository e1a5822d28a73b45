# SPDX-License-Identifier: Apache-2.0
"""Sums and counts over a weight's scores, and over activations; partial results are added in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels.ops.triton.tiles import TILE, Tiles, launch, tile_places

_SUMMED_ROWS = 512  # activations that one program sums: its partial result is then 1/64 of the bf16 bytes it read
_SUMMED_COLUMNS = 128


@triton.jit
def scores_of(weight, norms, start, place, column, inside):
    """Wanda's scores in fp32, made where they are needed; zero outside."""
    magnitude = tl.abs(tl.load(weight + start + place, mask=inside, other=0.0).to(tl.float32))
    return magnitude * tl.load(norms + column, mask=inside, other=0.0)


@triton.jit
def _sum_kernel(weight, norms, sums, rows, columns, in_a_row, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.program_id(0)
    start, place, column, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    scores = scores_of(weight, norms, start, place, column, inside)
    tl.store(sums + tile, tl.sum(scores.to(tl.float64), axis=0))


@triton.jit
def _count_kernel(weight, norms, thresholds, threshold_count, counts, rows, columns, in_a_row,
                  SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Scores above each threshold: the tile stays in registers while the thresholds pass by."""
    tile = tl.program_id(0)
    start, place, column, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    scores = scores_of(weight, norms, start, place, column, inside)
    for which in range(threshold_count):
        above = inside & (scores > tl.load(thresholds + which))
        tl.store(counts + tl.num_programs(0).to(tl.int64) * which + tile, tl.sum(above.to(tl.int32), axis=0))


@triton.jit
def _square_sums_kernel(x, sums, rows, columns, chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of squares of COLUMNS features over ``chunk`` rows, ROWS at a time, all in fp64: x is read once."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * chunk
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for step in range(0, chunk, ROWS):
        row = first + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        found = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float64)
        total += found * found
    partial = sums + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(partial, tl.sum(total, axis=0), mask=column < columns)


def outlier_stats(weight: Tensor, column_norms: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The operator of the same name, in two reads of the weight; see :mod:`mosaic_kernels.ops.reference`."""
    rows, columns = weight.shape
    tiles = Tiles.of(rows, columns)
    weight, norms = weight.contiguous(), column_norms.float().contiguous()
    sums = weight.new_empty(tiles.programs, dtype=torch.float64)
    shape = (rows, columns, tiles.in_a_row)
    meta: Any = {"SIZE": TILE, "WIDTH": tiles.width}
    if tiles.programs:
        launch(_sum_kernel, (tiles.programs,), weight, norms, sums, *shape, **meta)
    total = sums.sum()
    multiples = torch.tensor(alphas, dtype=torch.float64, device=weight.device)
    thresholds = (multiples * (total / max(1, weight.numel()))).float()
    counts = weight.new_empty((len(alphas), tiles.programs), dtype=torch.int32)
    if tiles.programs and alphas:
        launch(_count_kernel, (tiles.programs,), weight, norms, thresholds, len(alphas), counts, *shape, **meta)
    return total, counts.sum(1, dtype=torch.int64)


def column_square_sums(x: Tensor) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    x = x.flatten(0, -2).contiguous()
    rows, columns = x.shape
    grid = (-(-rows // _SUMMED_ROWS), -(-columns // _SUMMED_COLUMNS))
    partial = x.new_empty((grid[0], columns), dtype=torch.float64)
    if grid[0] and grid[1]:
        meta: Any = {"ROWS": 16, "COLUMNS": _SUMMED_COLUMNS}
        launch(_square_sums_kernel, grid, x, partial, rows, columns, _SUMMED_ROWS, **meta)
    return partial.sum(0)

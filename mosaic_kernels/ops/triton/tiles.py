# SPDX-License-Identifier: Apache-2.0
"""How the kernels that pass over a whole matrix divide it: tiles that follow each other as its elements do."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

TILE = 2048  # elements: 16 for each of 128 threads, two 16-byte loads of bf16


class Tiles(NamedTuple):
    """Tiles of a ``[rows, columns]`` matrix: one holds either a piece of one row or several whole rows.

    Either way its elements, and then the next tile's, are in row-major order, so that ranks among all
    elements are ranks in the tile plus a sum over the tiles before it.
    """

    programs: int
    in_a_row: int
    width: int

    @classmethod
    def of(cls, rows: int, columns: int) -> Tiles:
        width = min(TILE, max(8, triton.next_power_of_2(columns)))  # of whole bytes of the bitmask
        in_a_row = -(-columns // width)
        return cls(-(-rows // (TILE // width)) * in_a_row, in_a_row, width)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on a grid, which may be empty.

    Multiply-adds are fused whatever the release of Triton does by default, which is about to change.
    """
    if all(grid):
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


@triton.jit
def tile_places(tile, rows, columns, in_a_row, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile begins in its matrix, each element's distance from there and column, and whether it exists.

    The beginning is int64; the distance is int32: it spans a row's piece, or rows no wider than the tile.
    """
    lane = tl.arange(0, SIZE)
    first_row = (tile // in_a_row).to(tl.int64) * (SIZE // WIDTH)
    first_column = (tile % in_a_row) * WIDTH
    row, column = lane // WIDTH, first_column + lane % WIDTH
    inside = (first_row + row < rows) & (column < columns)
    return first_row * columns + first_column, row * columns + lane % WIDTH, column, inside

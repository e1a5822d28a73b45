# SPDX-License-Identifier: Apache-2.0
"""The tile bitmap: its order, its padding, and the way back."""

from __future__ import annotations

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import tiles as tiles_module
from mosaic_kernels.errors import FormatError
from mosaic_kernels.tiles import GROUP, HEAD_UNITS, HEADER_WORDS, TILE_WORDS, UNIT, TileBitmap

SHAPES = [(0, 5), (5, 0), (1, 1), (16, 64), (64, 64), (65, 130), (200, 72), (63, 1000)]


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).to(dtype)


def heads(tiles: TileBitmap, step: int) -> torch.Tensor:
    """Headers and bits of a step: ``int32 [2, 132]``."""
    first = UNIT * int(tiles.offsets[step])
    return tiles.tiles[first : first + UNIT * HEAD_UNITS].view(torch.int32).view(GROUP, TILE_WORDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_the_way_there_and_back(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    weight = sparse(*shape, density, dtype)
    packed = mk.pack(weight)
    tiles = TileBitmap.from_packed(packed)
    assert tiles.nnz == packed.nnz
    assert torch.equal(tiles.to_dense(), weight)
    again = tiles.to_packed()
    assert torch.equal(again.values, packed.values)
    assert torch.equal(again.bitmask, packed.bitmask)
    assert torch.equal(tiles.tiles.view(torch.int16), TileBitmap.from_dense(weight).tiles.view(torch.int16))


def test_bits_are_where_the_mma_reads_them() -> None:
    """One weight at a time, against the register layout of mma.m16n8k16 (PTX ISA, matrix fragments for m16n8k16)."""
    for row, column in [(0, 0), (1, 0), (0, 1), (8, 0), (0, 8), (15, 63), (7, 23), (33, 17), (64, 70)]:
        weight = torch.zeros(128, 128, dtype=torch.bfloat16)
        weight[row, column] = 1
        tiles = TileBitmap.from_dense(weight)
        words = heads(tiles, column // 64)[row // 64, HEADER_WORDS:].view(4, 32)
        strip, i, j = row % 64 // 16, row % 16, column % 64
        lane, register = 4 * (i % 8) + j % 8 // 2, i // 8 + 2 * (j % 16 // 8)
        word, bit = 2 * (4 * (j // 16) + register) + lane // 16, 16 * (lane % 16 // 8) + 8 * (j % 2) + lane % 8
        assert words.nonzero().tolist() == [[strip, word]]
        assert int(words[strip, word]) & 0xFFFFFFFF == 1 << bit


def test_stored_zeros_stay_and_strips_are_padded() -> None:
    keep = torch.zeros(64, 64, dtype=torch.bool)
    keep[0, :9] = keep[20, 5] = True
    tiles = TileBitmap.from_dense(torch.zeros(64, 64, dtype=torch.float16), keep)
    assert tiles.nnz == 10
    assert len(tiles.tiles) == UNIT * (HEAD_UNITS + 3)
    assert tiles.largest_step == HEAD_UNITS + 3
    assert heads(tiles, 0)[:, :4].tolist() == [[2 << 16, 3 | 3 << 16, 3, 10], [3 | 3 << 16, 3 | 3 << 16, 0, 0]]
    assert torch.equal(tiles.keep(), keep)
    assert tiles.to_packed().nnz == 10


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(300, 100, 0.4)
    whole = TileBitmap.from_dense(weight)
    monkeypatch.setattr(tiles_module, "_BYTES_AT_ONCE", 1)
    banded = TileBitmap.from_dense(weight)
    assert torch.equal(whole.tiles.view(torch.int16), banded.tiles.view(torch.int16))
    assert torch.equal(whole.offsets, banded.offsets)
    assert (whole.nnz, whole.largest_step) == (banded.nnz, banded.largest_step)


def test_size() -> None:
    weight = sparse(512, 512, 0.5)
    assert TileBitmap.from_dense(weight).nbytes <= 1.02 * mk.pack(weight).nbytes


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(FormatError, match="bf16 or fp16"):
        TileBitmap.from_dense(torch.eye(4))

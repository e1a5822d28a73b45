# SPDX-License-Identifier: Apache-2.0
"""The tile bitmap, which the tensor-core kernels of a GPU read, in plain torch: its specification.

A weight is cut into tiles of 64 x 64, a tile into four strips of 16 rows, and a strip's 1024 bits are in the
order in which a warp holds operand A of ``mma.m16n8k16`` (``csrc/include/mosaic/format.h`` says which bit is
whose). Two tiles, one under the other, are a step: the headers and bits of both, then the values of both, in one
stretch of memory that a kernel fetches with one copy. Each strip's values are padded with zeros to whole units of 8.
Rows and columns past the weight's are zero bits, so any shape has this form.

It takes 1/8 of a byte for each weight's bit as the canonical form does, 36 bytes for each step's headers and
offset, and up to 7 values of padding for each strip (1 % of a tile of half its weights); and a tile of zeros,
528 bytes, for each column of tiles where the tiles down are odd in number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosaic_kernels.errors import FormatError
from mosaic_kernels.format import PackedWeight, bits_to_mask, mask_to_bits

TILE = 64  # rows and columns of a tile
STRIPS = 4  # of a tile, 16 rows each
STRIP_BITS = TILE * TILE // STRIPS
# int32: each strip's first unit among the step's values, two uint16 a word; the tile's units; its kept weights
HEADER_WORDS = 4
TILE_WORDS = HEADER_WORDS + TILE * TILE // 32
UNIT = 8  # values that a copy of 16 bytes moves
GROUP = 2  # tiles of a step
HEAD_UNITS = GROUP * TILE_WORDS * 4 // 16  # of a step's headers and bits
TILE_DTYPES = (torch.bfloat16, torch.float16)

_BYTES_AT_ONCE = 1 << 28  # what packing may use beside its result


def tile_counts(rows: int, columns: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-rows // TILE), -(-columns // TILE)


def step_counts(rows: int, columns: int) -> tuple[int, int]:
    """Steps down and across."""
    down, across = tile_counts(rows, columns)
    return -(-down // GROUP), across


def to_strips(matrix: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[row tiles, column tiles, 4, 1024]`` in the order of the bits, zeros past the edges."""
    rows, columns = matrix.shape
    down, across = tile_counts(rows, columns)
    if (rows, columns) != (down * TILE, across * TILE):
        padded = matrix.new_zeros(down * TILE, across * TILE)
        padded[:rows, :columns] = matrix
        matrix = padded
    # rows: tile, strip, lower half, lane / 4;  columns: tile, step of 16, right half, lane % 4, which of two
    split = matrix.view(down, STRIPS, 2, 8, across, 4, 2, 4, 2)
    return split.permute(0, 4, 1, 5, 6, 2, 3, 7, 8).reshape(down, across, STRIPS, STRIP_BITS)


def from_strips(strips: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`to_strips`."""
    down, across = strips.shape[:2]
    split = strips.view(down, across, STRIPS, 4, 2, 2, 8, 4, 2)
    return split.permute(0, 2, 5, 6, 1, 3, 4, 7, 8).reshape(down * TILE, across * TILE)[:rows, :columns]


def _step_strips(matrix: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[steps down, steps across, 8, 1024]`` in the order of the values."""
    rows, columns = matrix.shape
    down, across = step_counts(rows, columns)
    if rows != down * GROUP * TILE:
        padded = matrix.new_zeros(down * GROUP * TILE, columns)
        padded[:rows] = matrix
        matrix = padded
    strips = to_strips(matrix).view(down, GROUP, across, STRIPS, STRIP_BITS)
    return strips.transpose(1, 2).reshape(down, across, GROUP * STRIPS, STRIP_BITS)


def _from_step_strips(strips: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`_step_strips`."""
    down, across = strips.shape[:2]
    tiles = strips.view(down, across, GROUP, STRIPS, STRIP_BITS).transpose(1, 2)
    return from_strips(tiles.reshape(down * GROUP, across, STRIPS, STRIP_BITS), rows, columns)


def _bit_order(bits: Tensor) -> Tensor:
    """Bits in the order of the values to their order in words: of each 8 lanes the first weights, then the second."""
    return bits.view(*bits.shape[:-1], STRIP_BITS // 16, 8, 2).transpose(-1, -2).reshape(bits.shape)


def _value_order(bits: Tensor) -> Tensor:
    """Inverse of :func:`_bit_order`."""
    return bits.view(*bits.shape[:-1], STRIP_BITS // 16, 2, 8).transpose(-1, -2).reshape(bits.shape)


@dataclass(frozen=True)
class TileBitmap:
    """A sparse ``[out_features, in_features]`` weight in tile bitmap form.

    Attributes:
        tiles: ``[8 * offsets[-1]]``, bf16 or fp16: step by step, ``int32 [2, 132]`` headers and bits and the values.
        offsets: where each step begins, in units of 16 bytes, ``int32 [steps + 1]``, read as unsigned.
        shape: ``(out_features, in_features)``.
        nnz: kept weights, padding not among them.
        largest_step: units of the longest step: what a kernel has to make room for.
    """

    tiles: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    nnz: int
    largest_step: int

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor | None = None) -> TileBitmap:
        """Of ``weight [out_features, in_features]``, the weights where ``keep`` (bool) is set; or those not zero.

        Raises:
            FormatError: the weight is not a 2-D bf16 or fp16 tensor.
        """
        if weight.dim() != 2 or weight.dtype not in TILE_DTYPES:
            raise FormatError(f"tiles hold 2-D bf16 or fp16 weights, got {weight.dtype} {list(weight.shape)}")
        rows, columns = weight.shape
        across = step_counts(rows, columns)[1]
        group = GROUP * TILE
        band = group * max(1, _BYTES_AT_ONCE // (16 * group * max(1, across * TILE)))  # rows, 16 bytes a weight
        bands = [
            _pack_band(weight[first : first + band], None if keep is None else keep[first : first + band])
            for first in range(0, rows, band)
        ]
        tiles, units = weight.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=weight.device)
        if bands:
            tiles, units = torch.cat([b[0] for b in bands]), torch.cat([b[1] for b in bands])
        return cls(tiles, offsets_of(units), (rows, columns), sum(b[2] for b in bands), largest_of(units))

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> TileBitmap:
        """Of a canonical weight; stored zeros stay stored."""
        keep = bits_to_mask(packed.bitmask, packed.shape[1])
        weight = packed.values.new_zeros(packed.shape)
        weight[keep] = packed.values
        return cls.from_dense(weight, keep)

    def keep(self) -> Tensor:
        """Which weights are stored: bool ``[out_features, in_features]``."""
        return _from_step_strips(self._bits(self._heads()), *self.shape)

    def to_dense(self) -> Tensor:
        """The dense weight."""
        heads = self._heads()
        bits = self._bits(heads)
        down, across = bits.shape[:2]
        pairs = heads[..., :2].to(torch.int64)
        begins = torch.stack([pairs & 0xFFFF, pairs >> 16 & 0xFFFF], dim=-1).view(down, across, GROUP * STRIPS)
        begins = begins + (self._first().view(down, across, 1) + HEAD_UNITS)
        places = UNIT * begins.unsqueeze(-1) + bits.cumsum(-1, dtype=torch.int16) - 1
        strips = self.tiles.new_zeros(bits.shape)
        strips[bits] = self.tiles[places[bits]]
        return _from_step_strips(strips, *self.shape)

    def _first(self) -> Tensor:
        """The first unit of each step."""
        return self.offsets[:-1].to(torch.int64) & 0xFFFFFFFF

    def _heads(self) -> Tensor:
        """Headers and bits: ``int32 [steps down, steps across, 2, 132]``."""
        places = self._first().view(*step_counts(*self.shape), 1) + torch.arange(HEAD_UNITS, device=self.offsets.device)
        heads = self.tiles.view(-1, UNIT)[places].view(torch.int32)
        return heads.view(*places.shape[:2], GROUP, TILE_WORDS)

    def _bits(self, heads: Tensor) -> Tensor:
        """:meth:`keep` in the order of the values, ``[steps down, steps across, 8, 1024]``."""
        down, across = heads.shape[:2]
        words = heads[..., HEADER_WORDS:].reshape(down * across * GROUP, TILE_WORDS - HEADER_WORDS)
        bits = bits_to_mask(words.view(torch.uint8), TILE * TILE)
        return _value_order(bits.view(down, across, GROUP * STRIPS, STRIP_BITS))

    def to_packed(self) -> PackedWeight:
        """The canonical form: the same weights, bit for bit."""
        keep = self.keep()
        return PackedWeight(self.to_dense()[keep], mask_to_bits(keep), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.tiles.nbytes + self.offsets.nbytes

    def detach(self) -> TileBitmap:
        """The same memory, outside of autograd."""
        return replace(self, tiles=self.tiles.detach())


def offsets_of(units: Tensor) -> Tensor:
    """The offsets of steps of so many units of 16 bytes."""
    offsets = torch.zeros(units.numel() + 1, dtype=torch.int64, device=units.device)
    torch.cumsum(units, 0, out=offsets[1:])
    return offsets.to(torch.int32)


def largest_of(units: Tensor) -> int:
    """``largest_step`` of steps of so many units."""
    return int(units.max()) if units.numel() else 0


def _pack_band(weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Steps, the units of each and the number of kept weights of whole rows of steps."""
    kept = _step_strips(weight != 0 if keep is None else keep)
    down, across = kept.shape[:2]
    counts = kept.sum(-1, dtype=torch.int64)
    ends = (-(-counts // UNIT)).cumsum(-1)
    begins = ends - -(-counts // UNIT)  # of each strip in its step
    units = ends[..., -1] + HEAD_UNITS
    first = (units.view(-1).cumsum(0) - units.view(-1)).view(down, across, 1)
    pairs = begins.view(down, across, GROUP, 2, 2)
    of_tile = counts.view(down, across, GROUP, STRIPS)
    header = torch.cat(
        [
            pairs[..., 0] | pairs[..., 1] << 16,
            (-(-of_tile // UNIT)).sum(-1, keepdim=True),
            of_tile.sum(-1, keepdim=True),
        ],
        dim=-1,
    )
    bits = mask_to_bits(_bit_order(kept).view(down * across * GROUP, TILE * TILE)).view(torch.int32)
    heads = torch.cat([header.to(torch.int32), bits.view(down, across, GROUP, TILE_WORDS - HEADER_WORDS)], dim=-1)
    tiles = weight.new_zeros(int(units.sum()), UNIT)
    places = first + torch.arange(HEAD_UNITS, device=weight.device)
    tiles[places] = heads.view(down, across, GROUP * TILE_WORDS).view(weight.dtype).view(*places.shape, UNIT)
    tiles = tiles.view(-1)
    at = kept.cumsum(-1, dtype=torch.int16) + (UNIT * (first + HEAD_UNITS + begins) - 1).unsqueeze(-1)
    tiles[at[kept]] = _step_strips(weight)[kept]
    return tiles, units.view(-1), int(counts.sum())

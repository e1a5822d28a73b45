# SPDX-License-Identifier: Apache-2.0
"""The tile bitmap, which the tensor-core kernels of a GPU read, in plain torch: its specification.

A weight is cut into tiles of 64 x 64, a tile into four strips of 16 rows, and a strip's 1024 bits are in the
order in which a warp holds operand A of ``mma.m16n8k16`` (``csrc/include/mosaic/format.h`` says which bit is
whose). A tile's values follow the order of its bits; each strip's are padded with zeros to whole units of 8
values. Rows and columns past the weight's are zero bits, so any shape has this form.

It takes 1/8 of a byte for each weight's bit as the canonical form does, 20 bytes for each tile's header and
offset, and up to 7 values of padding for each strip (14 on an H200's 4.6 KB tile of half its weights: 1 %).
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
HEADER_WORDS = 4  # int32: each strip's first unit as two uint16 a word, the tile's units, its kept weights
TILE_WORDS = HEADER_WORDS + TILE * TILE // 32
UNIT = 8  # values that a copy of 16 bytes moves
TILE_DTYPES = (torch.bfloat16, torch.float16)

_BYTES_AT_ONCE = 1 << 28  # what packing may use beside its result


def tile_counts(rows: int, columns: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-rows // TILE), -(-columns // TILE)


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


@dataclass(frozen=True)
class TileBitmap:
    """A sparse ``[out_features, in_features]`` weight in tile bitmap form.

    Attributes:
        tiles: headers and bits, ``int32 [row tiles, column tiles, 132]``.
        offsets: where each tile's values begin, in units of 8 values, ``int32 [tiles + 1]``, read as unsigned.
        values: ``[8 * offsets[-1]]``, bf16 or fp16.
        shape: ``(out_features, in_features)``.
        nnz: kept weights, padding not among them.
        largest_tile: units of the tile with most values: what a kernel has to make room for.
    """

    tiles: Tensor
    offsets: Tensor
    values: Tensor
    shape: tuple[int, int]
    nnz: int
    largest_tile: int

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor | None = None) -> TileBitmap:
        """Of ``weight [out_features, in_features]``, the weights where ``keep`` (bool) is set; or those not zero.

        Raises:
            FormatError: the weight is not a 2-D bf16 or fp16 tensor.
        """
        if weight.dim() != 2 or weight.dtype not in TILE_DTYPES:
            raise FormatError(f"tiles hold 2-D bf16 or fp16 weights, got {weight.dtype} {list(weight.shape)}")
        rows, columns = weight.shape
        down, across = tile_counts(rows, columns)
        band = TILE * max(1, _BYTES_AT_ONCE // (16 * TILE * max(1, across * TILE)))  # rows, about 16 bytes a weight
        bands = [
            _pack_band(weight[first : first + band], None if keep is None else keep[first : first + band])
            for first in range(0, rows, band)
        ]
        tiles = weight.new_zeros((0, across, TILE_WORDS), dtype=torch.int32)
        values = weight.new_zeros(0)
        if bands:
            tiles, values = torch.cat([b[0] for b in bands]), torch.cat([b[1] for b in bands])
        units = tiles[:, :, 2].reshape(-1)
        offsets = torch.zeros(down * across + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(units, 0, out=offsets[1:])
        return cls(
            tiles,
            offsets.to(torch.int32),
            values,
            (rows, columns),
            sum(b[2] for b in bands),
            int(units.max()) if units.numel() else 0,
        )

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> TileBitmap:
        """Of a canonical weight; stored zeros stay stored."""
        keep = bits_to_mask(packed.bitmask, packed.shape[1])
        weight = packed.values.new_zeros(packed.shape)
        weight[keep] = packed.values
        return cls.from_dense(weight, keep)

    def keep(self) -> Tensor:
        """Which weights are stored: bool ``[out_features, in_features]``."""
        return from_strips(self._bits(), *self.shape)

    def to_dense(self) -> Tensor:
        """The dense weight."""
        bits = self._bits()
        down, across = self.tiles.shape[:2]
        first = self.offsets[:-1].to(torch.int64).view(down, across, 1) & 0xFFFFFFFF
        pairs = self.tiles[:, :, :2].to(torch.int64)
        begins = first + torch.stack([pairs & 0xFFFF, pairs >> 16 & 0xFFFF], dim=-1).view(down, across, STRIPS)
        places = UNIT * begins.unsqueeze(-1) + bits.cumsum(-1, dtype=torch.int16) - 1
        strips = self.values.new_zeros(bits.shape)
        strips[bits] = self.values[places[bits]]
        return from_strips(strips, *self.shape)

    def _bits(self) -> Tensor:
        """:meth:`keep` in the order of :func:`to_strips`."""
        words = self.tiles[:, :, HEADER_WORDS:].reshape(-1, TILE_WORDS - HEADER_WORDS)
        return bits_to_mask(words.view(torch.uint8), TILE * TILE).view(*self.tiles.shape[:2], STRIPS, STRIP_BITS)

    def to_packed(self) -> PackedWeight:
        """The canonical form: the same weights, bit for bit."""
        keep = self.keep()
        return PackedWeight(self.to_dense()[keep], mask_to_bits(keep), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return self.tiles.nbytes + self.offsets.nbytes + self.values.nbytes

    def detach(self) -> TileBitmap:
        """The same memory, outside of autograd."""
        return replace(self, tiles=self.tiles.detach(), values=self.values.detach())


def _pack_band(weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Tiles, values and the number of kept weights of whole rows of tiles."""
    kept = to_strips(weight != 0 if keep is None else keep)
    down, across = kept.shape[:2]
    counts = kept.sum(-1, dtype=torch.int64)
    units = -(-counts // UNIT)
    ends = units.cumsum(-1)
    begins = ends - units  # of each strip in its tile
    first = ends[..., -1].reshape(-1).cumsum(0).view(down, across) - ends[..., -1]
    header = torch.zeros(down, across, HEADER_WORDS, dtype=torch.int64, device=weight.device)
    header[..., 0] = begins[..., 0] | begins[..., 1] << 16
    header[..., 1] = begins[..., 2] | begins[..., 3] << 16
    header[..., 2] = ends[..., -1]
    header[..., 3] = counts.sum(-1)
    bits = (
        mask_to_bits(kept.view(down * across, TILE * TILE))
        .view(torch.int32)
        .view(down, across, TILE_WORDS - HEADER_WORDS)
    )
    places = kept.cumsum(-1, dtype=torch.int16) + (UNIT * (first.unsqueeze(-1) + begins) - 1).unsqueeze(-1)
    values = weight.new_zeros(UNIT * int(ends[..., -1].sum()))
    values[places[kept]] = to_strips(weight)[kept]
    return torch.cat([header.to(torch.int32), bits], dim=-1), values, int(counts.sum())

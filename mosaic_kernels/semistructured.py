# SPDX-License-Identifier: Apache-2.0
"""2:4 weights as the sparse tensor cores of a GPU read them, in plain torch: the layout's specification.

Of every quad (four neighbouring columns of a row, the first a multiple of 4) such a weight keeps at most two.
It is cut into tiles of 64 x 64, a tile into four strips of 16 rows, and a strip is 1024 bytes of values and 128
of 2-bit indices in the order in which a warp holds the operands of ``mma.sp.m16n8k32``
(``csrc/include/mosaic/format.h`` says which is whose): 9/8 byte for each weight, wherever the zeros are. Rows
and columns past the weight's are padding, so any shape has this form.

A quad that keeps fewer than two weights is filled up with the value -0.0, which changes no sum. A stored zero is
written as 0.0 whatever its sign, so it stays stored; this alone keeps the canonical form from coming back bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosaic_kernels.errors import FormatError
from mosaic_kernels.format import PackedWeight, bits_to_mask, mask_to_bits, nibble_counts
from mosaic_kernels.tiles import STRIPS, TILE, TILE_DTYPES, tile_counts

QUAD = 4
VALUE_WORDS = 256  # int32 of a strip: two steps of 32 columns x 32 lanes x 4 registers of two values
INDEX_WORDS = 32  # a lane each, 8 quads of 4 bits
TWO_OF_FOUR_WORDS = STRIPS * (VALUE_WORDS + INDEX_WORDS)  # of a tile: 4608 bytes

_PADDING = -0x8000  # the bits of -0.0 in bf16 and fp16, as int16
_BYTES_AT_ONCE = 1 << 28  # what packing may use beside its result

# A band's quads, [rows, columns / 4], by dimension: 0 row tile, 1 strip, 2 lower half, 3 lane / 4; 4 column tile,
# 5 step of 32, 6 right half of it, 7 lane % 4. Values lie by step, lane and register (right half, lower half);
# indices by lane (step and right half say which of four), in a lane's word by lower half and quad.
_VALUE_ORDER = (0, 4, 1, 5, 3, 7, 6, 2)
_INDEX_ORDER = (0, 4, 1, 3, 5, 6, 2, 7)


def _index_codes() -> list[int]:
    """Of each choice of at most two columns, a bit each: ``first | second << 2``, where ``first < second``."""
    codes = []
    for bits in range(1 << QUAD):
        kept = [column for column in range(QUAD) if bits >> column & 1]
        free = [column for column in range(QUAD) if not bits >> column & 1]
        first, second = sorted((kept + free)[:2])
        codes.append(first | second << 2)
    return codes


def is_two_of_four(bitmask: Tensor) -> bool:
    """Whether no quad of a canonical ``bitmask`` keeps more than two weights (waits for the device)."""
    counts = nibble_counts(bitmask)
    return not bool((((counts & 0x0F) > 2) | ((counts >> 4) > 2)).any())


@dataclass(frozen=True)
class TwoOfFour:
    """A 2:4 sparse ``[out_features, in_features]`` weight in 2:4 tiles.

    Attributes:
        tiles: ``int32 [row tiles, column tiles, 1152]``.
        shape: ``(out_features, in_features)``.
        dtype: of the values, bf16 or fp16.

    Raises:
        FormatError: a dtype or shape is another.
    """

    tiles: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        expected = [*tile_counts(*self.shape), TWO_OF_FOUR_WORDS]
        if self.tiles.dtype != torch.int32 or list(self.tiles.shape) != expected:
            raise FormatError(
                f"the 2:4 tiles of a {self.shape[0]}x{self.shape[1]} weight are int32 {expected}, "
                f"got {self.tiles.dtype} {list(self.tiles.shape)}"
            )
        if self.dtype not in TILE_DTYPES:
            raise FormatError(f"2:4 tiles hold bf16 or fp16 values, not {self.dtype}")

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor | None = None) -> TwoOfFour:
        """Of ``weight [out_features, in_features]``, the weights where ``keep`` (bool) is set; or those not zero.

        Raises:
            FormatError: the weight is not a 2-D bf16 or fp16 tensor, or keeps more than two of a quad.
        """
        if weight.dim() != 2 or weight.dtype not in TILE_DTYPES:
            raise FormatError(f"2:4 tiles hold 2-D bf16 or fp16 weights, got {weight.dtype} {list(weight.shape)}")
        rows, columns = weight.shape
        down, across = tile_counts(rows, columns)
        tiles = weight.new_empty((down, across, TWO_OF_FOUR_WORDS), dtype=torch.int32)
        band = max(1, _BYTES_AT_ONCE // (16 * TILE * TILE * max(1, across)))  # row tiles, about 16 bytes a weight
        for first in range(0, down, band):
            part = slice(first * TILE, (first + band) * TILE)
            kept = weight[part] != 0 if keep is None else keep[part]
            tiles[first : first + band] = _pack_band(weight[part].view(torch.int16), kept, first * TILE)
        return cls(tiles, (rows, columns), weight.dtype)

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> TwoOfFour:
        """Of a canonical weight; stored zeros stay stored.

        Raises:
            FormatError: the values are not bf16 or fp16, or it keeps more than two of a quad.
        """
        keep = bits_to_mask(packed.bitmask, packed.shape[1])
        weight = packed.values.new_zeros(packed.shape)
        weight[keep] = packed.values
        return cls.from_dense(weight, keep)

    def keep(self) -> Tensor:
        """Which weights are stored: bool ``[out_features, in_features]``."""
        return self._bits() != _PADDING

    def to_dense(self) -> Tensor:
        """The dense weight."""
        bits = self._bits()
        return bits.masked_fill_(bits == _PADDING, 0).view(self.dtype)

    def to_packed(self) -> PackedWeight:
        """The canonical form: the same weights; a stored -0.0 has become 0.0."""
        bits = self._bits()
        keep = bits != _PADDING
        return PackedWeight(bits[keep].view(self.dtype), mask_to_bits(keep), self.shape)

    def _bits(self) -> Tensor:
        """The weights as int16, padding where none is stored."""
        down, across = self.tiles.shape[:2]
        strips = self.tiles.view(down, across, STRIPS, VALUE_WORDS + INDEX_WORDS)
        values = strips[..., :VALUE_WORDS].reshape(down, across, STRIPS, 2, 8, 4, 2, 2)
        pairs = _restore(values, _VALUE_ORDER).unsqueeze(-1).view(torch.int16)  # [rows, quads, 2]
        codes = strips[..., VALUE_WORDS:].contiguous().view(torch.uint8)
        codes = torch.stack([codes & 0x0F, codes >> 4], -1).view(down, across, STRIPS, 8, 2, 2, 2, 4)
        indices = _restore(codes, _INDEX_ORDER)
        first, second = indices & 3, indices >> 2
        quads = [
            torch.where(first == i, pairs[..., 0], torch.where(second == i, pairs[..., 1], _PADDING))
            for i in range(QUAD)
        ]
        rows, columns = self.shape
        return torch.stack(quads, -1).flatten(1)[:rows, :columns].contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles."""
        return self.tiles.nbytes

    def detach(self) -> TwoOfFour:
        """The same memory, outside of autograd."""
        return replace(self, tiles=self.tiles.detach())


def _restore(tiled: Tensor, order: tuple[int, ...]) -> Tensor:
    """``[rows, quads]`` of what lies by tile in ``order``."""
    back = tiled.permute([order.index(dimension) for dimension in range(len(order))])
    down, across = tiled.shape[:2]
    return back.reshape(down * TILE, across * TILE // QUAD)


def _pack_band(bits: Tensor, keep: Tensor, first_row: int) -> Tensor:
    """Tiles of whole rows of tiles; ``bits [rows, columns]`` are the weights as int16."""
    rows, columns = bits.shape
    down, across = tile_counts(rows, columns)
    padded = bits.new_full((down * TILE, across * TILE), _PADDING)
    padded[:rows, :columns] = torch.where(keep, bits.masked_fill(bits == _PADDING, 0), _PADDING)
    kept = (padded != _PADDING).view(down * TILE, across * TILE // QUAD, QUAD)
    crowded = kept.sum(-1, dtype=torch.uint8) > 2
    if bool(crowded.any()):
        row, quad = (int(i) for i in crowded.nonzero()[0])
        raise FormatError(
            f"not a 2:4 weight: of columns {QUAD * quad} to {QUAD * quad + 3} of row {first_row + row} "
            f"it keeps {int(kept[row, quad].sum())}"
        )

    choice = mask_to_bits(kept.flatten(0, 1)).view(down * TILE, across * TILE // QUAD)
    codes = torch.tensor(_index_codes(), dtype=torch.uint8, device=bits.device)[choice.to(torch.int32)]
    first, second = codes & 3, codes >> 2
    columns_of = padded.view(kept.shape).unbind(-1)
    low = torch.where(first == 0, columns_of[0], torch.where(first == 1, columns_of[1], columns_of[2]))
    high = torch.where(second == 1, columns_of[1], torch.where(second == 2, columns_of[2], columns_of[3]))

    split = (down, STRIPS, 2, 8, across, 2, 2, 4)
    values = torch.stack([low, high], -1).view(torch.int32).view(split).permute(_VALUE_ORDER)
    nibbles = codes.view(split).permute(_INDEX_ORDER).reshape(down, across, STRIPS, 4 * INDEX_WORDS, 2)
    indices = (nibbles[..., 0] | nibbles[..., 1] << 4).view(torch.int32)
    strips = torch.cat([values.reshape(down, across, STRIPS, VALUE_WORDS), indices], -1)
    return strips.view(down, across, TWO_OF_FOUR_WORDS)

# SPDX-License-Identifier: Apache-2.0
"""The form in which a layer holds its weight, where its device reads another faster than the canonical one."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.format import PackedWeight, bits_to_mask
from mosaic_kernels.ops import cuda
from mosaic_kernels.ops.select import forced
from mosaic_kernels.semistructured import TwoOfFour, is_two_of_four
from mosaic_kernels.tiles import TILE_DTYPES, TileBitmap, largest_of

# Of the kept share from which 2:4 tiles take no more bytes than the tile bitmap's: 9/8 byte a weight, not 1/8 and 2
# for each kept one. They need no decoding besides.
TWO_OF_FOUR_DENSITY = 0.5
_SLACK = 0.02  # zeros that a 2:4 weight happens to keep

Arrangement = TileBitmap | TwoOfFour


def arrange(packed: PackedWeight) -> Arrangement | None:
    """``packed`` in the form that the kernels of its device read fastest; ``None``: that is the canonical one.

    Needs, for as long as it runs, the dense weight and its mask besides: 3 bytes for each weight.
    """
    if packed.values.dtype not in TILE_DTYPES or 0 in packed.shape or not takes_tiles(packed.values.device):
        return None
    keep, weight = bits_to_mask(packed.bitmask, packed.shape[1]), ops.unpack(packed)
    if packed.density >= TWO_OF_FOUR_DENSITY - _SLACK and is_two_of_four(packed.bitmask):
        return TwoOfFour(torch.ops.mosaic.pack_two_of_four(weight, keep), packed.shape, weight.dtype)
    tiles, offsets = torch.ops.mosaic.pack_tiles(weight, keep)
    return TileBitmap(tiles, offsets, packed.shape, packed.nnz, largest_of(offsets.diff()))


def tensors_of(arranged: Arrangement) -> tuple[Tensor, Tensor]:
    """What a layer holds as its ``weight`` (floats) and its ``bitmask``: all of the memory but a tile's offsets."""
    floats = arranged.tiles if isinstance(arranged, TileBitmap) else arranged.tiles.view(arranged.dtype)
    return floats, arranged.tiles.new_empty(0, dtype=torch.int32)


def takes_tiles(device: torch.device) -> bool:
    """Whether tensor-core kernels run on ``device``."""
    return device.type == "cuda" and forced() in (None, "cuda") and cuda.why_not() is None

# SPDX-License-Identifier: Apache-2.0
"""The form in which a layer holds its weight, where its device reads another faster than the canonical one."""

from __future__ import annotations

import torch

from mosaic_kernels import ops
from mosaic_kernels.format import PackedWeight, bits_to_mask
from mosaic_kernels.ops import cuda
from mosaic_kernels.ops.select import forced
from mosaic_kernels.tiles import TILE_DTYPES, TileBitmap


def arrange(packed: PackedWeight) -> TileBitmap | None:
    """``packed`` in the form that the kernels of its device read fastest; ``None``: that is the canonical one.

    Needs, for as long as it runs, the dense weight and its mask besides: 3 bytes for each weight.
    """
    if packed.values.dtype not in TILE_DTYPES or 0 in packed.shape or not takes_tiles(packed.values.device):
        return None
    keep = bits_to_mask(packed.bitmask, packed.shape[1])
    tiles, offsets, values = torch.ops.mosaic.pack_tiles(ops.unpack(packed), keep)
    return TileBitmap(tiles, offsets, values, packed.shape, packed.nnz, int(tiles[:, :, 2].max()))


def takes_tiles(device: torch.device) -> bool:
    """Whether tensor-core kernels run on ``device``."""
    return device.type == "cuda" and forced() in (None, "cuda") and cuda.why_not() is None

# SPDX-License-Identifier: Apache-2.0
"""Finds values that no undamaged checkpoint holds: NaN, Inf, and packed zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_kernels.errors import FormatError, NonFiniteError

# The integer type of a value's bits, and the bits of infinity. Without its sign, NaN has larger bits than infinity,
# every finite value has smaller ones, and zero has the smallest.
_BITS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
# Values that are checked together: their bits fit into the second-level cache. One pass over 2^18 values finds zeros
# and NaN at 5 to 7 GB/s; count_nonzero and aminmax of all values take 2 GB/s (bf16 and fp16, one thread, Dec 2026).
_CHUNK = 1 << 18
_AGAIN = "copy or download the checkpoint again"


def check_values(name: str, values: Tensor, *, packed: bool, stored: str) -> None:
    """Refuse NaN and Inf, and where ``values`` are packed also zeros, which packing never stores.

    Args:
        name: of the tensor, for the message.
        values: of any shape and dtype; only fp32, bf16 and fp16 are checked.
        packed: ``values`` are the kept weights of a projection, in the dtype in which the file holds them.
        stored: safetensors' name of the dtype in the file, for the message.

    Raises:
        NonFiniteError: values are NaN or infinite; the message names the tensor and how many.
        FormatError: packed values are zero.
    """
    if values.dtype not in _BITS or not values.numel() or values.is_meta:
        return
    smallest, largest = _extremes(values)
    if largest >= _BITS[values.dtype][1]:
        count = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(
            f"{name}: {count} of {values.numel()} values are NaN or Inf in {str(values.dtype)[6:]}; the file holds "
            f"{stored} values: {_AGAIN}, or load it in the dtype in which it is stored"
        )
    if packed and smallest == 0:
        zeros = values.numel() - int(torch.count_nonzero(values))
        raise FormatError(
            f"{name}: {zeros} of {values.numel()} packed values are zero, which packing never stores: the file is "
            f"damaged; {_AGAIN}"
        )


def _extremes(values: Tensor) -> tuple[int, int]:
    """The smallest and the largest bits of ``values`` without their signs."""
    whole, infinity = _BITS[values.dtype]
    bits = values.detach().contiguous().view(-1).view(whole)
    sign = torch.iinfo(whole).max
    chunks = torch.split(bits, _CHUNK if values.is_cpu else len(bits))
    room = torch.empty_like(chunks[0])
    smallest, largest = infinity, 0
    for chunk in chunks:
        low, high = torch.bitwise_and(chunk, sign, out=room[: len(chunk)]).aminmax()
        smallest, largest = min(smallest, int(low)), max(largest, int(high))
    return smallest, largest

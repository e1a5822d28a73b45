# SPDX-License-Identifier: Apache-2.0
"""Packed weights with int8 values: a quarter of fp32's bytes, half of bf16's."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.errors import KernelError, NonFiniteError
from mosaic_kernels.format import GROUP_COLUMNS, PackedWeight, scale_counts, scale_groups


def quantize(weight: PackedWeight | Tensor, group: int | None = None) -> PackedWeight:
    """Round the kept weights to int8, symmetrically: absmax / 127 of a row or group is one step.

    The pattern stays as it is: a kept weight that rounds to 0 is still stored, so counts stay exact. A
    row or group that keeps nothing, or only zeros, has scale 0.

    Args:
        weight: packed with fp32, bf16 or fp16 values, or dense ``[out_features, in_features]``, whose
            zeros are packed away first.
        group: ``None`` for one scale a row, 64 for one every 64 columns.

    Returns:
        The packed weight; ``unpack`` gives its fp32 form, off by half a scale at most.

    Raises:
        KernelError: another group, or the weight is not a float one.
        NonFiniteError: a kept weight is NaN or infinite.

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> packed = mk.quantize(torch.tensor([[0.0, 127.0, -63.6], [2.54, 0.0, 0.0]]))
        >>> packed.values.tolist(), packed.bitmask.tolist()
        ([127, -64, 127], [[6], [1]])
    """
    if group not in (None, GROUP_COLUMNS):
        raise KernelError(f"scales are per row (None) or per {GROUP_COLUMNS} columns, not per {group}")
    packed = ops.pack(weight) if isinstance(weight, Tensor) else weight
    if packed.scales is not None:
        raise KernelError("the packed values are int8 already")
    packed.validate()
    columns = packed.shape[1]
    counts = scale_counts(packed.bitmask, scale_groups(columns, group))
    values = packed.values.detach().float()
    largest = torch.segment_reduce(values.abs(), "max", lengths=counts.flatten(), initial=0, unsafe=True)
    if not bool(torch.isfinite(largest).all()):
        raise NonFiniteError("quantize: kept weights are NaN or Inf; check the weight")
    scales = largest / 127
    # a scale that underflows leaves no steps, and one that nearly does is so coarse that quotients pass 127
    steps = scales.repeat_interleave(counts.flatten(), output_size=values.numel())
    rounded = torch.where(steps > 0, values / steps, 0).round_().clamp_(-127, 127).to(torch.int8)
    return PackedWeight(rounded, packed.bitmask, packed.shape, scales.view_as(counts))

# SPDX-License-Identifier: Apache-2.0
"""What a pruned model keeps dense, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import forced, is_recorded


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose few-row products on a CPU with AVX-512 run at the speed of memory.

    What a pruned model keeps dense (its head, and projections without zeros) would otherwise take most of
    a decode step: torch's ``F.linear`` reads a bf16 weight at half the machine's bandwidth. Parameters,
    ``state_dict`` and gradients are those of ``nn.Linear``.
    """

    # Up to here the kernel was 1.2 to 2.3x as fast as F.linear (11008x4096 and 2048x2048 bf16, one and two
    # threads, Zen 4, Nov 2026); at 64 rows they are equal.
    MAX_ROWS = 32

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            cpu.DENSE_ROWS
            and forced() in (None, "cpu")
            and input.is_cpu
            and input.dtype is torch.bfloat16
            and weight.dtype is torch.bfloat16
            and input.shape[:-1].numel() <= self.MAX_ROWS
            and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            if is_recorded(input):  # by a compiler, which takes operators
                found: Tensor = torch.ops.mosaic.dense_linear(input, weight, self.bias)
                return found
            return cpu.dense_linear_raw(input, weight, self.bias)
        return super().forward(input)

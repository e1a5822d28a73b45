# SPDX-License-Identifier: Apache-2.0
"""What a pruned model keeps dense, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for


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
        if (
            input.is_cpu
            and input.dtype is torch.bfloat16
            and input.shape[:-1].numel() <= self.MAX_ROWS
            and not is_recorded(input)
            and not (torch.is_grad_enabled() and self.weight.requires_grad)
            and self.weight.dtype is torch.bfloat16
            and self.weight.is_contiguous()
            and cpu.has_dense_rows()
            and kernel_for("sparse_linear", input) is cpu.sparse_linear_raw
        ):
            return cpu.dense_linear_raw(input, self.weight, self.bias)
        return super().forward(input)

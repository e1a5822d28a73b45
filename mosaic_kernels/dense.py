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

    # Up to how many rows the kernel is faster. 1.9 to 2.0x as fast as F.linear at one row, 1.3 to 1.4x at 16, 1.0
    # to 1.1x at 32 (four bf16 shapes, two threads, Zen 4, Nov 2026; test_dense_rows of benchmarks/bench_linear.py).
    # With AMX 1.4 to 1.5x at one to four rows, 1.1 to 1.2x at 16, 1.2 to 1.3x at 64, 1.04 to 1.12x at 256 (four bf16
    # shapes, one thread; Xeon, Sapphire Rapids class, Dec 2026).
    MAX_ROWS = 256 if cpu.TILES else 32

    def forward(self, input: Tensor) -> Tensor:
        if not self._runs(input):
            return super().forward(input)
        if torch.compiler.is_compiling():  # a compiler takes operators
            found: Tensor = torch.ops.mosaic.dense_linear(input, self.weight, self.bias)
            return found
        return cpu.dense_linear_raw(input, self.weight, self.bias)

    def _runs(self, x: Tensor) -> bool:
        """Whether the kernel takes ``x`` here, and nothing but a compiler has to see what it does."""
        weight, bias = self.weight, self.bias
        if not (cpu.DENSE_ROWS and x.dtype is torch.bfloat16 and x.is_cpu and x.shape[:-1].numel() <= self.MAX_ROWS):
            return False
        for constant in (weight,) if bias is None else (weight, bias):
            if type(constant) is not nn.Parameter or constant.dtype is not torch.bfloat16 or not constant.is_cpu:
                return False
            if torch.is_grad_enabled() and constant.requires_grad:
                return False
        if forced() not in (None, "cpu") or (torch.is_grad_enabled() and x.requires_grad):
            return False
        return torch.compiler.is_compiling() or not is_recorded(x)

# SPDX-License-Identifier: Apache-2.0
"""The linear layers that a pruned model keeps dense, as fast as memory allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_kernels.device import is_slow
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import forced, is_recorded


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that uses this package's kernels where they are faster than torch's on a CPU.

    The kernels need AVX2. They are faster for up to :attr:`MAX_ROWS` rows of bf16: few rows run at the speed of memory,
    while torch's ``F.linear`` reads a bf16 weight at half that speed. With torch, the layers that a pruned model keeps
    dense (its head, and projections without zeros) would take most of a decode step. On processors where torch
    multiplies bf16 or fp16 slowly (:func:`~mosaic_kernels.device.has_fast_products` is false), the kernels multiply any
    number of rows: weights keep their dtype, and products are computed in fp32. Parameters, ``state_dict`` and
    gradients are those of ``nn.Linear``.
    """

    # Up to this many rows the kernel is faster than F.linear: 1.9 to 2.0x at one row, 1.3 to 1.4x at 16, 1.0 to 1.1x
    # at 32 (four bf16 shapes, two threads, Zen 4, Nov 2026; test_dense_rows of benchmarks/bench_linear.py). With AMX:
    # 1.4 to 1.5x at one to four rows, 1.1 to 1.2x at 16, 1.2 to 1.3x at 64, 1.04 to 1.12x at 256 (four bf16 shapes,
    # one thread; Xeon, Sapphire Rapids class, Dec 2026).
    MAX_ROWS = 256 if cpu.TILES else 32

    def forward(self, input: Tensor) -> Tensor:
        if why_not(self, input) is not None:
            if is_slow(input) and torch.is_grad_enabled() and self._is_trained(input):
                return self._widened(input)
            return super().forward(input)
        if torch.compiler.is_compiling():  # a compiler needs a registered operator
            found: Tensor = torch.ops.mosaic.dense_linear(input, self.weight, self.bias)
            return found
        return cpu.dense_linear_raw(input, self.weight, self.bias)

    def _is_trained(self, x: Tensor) -> bool:
        """True if all tensors have the dtype of ``x``, autocast does not change it, and one of them takes gradients."""
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not x.dtype:
            return False
        tensors = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return all(tensor.dtype is x.dtype for tensor in tensors) and any(tensor.requires_grad for tensor in tensors)

    def _widened(self, x: Tensor) -> Tensor:
        """Compute ``F.linear`` on fp32 copies and round the result to the dtype of ``x``.

        With bf16 and a 4096x4096 weight, one row takes 34 ms forwards and backwards instead of 138 ms, and 64 rows
        take 85 ms instead of 7.5 s. (One thread, Xeon, Sapphire Rapids class, limited to AVX2, Dec 2026)
        """
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


_NO_KERNEL = cpu.why_not() or "this instruction set has no dense kernel"


def why_not(layer: nn.Linear, x: Tensor) -> str | None:
    """The reason why ``F.linear`` has to multiply ``x``, or ``None`` if the kernel does.

    The kernel is no torch function: autograd, tracers and function transforms do not see its call, so ``F.linear`` runs
    where one of them has to. (A compiler gets a registered operator instead.) The reasons are constant strings because
    this runs at every call.
    """
    if not x.is_cpu:
        return "the device is not a CPU"
    if not cpu.DENSE_ROWS:
        return _NO_KERNEL
    if not is_slow(x):
        if x.dtype is not torch.bfloat16:
            return "torch multiplies this dtype as fast"
        if x.shape[:-1].numel() > DenseLinear.MAX_ROWS:
            return "so many rows torch multiplies as fast"
    weight, bias = layer.weight, layer.bias
    for constant in (weight,) if bias is None else (weight, bias):
        if type(constant) is not nn.Parameter:
            return "its weight or bias is no ordinary parameter"
        if constant.dtype is not x.dtype or not constant.is_cpu:
            return "its weight or bias is of another dtype or device than the input"
        if torch.is_grad_enabled() and constant.requires_grad:
            return "its weight or bias takes gradients"
    if forced() not in (None, "cpu"):
        return "another backend is forced"
    if torch.is_grad_enabled() and x.requires_grad:
        return "the input takes gradients"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is active"
    if not torch.compiler.is_compiling() and is_recorded(x):
        return "a tracer or a function transform has to see the call"
    return None

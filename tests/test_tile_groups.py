# SPDX-License-Identifier: Apache-2.0
"""Errors of a group of weights on the tensor cores that need no device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.ops import tensor_cores
from mosaic_kernels.tiles import TileBitmap


def sparse(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).bfloat16()


def test_what_does_not_fit_is_refused() -> None:
    group = tensor_cores.Group([(TileBitmap.from_dense(sparse(8, 16)), None)])
    with pytest.raises(KernelError, match="x has 15 features but this projection takes 16"):
        group(torch.zeros(1, 15).bfloat16())
    with pytest.raises(KernelError, match=r"x is torch.float16 but the packed values are torch.bfloat16"):
        group(torch.zeros(1, 16).half())
    with pytest.raises(KernelError, match="bias is"):
        tensor_cores.Group([(TileBitmap.from_dense(sparse(8, 16)), torch.zeros(8))])

# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device, against float64 on the CPU; skipped, with the reason, without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.ops import cuda, reference

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (rows, in, out): every register block of the kernel, odd widths, several steps of 1024 columns, and the dense path
SHAPES = [
    (0, 64, 3),
    (1, 1, 1),
    (1, 4096, 33),
    (2, 31, 7),
    (3, 1025, 9),
    (8, 64, 5),
    (16, 2050, 6),
    (33, 96, 40),
]


def sparse(out: int, columns: int, density: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(out, columns) * (torch.rand(out, columns) < density)).to(dtype).cuda()


def test_the_backend_is_built_and_runs() -> None:
    assert cuda.why_not() is None


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_linear(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    rows, columns, out = shape
    x, bias = torch.randn(rows, columns).to(dtype).cuda(), torch.randn(out).to(dtype).cuda()
    for density in (0.0, 0.5, 1.0):
        weight = sparse(out, columns, density, dtype)
        index, values = mk.pack(weight.cpu()).index(), weight[weight != 0]
        with ops.use_backend(backend):
            found = torch.ops.mosaic.sparse_linear(x, values, index.words.cuda(), index.offsets.cuda(), bias, columns)
        exact = x.double() @ weight.double().T + bias.double()
        scale = float((x.double().abs() @ weight.double().abs().T).norm() + bias.double().norm() * rows**0.5)
        limit = 2 * (torch.finfo(dtype).eps + columns**0.5 * torch.finfo(torch.float32).eps) * scale
        assert float((found.double() - exact).norm()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 257), (3, 4096)])
def test_pack_and_unpack(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = sparse(*shape, 0.5, dtype)
    packed = mk.pack(weight)
    values, bits = reference.pack(weight)
    assert torch.equal(packed.values, values)
    assert torch.equal(packed.bitmask, bits)
    assert torch.equal(mk.unpack(packed), weight)

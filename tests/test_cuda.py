# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device, against float64 on the CPU; skipped, with the reason, without one."""

from __future__ import annotations

import pytest
import torch
import triton_checks
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.ops import cuda, reference
from mosaic_kernels.ops import triton as triton_backend

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


@pytest.mark.parametrize("check", triton_checks.CHECKS)
def test_triton_is_the_reference(check: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    triton_checks.CHECKS[check]("cuda")


def test_every_operator_has_a_kernel_on_the_device() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert triton_backend.why_not() is None
    weight = sparse(64, 4096, 1.0, torch.bfloat16)
    with torch.cuda.device(0):
        mask = ops.score_select(weight, torch.ones(4096, device="cuda"), (2, 4), "group")
    assert mask.is_cuda
    assert int(mask.sum()) == weight.numel() // 2


def test_triton_indexes_beyond_two_to_the_31() -> None:
    """The last weights of a matrix of 2^31 and some: 4 GiB of bf16."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    weight = torch.zeros(65_537, 32_768, dtype=torch.bfloat16, device="cuda")
    weight[-1, -3:] = torch.tensor([1.0, -3.0, 2.0])
    ones = torch.ones(32_768, device="cuda")
    with ops.use_backend("triton"):
        values, bits = torch.ops.mosaic.pack(weight)
        assert values.tolist() == [1.0, -3.0, 2.0]
        assert bits[-1, -1] == 0b1110_0000
        assert torch.equal(torch.ops.mosaic.unpack(values, bits, 32_768)[-1], weight[-1])
        assert ops.outlier_stats(weight, ones, (5.0,)) == (6.0, [3])
        assert ops.column_square_sums(weight)[-3:].tolist() == [1.0, 9.0, 4.0]
        assert ops.score_select(weight, ones, 2)[-1, -3:].tolist() == [False, True, True]

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
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap

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


def two_of_four(out: int, columns: int, dtype: torch.dtype) -> Tensor:
    quads = torch.randn(out, columns // 4, 4)
    return quads.where(quads.abs().argsort(-1).argsort(-1) >= 2, 0).view(out, columns).to(dtype).cuda()


# (rows, in, out of each weight): every number of 8-row blocks, two launches, shared and whole rows of steps
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "outs"),
    [
        (1, 4096, [4096, 1024, 1024]),
        (5, 328, [200]),
        (16, 11008, [4096]),
        (32, 2048, [65, 33]),
        (64, 4096, [14336]),
        (70, 72, [130]),
    ],
)
def test_two_of_four_linear(rows: int, columns: int, outs: list[int], dtype: torch.dtype) -> None:
    from mosaic_kernels import _C_cuda

    x = torch.randn(rows, columns).to(dtype).cuda()
    weights = [two_of_four(out, columns, dtype) for out in outs]
    biases = [torch.randn(out).to(dtype).cuda() for out in outs]
    tiles = [TwoOfFour.from_dense(weight) for weight in weights]
    work = torch.zeros(_C_cuda.linear_workspace_bytes(0), dtype=torch.uint8, device="cuda:0")
    results = []
    for _ in range(2):
        found = [x.new_full((rows, out), float("nan")) for out in outs]
        parts = [
            (t.tiles.data_ptr(), 0, bias.data_ptr(), result.data_ptr(), t.shape[0], 0)
            for t, bias, result in zip(tiles, biases, found, strict=True)
        ]
        torch.cuda.synchronize()  # weights are read before the kernels ahead have ended
        _C_cuda.linear_2to4(
            parts, x.data_ptr(), rows, columns, cuda.DTYPES[dtype], work.data_ptr(), work.numel(),
            0, torch.cuda.current_stream(0).cuda_stream,
        )  # fmt: skip
        results.append(found)
    for weight, bias, result, again in zip(weights, biases, *results, strict=True):
        assert torch.equal(result, again)
        exact = x.double() @ weight.double().T + bias.double()
        scale = float((x.double().abs() @ weight.double().abs().T).norm() + bias.double().norm() * rows**0.5)
        limit = 2 * (torch.finfo(dtype).eps + columns**0.5 * torch.finfo(torch.float32).eps) * scale
        assert float((result.double() - exact).norm()) <= limit


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (65, 130), (100, 67), (4096, 4096)])
def test_two_of_four_packs_and_expands_on_the_device(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from mosaic_kernels import _C_cuda

    rows, columns = shape
    weight = two_of_four(rows, -(-columns // 4) * 4, dtype)[:, :columns].contiguous()
    tiles = TwoOfFour.from_dense(weight)
    assert torch.equal(tiles.tiles.cpu(), TwoOfFour.from_dense(weight.cpu()).tiles)
    assert torch.equal(tiles.to_dense(), weight)
    out = torch.full_like(weight, float("nan"))
    stream = torch.cuda.current_stream(0).cuda_stream
    _C_cuda.expand_2to4(tiles.tiles.data_ptr(), out.data_ptr(), rows, columns, 0, stream)
    assert torch.equal(out, weight)


def launch_prefill(x: Tensor, parts: list[tuple[TileBitmap, Tensor]], found: list[Tensor], work: Tensor) -> None:
    from mosaic_kernels import _C_cuda

    rows = [
        (t.tiles.data_ptr(), t.offsets.data_ptr(), bias.data_ptr(), out.data_ptr(), *size)
        for (t, bias), out in zip(parts, found, strict=True)
        for size in [(t.shape[0], t.largest_step)]
    ]
    _C_cuda.linear_prefill(
        rows, x.data_ptr(), len(x), x.shape[1], cuda.DTYPES[x.dtype], work.data_ptr(), work.numel(),
        0, torch.cuda.current_stream(0).cuda_stream,
    )  # fmt: skip


# Block tiles of either size, the last ones cut; few block tiles in long rows, which are sliced; several weights;
# outputs whose rows begin at multiples of 16 bytes and not; more block tiles than multiprocessors.
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, (1,)),
        (65, 200, (130,)),
        (130, 4096, (300, 65, 64)),
        (257, 72, (4097,)),
        (256, 4096, (4096, 1024, 1024)),
        (1000, 11008, (1000,)),
        (4096, 4096, (4096,)),
    ],
    ids=str,
)
def test_prefill(shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, density: float) -> None:
    from mosaic_kernels import _C_cuda

    if not _C_cuda.has_linear_prefill(0):
        pytest.skip("linear_prefill runs on compute capability 9.0 alone")
    rows, columns, outs = shape
    x = torch.randn(rows, columns).to(dtype).cuda()
    weights = [sparse(out, columns, density, dtype) for out in outs]
    parts = [(TileBitmap.from_dense(weight), torch.randn(len(weight)).to(dtype).cuda()) for weight in weights]
    work = torch.zeros(_C_cuda.linear_workspace_bytes(0), dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()  # weights are read before the kernels ahead have ended
    results = [[x.new_full((rows, out), float("nan")) for out in outs] for _ in range(2)]
    for found in results:
        launch_prefill(x, parts, found, work)
    for weight, (_, bias), result, again in zip(weights, parts, *results, strict=True):
        assert torch.equal(result, again)
        exact = x.double() @ weight.double().T + bias.double()
        size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        sums = 4 * columns**0.5 * torch.finfo(torch.float32).eps
        assert bool(((result.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + sums * size).all())


def test_prefill_in_a_graph() -> None:
    from mosaic_kernels import _C_cuda

    if not _C_cuda.has_linear_prefill(0):
        pytest.skip("linear_prefill runs on compute capability 9.0 alone")
    x, weight = torch.randn(200, 4096).bfloat16().cuda(), sparse(256, 4096, 0.5, torch.bfloat16)
    parts = [(TileBitmap.from_dense(weight), torch.zeros(256, dtype=torch.bfloat16, device="cuda:0"))]
    work = torch.zeros(_C_cuda.linear_workspace_bytes(0), dtype=torch.uint8, device="cuda:0")
    once, replayed = x.new_empty(200, 256), x.new_empty(200, 256)
    torch.cuda.synchronize()
    launch_prefill(x, parts, [once], work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_prefill(x, parts, [replayed], work)
    for _ in range(2):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, once)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (200, 1032), (4096, 4096)], ids=str)
def test_tiles_expand_on_the_device(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from mosaic_kernels import _C_cuda

    for density in (0.0, 0.5, 1.0):
        weight = sparse(*shape, density, dtype)
        tiles, last = TileBitmap.from_dense(weight), -(-shape[0] // 64)
        addresses = tiles.tiles.data_ptr(), tiles.offsets.data_ptr()
        for first, end in {(0, last), (last // 2, last)}:
            out = torch.full_like(weight[64 * first :], float("nan"))
            stream = torch.cuda.current_stream(0).cuda_stream
            _C_cuda.expand_tiles(*addresses, out.data_ptr(), *shape, first, end, 0, stream)
            assert torch.equal(out, weight[64 * first :])


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

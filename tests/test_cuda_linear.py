# SPDX-License-Identifier: Apache-2.0
"""MosaicLinear and the tile kernels on a CUDA device: values, graphs, streams, devices, compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels.ops import reference, tensor_cores
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap

pytestmark = pytest.mark.cuda

ROWS = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130]
SHAPES = [(1, 8), (64, 64), (200, 72), (33, 1000), (4096, 4096), (1000, 11008)]  # out, in


def dense(out: int, columns: int, density: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    linear = nn.Linear(columns, out, device="cuda").to(dtype).requires_grad_(False)
    linear.weight[torch.rand(out, columns, device="cuda") >= density] = 0
    return linear


def assert_close(found: Tensor, x: Tensor, linear: nn.Linear) -> None:
    """Against float64: fp32 sums of products that are exact in fp32, rounded once."""
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    size = x.double().abs() @ linear.weight.double().abs().T + linear.bias.double().abs()
    bound = (
        torch.finfo(found.dtype).eps * exact.abs() + 4 * linear.in_features**0.5 * torch.finfo(torch.float32).eps * size
    )
    assert bool(((found.double() - exact).abs() <= bound + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_values(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    linear = dense(*shape, density, dtype)
    layer = mk.MosaicLinear.from_linear(linear)
    assert isinstance(layer.arranged, TileBitmap)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        assert_close(layer(x), x, linear)


@pytest.mark.parametrize("columns", [1, 7, 30, 65])
def test_features_that_copies_cannot_take_whole(columns: int) -> None:
    linear = dense(100, columns)
    x = torch.randn(5, columns, device="cuda").bfloat16()
    assert_close(mk.MosaicLinear.from_linear(linear)(x), x, linear)


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (200, 72), (1000, 1030)], ids=str)
def test_tiles_are_those_of_the_reference(shape: tuple[int, int]) -> None:
    weight = dense(*shape).weight.detach()
    keep = torch.rand(shape, device="cuda") < 0.7
    for mask in (None, keep):
        found = torch.ops.mosaic.pack_tiles(weight, mask)
        for ours, theirs in zip(
            found, reference.pack_tiles(weight.cpu(), mask if mask is None else mask.cpu()), strict=True
        ):
            assert torch.equal(ours.cpu().view(torch.int16), theirs.view(torch.int16))
        assert torch.equal(torch.ops.mosaic.expand_tiles(*found, *shape), weight if mask is None else weight * mask)


@pytest.fixture
def cublas_sums_in_fp32() -> Iterator[None]:
    """By default it may add partial sums in bf16; it takes 2:4 weights for more than 64 rows."""
    options = torch.backends.cuda.matmul
    before = options.allow_bf16_reduced_precision_reduction
    options.allow_bf16_reduced_precision_reduction = False
    yield
    options.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_2_of_4(shape: tuple[int, int], cublas_sums_in_fp32: None) -> None:
    linear = dense(*shape, 1.0)
    linear.weight[:, 0::4] = linear.weight[:, 3::4] = 0
    layer = mk.MosaicLinear.from_linear(linear)
    assert isinstance(layer.arranged, TwoOfFour) is (shape[1] % 4 == 0)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device="cuda").bfloat16()
        assert_close(layer(x), x, linear)


def test_several_weights_in_one_launch() -> None:
    linears = [dense(out, 1024) for out in (1024, 200, 72)]
    group = tensor_cores.Group([(TileBitmap.from_dense(each.weight.detach()), each.bias) for each in linears])
    for rows in ROWS[:-2]:
        x = torch.randn(rows, 1024, device="cuda").bfloat16()
        for found, linear in zip(group(x), linears, strict=True):
            assert_close(found, x, linear)


def test_two_runs_are_bit_identical() -> None:
    linear = dense(1000, 8192)
    layer = mk.MosaicLinear.from_linear(linear)
    for rows in (1, 16, 64):
        x = torch.randn(rows, 8192, device="cuda").bfloat16()
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(50))


def test_inputs_that_are_not_contiguous() -> None:
    linear = dense(64, 512)
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(512, 6, device="cuda").bfloat16().T
    assert_close(layer(x), x, linear)
    shifted = torch.randn(4 * 512 + 3, device="cuda").bfloat16()[3:].view(4, 512)
    assert shifted.data_ptr() % 16
    assert_close(layer(shifted), shifted, linear)


def test_under_a_graph() -> None:
    linear = dense(512, 1024)
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(1, 1024, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(layer(x)[..., :1].expand(1, 1024) + x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, layer(layer(x)[..., :1].expand(1, 1024) + x))


def test_a_graph_on_a_stream_that_never_ran() -> None:
    linear = dense(512, 8192)
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(1, 8192, device="cuda").bfloat16()
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            outs.append(layer(x))
        graphs.append(graph)
    for graph, out in list(zip(graphs, outs, strict=True))[::-1]:  # the last one first
        graph.replay()
        assert_close(out, x, linear)


def test_on_two_streams_at_once() -> None:
    linear = dense(4096, 4096)
    layer = mk.MosaicLinear.from_linear(linear)
    xs = [torch.randn(4, 4096, device="cuda").bfloat16() for _ in range(2)]
    wanted = [layer(x) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(20):
        found = []
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one() -> None:
    linear = dense(256, 512)
    layer = mk.MosaicLinear.from_linear(linear).to("cuda:1")
    x = torch.randn(3, 512, device="cuda").bfloat16()
    assert torch.equal(layer(x.to("cuda:1")).cpu(), mk.MosaicLinear.from_linear(linear)(x).cpu())


def test_compiled() -> None:
    linear = dense(256, 512)
    layer = mk.MosaicLinear.from_linear(linear)
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, fullgraph=True)
    x = torch.randn(3, 512, device="cuda").bfloat16()
    assert torch.allclose(compiled(x), torch.relu(layer(x)) + 1, atol=1e-2)


def test_compiled_into_graphs() -> None:
    """Runs before the capture, the capture and replays; what each allocates, the next one's pool hands out again."""
    linear = dense(1000, 8192)
    layer = mk.MosaicLinear.from_linear(linear)
    factors = torch.randn(8192, 2048, device="cuda").bfloat16() / 64

    def run(x: Tensor) -> Tensor:
        return layer((x @ factors @ factors.T).relu())

    compiled = torch.compile(run, mode="reduce-overhead", fullgraph=True)
    for rows in (1, 300):
        for _ in range(5):
            x = torch.randn(rows, 8192, device="cuda").bfloat16()
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.allclose(compiled(x), run(x), rtol=0.05, atol=0.05)


def test_gradients_of_the_input() -> None:
    linear = dense(256, 512)
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(3, 512, device="cuda").bfloat16().requires_grad_()
    layer(x).sum().backward()
    wanted = torch.ones(3, 256, device="cuda").bfloat16() @ linear.weight
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted, rtol=2e-2, atol=2e-2)


def test_to_the_cpu_and_back() -> None:
    linear = dense(200, 136)
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(3, 136, device="cuda").bfloat16()
    there = copy.deepcopy(layer).cpu()
    assert there.arranged is None
    assert torch.equal(there.state_dict()["weight"], layer.state_dict()["weight"].cpu())
    assert torch.allclose(there(x.cpu()), layer(x).cpu(), rtol=1e-2, atol=1e-2)
    assert torch.equal(there.cuda()(x), layer(x))


def test_memory_is_that_of_the_packed_weight() -> None:
    linear = dense(4096, 4096)
    layer = mk.MosaicLinear.from_linear(linear)
    del linear
    torch.cuda.synchronize()
    held = layer.weight.nbytes + layer.bitmask.nbytes
    assert isinstance(layer.arranged, TileBitmap)
    assert held <= layer.arranged.nbytes <= 1.02 * (4096 * 4096 / 8 + 2 * layer.nnz)

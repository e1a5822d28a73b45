# SPDX-License-Identifier: Apache-2.0
"""Many rows of x on the tile bitmap, on an emulated GPU: the expansion bit for bit, the product against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from guarded import Guarded
from simt import CODES, DEVICE, Gpu
from test_cuda_kernels import HALF_DTYPES, Part, sparse, tile_linear, unwritten, workspace
from torch import Tensor

from mosaic_kernels.errors import BackendError, KernelError
from mosaic_kernels.tiles import TILE, TileBitmap

LARGEST_SHARED = 228 * 1024  # of compute capability 9.0


@pytest.fixture(autouse=True)
def _as_it_was(gpu: Gpu) -> None:
    gpu.limits(shared_bytes=LARGEST_SHARED)
    gpu.seed(0)


def expand(gpu: Gpu, weight: Tensor, first: int, last: int) -> Tensor:
    tiles = TileBitmap.from_dense(weight)
    memory = [Guarded(t) for t in (tiles.tiles, tiles.offsets)]
    rows, columns = weight.shape
    out = unwritten(min(rows, last * TILE) - first * TILE, columns, weight.dtype)
    gpu.module.expand_tiles(*[t.address for t in memory], out.address, rows, columns, first, last, DEVICE, 0)
    return out.read()


# one weight, part of a strip, of a tile, whole tiles; columns whose rows begin at multiples of 16 bytes and not
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (15, 63), (64, 64), (65, 72), (130, 129), (200, 136)], ids=str)
def test_expansion_is_exact(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for seed, density in enumerate((0.0, 0.03, 0.5, 1.0)):
        gpu.seed(seed)
        weight = sparse(*shape, density, dtype)
        assert torch.equal(expand(gpu, weight, 0, -(-shape[0] // TILE)), weight)


def test_expansion_of_some_row_tiles(gpu: Gpu) -> None:
    weight = sparse(200, 72, 0.5)
    for first, last in [(0, 1), (1, 3), (3, 4), (2, 2)]:
        assert torch.equal(expand(gpu, weight, first, last), weight[first * TILE : last * TILE])


def test_expansion_names_row_tiles_that_are_not_there(gpu: Gpu) -> None:
    for first, last in [(-1, 1), (0, 2)]:
        with pytest.raises(KernelError, match="no such row tiles"):
            gpu.module.expand_tiles(0, 0, 0, 64, 64, first, last, DEVICE, 0)


def prefill(gpu: Gpu, x: Tensor, parts: Sequence[Part], work: Guarded | None = None) -> list[Tensor]:
    return tile_linear(gpu, "linear_prefill", x, parts, work)


def assert_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Every element within fp32 sums of products that are exact in fp32, rounded once."""
    added = torch.zeros(len(weight)) if bias is None else bias
    exact = x.double() @ weight.double().T + added.double()
    size = x.double().abs() @ weight.double().abs().T + added.double().abs()
    eps, sums = torch.finfo(found.dtype).eps, 4 * x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= eps / 2 * exact.abs() + sums * size).all())


@pytest.fixture
def hopper(gpu: Gpu) -> Gpu:
    if gpu.arch != 90:
        pytest.skip("compute capability 9.0 alone has warpgroup products")
    return gpu


# One row, a few more than linear_decode takes, more than one block tile of either size; features: one, part of a
# strip, of a tile, a last group of one tile and of two, rows of the output at multiples of 16 bytes and not.
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 65, 128, 130, 257])
def test_product(hopper: Gpu, dtype: torch.dtype, rows: int) -> None:
    shapes = [(1, 8), (15, 64), (64, 72), (130, 200), (200, 128), (300, 136)]
    for seed, (out, columns) in enumerate(shapes):
        hopper.limits(multiprocessors=1 + (seed + rows) % 7, shared_bytes=LARGEST_SHARED)
        hopper.seed(seed)
        density = (0.5, 1.0, 0.03, 0.0)[(seed + rows) % 4]
        x, weight = torch.randn(rows, columns).to(dtype), sparse(out, columns, density, dtype)
        bias = torch.randn(out).to(dtype) if seed % 2 else None
        (found,) = prefill(hopper, x, [(weight, bias)])
        assert_product(found, x, weight, bias)


def test_block_tiles_in_more_than_one_band(hopper: Gpu) -> None:
    hopper.limits(multiprocessors=18, shared_bytes=LARGEST_SHARED)  # one wave of 9 x 2 block tiles
    x, weight = torch.randn(1100, 72).bfloat16(), sparse(200, 72, 0.5)
    (found,) = prefill(hopper, x, [(weight, None)])
    assert_product(found, x, weight, None)


@pytest.mark.parametrize("multiprocessors", [1, 3, 5])
def test_several_weights_in_one_launch(hopper: Gpu, multiprocessors: int) -> None:
    hopper.limits(multiprocessors=multiprocessors, shared_bytes=LARGEST_SHARED)
    for parts in [(130, 64, 7), (0, 72), (200, 300)]:
        weights = [sparse(out, 96, 0.5) for out in parts]
        biases = [None, *[torch.randn(out).bfloat16() for out in parts[1:]]]
        x = torch.randn(150, 96).bfloat16()
        for found, weight, bias in zip(
            prefill(hopper, x, [*zip(weights, biases, strict=True)]), weights, biases, strict=True
        ):
            assert_product(found, x, weight, bias)


def test_every_order_gives_the_same_bits(hopper: Gpu) -> None:
    x, weight = torch.randn(130, 200).bfloat16(), sparse(300, 200, 0.5)
    results = []
    for seed in range(4):
        hopper.limits(multiprocessors=2, shared_bytes=LARGEST_SHARED, resident_blocks=1 + seed % 2)
        hopper.seed(seed)
        results += prefill(hopper, x, [(weight, None)])
    assert_product(results[0], x, weight, None)
    assert all(torch.equal(result, results[0]) for result in results)


# block tiles of 128 rows of x, one and two of them, and of 256, which three multiprocessors share out evenly
@pytest.mark.parametrize(
    ("rows", "out", "columns", "multiprocessors"), [(65, 130, 1992, 16), (130, 130, 1992, 16), (130, 65, 6400, 3)]
)
def test_long_rows_are_sliced_where_block_tiles_are_few(
    hopper: Gpu, rows: int, out: int, columns: int, multiprocessors: int
) -> None:
    hopper.limits(multiprocessors=multiprocessors, shared_bytes=LARGEST_SHARED)
    x, weight, bias = torch.randn(rows, columns).bfloat16(), sparse(out, columns, 0.5), torch.randn(out).bfloat16()
    work = workspace(hopper)
    (found,) = prefill(hopper, x, [(weight, bias)], work)
    assert_product(found, x, weight, bias)
    used = work.read()
    counters = 4 * 16384
    assert not used[:counters].any(), "counters are zero again"
    assert used[counters:].any(), "slices left partial sums"
    # without room for partial sums there are no slices
    small = Guarded(torch.zeros(counters, dtype=torch.uint8))
    (whole,) = prefill(hopper, x, [(weight, bias)], small)
    assert_product(whole, x, weight, bias)


def test_what_it_refuses(gpu: Gpu) -> None:
    work, x = workspace(gpu), Guarded(torch.zeros(65, 12, dtype=torch.bfloat16))
    arguments = ([(0, 0, 0, 0, 0, 0)], x.address, 65, 12, CODES[torch.bfloat16], work.address, work.like.numel())
    if gpu.arch == 90:
        with pytest.raises(KernelError, match="multiples of 16 bytes"):
            gpu.module.linear_prefill(*arguments, DEVICE, 0)
    else:
        with pytest.raises(BackendError, match=r"compute capability 9\.0 alone"):
            gpu.module.linear_prefill(*arguments, DEVICE, 0)

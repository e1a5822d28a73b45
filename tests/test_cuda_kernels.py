# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/cuda on an emulated GPU: against float64, in many orders, between forbidden pages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from guarded import Guarded
from simt import CODES, DEVICE, Gpu
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import RowIndex
from mosaic_kernels.ops import reference
from mosaic_kernels.tiles import GROUP, HEAD_UNITS, TILE_WORDS, TileBitmap, offsets_of, step_counts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)

Part = tuple[Tensor, Tensor | None]  # weight, bias


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).to(dtype)


def unwritten(rows: int, columns: int, dtype: torch.dtype) -> Guarded:
    return Guarded(torch.full((rows, columns), float("nan"), dtype=dtype))


def assert_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what fp32 sums and one rounding may be off."""
    exact, scale = x.double() @ weight.double().T, float((x.double().abs() @ weight.double().abs().T).norm())
    if bias is not None:
        exact, scale = exact + bias.double(), scale + float(bias.double().norm()) * len(x) ** 0.5
    limit = 2 * (torch.finfo(x.dtype).eps + x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps) * scale
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm()) <= limit


def linear_rows(gpu: Gpu, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    packed = mk.pack(weight)
    index = packed.index()
    inputs = [Guarded(t) for t in (x, packed.values, index.words, index.offsets)]
    given_bias, out = Guarded(weight[:0] if bias is None else bias), unwritten(len(x), len(weight), x.dtype)
    gpu.module.linear_rows(
        *[t.address for t in inputs], 0 if bias is None else given_bias.address, out.address, len(x), x.shape[1],
        len(weight), packed.nnz, CODES[x.dtype], DEVICE, 0,
    )  # fmt: skip
    return out.read()


def workspace(gpu: Gpu) -> Guarded:
    return Guarded(torch.zeros(gpu.module.linear_workspace_bytes(DEVICE), dtype=torch.uint8))


def tile_linear(gpu: Gpu, name: str, x: Tensor, parts: Sequence[Part], work: Guarded | None = None) -> list[Tensor]:
    """What the kernel ``name`` makes of weights in tile bitmap form."""
    work, arguments, kept, outs = work or workspace(gpu), [], [], []
    for weight, bias in parts:
        tiles = TileBitmap.from_dense(weight)
        memory = [Guarded(t) for t in (tiles.tiles, tiles.offsets, *([] if bias is None else [bias]))]
        out = unwritten(len(x), len(weight), x.dtype)
        addresses = [t.address for t in memory] + [0] * (bias is None)
        arguments.append((*addresses, out.address, len(weight), tiles.largest_step))
        kept.append(memory)
        outs.append(out)
    given = Guarded(x)
    getattr(gpu.module, name)(
        arguments, given.address, len(x), x.shape[1], CODES[x.dtype], work.address, work.like.numel(), DEVICE, 0
    )
    return [out.read() for out in outs]


def linear_decode(gpu: Gpu, x: Tensor, parts: Sequence[Part], work: Guarded | None = None) -> list[Tensor]:
    return tile_linear(gpu, "linear_decode", x, parts, work)


@pytest.fixture(autouse=True)
def _as_it_was(gpu: Gpu) -> None:
    gpu.limits()
    gpu.seed(0)


# Every register block, odd widths, a single word, several steps of 1024 columns, rows that are not whole blocks.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 1025, 9), (2, 31, 7), (3, 33, 5), (4, 64, 4), (5, 66, 6), (8, 100, 3), (17, 2050, 2)],
    ids=str,
)
def test_linear_rows(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, out = shape
    for seed, density in enumerate((0.0, 0.03, 0.5, 1.0)):
        gpu.seed(seed)
        x, weight = torch.randn(rows, columns).to(dtype), sparse(out, columns, density, dtype)
        bias = torch.randn(out).to(dtype) if seed % 2 else None
        assert_product(linear_rows(gpu, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33, 64, 65])
def test_linear_decode(gpu: Gpu, dtype: torch.dtype, rows: int) -> None:
    # one feature, part of a strip, of a tile, whole ones, a last group of one tile and of two; columns likewise
    for seed, (out, columns) in enumerate([(1, 8), (15, 64), (64, 72), (130, 200), (200, 128)]):
        gpu.limits(multiprocessors=1 + (seed + rows) % 7)
        gpu.seed(seed)
        x, weight = torch.randn(rows, columns).to(dtype), sparse(out, columns, (0.5, 1.0, 0.03)[seed % 3], dtype)
        bias = torch.randn(out).to(dtype) if seed % 2 else None
        (found,) = linear_decode(gpu, x, [(weight, bias)])
        assert_product(found, x, weight, bias)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_linear_decode_of_any_part_of_a_group(gpu: Gpu, density: float) -> None:
    for seed, out in enumerate((2, 16, 17, 63, 65, 127, 128, 129, 192, 193)):
        gpu.seed(seed)
        columns = 8 * (1 + 5 * seed)
        x, weight = torch.randn(3, columns).bfloat16(), sparse(out, columns, density)
        assert_product(linear_decode(gpu, x, [(weight, None)])[0], x, weight, None)


@pytest.mark.parametrize("multiprocessors", range(1, 8))
def test_any_number_of_blocks_shares_the_steps(gpu: Gpu, multiprocessors: int) -> None:
    """Columns long enough that 14 blocks split them, shared memory for several stages, for one, and of one block."""
    x, weight, bias = torch.randn(5, 1000).bfloat16(), sparse(150, 1000, 0.5), torch.randn(150).bfloat16()
    for shared_bytes, resident in ((228 * 1024, 1), (100 * 1024, 4), (48 * 1024, 14)):
        gpu.limits(multiprocessors, shared_bytes, resident)
        gpu.seed(multiprocessors)
        assert_product(linear_decode(gpu, x, [(weight, bias)])[0], x, weight, bias)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_several_weights_in_one_launch(gpu: Gpu, parts: int) -> None:
    x = torch.randn(2, 328).half()
    for seed, outs in enumerate([(200, 65, 1, 64), (0, 129, 0, 7), (5, 5, 5, 5)]):
        gpu.limits(multiprocessors=2 + seed)
        gpu.seed(seed)
        given = [
            (sparse(out, 328, 0.2 * (p + 1), torch.float16), torch.randn(out).half()) for p, out in enumerate(outs)
        ]
        for found, (weight, bias) in zip(linear_decode(gpu, x, given[:parts]), given, strict=False):
            assert_product(found, x, weight, bias)


@pytest.mark.parametrize("rows", [1, 12, 70])
def test_the_order_of_the_blocks_changes_nothing(gpu: Gpu, rows: int) -> None:
    """One workspace for all launches: its counters are zero again after each."""
    gpu.limits(multiprocessors=4, shared_bytes=100 * 1024, resident_blocks=8)
    x, weight, work = torch.randn(rows, 520).bfloat16(), sparse(300, 520, 0.5), workspace(gpu)
    results = []
    for seed in range(12):
        gpu.seed(seed)
        results += linear_decode(gpu, x, [(weight, None)], work)
        assert not work.read()[: 4 * 16384].any()
    assert all(torch.equal(result, results[0]) for result in results)
    assert_product(results[0], x, weight, None)


def test_code_that_does_not_wait_is_not_launched_early(gpu: Gpu) -> None:
    """Code for sm_80, which a later device compiles anew: launching it refuses what lets it start early."""
    gpu.limits(major=9)
    x, weight = torch.randn(3, 520).bfloat16(), sparse(70, 520, 0.5)
    assert_product(linear_decode(gpu, x, [(weight, None)])[0], x, weight, None)


def test_what_a_decode_launch_refuses(gpu: Gpu) -> None:
    x, weight = torch.randn(1, 64).bfloat16(), sparse(64, 64, 0.5)
    with pytest.raises(KernelError, match="pad its features to a multiple of 8"):
        linear_decode(gpu, x[:, :60].contiguous(), [(weight[:, :60], None)])
    with pytest.raises(KernelError, match="1 to 4 weights"):
        linear_decode(gpu, x, [])
    with pytest.raises(KernelError, match="bf16 and fp16"):
        gpu.module.linear_decode([(0, 0, 0, 0, 64, 1)], 0, 1, 64, 0, 0, 1 << 40, DEVICE, 0)
    with pytest.raises(KernelError, match="workspace is too small"):
        linear_decode(gpu, x, [(weight, None)], Guarded(torch.zeros(16, dtype=torch.uint8)))
    gpu.limits(shared_bytes=8 * 1024)
    with pytest.raises(KernelError, match="shared memory is too small"):
        linear_decode(gpu, x, [(weight, None)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (4, 64), (9, 257)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_pack_and_unpack(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int], masked: bool) -> None:
    rows, columns = shape
    sizes = (rows, columns, CODES[dtype], DEVICE, 0)
    for seed, density in enumerate((0.0, 0.5, 1.0)):
        gpu.seed(seed)
        dense = sparse(rows, columns, density, dtype)
        keep = torch.rand(shape) < 0.7 if masked else None
        expected_values, expected_bits = reference.pack(dense, keep)
        index = RowIndex.from_bitmask(expected_bits)
        weight, mask = Guarded(dense), Guarded(torch.empty(0, dtype=torch.bool) if keep is None else keep)
        words, counts = Guarded(torch.full_like(index.words, -1)), Guarded(torch.full((rows,), -1))
        keep_address = 0 if keep is None else mask.address
        gpu.module.pack_bits(weight.address, 0, words.address, counts.address, 0, keep_address, *sizes)
        assert torch.equal(words.read(), index.words)
        assert torch.equal(counts.read(), index.offsets.diff())

        offsets, values = Guarded(index.offsets), Guarded(torch.full_like(expected_values, float("nan")))
        gpu.module.pack_values(weight.address, values.address, words.address, 0, offsets.address, 0, *sizes)
        assert torch.equal(values.read(), expected_values)

        again = unwritten(rows, columns, dtype)
        gpu.module.unpack(again.address, values.address, words.address, 0, offsets.address, 0, *sizes)
        assert torch.equal(again.read(), dense if keep is None else dense * keep)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (65, 130), (63, 40), (130, 72)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_pack_tiles(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int], masked: bool) -> None:
    rows, columns = shape
    for seed, density in enumerate((0.0, 0.03, 0.5, 1.0)):
        gpu.seed(seed)
        dense = sparse(rows, columns, density, dtype)
        keep = torch.rand(shape) < 0.5 if masked else None  # zeros that are kept are stored
        expected = TileBitmap.from_dense(dense, keep)
        weight, mask = Guarded(dense), Guarded(torch.empty(0, dtype=torch.bool) if keep is None else keep)
        bits = Guarded(torch.full((*step_counts(*shape), GROUP, TILE_WORDS), -1, dtype=torch.int32))
        offsets, tiles = Guarded(expected.offsets), Guarded(torch.full_like(expected.tiles, float("nan")))
        source = (weight.address, 0 if keep is None else mask.address, bits.address)
        sizes = (rows, columns, CODES[dtype], DEVICE, 0)
        gpu.module.pack_tile_bits(*source, 0, 0, *sizes)
        assert torch.equal(offsets_of(bits.read()[..., 2].sum(-1).view(-1) + HEAD_UNITS), expected.offsets)
        gpu.module.pack_tile_values(*source, offsets.address, tiles.address, *sizes)
        assert torch.equal(tiles.read().view(torch.int16), expected.tiles.view(torch.int16))


def test_devices_are_found(gpu: Gpu) -> None:
    assert gpu.module.why_not(0) is None
    assert gpu.module.why_not(1000) == "there is no such CUDA device"

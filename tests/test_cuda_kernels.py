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
from mosaic_kernels.tiles import TileBitmap

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


def linear_decode(gpu: Gpu, x: Tensor, parts: Sequence[Part], work: Guarded | None = None) -> list[Tensor]:
    work, arguments, kept, outs = work or workspace(gpu), [], [], []
    for weight, bias in parts:
        tiles = TileBitmap.from_dense(weight)
        memory = [Guarded(t) for t in (tiles.tiles, tiles.offsets, tiles.values, *([] if bias is None else [bias]))]
        out = unwritten(len(x), len(weight), x.dtype)
        addresses = [t.address for t in memory] + [0] * (bias is None)
        arguments.append((*addresses, out.address, len(weight), tiles.largest_tile))
        kept.append(memory)
        outs.append(out)
    given = Guarded(x)
    gpu.module.linear_decode(
        arguments, given.address, len(x), x.shape[1], CODES[x.dtype], work.address, work.like.numel(), DEVICE, 0
    )
    return [out.read() for out in outs]


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

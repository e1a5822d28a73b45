# SPDX-License-Identifier: Apache-2.0
"""Attention of one token to contexts of any length: ours against torch's, over keys and values that no cache holds.

    pytest benchmarks/bench_attend.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/attend-CPU.json

Torch's query heads that share a key head are the rows of one product, as ``mosaic_kernels.attention`` has it:
with ``enable_gqa=True`` it takes some ten times as long.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import attend
from measure import copies, record
from torch.nn.functional import scaled_dot_product_attention

# TinyLlama-1.1B, Qwen3-4B (its 128 a head), Qwen2.5-1.5B, and a model without shared heads.
HEADS = {"32/4x64": (32, 4, 64), "32/8x128": (32, 8, 128), "12/2x128": (12, 2, 128), "32/32x64": (32, 32, 64)}
TOKENS = (64, 512, 2048, 8192, 32768)
ROUNDS = 21


def measured(benchmark: Any, heads: str, tokens: int, dtype: torch.dtype) -> None:
    query_heads, key_heads, dim = HEADS[heads]
    shape, size = (key_heads, tokens, dim), 2 * key_heads * tokens * dim * dtype.itemsize
    torch.manual_seed(0)
    query, threads = torch.randn(query_heads, dim).to(dtype), torch.get_num_threads()
    one = [torch.randn(shape).to(dtype) for _ in range(2)]
    rotated = [[each.clone() for each in one] for _ in range(copies(size))]
    rows = query.view(1, key_heads, query_heads // key_heads, dim)

    def torchs(index: int) -> torch.Tensor:
        keys, values = rotated[index % len(rotated)]
        return scaled_dot_product_attention(rows, keys[None], values[None]).view(query_heads, dim)

    def ours(index: int) -> torch.Tensor:
        return attend(query, *rotated[index % len(rotated)], threads=threads)

    wanted = torchs(0).float()  # whose weights are rounded to the dtype, and whose result is; sums are in fp32
    bound = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (dim**0.5 + tokens**0.5)
    assert float((ours(0).float() - wanted).norm() / wanted.norm()) <= bound
    record(benchmark, {"torch": torchs, "ours": ours}, ROUNDS, tokens=tokens, heads=heads, dtype=str(dtype), bytes=size)
    info = benchmark.extra_info
    info["gb_per_s"] = size / info["ours"]["median_us"] / 1e3


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", HEADS)
def test_attend(benchmark: Any, heads: str, tokens: int) -> None:
    measured(benchmark, heads, tokens, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", ["32/4x64", "32/32x64"])
def test_other_dtypes(benchmark: Any, heads: str, dtype: torch.dtype) -> None:
    measured(benchmark, heads, 2048, dtype)

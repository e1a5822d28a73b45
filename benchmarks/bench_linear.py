# SPDX-License-Identifier: Apache-2.0
"""One linear layer: the row-bitmap kernel against torch's ``F.linear`` on the same dense weight.

    pytest benchmarks/bench_linear.py --benchmark-only --benchmark-json=benchmarks/results/linear-CPU.json

Weights rotate past the last cache; dense and sparse calls take turns; medians and their ratio are in
``extra_info``. Density is the share of weights kept.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import copies, interleaved, summary

import mosaic_kernels as mk

# (out_features, in_features): Llama-2-7B's up and down, Llama-3-8B's key, Qwen2.5-1.5B's up, and the two
# shapes of the example model, where the cost of a call weighs more than its bytes.
SHAPES = {
    "llama2-7b-up": (11008, 4096),
    "llama2-7b-down": (4096, 11008),
    "llama3-8b-key": (1024, 4096),
    "qwen2.5-1.5b-up": (8960, 1536),
    "tiny-up": (704, 256),
    "tiny-query": (256, 256),
}
ROWS = (1, 4, 16, 64)
DENSITIES = (0.5, 0.4, 0.3)


def _rounds(out: int, columns: int, rows: int) -> int:
    """Enough for a median and rough percentiles, in a few seconds."""
    return max(25, min(200, int(2e9 / (out * columns * max(1, rows)))))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(benchmark: Any, shape: str, rows: int, density: float) -> None:
    out, columns = SHAPES[shape]
    weight = torch.randn(out, columns) * columns**-0.5
    weight = (weight * (torch.rand(out, columns) < density)).bfloat16()
    x = torch.randn(rows, columns).bfloat16()
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    layers = [mk.MosaicLinear.from_packed(mk.pack(weight)) for _ in range(copies(mk.pack(weight).nbytes))]
    variants = {
        "dense": lambda i: F.linear(x, dense[i % len(dense)]),
        "sparse": lambda i: layers[i % len(layers)](x),
    }

    # A kernel that computes something else would be fast for nothing; bf16 rounds the result once.
    exact = x.double() @ weight.double().T
    assert float((layers[0](x).double() - exact).norm() / exact.norm()) <= torch.finfo(torch.bfloat16).eps

    @torch.no_grad()
    def run() -> dict[str, list[float]]:
        return interleaved(variants, _rounds(out, columns, rows))

    seconds = benchmark.pedantic(run, rounds=1)
    found = {name: summary(values) for name, values in seconds.items()}
    packed = layers[0].packed
    benchmark.extra_info.update(
        shape=[out, columns],
        rows=rows,
        density=packed.density,
        dtype="bfloat16",
        dense=found["dense"],
        sparse=found["sparse"],
        speed_up=found["dense"]["median_us"] / found["sparse"]["median_us"],
        gigabytes_per_s=packed.nbytes / found["sparse"]["median_us"] / 1e3,
        byte_ratio=weight.nbytes / packed.nbytes,
    )

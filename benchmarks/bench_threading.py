# SPDX-License-Identifier: Apache-2.0
"""Whether torch's operators slow down when sparse products run between them.

    pytest benchmarks/bench_threading.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/threading-CPU.json

A second pool of spinning threads beside torch's would show here: torch's team would have to share its cores with it.
Only torch's operators are timed. In the baseline our products run on the calling thread alone, so that caches are as
cold and no thread of ours is awake. ``alone`` has nothing in between and ``torch`` has torch's products of the same
shapes; these are not compared, because they leave other caches behind (on one thread, where nothing can fight, torch's
operators are 2 to 5 % slower after our products than after its own). At most 3 % may be lost (tests/test_docs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import summary

import mosaic_kernels as mk
from mosaic_kernels.ops import threads as thread_count

WIDTH, CHANNELS = 1024, 2816
BETWEEN = {"query": (WIDTH, WIDTH), "up": (CHANNELS, WIDTH)}
ROUNDS = 300


def torch_operators(rows: int) -> list[Callable[[], object]]:
    """What a decoder block does besides our products."""
    x = torch.randn(rows, WIDTH).bfloat16()
    wide, square = (torch.randn(out, WIDTH).bfloat16() for out in (CHANNELS, WIDTH))
    scale, shift = torch.randn(2, WIDTH).bfloat16()
    heads = torch.randn(3, 1, 16, 64 + rows, 64).bfloat16()
    return [
        lambda: F.rms_norm(x, (WIDTH,), scale),
        lambda: F.linear(x, square),
        lambda: F.scaled_dot_product_attention(heads[0, :, :, :rows], heads[1], heads[2]),
        lambda: F.layer_norm(x, (WIDTH,), scale, shift),
        lambda: F.linear(x, wide),
    ]


def timed(operators: list[Callable[[], object]], between: list[Callable[[], object]]) -> float:
    """Seconds that ``operators`` take while ``between`` run in turn before each of them."""
    seconds = 0.0
    for i, operator in enumerate(operators):
        between[i % len(between)]()
        started = time.perf_counter()
        operator()
        seconds += time.perf_counter() - started
    return seconds


@pytest.mark.parametrize("rows", [1, 16])
def test_torch_between_ours(benchmark: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH).bfloat16()
    weights = [(torch.randn(shape) * (torch.rand(shape) < 0.5)).bfloat16() for shape in BETWEEN.values()]
    layers = [mk.MosaicLinear.from_packed(mk.pack(weight)) for weight in weights]
    operators = torch_operators(rows)

    def on_one_thread(layer: mk.MosaicLinear) -> None:
        monkeypatch.setattr(thread_count, "_FORCED_THREADS", 1)
        layer(x)
        monkeypatch.setattr(thread_count, "_FORCED_THREADS", 0)

    variants: dict[str, list[Callable[[], object]]] = {
        "alone": [lambda: None],
        "torch": [lambda weight=weight: F.linear(x, weight) for weight in weights],
        "inline": [lambda layer=layer: on_one_thread(layer) for layer in layers],
        "ours": [lambda layer=layer: layer(x) for layer in layers],
    }

    @torch.no_grad()
    def run() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        order = list(variants.items())
        for index in range(ROUNDS + 5):
            for name, between in order if index % 2 else reversed(order):
                seconds[name].append(timed(operators, between))
        return {name: values[5:] for name, values in seconds.items()}

    seconds = benchmark.pedantic(run, rounds=1)
    found = {name: summary(values) for name, values in seconds.items()}
    kept = found["inline"]["median_us"] / found["ours"]["median_us"]
    benchmark.extra_info.update(rows=rows, threads=torch.get_num_threads(), **found, ratios={"kept_speed": kept})

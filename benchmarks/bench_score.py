# SPDX-License-Identifier: Apache-2.0
"""Scoring and selecting: one pass of ours each against the sequence a user of plain torch writes.

    pytest benchmarks/bench_score.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/score-CPU.json

The sequence: metric ``|W| * norms`` in fp32, a stable sort (exact counts, ties by index), scatter of the mask,
apply, pack. Its steps' medians are in ``steps_ms``. Other baselines are the reference operators.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import record
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.ops import reference

# Llama-2-7B's query, and TinyLlama-1.1B's down: no multiple of a piece, rows beyond L1.
SHAPES = {"4096x4096": (4096, 4096), "2048x5632": (2048, 5632)}
ALPHAS = {"1": (5.0,), "4": (3.0, 5.0, 7.0, 10.0)}


def projection(shape: str) -> tuple[Tensor, Tensor]:
    rows, columns = SHAPES[shape]
    torch.manual_seed(0)
    return (torch.randn(rows, columns) * columns**-0.5).bfloat16(), torch.rand(columns) + 0.5


def stock(weight: Tensor, norms: Tensor, width: int, keep: int, mark: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """The ``keep`` best of every ``width`` neighbouring scores, packed; ``mark`` hears when a step is done."""
    metric = (weight.float().abs() * norms).view(-1, width)
    mark("metric")
    order = metric.sort(dim=1, descending=True, stable=True).indices
    mark("sort")
    mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order[:, :keep], True).view_as(weight)
    mark("scatter")
    pruned = weight * mask
    mark("apply")
    packed = reference.pack(pruned)
    mark("pack")
    return packed


def stock_outliers(weight: Tensor, norms: Tensor, alphas: tuple[float, ...]) -> list[int]:
    """As the reference, but with the mean in fp32: its sum in double takes most of its time."""
    scores = weight.float().abs() * norms
    mean = scores.mean()
    return [int((scores > alpha * mean).sum()) for alpha in alphas]


class StepClock:
    """Seconds of each step of :func:`stock`, over all calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        self._last = time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds.setdefault(step, []).append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        return {step: statistics.median(values) * 1e3 for step, values in self.seconds.items()}


@pytest.mark.parametrize("scope", ["matrix", "row", "2:4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_score_select_pack(benchmark: Any, threads: int, shape: str, scope: str) -> None:
    weight, norms = projection(shape)
    rows, columns = weight.shape
    width = {"matrix": rows * columns, "row": columns, "2:4": 4}[scope]
    keep: Any = (2, 4) if scope == "2:4" else width // 2
    clock = StepClock()

    def by_torch(_: int) -> tuple[Tensor, Tensor]:
        clock.start()
        return stock(weight, norms, width, width // 2, clock)

    def by_ours(_: int) -> mk.PackedWeight:
        return ops.score_pack(weight, norms, keep, "group" if scope == "2:4" else scope)

    packed, (values, bits) = by_ours(0), by_torch(0)
    assert torch.equal(packed.values, values)  # ties too
    assert torch.equal(packed.bitmask, bits)
    record(
        benchmark, {"torch": by_torch, "ours": by_ours}, 3, operation=f"score + select + pack, {scope}",
        shape=[rows, columns], threads=threads,
    )  # fmt: skip
    benchmark.extra_info["steps_ms"] = clock.medians()


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outlier_stats(benchmark: Any, threads: int, shape: str, alphas: str) -> None:
    weight, norms = projection(shape)
    variants = {
        "torch": lambda _: stock_outliers(weight, norms, ALPHAS[alphas]),
        "ours": lambda _: ops.outlier_stats(weight, norms, ALPHAS[alphas]),
    }
    counts = ops.outlier_stats(weight, norms, ALPHAS[alphas])[1]
    assert counts == reference.outlier_stats(weight, norms, ALPHAS[alphas])[1].tolist()
    what = f"outlier statistics, {alphas} threshold{'s' * (alphas != '1')}"
    record(benchmark, variants, 15, operation=what, shape=list(weight.shape), threads=threads)


def test_column_square_sums(benchmark: Any, threads: int) -> None:
    x = torch.randn(2048, 4096).bfloat16()  # one calibration sequence
    assert torch.allclose(ops.column_square_sums(x), reference.column_square_sums(x))
    variants = {"torch": lambda _: reference.column_square_sums(x), "ours": lambda _: ops.column_square_sums(x)}
    record(benchmark, variants, 15, operation="column sums of squares", shape=list(x.shape), threads=threads)


def test_obs_block(benchmark: Any, threads: int) -> None:
    torch.manual_seed(0)
    weight, keep = torch.randn(4096, 128), torch.rand(4096, 128) < 0.5
    spread = torch.randn(128, 256)
    inverse = torch.linalg.inv(spread @ spread.T / 128 + torch.eye(128))
    factor = torch.linalg.cholesky(inverse, upper=True)
    ours, exact = ops.obs_block(weight, factor, keep)[0], reference.obs_block(weight, factor, keep, 0, 0)[0]
    assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-4)
    variants = {
        "torch": lambda _: reference.obs_block(weight, factor, keep, 0, 0),
        "ours": lambda _: ops.obs_block(weight, factor, keep),
    }
    record(benchmark, variants, 9, operation="OBS sweep of a block", shape=list(weight.shape), threads=threads)

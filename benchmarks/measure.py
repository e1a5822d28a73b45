# SPDX-License-Identifier: Apache-2.0
"""How everything here is measured: variants take turns, weights rotate past the last cache, medians count."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mosaic_kernels import info

# Copies of a weight are rotated until they hold this much: past the last-level cache of any CPU (and
# the L2 of any GPU) of 2026, so that every call reads memory, as decoding a real model does.
ROTATED_BYTES = 192 << 20


def copies(nbytes: int) -> int:
    """How many copies of a weight of ``nbytes`` to rotate through."""
    return max(2, -(-ROTATED_BYTES // max(1, nbytes)))


def interleaved(variants: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call; in each round every variant runs once, with the round's number.

    A shared machine drifts by tens of percent within seconds: only variants that take turns compare.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run(0)  # warm up
    order = list(variants.items())
    for index in range(rounds):
        for name, run in order if index % 2 else reversed(order):
            started = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and percentiles, in microseconds."""
    cuts = statistics.quantiles(seconds, n=20)
    return {"median_us": statistics.median(seconds) * 1e6, "p5_us": cuts[0] * 1e6, "p95_us": cuts[-1] * 1e6}


def record(benchmark: Any, variants: Mapping[str, Callable[[int], object]], rounds: int, **info: Any) -> None:
    """Interleave ``torch`` and ``ours``; their medians, their ratio and ``info`` become the benchmark's figures."""
    with torch.no_grad():
        seconds = benchmark.pedantic(lambda: interleaved(variants, rounds), rounds=1)
    found = {name: summary(values) for name, values in seconds.items()}
    speed_up = found["torch"]["median_us"] / found["ours"]["median_us"]
    benchmark.extra_info.update(info, **found, ratios={"speed_up": speed_up})


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, instruction set, threads, versions, commit."""
    model = next(
        (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), ""
    )
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": info.collect()["cpu"]["isa"],
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }

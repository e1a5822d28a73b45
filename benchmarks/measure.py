# SPDX-License-Identifier: Apache-2.0
"""How everything here is measured: variants take turns, weights rotate past the last cache, medians count."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mosaic_kernels import info


def last_level_cache(cpu: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the first processor; 0 if the system does not tell."""
    sizes = [path.read_text().strip() for path in cpu.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units), default=0)


# Copies of a weight are rotated until they hold this much, so that every call reads memory, as decoding a real model
# does: more than the L2 of any GPU of 2026, and more than the last cache of this processor (480 MB on some servers).
ROTATED_BYTES = max(192 << 20, last_level_cache() * 5 // 4)


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
    here, commit = Path(__file__).parent, ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    cpu = info.collect()["cpu"]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu["isa"],
        "features": cpu["features"],  # of the processor, used or not
        "torch_isa": torch.backends.cpu.get_cpu_capability(),  # lower than the processor's where it was limited
        "torch": torch.__version__,
        "commit": commit,
    }

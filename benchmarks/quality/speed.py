# SPDX-License-Identifier: Apache-2.0
"""Seconds of a pruning run against SparseGPT as public codes run it: same machine, text and target, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaic_kernels as mk
from mosaic_kernels.cli import resolve_device
from mosaic_kernels.prune.calibration import calibrate
from quality.baselines import naive_sparsegpt
from quality.runner import Settings

VARIANTS: dict[str, dict[str, Any]] = {
    "wanda": {"solver": "wanda", "policy": "uniform"},
    "fast": {"quality": "fast"},
    "sparsegpt": {"solver": "sparsegpt", "policy": "uniform"},
    "default": {"quality": "default"},
}
# (variant, of which other, at most this share of its seconds); 7.19 is the paper's headline (arXiv 2504.06323).
BARS = (
    ("default", "naive", 1.0),
    ("fast", "naive", 1 / 7.19),
    ("wanda", "naive", 1 / 7.19),
    ("fast", "wanda", 1.5),
)
WARM_UP_SAMPLES = 2


def measure(path: Path, settings: Settings, *, sparsity: float = 0.7, repeats: int = 5) -> dict[str, Any]:
    """Median seconds of every variant and the bars.

    A variant's seconds are its stations ``calibrate``, ``allocate`` and ``prune``: reading the tokenised
    text, embedding it, ranking and all pruning. The naive loop embeds, and prunes; its tokens are handed to it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("naive", *VARIANTS)}
    stations: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for index in range(-1, repeats):
        order = list(seconds) if index % 2 else list(reversed(seconds))
        for name in order:
            samples = settings.samples if index >= 0 else WARM_UP_SAMPLES
            spent, parts = _run(name, path, settings, samples, sparsity)
            if index >= 0:
                seconds[name].append(spent)
                if parts:
                    stations[name].append(parts)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "samples": settings.samples,
        "seqlen": settings.seqlen,
        "sparsity": sparsity,
        "repeats": repeats,
        "seconds": seconds,
        "stations": stations,
        "medians": medians,
        "bars": [
            {"name": f"{ours} / {other}", "value": medians[ours] / medians[other], "must": bound,
             "met": medians[ours] <= bound * medians[other]}
            for ours, other, bound in BARS
        ],
    }  # fmt: skip


def _run(
    name: str, path: Path, settings: Settings, samples: int, sparsity: float
) -> tuple[float, dict[str, float] | None]:
    model = AutoModelForCausalLM.from_pretrained(path).to(resolve_device(settings.device)).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    shared = {"samples": samples, "seqlen": settings.seqlen, "seed": 0}
    if name == "naive":
        tokens = calibrate(str(settings.calibration), tokenizer, model.config.vocab_size, **shared).tokens
        started = time.perf_counter()
        naive_sparsegpt(model, tokens, sparsity)
        return time.perf_counter() - started, None
    report = mk.prune(
        model, tokenizer=tokenizer, category="unstructured", sparsity=sparsity, device=settings.device,
        calibration=settings.calibration, **shared, **VARIANTS[name],
    )  # fmt: skip
    parts = {station: report["seconds"][station] for station in ("calibrate", "allocate", "prune")}
    return sum(parts.values()), parts


def markdown(result: Mapping[str, Any]) -> str:
    """Medians and bars as tables."""
    lines = ["| variant | seconds, median | naive / variant |", "|---|---|---|"]
    naive = result["medians"]["naive"]
    lines += [f"| {name} | {value:.2f} | {naive / value:.2f}x |" for name, value in result["medians"].items()]
    lines += ["", "| bar | value | must |", "|---|---|---|"]
    for bar in result["bars"]:
        word = "met" if bar["met"] else "**missed**"
        lines.append(f"| {bar['name']} | {bar['value']:.3f} | {bar['must']:.3f} {word} |")
    return "\n".join(lines)

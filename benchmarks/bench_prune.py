# SPDX-License-Identifier: Apache-2.0
"""Pruning the example model: seconds, exact counts, bytes, perplexity, and speed against the dense model.

    pytest benchmarks/bench_prune.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/prune-CPU.json

One round each: a run is seconds to a minute of deterministic work. Speeds are medians of runs interleaved
with the dense model's, so their ratio holds on a shared machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mosaic_kernels as mk
from mosaic_kernels.evaluate.latency import latencies

EXAMPLES = Path(__file__).parent.parent / "examples"
SPARSITY = 0.6

# The rows of README's table: category x solver, all at one exact budget.
VARIANTS: dict[str, dict[str, str]] = {
    "unstructured-magnitude": {"category": "unstructured", "solver": "magnitude", "policy": "uniform"},
    "unstructured-wanda": {"category": "unstructured", "solver": "wanda", "policy": "uniform"},
    "unstructured-sparsegpt": {"category": "unstructured", "solver": "sparsegpt", "policy": "uniform"},
    "unstructured-sparsegpt-pod": {"category": "unstructured", "solver": "sparsegpt", "policy": "pod"},
    "unstructured-default": {"category": "unstructured"},
    "structured-default": {"category": "structured"},
    "composite-sparsegpt-pod": {"category": "composite", "solver": "sparsegpt", "policy": "pod"},
    "composite-default": {"category": "composite"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_prune_example(benchmark: Any, tmp_path: Path, variant: str) -> None:
    def run() -> dict[str, Any]:
        return mk.prune(
            EXAMPLES / "tiny-llama", sparsity=SPARSITY, calibration=EXAMPLES / "text" / "calibration.txt", seqlen=256,
            eval_text=EXAMPLES / "text" / "validation.txt", output_dir=tmp_path / "out", **VARIANTS[variant],
        )  # fmt: skip

    report = benchmark.pedantic(run, rounds=1)
    dense = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-llama")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense_speed, pruned_speed = latencies([dense, pruned], prompt_tokens=64, new_tokens=64, repeats=9)
    ratios = {"decode": pruned_speed.decode_tokens_per_s / dense_speed.decode_tokens_per_s}
    parameters = sum(p.numel() for p in dense.parameters())
    benchmark.extra_info.update(
        category=report["category"],
        policy=report["policy"],
        solver=report["solver"],
        parameters={"dense": parameters, "pruned": parameters - report["removed_parameters"]},
        removed_difference=report["removed_difference"],
        bytes=report["bytes"],
        perplexity={key: report["perplexity"][key] for key in ("dense", "pruned", "tokens")},
        seconds=report["seconds"],
        decode_tokens_per_s={"dense": dense_speed.decode_tokens_per_s, "pruned": pruned_speed.decode_tokens_per_s},
        prefill_tokens_per_s={"dense": dense_speed.prefill_tokens_per_s, "pruned": pruned_speed.prefill_tokens_per_s},
        threads=torch.get_num_threads(),
        ratios=ratios,
        memory={"weight_bytes": report["bytes"]["pruned"]},
    )
    if report["category"] != "structured":
        assert report["removed_difference"] == 0

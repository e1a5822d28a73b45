# SPDX-License-Identifier: Apache-2.0
"""Memory of a pruned model against the dense one: weight bytes, and the peaks of loading, decoding and pruning.

    pytest benchmarks/bench_memory.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/memory-CPU.json

A random Llama of 110M parameters, half of its projection weights pruned. Every job runs in a process of its own; its
peak is what is resident above the interpreter with all imports, in units of the model's weight bytes. Loading is
``from_pretrained`` and then reading every weight once, because a mapped file takes no memory before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).parent / "memory_worker.py"
# Peaks must repeat: transformers loads on several threads and malloc keeps what they free, some 20 % more or less
# from run to run; with these 0.1 % (Nov 2026).
STEADY = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def measured(job: str, *directories: Path, device: str) -> dict[str, Any]:
    """What the worker prints."""
    done = subprocess.run(
        [sys.executable, WORKER, job, *directories, device],
        env={**os.environ, **STEADY}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("memory") / "dense"
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(dense: Path) -> tuple[Path, dict[str, Any]]:
    """The pruned model, and what pruning it took."""
    path = dense.parent / "pruned"
    return path, measured("prune", dense, path, device="cpu")


def record(benchmark: Any, found: dict[str, Any], field: str, weight_bytes: int, operation: str) -> None:
    """The peak in units of ``weight_bytes``; the benchmark's time is of no interest."""
    benchmark.extra_info.update(
        operation=operation, weight_bytes=weight_bytes, **found, memory={"peak": found[field] / weight_bytes}
    )


def test_weight_bytes(benchmark: Any, dense: Path, pruned: tuple[Path, dict[str, Any]]) -> None:
    def run() -> list[int]:
        return [measured("load", path, device="cpu")["weight_bytes"] for path in (dense, pruned[0])]

    dense_bytes, pruned_bytes = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        operation="weight bytes",
        dense=dense_bytes,
        pruned=pruned_bytes,
        memory={"of_dense": pruned_bytes / dense_bytes},
    )


@pytest.mark.parametrize("model", ["dense", "pruned"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("job", ["load", "decode"])
def test_peak(
    benchmark: Any, dense: Path, pruned: tuple[Path, dict[str, Any]], job: str, device: str, model: str
) -> None:
    path = dense if model == "dense" else pruned[0]
    found = benchmark.pedantic(lambda: measured(job, path, device=device), rounds=1)
    weight_bytes = found.pop("weight_bytes")
    record(benchmark, found, "peak_bytes" if device == "cpu" else "device_bytes", weight_bytes, f"{job}, {model}")


def test_peak_of_pruning(benchmark: Any, dense: Path, pruned: tuple[Path, dict[str, Any]]) -> None:
    found = benchmark.pedantic(lambda: pruned[1], rounds=1)
    weight_bytes = (dense / "model.safetensors").stat().st_size
    record(benchmark, found, "peak_bytes", weight_bytes, "prune (Wanda, 8 x 128 tokens)")

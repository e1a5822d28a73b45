# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: the plan and its bytes, without a weight being read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from prune_runs import QUICK, Run, require_failure
from small_models import random_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", torch.bfloat16, ("--sparsity", "0.6", "--policy", "uniform")),
        ("qwen2", torch.float32, ("--sparsity", "0.6", "--policy", "uniform")),  # biases leave with their heads
        ("qwen2", torch.bfloat16, ("--category", "structured", "--sparsity", "0.4", "--policy", "uniform")),
        ("qwen3", torch.float16, ("--sparsity", "0.02", "--category", "unstructured", "--policy", "uniform")),
        ("mistral", torch.float32, ("--sparsity", "0.5", "--format", "dense", "--policy", "uniform")),
        ("llama", torch.float32, ("--pattern", "2:4", "--category", "unstructured")),
        ("llama", torch.float32, ("--category", "auto", "--sparsity", "0.3", "--policy", "uniform")),
        ("llama", torch.float32, ("--dtype", "bfloat16", "--sparsity", "0.6", "--policy", "uniform")),
        ("llama", torch.float32, ("--sparsity", "0")),
        ("llama", torch.bfloat16, ("--sparsity", "0", "--weights", "int8")),
        ("qwen2", torch.bfloat16, ("--sparsity", "0.6", "--policy", "uniform", "--weights", "int8-group")),
    ],
)
def test_dry_run_predicts_the_bytes_without_weights(
    run: Run, tmp_path: Path, kind: str, dtype: torch.dtype, options: tuple[str, ...]
) -> None:
    path = tmp_path / "model"
    random_model(kind, dtype=dtype).save_pretrained(path)
    real = run(path, "--output-dir", "out", "--json", *QUICK, *options)
    assert real.code == 0, real.err
    shutil.move("out", tmp_path / "out")
    (path / "model.safetensors").unlink()
    dry = run(path, "--dry-run", "--json", *options)
    assert dry.code == 0, dry.err
    assert dry.out.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
    report, plan = json.loads(real.out), json.loads(dry.out)
    for key in (
        "bytes", "prunable_parameters", "removed_parameters", "structured_removed", "unstructured_zeros", "category"
    ):  # fmt: skip
        assert plan[key] == report[key], key
    assert {name: entry["shape"] for name, entry in plan["projections"].items()} == {
        name: entry["shape"] for name, entry in report["projections"].items()
    }
    assert isinstance(plan["peak_memory_bytes"]["host"], int)
    assert plan["peak_memory_bytes"]["host"] > plan["bytes"]["dense"]


@pytest.mark.parametrize(
    "kind", [("unstructured",), ("structured",), ("composite", "--structured-share", "0.1")], ids=lambda kind: kind[0]
)
def test_dry_run_with_ranks_knows_every_target(run: Run, dense_dir: Path, kind: tuple[str, ...]) -> None:
    options = ("--sparsity", "0.3", "--outlier-threshold", "3", "--category", *kind)
    report = json.loads(run(dense_dir, "--output-dir", "out", "--json", *QUICK, *options).out)
    plan = json.loads(run(dense_dir, "--dry-run", "--json", "--ranks", "out/ranks.json", *options).out)
    assert plan["targets"] == "exact"
    assert plan["bytes"] == report["bytes"]
    for name, entry in plan["projections"].items():
        assert entry["target"] == report["projections"][name]["target"]
        rows, columns = entry["shape"]
        assert entry["zeros"] == rows * columns - report["projections"][name]["nnz"]
    assert "uniform until" in json.loads(run(dense_dir, "--dry-run", "--json", *options).out)["targets"]


def test_dry_run_as_people_read_it(run: Run, dense_dir: Path) -> None:
    result = run(dense_dir, "--dry-run", "--sparsity", "0.6")
    assert result.code == 0
    assert "60.00%" in result.out
    assert "model.layers.2.mlp.down_proj" in result.out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--sparsity", "2"), 2),
        (("--pattern", "3:7", "--category", "composite"), 2),
        (("--calibration", "./none.txt"), 2),
        (("--calibration", "/dev/null"), 2),
        (("--eval-text", "none.txt"), 2),
        (("--ranks", "none.json"), 2),
        (("--ranks", "/dev"), 2),
        (("--seqlen", "129"), 2),
        (("--calibration", f"{__file__}.gz"), 2),
        (("--eval-text", "/proc/self/exe"), 1),
    ],
)
def test_dry_run_refuses_what_the_run_refuses(run: Run, dense_dir: Path, options: tuple[str, ...], code: int) -> None:
    require_failure(run(dense_dir, "--dry-run", *options), code, "error: ")

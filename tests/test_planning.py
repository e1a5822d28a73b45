# SPDX-License-Identifier: Apache-2.0
"""Whole runs whose plan is found by trying, and whose weights are tuned afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prune_runs import QUICK, Run, digests, kept_weights, require_failure, stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaic_kernels as mk
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import pipeline, planning
from mosaic_kernels.prune import search as searching
from mosaic_kernels.text import load_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--samples", "17", "--seqlen", "8")  # one sequence of these is held out
SHORT = searching.Evolution(generations=1, offspring=2, rounds=((32, 1),))


@pytest.mark.parametrize(
    ("solver", "recover"),
    [
        ("admm", "reconstruct"),
        ("admm", "lora"),
        ("wanda", "reconstruct"),
        pytest.param("wanda", "lora", marks=pytest.mark.slow),
    ],
)
def test_recovery_keeps_every_count(recover: str, solver: str, run: Run, dense_dir: Path) -> None:
    options = ("--sparsity", "0.5", "--structured-share", "0.2", "--policy", "uniform", "--solver", solver)
    result = run(dense_dir, "--output-dir", "out", "--json", "--recover", recover, *options, *QUICK)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["removed_difference"] == 0
    assert report["recover"]["method"] == recover
    assert ("accepted" in report["recover"]) == (recover == "lora")
    assert ("recover" in report["seconds"]) == (recover == "lora")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert kept_weights(ModelAdapter.of(model)) == report["prunable_parameters"] - report["removed_parameters"]


def test_reconstruction_comes_nearer_to_the_dense_model(tiny_llama: Path, calibration_text: Path) -> None:
    """On the trained example, with few sequences: the model's own loss on text it was not calibrated on falls."""
    options = {
        "calibration": calibration_text, "samples": 16, "seqlen": 64, "sparsity": 0.7, "category": "unstructured",
        "policy": "uniform", "quality": "fast", "eval_text": calibration_text.parent / "validation.txt",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = {}
    for recover in ("none", "reconstruct"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "load_tokens", lambda path, tokenizer: load_tokens(path, tokenizer)[:8192])
            report = mk.prune(model, tokenizer=tokenizer, recover=recover, **options)
        found[recover] = report["perplexity"]["pruned"]
    assert found["reconstruct"] < found["none"]


@pytest.mark.parametrize("options", [("--policy", "curve+search"), ("--policy", "curve")])
def test_a_resumed_run_does_not_search_again(
    options: tuple[str, ...], run: Run, dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (dense_dir, "--output-dir", "out", "--sparsity", "0.6", *options, *QUICK)
    assert SHORT.generations
    monkeypatch.setattr(planning, "search", lambda adapter, plan, *_: searching.search(adapter, plan, *_, SHORT))
    assert run(dense_dir, "--output-dir", "whole", *command[3:]).code == 0
    with stopped_at(1):
        assert run(*command).code == 130
    for name in ("search", "choose_share", "measure"):
        monkeypatch.setattr(planning, name, None)
    result = run(*command, "--resume", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["removed_difference"] == 0
    assert digests(Path("out")) == digests(Path("whole"))


@pytest.mark.parametrize("recover", ["none", "reconstruct", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_resumed_run_with_held_out_sequences_gives_the_same_bytes(recover: str, run: Run, dense_dir: Path) -> None:
    options = (
        "--sparsity",
        "0.6",
        "--policy",
        "uniform",
        "--calibration",
        "random",
        "--samples",
        "17",
        "--seqlen",
        "8",
    )
    command = (dense_dir, "--recover", recover, *options)
    assert run(*command, "--output-dir", "whole").code == 0
    with stopped_at(2):
        assert run(*command, "--output-dir", "out").code == 130
    assert run(*command, "--output-dir", "out", "--resume").code == 0
    assert digests(Path("out")) == digests(Path("whole"))


def test_recovery_without_a_sequence_to_judge_by_is_refused_before_any_work(
    run: Run, dense_dir: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One short line of text, for some windows too few. " * 8)
    result = run(
        tiny_llama,
        "--output-dir",
        "out",
        "--recover",
        "lora",
        "--calibration",
        short,
        "--seqlen",
        "64",
        "--samples",
        "8",
    )
    require_failure(result, 1, "second sequence", "--seqlen")

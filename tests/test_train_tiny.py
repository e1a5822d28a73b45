# SPDX-License-Identifier: Apache-2.0
"""The training example: it learns, stopping changes nothing, and its output is a model like any other."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny.py"
MICRO = ("--hidden=32", "--layers=2", "--heads=2", "--kv-heads=1", "--ffn=40", "--seqlen=32", "--batch=4", "--lr=1e-2")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path, calibration_text: Path) -> Path:
    """A few KB, enough for about 2000 tokens, compressed."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(calibration_text.read_bytes()[:8000].rpartition(b"\n")[0]))
    return path


@pytest.fixture
def train(script: Any, text: Path) -> Callable[..., int]:
    def call(output: Path, *more: str) -> int:
        return int(script.main(["--text", str(text), "--output", str(output), "--device=cpu", *MICRO, *more]))

    return call


def stop_after(steps: int, number: int, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the middle of a step."""
    inner, calls = script.loss_of, 0

    def loss_of(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), number)
        return inner(*arguments)

    monkeypatch.setattr(script, "loss_of", loss_of)


def test_it_learns_and_the_output_loads(
    train: Callable[..., int], tmp_path: Path, validation_text: Path, tokenizer: Any
) -> None:
    short = tmp_path / "validation.txt"
    short.write_bytes(validation_text.read_bytes()[:3000])
    reports = []
    for steps in (1, 40):
        assert train(tmp_path / f"{steps}", f"--steps={steps}", f"--val-text={short}", "--eval-every=20") == 0
        reports.append(json.loads((tmp_path / f"{steps}" / "training.json").read_text()))
    first, last = reports
    assert first["train_loss"] == pytest.approx(8.3, abs=0.2), "an untrained model knows nothing: ln 4096 = 8.3"
    assert last["validation_loss"] < first["validation_loss"] - 0.5, "0.86 in November 2026"
    assert last["tokens_seen"] == 40 * 4 * 32

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "40")
    assert model.dtype == torch.bfloat16
    assert (model.config.hidden_size, model.config.head_dim, model.config.num_key_value_heads) == (32, 16, 1)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "40")("The sea was calm.", return_tensors="pt").input_ids
    assert tokens.tolist() == tokenizer("The sea was calm.", return_tensors="pt").input_ids.tolist()
    assert model(tokens).logits.isfinite().all()
    assert not (tmp_path / "40" / "checkpoint").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    dtype: str, train: Callable[..., int], script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = signal.getsignal(signal.SIGINT)
    settings = ("--steps=9", f"--dtype={dtype}")
    assert train(tmp_path / "whole", *settings) == 0
    for steps, number, resume in ((4, signal.SIGTERM, ()), (3, signal.SIGINT, ("--resume",))):
        with monkeypatch.context() as patch:
            stop_after(steps, number, script, patch)
            assert train(tmp_path / "parts", *settings, *resume) == 128 + number
        assert not (tmp_path / "parts" / "config.json").exists(), "a stopped run must not look finished"
    assert train(tmp_path / "parts", *settings, "--resume") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert signal.getsignal(signal.SIGINT) is usual


def test_minutes_end_a_run_with_a_finished_schedule(train: Callable[..., int], tmp_path: Path) -> None:
    assert train(tmp_path / "out", "--minutes=0.02") == 0
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["step"] > 1
    assert report["seconds"] < 60, "most of it is the step that was running when the 1.2 s were over"


def test_mistakes_are_explained(
    train: Callable[..., int],
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            train(tmp_path / "out", *arguments)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "nowhere.txt" in refused("--steps=1", f"--text={tmp_path / 'nowhere.txt'}")
    assert "--steps" in refused()
    assert "--heads" in refused("--steps=1", "--heads=3")
    assert "lower --seqlen" in refused("--steps=1", "--seqlen=5000")
    assert "leave out --resume" in refused("--steps=1", "--resume")
    with monkeypatch.context() as patch:
        stop_after(1, signal.SIGTERM, script, patch)
        assert train(tmp_path / "out", "--steps=2") == 128 + signal.SIGTERM
    assert "add --resume" in refused("--steps=2")
    assert "lr 0.01, not 0.5" in refused("--steps=2", "--resume", "--lr=0.5")
    assert train(tmp_path / "out", "--steps=2", "--resume") == 0
    assert "finished" in refused("--steps=2")

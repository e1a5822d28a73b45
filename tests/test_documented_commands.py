# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of README and examples/ with every warning an error: users see no warning of a dependency.

The settings are smaller than the documented ones; what is called is the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from small_models import random_model

pytestmark = pytest.mark.compat

# Warnings that this package neither causes nor can avoid, as `python -W` takes them, each with its reason. None so far.
EXCEPTIONS: tuple[str, ...] = ()

SNIPPET = """
import sys
import mosaic_kernels
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The old man", return_tensors="pt", add_special_tokens=False)
for cache in ("dynamic", "static"):
    ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4,
                         do_sample=False, pad_token_id=0, cache_implementation=cache)
    print(ids.shape)
model.save_pretrained(sys.argv[2])
model.dequantize()
"""


def run(*arguments: str | Path, cwd: Path) -> str:
    """Stdout of ``python -W error ARGUMENTS``, which must succeed without a warning, even in a log."""
    exceptions = [f"-W{each}" for each in EXCEPTIONS]
    done = subprocess.run(
        [sys.executable, "-W", "error", *exceptions, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "XDG_CACHE_HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("Warning", "deprecated"):
        assert word not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A copy of ``examples/`` with a smaller model and less text, and the pruned model in ``out``."""
    folder = tmp_path_factory.mktemp("examples")
    random_model(vocab_size=4096, max_position_embeddings=256, dtype=torch.bfloat16).save_pretrained(
        folder / "tiny-llama"
    )
    tokenizer.save_pretrained(folder / "tiny-llama")
    shutil.copy(EXAMPLES / "quickstart.py", folder)
    (folder / "text").mkdir()
    for name, size in (("calibration.txt", 30_000), ("validation.txt", 6_000)):
        text = (EXAMPLES / "text" / name).read_text(encoding="utf-8")[:size]
        (folder / "text" / name).write_text(text, encoding="utf-8")
    said = run(
        "-m", "mosaic_kernels.prune", "tiny-llama", "--output-dir", "out", "--sparsity", "0.5", "--samples", "4",
        "--seqlen", "16", "--calibration", "text/calibration.txt", "--eval-text", "text/validation.txt", cwd=folder,
    )  # fmt: skip
    assert "removed" in said
    return folder


def test_evaluate(place: Path) -> None:
    assert "perplexity" in run("-m", "mosaic_kernels.evaluate", "out", "--text", "text/validation.txt", cwd=place)


def test_evaluate_latency(place: Path) -> None:
    assert "decode" in run("-m", "mosaic_kernels.evaluate", "out", "--latency", cwd=place)


def test_info(place: Path) -> None:
    assert "transformers" in run("-m", "mosaic_kernels.info", cwd=place)


def test_loading_and_generating(place: Path) -> None:
    assert run("-c", SNIPPET, "out", "again", cwd=place).count("torch.Size") == 2


def test_the_example(place: Path) -> None:
    said = run("quickstart.py", "--output-dir", "small", "--eval-tokens", "600", cwd=place)
    assert "written to small" in said
    assert "perplexity on 510 tokens of " in said  # two windows of 256, whose first token is not predicted

# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint in a process that knows nothing of this package, or only as much as the test says.

transformers fills tensors that a file lacks with random values and merely warns, so a checkpoint that
stock transformers cannot read must make it fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, cut_block, load, logits, prompt, random_model, save, zero_weights

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.models import ModelAdapter

# One interpreter, and a fork for each checkpoint: what one load registers must not help the next.
PROGRAM = """
import os, sys
import torch
{imports}
import transformers.models.llama.modeling_llama  # slow, so before the forks
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    if os.fork() == 0:
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **{options})
            with torch.no_grad():
                torch.save(model(input_ids=torch.load(path + "/../prompt.pt")).logits, path + ".logits")
            model.save_pretrained(path + "-again")
        except Exception as error:
            print(path, "FAILED", type(error).__name__, error)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.wait()
"""


def _structured_only() -> ModelAdapter:
    adapter = ModelAdapter.of(random_model())
    cut_block(adapter, 1, query=2, key_value=1, channels=24)
    return adapter


def _one_packed() -> ModelAdapter:
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5, only="up_proj")
    pack_model(adapter)
    return adapter


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Name -> directory and the logits before saving."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(prompt(), folder / "prompt.pt")
    made = {"composite": composite(), "structured": _structured_only(), "one": _one_packed()}
    made["int8"] = composite(weights="int8")
    found = {name: (save(adapter, folder / name), logits(adapter.model)) for name, adapter in made.items()}
    uneven = composite(pack=False)
    found["dense"] = (save(uneven, folder / "dense", format="dense"), logits(uneven.model))
    return found


def _run(checkpoints: dict[str, tuple[Path, torch.Tensor]], folder: Path, imports: str, **options: Any) -> str:
    for path, _ in checkpoints.values():
        path.with_name(path.name + ".logits").unlink(missing_ok=True)
    program = PROGRAM.format(imports=imports, options=options)
    done = subprocess.run(
        [sys.executable, "-c", program, *(str(path) for path, _ in checkpoints.values())],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("imports", "options"), [("import mosaic_kernels", {}), ("", {"trust_remote_code": True})], ids=["import", "trust"]
)
def test_loads(checkpoints: Any, tmp_path: Path, imports: str, options: dict[str, Any]) -> None:
    said = _run(checkpoints, tmp_path, imports, **options)
    assert not said
    for path, before in checkpoints.values():
        assert torch.equal(torch.load(path.with_name(path.name + ".logits")), before)
        again = path.with_name(path.name + "-again")
        # transformers copies no code of its own into what is saved then
        assert [file.name for file in again.glob("*.py")] == ["mosaic_autoload.py"]
        assert torch.equal(logits(load(again)), before)


def test_fails_without_the_package(checkpoints: Any, tmp_path: Path) -> None:
    said = _run(checkpoints, tmp_path, "")
    for path, _ in checkpoints.values():
        assert f"{path} FAILED RuntimeError" in said
        assert not path.with_name(path.name + ".logits").exists()


def test_import_order_does_not_matter() -> None:
    """The format is registered where transformers came first, and where our own classes import it."""
    program = """
import os, sys, torch
for order in sys.argv[1:]:
    if os.fork() == 0:
        for module in order.split():
            __import__(module)
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
        known = "mosaic" in AUTO_QUANTIZATION_CONFIG_MAPPING and "mosaic" in AUTO_QUANTIZER_MAPPING
        print(order, known, flush=True)
        os._exit(0)
    os.wait()
"""
    orders = [
        "transformers.quantizers.auto mosaic_kernels",
        "mosaic_kernels.checkpoint.quantizer",
    ]
    done = subprocess.run([sys.executable, "-c", program, *orders], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{order} True" for order in orders], done.stderr


def test_importing_the_package_imports_no_transformers() -> None:
    program = "import sys, mosaic_kernels; print([m for m in ('transformers', 'peft', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"

# SPDX-License-Identifier: Apache-2.0
"""A deleted model is freed at once, and one that crosses to another process works there."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, load, logits, prompt, random_model, save

import mosaic_kernels as mk

PRUNING = {"sparsity": 0.5, "calibration": "random", "samples": 4, "seqlen": 16, "solver": "wanda", "policy": "uniform"}


def generated(model: Any) -> None:
    with torch.inference_mode():
        model.generate(prompt()[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)


def trained(model: Any) -> None:
    model(input_ids=prompt(), labels=prompt()).loss.backward()


def compiled(model: Any) -> None:
    torch.compile(model.model.layers[0].mlp, backend="eager")(torch.randn(2, 64))


def pruned() -> Any:
    model = random_model()
    mk.prune(model, **PRUNING)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", [logits, generated, trained])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: load(path),
        lambda path: mk.prepare_inference(load(path), keep_dense_for_prefill=True),
        lambda path: copy.deepcopy(mk.prepare_inference(load(path))),
        lambda path: load(path).dequantize(),
        lambda path: load(path).to(torch.bfloat16),
        lambda path: pruned(),
    ],
    ids=["loaded", "prepared", "copied", "dequantized", "cast", "pruned"],
)
def test_a_deleted_model_is_freed_at_once(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], Any], use: Callable[[Any], object]
) -> None:
    path = save(composite(), tmp_path_factory.mktemp("packed"))
    gc.collect()
    gc.disable()
    try:
        model = make(path)
        use(model)
        known = {name: weakref.ref(module) for name, module in model.named_modules()}
        weights = [weakref.ref(p) for p in model.parameters()]
        del model
        assert [name for name, module in known.items() if module() is not None] == []
        assert [weight for weight in weights if weight() is not None] == []
    finally:
        gc.enable()


def test_copies_run_together_as_their_originals_do() -> None:
    model = mk.prepare_inference(composite().model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention, mlp = other.model.layers[1].self_attn, other.model.layers[1].mlp
        assert mlp.gate_proj.siblings is mlp.up_proj.siblings is not None
        assert attention.q_proj.siblings is attention.v_proj.siblings is not None
        assert mlp.up_proj.siblings is not model.model.layers[1].mlp.up_proj.siblings
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    "first", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("mosaic_kernels", "transformers")), "nothing"]
)
def test_a_prepared_model_crosses_to_a_fresh_process(tmp_path: Path, first: str) -> None:
    model = mk.prepare_inference(composite().model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import sys, torch
{"" if first == "nothing" else f"import {first}"}
sys.path.insert(0, {str(Path(__file__).parent)!r})
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from small_models import logits
assert torch.equal(logits(model), torch.load({str(tmp_path / "logits.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _answer(model: Any, queue: Any) -> None:
    queue.put(logits(model).numpy())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["spawn", "forkserver", "fork"])
def test_other_processes_take_a_prepared_model(way: Any) -> None:
    model = mk.prepare_inference(composite().model)
    wanted = logits(model)  # with threads of this process, if it has several
    context = multiprocessing.get_context(way)
    queue = context.Queue()
    process = context.Process(target=_answer, args=(model, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert torch.equal(torch.from_numpy(found), wanted)

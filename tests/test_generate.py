# SPDX-License-Identifier: Apache-2.0
"""Whole packed models decode: with either cache, compiled, and with what a token costs outside the kernels known."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, random_model, zero_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from decoding import in_turns, speeds, step_logits, without_kernels, write

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.ops import cpu


def packed(weights: Any = "float", **settings: Any) -> Any:
    """Half of every projection is zeros."""
    adapter = ModelAdapter.of(random_model(**settings).requires_grad_(False))
    zero_weights(adapter, 0.5)
    pack_model(adapter, weights)
    return adapter.model


def prompt(tokens: int = 9) -> torch.Tensor:
    return torch.randint(96, (1, tokens), generator=torch.Generator().manual_seed(3))


def static_cache(model: Any, tokens: int = 32) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_either_cache_and_the_bare_loop_write_the_same(weights: Any) -> None:
    model = packed(weights)
    written = write(model, prompt(), 11).tokens
    assert len(set(written)) > 2  # a model that repeats itself would hide a cache that is off by one
    assert write(model, prompt(), 11, cache=static_cache(model)).tokens == written
    for cache in ("dynamic", "static"):
        ids = model.generate(prompt(), max_new_tokens=12, do_sample=False, cache_implementation=cache)
        assert ids[0, 9:].tolist() == written, cache


def test_blocks_of_different_shapes_write_the_same() -> None:
    model: Any = composite().model
    dynamic, static = (
        model.generate(prompt(), max_new_tokens=12, do_sample=False, cache_implementation=cache)
        for cache in ("dynamic", "static")
    )
    assert torch.equal(dynamic, static)


def test_a_static_cache_is_emptied_before_it_is_used_again() -> None:
    model = packed()
    cache = static_cache(model)
    first = write(model, prompt(), 5, cache=cache)
    write(model, prompt(12), 5, cache=cache)
    assert write(model, prompt(), 5, cache=cache).tokens == first.tokens


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_compiled_step_computes_the_same(weights: Any) -> None:
    model = packed(weights, num_hidden_layers=1)
    wanted = step_logits(model, prompt())
    cache, step = static_cache(model), torch.compile(model, dynamic=False)
    found = step_logits(model, prompt(), cache=cache, step=step)
    # fp32 sums of at most 64 products, in another order, through the roundings of one block
    assert float((found - wanted).norm() / wanted.norm()) <= torch.finfo(torch.float32).eps * 64
    with torch._dynamo.config.patch(error_on_recompile=True):  # one compilation serves every step of every text
        for tokens in (9, 12):
            written = write(model, prompt(tokens), 4, cache=cache, step=step).tokens
            assert written == write(model, prompt(tokens), 4).tokens


def test_turns_and_speeds() -> None:
    model = packed()
    runs = in_turns({"ours": lambda: write(model, prompt(), 4)}, 2)
    assert [len(run.steps) for run in runs["ours"]] == [4, 4]
    assert [len(run.tokens) for run in runs["ours"]] == [5, 5]
    found = speeds(runs["ours"])
    assert 0 < found["decode"]["p5"] <= found["decode"]["tokens_per_s"] <= found["decode"]["p95"]
    assert found["prefill"]["tokens_per_s"] > 0


def test_only_our_products_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(dtype=torch.bfloat16)
    real = cpu._C_cpu
    wanted = write(model, prompt(), 3)
    called: list[str] = []
    model._apply(lambda tensor: tensor)

    class Counting:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(real, name)

    monkeypatch.setattr(cpu, "_C_cpu", Counting())
    write(model, prompt(), 1)
    assert called.count("PreparedGroup") == 2 * 3  # two groups of siblings, three blocks
    assert called.count("PreparedLinear") == 2 * 3  # their other layers, prepared for prompts and tokens alike
    called.clear()
    with without_kernels(model):
        write(model, prompt(), 3)
    assert not [name for name in called if name.startswith("sparse_linear")]
    assert write(model, prompt(), 3).tokens == wanted.tokens

# SPDX-License-Identifier: Apache-2.0
"""transformers refuses some casts of a packed model; the calls that README recommends instead work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, load, logits, random_model, save, zero_weights
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.models import ModelAdapter


def uniform() -> ModelAdapter:
    adapter = ModelAdapter.of(random_model(dtype=torch.bfloat16))
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    return adapter


def different_shapes() -> ModelAdapter:
    return composite(dtype=torch.bfloat16)


def int8() -> ModelAdapter:
    return composite(dtype=torch.bfloat16, weights="int8")


@pytest.fixture(params=[uniform, different_shapes, int8], ids=lambda make: make.__name__)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return load(save(request.param(), tmp_path / "packed"))


def floats(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.float32), lambda model: model.float()])
def test_a_cast_keeps_the_model_packed(packed: Any, cast: Callable[[Any], Any]) -> None:
    before, wanted = logits(packed), {name: type(module) for name, module in packed.named_modules()}
    cast(packed)
    assert {name: type(module) for name, module in packed.named_modules()} == wanted
    scales = [module.scales for module in packed.modules() if isinstance(module, mk.MosaicLinear)]
    assert floats(packed) == {torch.float32}
    assert all(each is None or each.dtype is torch.float32 for each in scales)
    # the same weights; activations were rounded some thirty times on the way
    assert distance(before, logits(packed)) <= 6 * torch.finfo(torch.bfloat16).eps


def test_it_loads_in_another_dtype(tmp_path: Path) -> None:
    model = load(save(uniform(), tmp_path / "packed"), dtype=torch.float32)
    assert floats(model) == {torch.float32}
    assert logits(model).dtype is torch.float32


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_dequantize_gives_an_ordinary_model_of_one_dtype(packed: Any, dtype: torch.dtype | None) -> None:
    before = logits(packed)
    dense = packed.dequantize() if dtype is None else packed.dequantize(dtype)
    assert dense is packed
    assert not any(isinstance(module, mk.MosaicLinear) for module in dense.modules())
    assert floats(dense) == {dtype or torch.bfloat16}
    assert distance(logits(dense), before) <= 6 * torch.finfo(torch.bfloat16).eps
    for cast, wanted in (("float", torch.float32), ("half", torch.float16)):
        getattr(dense, cast)()
        assert floats(dense) == {wanted}


def test_dequantize_follows_a_cast(packed: Any) -> None:
    packed.to(torch.float32).dequantize()
    assert floats(packed) == {torch.float32}
    logits(packed)


def test_what_was_dequantized_trains(packed: Any) -> None:
    packed.dequantize(torch.float32).train()
    layer = packed.model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear
    ids = torch.arange(8)[None]
    packed(input_ids=ids, labels=ids).loss.backward()
    assert float(layer.weight.grad.norm()) > 0


def test_what_was_dequantized_is_saved_and_prepared_again(packed: Any, tmp_path: Path) -> None:
    packed.dequantize()
    packed.save_pretrained(tmp_path / "dense")
    found, wanted = load(tmp_path / "dense").state_dict(), packed.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    reasons = {block.why_not for block in mk.explain(packed).blocks}
    assert reasons == {"self_attn.q_proj is an nn.Linear that is not prepared: call mk.prepare_inference(model)"}
    mk.prepare_inference(packed)
    assert not reasons & {block.why_not for block in mk.explain(packed).blocks}

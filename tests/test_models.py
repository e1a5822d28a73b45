# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import KINDS, cut_block, logits, random_model
from torch import nn

from mosaic_kernels.errors import UnsupportedModelError
from mosaic_kernels.models import PROJECTIONS, ModelAdapter


@pytest.mark.parametrize("kind", KINDS)
def test_finds_blocks_projections_and_heads(kind: str) -> None:
    model = random_model(kind)
    adapter = ModelAdapter.of(model)
    assert [block.prefix for block in adapter.blocks] == [f"model.layers.{i}" for i in range(3)]
    modules = dict(model.named_modules())
    found = {block.full_name(name): layer for block, name, layer in adapter.projections()}
    assert len(found) == 3 * len(PROJECTIONS)
    assert all(modules[name] is layer for name, layer in found.items())
    block = adapter.blocks[1]
    assert (block.head_dim, block.query_heads, block.key_value_heads, block.channels) == (16, 4, 2, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_prunable_are_the_linear_weights_of_blocks(kind: str) -> None:
    model = random_model(kind)
    expected = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    adapter = ModelAdapter.of(model)
    assert adapter.prunable_parameters == expected == sum(adapter.sizes().values())


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_head_dim_where_the_config_has_none(kind: str) -> None:
    model = random_model(kind, head_dim=None)
    assert ModelAdapter.of(model).blocks[0].head_dim == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("query", "key_value"), [(2, 1), (2, 2), (4, 2)])
def test_refreshed_heads_compute_what_the_rest_computes(kind: str, query: int, key_value: int) -> None:
    """Cutting a head is the same as zeroing its columns of o_proj."""
    settings: dict[str, Any] = {"num_key_value_heads": 4} if query == key_value else {}
    cut, masked = random_model(kind, **settings), random_model(kind, **settings)
    cut_block(ModelAdapter.of(cut), 1, query=query, key_value=key_value, channels=40)
    with torch.no_grad():
        masked.model.layers[1].self_attn.o_proj.weight[:, query * 16 :] = 0
    difference = (logits(cut) - logits(masked)).double().norm() / logits(masked).double().norm()
    # the same sums in another order, through a few layers of 64 features
    assert float(difference) <= 16 * torch.finfo(torch.float32).eps * 64**0.5
    block = ModelAdapter.of(cut).blocks[1]
    assert (block.query_heads, block.key_value_heads) == (query, key_value)


def test_channels_can_differ_between_blocks() -> None:
    cut, masked = random_model(), random_model()
    cut_block(ModelAdapter.of(cut), 0, query=4, key_value=2, channels=24)
    with torch.no_grad():
        masked.model.layers[0].mlp.down_proj.weight[:, 24:] = 0
    difference = (logits(cut) - logits(masked)).double().norm() / logits(masked).double().norm()
    assert float(difference) <= 16 * torch.finfo(torch.float32).eps * 64**0.5


def test_replace_puts_a_layer_into_the_model() -> None:
    model = random_model()
    new = nn.Linear(64, 40, bias=False)
    ModelAdapter.of(model).blocks[2].replace("mlp.up_proj", new)
    assert model.model.layers[2].mlp.up_proj is new


def test_other_architectures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported.*llama, mistral, qwen2, qwen3"):
        ModelAdapter.of(random_model("gpt2", n_embd=64, n_head=4, n_layer=1, n_positions=128))


def test_a_model_without_head_is_no_language_model() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel is not a causal language model"):
        ModelAdapter.of(random_model().model)

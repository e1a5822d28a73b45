# SPDX-License-Identifier: Apache-2.0
"""``mk.explain`` and preparing answer for models that lack parts, and refuse what is no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_model, zero_weights
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import ModelAdapter


def packed() -> Any:
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    return adapter.model


def test_a_block_or_its_norm_of_another_kind() -> None:
    model = packed()
    model.model.layers[0].input_layernorm = nn.Identity()
    model.model.layers[1].input_layernorm = nn.RMSNorm(64, elementwise_affine=False)
    model.model.layers[2] = nn.Identity()
    found = mk.explain(model)
    assert [block.native for block in found.blocks] == [False] * 3
    assert [str(block.why_not).split(":")[0] for block in found.blocks[:2]] == [
        "input_layernorm is not transformers' own"
    ] * 2
    assert found.blocks[2].why_not == "a Identity of torch.nn.modules.linear is no decoder block that is known"


def test_preparing_takes_a_norm_without_weight(caplog: pytest.LogCaptureFixture) -> None:
    model = packed()
    model.model.layers[1].input_layernorm = nn.Identity()
    mk.prepare_inference(model)
    assert "1 of 3 blocks take no token natively (input_layernorm is not transformers' own" in caplog.text


def test_blocks_that_are_all_wrapped_are_missed() -> None:
    model = packed()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = nn.Sequential(block)
    assert "no decoder block as of a 'llama' was found: all were replaced or wrapped" in str(mk.explain(model))


def test_a_model_of_which_nothing_is_in_memory() -> None:
    with torch.device("meta"):
        model = random_model()
    found = mk.explain(mk.prepare_inference(model))
    assert [block.native for block in found.blocks] == [False] * 3
    assert "not in memory" in str(found.blocks[0].why_not)


def test_a_path_is_no_model() -> None:
    with pytest.raises(UsageError, match=r"not a str: load it, or run `python -m mosaic_kernels.info examples/tiny`"):
        mk.explain("examples/tiny")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"takes a model, not a NoneType$"):
        mk.explain(None)  # type: ignore[arg-type]

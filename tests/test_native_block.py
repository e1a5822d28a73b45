# SPDX-License-Identifier: Apache-2.0
"""Every reason why a block has no native calls is found, and disappears with its cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_model
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels import decode, ops
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.models import ModelAdapter

IDS = torch.arange(5)[None]


@pytest.fixture
def model() -> Any:
    adapter = ModelAdapter.of(random_model("llama", dtype=torch.float32))
    for _, _, layer in adapter.projections():
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
    pack_model(adapter)
    return adapter.model


def taken(model: Any) -> list[int]:
    """Tokens that each block takes natively while three are written, the first of them by the prompt."""
    before = [block.native_tokens for block in model.model.layers]
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    return [block.native_tokens - count for block, count in zip(model.model.layers, before, strict=True)]


def reason(block: Any, dtype: torch.dtype = torch.float32) -> str | None:
    x, rotation = torch.zeros(1, 1, 64, dtype=dtype), torch.zeros(1, 1, 16, dtype=dtype)
    with torch.no_grad():
        return decode.why_not(block, x, (rotation, rotation))


def test_a_block_that_runs_natively_has_no_reason(model: Any) -> None:
    assert taken(model) == [2, 2, 2]
    assert [reason(block) for block in model.model.layers] == [None] * 3


def test_a_forward_that_was_replaced_before_the_first_token_is_obeyed(model: Any) -> None:
    mlp, seen = model.model.layers[1].mlp, []
    own = mlp.forward
    mlp.forward = lambda x: (seen.append(1), own(x))[1]
    assert taken(model) == [2, 0, 2]
    assert len(seen) == 3
    assert reason(model.model.layers[1]) == "the forward of mlp was replaced (accelerate does so to move weights)"
    del mlp.forward
    assert taken(model) == [2, 2, 2]


def test_a_reason_does_not_outlive_its_cause(model: Any) -> None:
    block = model.model.layers[1]
    own = block.mlp.down_proj
    block.mlp.down_proj = nn.Sequential(own)  # as PEFT wraps a layer, and takes it out again
    assert taken(model) == [2, 0, 2]
    assert "mlp.down_proj was replaced by a module that is none of ours: a Sequential" in str(reason(block))
    block.mlp.down_proj = own
    assert taken(model) == [2, 2, 2]
    assert reason(block) is None


def change(block: Any, name: str) -> None:
    attn, mlp = block.self_attn, block.mlp
    if name == "norm":
        block.input_layernorm = nn.LayerNorm(64)
    elif name == "norm's dtype":
        block.post_attention_layernorm.bfloat16()
    elif name == "activation":
        mlp.act_fn = nn.GELU()
    elif name == "plain":
        attn.q_proj = attn.q_proj.to_dense()
    elif name == "dtype":
        mlp.up_proj.bfloat16()
    elif name == "bias":
        attn.v_proj.bias = nn.Parameter(torch.zeros(32, dtype=torch.bfloat16))
    elif name == "sizes":
        mlp.down_proj = mk.MosaicLinear(48, 64, bias=False, dtype=torch.float32)
    elif name == "mixed":
        attn.k_proj = mk.MosaicLinear.from_linear(attn.k_proj.to_dense(), "int8")
    elif name == "hook":
        mlp.gate_proj.register_forward_hook(lambda *_: None)
    else:
        assert name == "offloaded"
        attn.o_proj.to("meta")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("norm", "input_layernorm is not transformers' own: it is a LayerNorm of torch.nn"),
        ("norm's dtype", "post_attention_layernorm is torch.bfloat16 and the activations are torch.float32"),
        ("activation", "the activation is GELU: the native block knows SiLU"),
        ("plain", "self_attn.q_proj is an nn.Linear that is not prepared: call mk.prepare_inference(model)"),
        ("dtype", "mlp.up_proj has torch.bfloat16 values and the activations are torch.float32"),
        ("bias", "self_attn.v_proj has a torch.bfloat16 bias and the activations are torch.float32"),
        ("sizes", "the sizes of its projections are not those of one decoder block"),
        ("mixed", "layers of mixed kinds share an input: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
        ("hook", "hooks on mlp.gate_proj"),
        ("offloaded", "self_attn.o_proj is not in memory (offloaded, or not loaded yet)"),
    ],
)
def test_every_part_that_does_not_fit_is_named(model: Any, name: str, words: str) -> None:
    block = model.model.layers[2]
    change(block, name)
    assert str(reason(block)).startswith(words)
    never = decode.why_never(block, torch.zeros(1, 1, 64))
    assert never == (None if name == "hook" else reason(block))  # hooks come and go
    assert reason(model.model.layers[0]) is None


def test_what_the_call_is_decides_too(model: Any) -> None:
    block = model.model.layers[0]
    x, rotation = torch.zeros(1, 1, 64), (torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))
    assert decode.why_not(block, x, rotation) == decode.GRADIENTS
    with torch.no_grad():
        assert decode.why_not(block, torch.zeros(2, 1, 64), rotation) == decode.SEVERAL_ROWS
        assert decode.why_not(block, x.double(), rotation) == decode.NO_DTYPE
        assert "rotary" in str(decode.why_not(block, x, (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))))
        assert "attention mask" in str(decode.why_not(block, x, rotation, attention_mask=torch.zeros(1, 1, 1, 9)))
        assert "output_attentions" in str(decode.why_not(block, x, rotation, output_attentions=True))
        assert decode.why_not(block, x, rotation, use_cache=True) is None
        with ops.use_backend("reference"):
            assert decode.why_not(block, x, rotation) == "use_backend('reference') is in force"
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in str(decode.why_not(block, x, rotation))
        block.train()
        assert decode.why_not(block, x, rotation) == decode.TRAINING

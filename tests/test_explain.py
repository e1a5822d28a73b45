# SPDX-License-Identifier: Apache-2.0
"""What ``mk.explain`` says is what happens: natively or not, by which kernel, and why not the faster one."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import composite, load, random_model, save
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import KernelError
from mosaic_kernels.info import main as info
from mosaic_kernels.models import SUPPORTED_MODEL_TYPES, ModelAdapter
from mosaic_kernels.ops import cpu

IDS = torch.arange(5)[None]
NEW = 3  # tokens, the first of which the prompt makes


def packed(kind: str = "llama", weights: Any = "float", **settings: Any) -> Any:
    """A model of three blocks with packed projections, prepared as a checkpoint is at loading."""
    adapter = ModelAdapter.of(random_model(kind, **settings))
    for _, _, layer in adapter.projections():
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
    pack_model(adapter, weights)
    return adapter.model


def taken(model: Any, **options: Any) -> list[int]:
    """Tokens that each block takes natively while some are written."""
    blocks = list(model.model.layers)
    before = [getattr(block, "native_tokens", 0) for block in blocks]
    model.generate(IDS, max_new_tokens=NEW, do_sample=False, **options)
    return [getattr(block, "native_tokens", 0) - count for block, count in zip(blocks, before, strict=True)]


def said(model: Any) -> list[int]:
    """The same, as the explanation has it."""
    return [(NEW - 1) * block.native for block in mk.explain(model).blocks]


def watch(block: Any) -> None:
    block.self_attn.register_forward_pre_hook(lambda *_: None)


def watch_from_outside(block: Any) -> None:
    block.register_forward_hook(lambda *_: None)  # sees what the block returns, natively or not


def replace_forward(block: Any) -> None:
    own = block.mlp.forward
    block.mlp.forward = lambda x: own(x)


def wrap(block: Any) -> None:
    block.mlp.up_proj = nn.Sequential(block.mlp.up_proj)


def unpack(block: Any) -> None:
    layer = block.self_attn.o_proj
    block.self_attn.o_proj = layer.to_dense() if isinstance(layer, mk.MosaicLinear) else layer


def unpack_and_prepare(block: Any) -> None:
    unpack(block)
    block.self_attn.o_proj.__class__ = DenseLinear


def another_activation(block: Any) -> None:
    block.mlp.act_fn = nn.GELU()


def train(block: Any) -> None:
    block.train()


def round_some(block: Any) -> None:
    block.self_attn.k_proj = mk.MosaicLinear.from_linear(block.self_attn.k_proj.to_dense(), "int8")


def other_norm(block: Any) -> None:
    block.input_layernorm = nn.RMSNorm(64)


CHANGES = (
    watch, watch_from_outside, replace_forward, wrap, unpack, unpack_and_prepare, another_activation, train, round_some,
    other_norm,
)  # fmt: skip


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 2)), max_size=3, unique=True),
    st.sampled_from(["before", "after"]),
)
def test_a_block_is_said_to_be_native_where_it_is(changes: list[tuple[Any, int]], when: str) -> None:
    model = packed()
    if when == "after":  # when the block has its native calls already
        assert taken(model) == said(model) == [NEW - 1] * 3
    for change, place in changes:
        change(model.model.layers[place])
    before = said(model)
    assert taken(model) == before
    assert said(model) == before
    reasons = [block.why_not for block in mk.explain(model).blocks]
    assert [reason is None for reason in reasons] == [bool(count) for count in before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SUPPORTED_MODEL_TYPES)
def test_families_and_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = packed(kind, dtype=dtype)
    assert taken(model) == said(model) == [NEW - 1] * 3


def test_states_of_the_whole_model() -> None:
    model = packed()
    for name, reason in (
        ("eager", "the attention implementation is eager: call model.set_attn_implementation('sdpa')"),
        ("sdpa", None),
        ("mosaic_sdpa", None),
    ):
        mk.prepare_inference(model) if name == "mosaic_sdpa" else model.set_attn_implementation(name)
        assert [block.why_not for block in mk.explain(model).blocks] == [reason] * 3
        assert taken(model) == said(model)
    assert taken(model, cache_implementation="static") == said(model)
    model.config.output_hidden_states = True
    assert {block.why_not for block in mk.explain(model).blocks} == {
        "config.output_hidden_states is on: transformers records what blocks do"
    }
    assert taken(model) == said(model) == [0, 0, 0]
    model.config.output_hidden_states = False
    assert taken(model) == said(model) == [NEW - 1] * 3
    model.train()
    assert {block.why_not for block in mk.explain(model).blocks} == {"the model is in training mode: call model.eval()"}
    assert taken(model) == said(model) == [0, 0, 0]


def test_another_backend_and_hooks_on_everything() -> None:
    model = packed()
    with ops.use_backend("reference"):
        assert taken(model) == said(model) == [0, 0, 0]
        assert {layer.why_not for layer in mk.explain(model).layers if layer.kind == "packed"} == {
            "use_backend('reference') is in force"
        }
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert taken(model) == said(model) == [0, 0, 0]
        assert "every module" in str(mk.explain(model).blocks[0].why_not)
    assert taken(model) == said(model) == [NEW - 1] * 3


def test_a_compiled_model() -> None:
    model = packed()
    model.compile(backend="eager")
    assert said(model) == [0, 0, 0]
    found = mk.explain(torch.compile(packed(), backend="eager"))
    assert {block.why_not for block in found.blocks} == {"torch.compile traces transformers' modules"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
def test_a_model_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = packed()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    wrapped.eval()
    found = mk.explain(wrapped)
    assert {block.why_not for block in found.blocks} == {
        "self_attn.q_proj was replaced by a module that is none of ours: a Linear of peft.tuners.lora.layer"
    }
    assert taken(model) == [0, 0, 0]
    base = next(layer for layer in found.layers if layer.name.endswith("q_proj.base_layer"))
    assert base.kind == "packed"


def test_a_model_that_was_not_prepared() -> None:
    model = random_model(dtype=torch.bfloat16)
    found = mk.explain(model)
    assert {block.why_not for block in found.blocks} == {"not prepared: call mk.prepare_inference(model)"}
    assert taken(model) == said(model) == [0, 0, 0]
    assert found.summary.startswith("0 of 3 blocks natively (not prepared: call mk.prepare_inference(model)), 21 ")
    assert found.summary.count("prepare_inference") == 1  # said once


def test_other_architectures_and_modules() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt_neox", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    found = mk.explain(AutoModelForCausalLM.from_config(config))
    assert not found.blocks
    assert "blocks of 'gpt_neox' run transformers' modules: native ones are llama" in str(found)
    assert str(mk.explain(nn.ReLU())) == "runs: no linear layers"


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The rows that the dense kernel multiplied."""
    seen: list[torch.Size] = []
    real = cpu.dense_linear_raw
    monkeypatch.setattr(cpu, "dense_linear_raw", lambda x, *rest: (seen.append(x.shape), real(x, *rest))[1])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_dense_layer_runs_as_is_said(dense_calls: list[torch.Size], dtype: torch.dtype) -> None:
    for kind in (nn.Linear, DenseLinear):
        layer = nn.Linear(24, 8, dtype=dtype).requires_grad_(False)
        layer.__class__ = kind
        dense_calls.clear()
        layer(torch.zeros(1, 24, dtype=dtype))
        (found,) = mk.explain(layer).layers
        assert (found.kind == "dense") == bool(dense_calls)
        assert (found.kernel == "torch") == (not dense_calls)
        assert (found.why_not is None) == bool(dense_calls)
        if dense_calls:
            assert kind is DenseLinear
            assert found.kernel == ops.isa.level()


@pytest.mark.parametrize("weights", ["float", "int8", "int8-group"])
@torch.no_grad()
def test_a_packed_layer_runs_as_is_said(weights: Any) -> None:
    """By our kernel, which alone refuses what does not fit."""
    dense = nn.Linear(80, 16, bias=False).requires_grad_(False)
    dense.weight[:, :40] = 0
    layer = mk.MosaicLinear.from_linear(dense, weights)
    (found,) = mk.explain(layer).layers
    names = {"float": "fp32", "int8": "int8", "int8-group": "int8-group"}
    assert (found.kind, found.kernel, found.values) == ("packed", ops.isa.level(), names[weights])
    assert found.density == 0.5
    assert found.why_not is None or ops.isa.level() != cpu.BEST_ISA
    with ops.use_backend("reference"):
        assert mk.explain(layer).layers[0].kernel == "reference"
    with ops.use_backend("triton"):
        (found,) = mk.explain(layer).layers
        assert found.kernel == "none"
        assert "backend 'triton' was forced but cannot run" in str(found.why_not)


def test_a_call_that_would_fail_is_told() -> None:
    model = packed()
    model.get_input_embeddings().double()
    found = mk.explain(model)
    assert {layer.kernel for layer in found.layers if layer.kind == "packed"} == {"none"}
    assert {layer.why_not for layer in found.layers if layer.kind == "packed"} == {
        "a call fails: its activations are torch.float64, and the values or the bias are not"
    }
    assert {block.why_not for block in found.blocks} == {"activations are neither fp32 nor bf16 nor fp16"}
    with pytest.raises(KernelError, match=r"x is torch\.float64 but the packed values are"):
        model(input_ids=IDS)


def test_rounded_activations_are_told() -> None:
    model = mk.prepare_inference(packed(weights="int8"), quantize_activations=True)
    assert {layer.values for layer in mk.explain(model).layers if layer.kind == "packed"} == {"int8, x rounded"}


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_a_lower_instruction_set_is_told(level: str) -> None:
    from mosaic_kernels import _C_cpu

    before = _C_cpu.isa()
    try:
        _C_cpu.set_isa(level)
    except KernelError:
        pytest.skip(f"this processor has no {level}")
    try:
        layer = mk.explain(packed()).layers[0]
        assert layer.kernel == level
        assert (layer.why_not is None) == (level == cpu.BEST_ISA)
        if layer.why_not is not None:
            assert layer.why_not == (
                f"this processor has {cpu.BEST_ISA}, and MOSAIC_ISA or set_isa keeps kernels to {level}"
            )
    finally:
        _C_cpu.set_isa(before)


def test_what_is_on_disk_is_told(tmp_path: Path) -> None:
    save(composite(), tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    model = load(tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "offload"))
    found = mk.explain(model)
    assert "self_attn.q_proj is not in memory (offloaded" in str(found.blocks[1].why_not)
    away = {layer.name for layer in found.layers if layer.why_not and layer.why_not.startswith("offloaded")}
    assert {name.startswith("model.layers.1.") for name in away} == {True}
    assert len(away) == 7
    assert taken(model) == said(model)


def test_nothing_is_changed_by_asking() -> None:
    model = packed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    mk.explain(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [block.native_tokens for block in model.model.layers] == [0, 0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_the_counter_is_the_blocks_own() -> None:
    import copy

    model = packed()
    assert taken(model) == [NEW - 1] * 3
    assert [block.native_tokens for block in copy.deepcopy(model).model.layers] == [0, 0, 0]
    assert "(2 taken natively so far)" in str(mk.explain(model))


def test_one_warning_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mosaic_kernels"):
        model = packed()
        mk.prepare_inference(model)
        assert not caplog.messages
        for block in model.model.layers:
            another_activation(block)
        mk.prepare_inference(model)
        mk.prepare_inference(model)
        (message,) = caplog.messages
        assert message == (
            "this model is slower than it could be: 3 of 3 blocks take no token natively (the activation is GELU: the "
            "native block knows SiLU). mk.explain(model) says more"
        )
        caplog.clear()
        with ops.use_backend("reference"):
            other = packed()
        (message,) = caplog.messages
        assert "3 of 3 blocks take no token natively (use_backend('reference') is in force)" in message
        assert "21 of 21 packed layers are not multiplied by this CPU's kernels (use_backend('refer" in message
        caplog.clear()
        mk.prepare_inference(other)
        assert not caplog.messages


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    path = str(save(composite(), tmp_path / "saved"))
    assert info([path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == path
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["blocks"]) == 3
    assert info([path]) == 0
    table = capsys.readouterr().out
    assert table.startswith(f"runs: {found['summary']}\n")
    assert re.search(rf"torch {re.escape(torch.__version__)}, transformers \d", table)
    assert info([str(tmp_path / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().err

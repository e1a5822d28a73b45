# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks that take one token natively: the same as transformers' modules, or these themselves."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from decoding import step_logits, without_kernels, write

import mosaic_kernels as mk
from mosaic_kernels import compat, decode, ops
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import KernelError
from mosaic_kernels.models import SUPPORTED_MODEL_TYPES, ModelAdapter

pytestmark = pytest.mark.compat
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(family: str = "llama", dtype: torch.dtype = torch.float32, weights: Any = "float", **settings: Any) -> Any:
    """A small packed model, prepared; its norms and biases are not the ones and zeros they start as."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "vocab_size": 96, "head_dim": 20}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **heads, "initializer_range": 0.1, **settings})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0, 0.2).add_(1)
    adapter = ModelAdapter.of(model)
    for _, _, layer in adapter.projections():
        layer.weight[torch.rand(layer.weight.shape) < 0.5] = 0
    pack_model(adapter, weights)
    return mk.prepare_inference(adapter.model)


def prompt(tokens: int = 9) -> Tensor:
    return torch.randint(96, (1, tokens), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every block that took a token natively."""
    runs: list[int] = []
    real = decode._Token.run

    def counted(token: Any, *arguments: Any) -> Tensor:
        runs.append(1)
        return real(token, *arguments)

    monkeypatch.setattr(decode._Token, "run", counted)
    return runs


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a function with transformers' modules."""

    def run(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_token_of", lambda *_: None)
            return function(*arguments, **options)

    return run


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SUPPORTED_MODEL_TYPES)
def test_a_token_is_what_the_modules_make_of_it(
    natively: list[int], modules: Any, family: str, dtype: torch.dtype
) -> None:
    model = made(family, dtype)
    for tokens in (3, 9, 70, 600):
        found = step_logits(model, prompt(tokens))
        assert len(natively) == 3
        wanted = modules(step_logits, model, prompt(tokens))
        assert len(natively) == 3
        natively.clear()
        # some ten roundings in each of three blocks; attention rounds its weights in transformers alone
        assert distance(found, wanted) <= 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weights", ["int8", "int8-group"])
@pytest.mark.parametrize("rounded", [False, True])
def test_int8_weights(natively: list[int], modules: Any, weights: str, rounded: bool) -> None:
    model = mk.prepare_inference(made(weights=weights), quantize_activations=rounded)
    found = step_logits(model, prompt())
    assert len(natively) == 3
    # rounding to whole numbers makes a small difference one of 1/127 at times
    assert distance(found, modules(step_logits, model, prompt())) <= (2e-2 if rounded else 1e-5)


@pytest.mark.parametrize("heads", [(6, 6), (6, 1)])
def test_heads_shared_by_none_and_by_all(natively: list[int], modules: Any, heads: tuple[int, int]) -> None:
    model = made(num_attention_heads=heads[0], num_key_value_heads=heads[1], attention_bias=True, mlp_bias=True)
    found = step_logits(model, prompt(40))
    assert len(natively) == 3
    assert distance(found, modules(step_logits, model, prompt(40))) <= 1e-5


def test_blocks_of_different_shapes(natively: list[int], modules: Any) -> None:
    model: Any = mk.prepare_inference(composite().model)  # whose output projections are dense
    found = step_logits(model, prompt())
    assert len(natively) == (3 if ops.cpu.DENSE_ROWS else 0)
    assert distance(found, modules(step_logits, model, prompt())) <= 1e-5


def test_projections_that_stayed_dense(natively: list[int], modules: Any) -> None:
    model = made(dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = layer.to_dense()
    mk.prepare_inference(model)
    found = step_logits(model, prompt())
    assert len(natively) == (3 if ops.cpu.DENSE_ROWS else 2)
    assert distance(found, modules(step_logits, model, prompt())) <= 0.05


def test_generate_with_every_cache_and_beams(natively: list[int], modules: Any) -> None:
    model = made()
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}):
        natively.clear()
        found = model.generate(prompt(), max_new_tokens=12, do_sample=False, **options)
        assert bool(natively) is not bool({"num_beams", "use_cache"} & options.keys())
        assert torch.equal(found, modules(model.generate, prompt(), max_new_tokens=12, do_sample=False, **options))


def test_batches_take_the_modules_and_padding_is_not_attended_to(natively: list[int], modules: Any) -> None:
    from transformers import StaticCache

    model, ids = made(), torch.cat([prompt(), prompt()])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert not natively

    @torch.no_grad()
    def after_padding(cache: Any) -> Tensor:
        seen = model(input_ids=ids[:1, :-1], attention_mask=mask[:1, :-1], **compat.with_cache(model, cache))
        step = {"attention_mask": mask[:1], **compat.with_cache(model, compat.cache_of(seen))}
        logits: Tensor = model(input_ids=ids[:1, -1:], position_ids=torch.tensor([[5]]), **step).logits
        return logits

    for made_cache in (lambda: None, lambda: StaticCache(config=model.config, max_cache_len=40)):
        found = after_padding(made_cache())
        assert len(natively) == 3
        assert distance(found, modules(after_padding, made_cache())) <= 1e-5
        natively.clear()


@torch.no_grad()
def next_token(model: Any, **options: Any) -> Any:
    out = model(input_ids=prompt(), use_cache=True)
    return model(input_ids=prompt(1), **compat.with_cache(model, compat.cache_of(out)), **options)


def test_who_watches_sees_what_the_modules_do(natively: list[int]) -> None:
    model = made()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    next_token(model)
    assert len(seen) == 2
    assert len(natively) == 2
    handle.remove()
    natively.clear()
    next_token(model, output_attentions=True)
    assert not natively
    model.set_attn_implementation("eager")
    next_token(model)
    assert not natively


def test_hidden_states_are_recorded(modules: Any) -> None:
    model = made()
    found = next_token(model, output_hidden_states=True).hidden_states
    wanted = modules(next_token, model, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 4
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) <= 1e-5


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_was_recorded_once_is_not_for_ever(natively: list[int], modules: Any, asked: str) -> None:
    model = made()
    if asked == "output_attentions":
        model.set_attn_implementation("eager")
    next_token(model, **{asked: True})
    model.set_attn_implementation("sdpa")
    assert not natively
    hooks = [block.self_attn._forward_hooks for block in model.model.layers]
    assert all(hooks)  # transformers leaves them behind
    found = step_logits(model, prompt())
    assert len(natively) == 3
    assert distance(found, modules(step_logits, model, prompt())) <= 1e-5
    natively.clear()
    model.config.output_hidden_states = True  # which blocks are not told
    wanted, recorded = modules(next_token, model).hidden_states, next_token(model).hidden_states
    assert not natively
    model.config.output_hidden_states = False
    assert all(distance(one, other) <= 1e-5 for one, other in zip(recorded, wanted, strict=True))

    def output_capturing_hook(*_: Any) -> None:  # somebody else's
        natively.append(-1)

    model.model.layers[0].self_attn.register_forward_hook(output_capturing_hook)
    next_token(model)
    assert sorted(natively) == [-1, -1, 1, 1]


def test_gradients_and_training_take_the_modules(natively: list[int]) -> None:
    model = made()
    cache = compat.cache_of(model(input_ids=prompt(), use_cache=True))
    x = model.get_input_embeddings()(prompt(1)).requires_grad_()
    model(inputs_embeds=x, **compat.with_cache(model, cache)).logits.sum().backward()
    assert x.grad is not None
    assert float(x.grad.norm()) > 0
    assert not natively
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    cache = compat.cache_of(model(input_ids=prompt(), use_cache=True))
    assert model(input_ids=prompt(1), **compat.with_cache(model, cache)).logits.requires_grad
    assert len(natively) == 0  # the first block's result takes the others along
    model.train()
    next_token(model)
    assert not natively


def test_parameters_that_are_replaced_are_read_anew(natively: list[int], modules: Any) -> None:
    model = made()
    before = step_logits(model, prompt())
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.up_proj.weight.mul_(1.5)  # in place
        block.post_attention_layernorm.weight = nn.Parameter(block.post_attention_layernorm.weight * 2)
        block.self_attn.o_proj = mk.MosaicLinear.from_linear(nn.Linear(120, 72, bias=False).requires_grad_(False))
        block.mlp.gate_proj.weight.data = block.mlp.gate_proj.weight.data * 1.1
    natively.clear()
    after = step_logits(model, prompt())
    assert len(natively) == 3
    assert distance(after, before) > 1e-2
    assert distance(after, modules(step_logits, model, prompt())) <= 1e-5
    model.to(torch.bfloat16)
    assert distance(step_logits(model, prompt()), after) <= 0.1
    assert len(natively) == 6


def test_another_pattern_of_as_many_weights(natively: list[int], modules: Any) -> None:
    model, other = made(hidden_size=96), made(hidden_size=96)
    before = step_logits(model, prompt())
    with torch.no_grad():
        for name, layer in other.named_modules():
            if isinstance(layer, mk.MosaicLinear):
                dense = layer.to_dense()
                dense.weight.copy_(dense.weight.flatten().roll(37).view_as(dense.weight))  # as many, elsewhere
                other.set_submodule(name, mk.MosaicLinear.from_linear(dense))
    model.load_state_dict(other.state_dict())
    natively.clear()
    after = step_logits(model, prompt())
    assert len(natively) == 3
    assert distance(after, before) > 1e-2
    assert distance(after, modules(step_logits, mk.prepare_inference(other), prompt())) <= 1e-5


def test_numbers_and_methods_that_change_are_obeyed(
    natively: list[int], modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    step_logits(model, prompt())
    block = model.model.layers[0]
    block.self_attn.scaling *= 3
    block.post_attention_layernorm.variance_epsilon = 3.0
    assert distance(step_logits(model, prompt()), modules(step_logits, model, prompt())) <= 1e-5
    assert len(natively) == 6
    natively.clear()
    block.mlp.down_proj = nn.Sequential(block.mlp.down_proj)  # no layer that is known
    step_logits(model, prompt())
    assert len(natively) == 2
    natively.clear()
    kind = type(block.mlp)
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x))
    step_logits(made(), prompt())
    assert not natively


def test_autocast_and_other_dtypes_take_the_modules(natively: list[int]) -> None:
    model = made()
    with torch.autocast("cpu", torch.bfloat16):
        next_token(model)
    assert not natively
    step_logits(made(weights="int8").double(), prompt())
    assert not natively


def test_a_flag_that_changes_is_obeyed(natively: list[int], modules: Any) -> None:
    model = made(weights="int8")
    step_logits(model, prompt())
    for block in model.model.layers:
        block.mlp.down_proj.quantize_activations = True
    found = step_logits(model, prompt())
    assert len(natively) == 6
    assert distance(found, modules(step_logits, model, prompt())) <= 2e-2
    model.model.layers[0].mlp.up_proj.quantize_activations = True  # not as gate, with which it shares its input
    natively.clear()
    step_logits(model, prompt())
    assert len(natively) == 2


def test_another_backend_takes_the_modules(natively: list[int]) -> None:
    model = made()
    with ops.use_backend("reference"):
        step_logits(model, prompt())
    assert not natively
    with without_kernels(model):
        write(model, prompt(), 1)
    natively.clear()
    step_logits(model, prompt())
    assert len(natively) == 3


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_every_instruction_set(modules: Any, natively: list[int], monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    from mosaic_kernels import _C_cpu

    before = _C_cpu.isa()
    monkeypatch.setattr(ops.cpu, "DENSE_ROWS", level != "scalar")  # as it is there
    try:
        _C_cpu.set_isa(level)
    except KernelError:
        pytest.skip(f"this processor has no {level}")
    try:
        for dtype in DTYPES:
            model = made(dtype=dtype)
            found, wanted = step_logits(model, prompt(30)), modules(step_logits, model, prompt(30))
            assert distance(found, wanted) <= 6 * torch.finfo(dtype).eps
        assert len(natively) == 9
    finally:
        _C_cpu.set_isa(before)


def test_large_scores_and_what_is_not_finite(modules: Any) -> None:
    model = made()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(300)  # scores of some thousand: one key takes all
    found, wanted = step_logits(model, prompt(40)), modules(step_logits, model, prompt(40))
    assert bool(found.isfinite().all())
    assert distance(found, wanted) <= 1e-3
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("nan")
    assert bool(step_logits(model, prompt(4)).isnan().all())


def test_a_token_that_attends_to_nothing_is_finite() -> None:
    model = made()
    with torch.no_grad():
        seen = model(input_ids=prompt(), use_cache=True)
        mask = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
        out = model(input_ids=prompt(1), attention_mask=mask, **compat.with_cache(model, compat.cache_of(seen)))
    assert bool(out.logits.isfinite().all())


def test_a_cache_of_another_kind_is_told(natively: list[int]) -> None:
    model = made()
    with torch.no_grad():
        cache = compat.cache_of(model(input_ids=prompt(), use_cache=True))
        cache.update = lambda key, value, *_: (key[..., :-2], value[..., :-2])
        with pytest.raises(KernelError, match="the cache returned keys"):
            model(input_ids=prompt(1), **compat.with_cache(model, cache))


@pytest.mark.parametrize("family", SUPPORTED_MODEL_TYPES)
def test_a_block_keeps_its_name_is_copied_and_pickled(family: str) -> None:
    model = made(family)
    wanted = write(model, prompt(), 5).tokens
    block = model.model.layers[0]
    home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert isinstance(block, getattr(home, type(block).__name__))
    assert type(block) is getattr(decode, type(block).__name__)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.model.layers[0]) is type(block)
        assert "_token" not in other.model.layers[0].__dict__
        assert write(other, prompt(), 5).tokens == wanted
    assert not hasattr(decode, "OtherDecoderLayer")

# SPDX-License-Identifier: Apache-2.0
"""Recovery after pruning: local reconstruction and masked LoRA lower the error and leave every zero in its place."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import KINDS, composite, cut_block, random_model, zero_weights
from torch import Tensor, nn

from mosaic_kernels.errors import CalibrationError, EnvironmentError_, MosaicError, UsageError
from mosaic_kernels.models import PROJECTIONS, Block, ModelAdapter
from mosaic_kernels.prune import masked_lora, reconstruct
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, advance, embed, forward
from mosaic_kernels.prune.reconstruct import Tuning
from mosaic_kernels.prune.recover import dense_teacher, recover_lora
from mosaic_kernels.prune.solvers import SOLVERS
from mosaic_kernels.prune.units import Units
from mosaic_kernels.prune.walk import ATTENTION_OUT, FFN_IN, FFN_OUT, Walk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks every model for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
HALVES = (ATTENTION_OUT, FFN_OUT)


def some_tokens(sequences: int, seqlen: int = 32) -> Tensor:
    return torch.randint(96, (sequences, seqlen), generator=torch.Generator().manual_seed(2))


def pruned_pair(
    kind: str = "llama", *, cut: bool = False, sequences: int = 12, held_out: int = 2, **settings: Any
) -> tuple[Block, Block, list[Batch]]:
    """A block with zeros (and fewer heads and channels), its dense copy, and batches with their dense side."""
    adapter = ModelAdapter.of(random_model(kind, **settings))
    dense = adapter.blocks[0].copy()
    if cut:
        cut_block(adapter, 0, query=2, key_value=1, channels=33)
    zero_weights(adapter, 0.5)
    tokens = some_tokens(sequences)
    batches = [*embed(adapter, tokens[held_out:])]
    if held_out:
        batches += embed(adapter, tokens[:held_out], held_out=True)
    return adapter.blocks[0], dense, [Batch(b.hidden, b.arguments, b.hidden, b.held_out) for b in batches]


def walk_to(block: Block, batches: list[Batch], stage: int) -> Walk:
    """A walk that stands before the half that ends with this stage."""
    walk = Walk(block, batches, [batch.hidden for batch in batches])
    walk._past_attention = stage == FFN_OUT
    return walk


def walks(block: Block, dense: Block, batches: list[Batch], stage: int) -> tuple[Walk, Walk]:
    return walk_to(block, batches, stage), walk_to(dense, batches, stage)


def weights(block: Block) -> dict[str, Tensor]:
    return {name: block.projection(name).weight.detach().clone() for name in PROJECTIONS}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def held_out_error(block: Block, dense: Block, batches: list[Batch]) -> float:
    """Of the whole block's output, by its own forward."""
    pairs = [
        (forward(dense, b, b.hidden) - b.hidden, forward(block, b, b.hidden) - b.hidden) for b in batches if b.held_out
    ]
    return sum(float((x - y).square().sum()) for x, y in pairs) / sum(float(x.square().sum()) for x, _ in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_leaves_zeros_in_their_places_and_lowers_the_error(
    kind: str, cut: bool, dtype: torch.dtype
) -> None:
    block, dense, batches = pruned_pair(kind, cut=cut, dtype=dtype)
    before, flags = weights(block), [parameter.requires_grad for parameter in block.module.parameters()]
    others = {name: value.clone() for name, value in block.module.state_dict().items() if "_proj.weight" not in name}
    error = held_out_error(block, dense, batches)
    walk, beside = walks(block, dense, batches, ATTENTION_OUT)
    for stage in HALVES:
        assert reconstruct.reconstruct(walk, beside, stage, Tuning(tokens=64))
        walk.forget()
        walk.add(stage)
        beside.add(stage)
    after = weights(block)
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in PROJECTIONS)
    assert all(after[name].dtype == dtype and not torch.equal(after[name], before[name]) for name in PROJECTIONS)
    assert held_out_error(block, dense, batches) < error
    assert same(others, {name: block.module.state_dict()[name] for name in others})
    assert flags == [parameter.requires_grad for parameter in block.module.parameters()]
    assert all(parameter.grad is None for parameter in block.module.parameters())
    assert all(torch.equal(walk.residual[i], x.hidden) for i, x in enumerate(advance(block, batches)))


def test_reconstruction_of_a_real_block(tiny_llama: Path, tokenizer: Any, calibration_text: Path) -> None:
    """Zeros by magnitude in a trained block: a third of its error on held-out text at least is made good."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    ids = tokenizer(calibration_text.read_text()[:12000])["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    adapter = ModelAdapter.of(model.eval())
    dense = adapter.blocks[0].copy()
    batches = [*embed(adapter, tokens[8:]), *embed(adapter, tokens[:8], held_out=True)]
    batches = [Batch(b.hidden, b.arguments, b.hidden, b.held_out) for b in batches]
    zero_weights(adapter, 0.7)
    error = held_out_error(adapter.blocks[0], dense, batches)
    walk, beside = walks(adapter.blocks[0], dense, batches, ATTENTION_OUT)
    for stage in HALVES:
        assert reconstruct.reconstruct(walk, beside, stage, Tuning(tokens=512))
        walk.forget()
        walk.add(stage)
        beside.add(stage)
    assert held_out_error(adapter.blocks[0], dense, batches) < 0.67 * error


@pytest.mark.parametrize("stage", HALVES)
def test_reconstruction_that_fails_is_put_back(stage: int, caplog: pytest.LogCaptureFixture) -> None:
    block, dense, batches = pruned_pair()
    before = weights(block)
    with caplog.at_level(logging.INFO, "mosaic_kernels"):
        assert not reconstruct.reconstruct(*walks(block, dense, batches, stage), stage, Tuning(rate=1e6, epochs=2))
    assert same(weights(block), before)
    assert "put back" in caplog.text


@pytest.mark.parametrize("stage", HALVES)
def test_what_only_fits_noise_is_put_back(stage: int) -> None:
    """Training sequences ask for another block's outputs, held-out ones for what the half already makes."""
    block, _, batches = pruned_pair()
    other = ModelAdapter.of(random_model(seed=9)).blocks[0]
    walk, beside = walks(block, other, batches, stage)
    twin = walk_to(block.copy(), batches, stage)
    for index, batch in enumerate(batches):
        if batch.held_out:
            beside._kept[stage, index] = twin.input(stage, index)
    for name in PROJECTIONS:
        if name.endswith(("o_proj", "down_proj")):
            other.projection(name).weight.data.copy_(block.projection(name).weight)
    before = weights(block)
    assert not reconstruct.reconstruct(walk, beside, stage, Tuning(epochs=2))
    assert same(weights(block), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", HALVES)
def test_a_half_in_steps_makes_what_the_block_makes(stage: int, kind: str, implementation: str) -> None:
    block, dense, batches = pruned_pair(kind, cut=True, attn_implementation=implementation, sliding_window=8)
    walk, beside = walks(block, dense, batches, stage)
    parts, judges, _ = reconstruct._parts(walk, beside, stage, Tuning(tokens=96))
    assert [len(part.hidden) for part in parts] == [3, 3, 3, 1]
    assert [len(part.hidden) for part in judges] == [2]
    half = reconstruct._Half(walk, stage)
    with torch.no_grad():
        made = torch.cat([half.output(half.weights, part) for part in parts])
        name = "self_attn.o_proj" if stage == ATTENTION_OUT else "mlp.down_proj"
        wanted = block.projection(name)(walk.input(stage, 0))
        target = dense.projection(name)(beside.input(stage, 0))
    bound = 64 * torch.finfo(torch.float32).eps
    assert float((made - wanted).norm()) <= bound * float(wanted.norm())
    assert torch.equal(torch.cat([part.target for part in parts]), target)  # without drift, the dense half's output


def test_only_kept_weights_have_gradients() -> None:
    block, dense, batches = pruned_pair()
    walk, beside = walks(block, dense, batches, FFN_OUT)
    half = reconstruct._Half(walk, FFN_OUT)
    part = reconstruct._parts(walk, beside, FFN_OUT, Tuning())[0][0]
    keep = {name: weight != 0 for name, weight in half.weights.items()}
    masters = {name: weight.clone().requires_grad_() for name, weight in half.weights.items()}
    reconstruct._step(half, masters, keep, part, torch.optim.SGD(masters.values(), lr=0.0))
    x = walk.input(FFN_IN, 0)
    gate, up, down = (weight.clone().requires_grad_() for weight in half.weights.values())
    made = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    ((part.target - made).square().sum() / made.numel() ** 0.5).backward()
    for name, plain in zip(masters, (gate, up, down), strict=True):
        found = masters[name].grad
        assert found is not None
        assert plain.grad is not None
        assert bool((found[~keep[name]] == 0).all())
        assert bool((plain.grad[~keep[name]] != 0).any())
        wanted = plain.grad * keep[name]
        assert float((found - wanted).norm()) <= 1e3 * torch.finfo(torch.float32).eps * float(wanted.norm())


def test_a_kept_weight_never_becomes_zero() -> None:
    weight = torch.tensor([[0.0, 1e-45, 2.0, 0.0]])
    rounded = reconstruct._rounded(weight, torch.tensor([[True, True, True, False]]), torch.bfloat16)
    assert (rounded != 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(("sequences", "changed"), [(1, False), (2, True)])
def test_the_last_sequence_judges_where_none_is_held_out(sequences: int, changed: bool) -> None:
    block, dense, batches = pruned_pair(sequences=sequences, held_out=0)
    assert reconstruct.reconstruct(*walks(block, dense, batches, FFN_OUT), FFN_OUT) is changed


def test_an_unknown_half_is_refused() -> None:
    block, dense, batches = pruned_pair()
    with pytest.raises(MosaicError, match="no half"):
        reconstruct.reconstruct(*walks(block, dense, batches, FFN_OUT), FFN_IN)


@pytest.mark.parametrize("solver", ["admm", "wanda"])
@pytest.mark.parametrize("units", [Units(), Units(groups=1, channels=8)])
def test_a_pruned_block_with_reconstruction_has_the_same_counts(solver: str, units: Units) -> None:
    found = {}
    for recover in (False, True):
        _, dense, batches = pruned_pair()
        block = dense.copy()
        kept = block.copy()  # how large the projections are afterwards
        prune_block(kept, batches, SOLVERS[solver], units, dict.fromkeys(map(kept.full_name, PROJECTIONS), 0), None)
        zeros = {block.full_name(name): kept.projection(name).weight.numel() // 2 for name in PROJECTIONS}
        after = prune_block(block, batches, SOLVERS[solver], units, zeros, None, dense, recover=recover)
        assert {block.full_name(n): int((block.projection(n).weight == 0).sum()) for n in PROJECTIONS} == zeros
        assert all(torch.equal(x.hidden, y.hidden) for x, y in zip(after, advance(block, batches), strict=True))
        found[recover] = held_out_error(block, dense, batches)
    assert found[True] < found[False]


def test_reconstruction_needs_the_dense_block() -> None:
    block, _, batches = pruned_pair()
    with pytest.raises(MosaicError, match="dense block"):
        prune_block(block, batches, SOLVERS["wanda"], Units(), {}, None, recover=True)


# Masked LoRA


def pruned_model(kind: str = "llama", **settings: Any) -> tuple[Any, Tensor, Tensor]:
    """A pruned model, tokens, and the dense model's logits of them."""
    model, tokens = random_model(kind, **settings), some_tokens(34, 16)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    adapter = ModelAdapter.of(model)
    cut_block(adapter, 0, query=2, key_value=1, channels=33)
    zero_weights(adapter, 0.5)
    return model, tokens, logits


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("mistral", torch.bfloat16), ("qwen2", torch.float16), ("qwen3", torch.float32)],
)
def test_lora_changes_kept_weights_only_and_leaves_no_trace(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    model, tokens, logits = pruned_model(kind, dtype=dtype)
    model.model.norm.weight.requires_grad_(False)
    model.train()
    model.model.layers[1].eval()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    attributes, before, random = set(vars(model)), state(model), torch.get_rng_state()
    report = recover_lora(model, tokens, teacher=logits.__getitem__, rank=4, steps=20, rate=0.01, tokens_per_step=128)
    assert report["accepted"]
    assert report["loss"] == "kl"
    after = state(model)
    assert report["after"] < report["before"]
    assert list(after) == list(before)
    prunable = {f"{name}.weight" for name in ModelAdapter.of(model).sizes()}
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]) is (name not in prunable)
        assert torch.equal(value == 0, before[name] == 0)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert modules == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert attributes == set(vars(model))
    assert torch.equal(random, torch.get_rng_state())
    assert float(divergence(model, tokens[32:], logits[32:])) == pytest.approx(report["after"], rel=1e-3)


def divergence(model: Any, tokens: Tensor, dense: Tensor) -> Tensor:
    with torch.no_grad():
        made = model.eval()(input_ids=tokens).logits.flatten(0, 1).float().log_softmax(-1)
    wanted = dense.flatten(0, 1).float().log_softmax(-1)
    return (wanted.exp() * (wanted - made)).sum(-1).mean()


def test_lora_learns_the_text_without_a_teacher() -> None:
    pytest.importorskip("peft")
    model, _, _ = pruned_model()
    tokens = torch.arange(16).repeat(32, 1)
    report = recover_lora(model, tokens, steps=10, rate=0.01, tokens_per_step=128)
    assert report["accepted"]
    assert report["loss"] == "cross-entropy"
    assert report["after"] == pytest.approx(
        float(model(input_ids=tokens[:1], labels=tokens[:1]).loss.detach()), rel=1e-4
    )


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_lora_that_fails_is_discarded(rate: float) -> None:
    pytest.importorskip("peft")
    model, tokens, logits = pruned_model()
    before = state(model)
    report = recover_lora(model, tokens, teacher=logits.__getitem__, steps=4, rate=rate)
    assert not report["accepted"]
    assert report["after"] is None or report["after"] > report["before"]
    assert same(state(model), before)
    assert not any(hasattr(module, "base_layer") for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_runs_with_what_it_merges_to_and_merges_exactly(dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    model, tokens, _ = pruned_model("qwen2", dtype=dtype)
    before = state(model)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: masked_lora.lora_layer()})
    adapted = peft.get_peft_model(model, config)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 6
    wanted = {}
    for name, layer in layers.items():
        weight, a, b = before[f"{name}.weight"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = (5 / 3) * (b @ a) * (weight != 0)
        wanted[f"{name}.weight"] = (weight.float() + update).to(dtype).detach()
        assert torch.equal(layer.get_delta_weight("default"), update)
    with torch.no_grad():
        logits = adapted(input_ids=tokens[:2]).logits
    assert adapted.merge_and_unload() is model
    assert list(state(model)) == list(before)
    assert all(torch.equal(value, wanted.get(name, before[name])) for name, value in state(model).items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens[:2]).logits, logits)


def test_gradients_of_the_masked_product() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, a, b, bias, out = (
        torch.randn(size, generator=random) for size in ((2, 5, 7), (6, 7), (3, 7), (6, 3), (6,), (2, 5, 6))
    )
    weight[weight < 0] = 0
    inputs = [value.requires_grad_() for value in (x, a, b)]
    made: Any = masked_lora._MaskedProduct.apply
    found = torch.autograd.grad((made(x, weight, bias, a, b, 0.5) * out).sum(), inputs)
    plain = F.linear(x, weight + 0.5 * (b @ a) * (weight != 0), bias)
    for got, wanted in zip(found, torch.autograd.grad((plain * out).sum(), inputs), strict=True):
        assert float((got - wanted).norm()) <= 64 * torch.finfo(torch.float32).eps * float(wanted.norm())


def test_the_dense_stream_is_a_teacher() -> None:
    model, tokens = random_model(), some_tokens(5)
    adapter = ModelAdapter.of(model)
    batches = [*embed(adapter, tokens[:3]), *embed(adapter, tokens[3:], held_out=True)]
    batches = [Batch(b.hidden, b.arguments, b.hidden, b.held_out) for b in batches]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    for block in adapter.blocks:
        dense = block.copy()
        nn.init.zeros_(block.projection("mlp.up_proj").weight)
        batches = advance(block, batches, dense)
    found = dense_teacher(adapter, batches)(torch.tensor([4, 0]))
    assert float((found - logits[[4, 0]]).norm()) <= 1e3 * torch.finfo(torch.float32).eps * float(logits.norm())


def test_without_peft_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, _ = pruned_model()
    before = state(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(EnvironmentError_, match=r"pip install 'mosaic-kernels\[peft\]'"):
        recover_lora(model, tokens)
    assert same(state(model), before)


def test_lora_refuses_what_it_cannot_do() -> None:
    model, tokens, _ = pruned_model()
    with pytest.raises(CalibrationError, match="two sequences"):
        recover_lora(model, tokens[:1])
    for options in ({"rank": 0}, {"steps": 0}, {"rate": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(options))):
            recover_lora(model, tokens, **options)
    with pytest.raises(UsageError, match="dequantize"):
        recover_lora(composite().model, tokens)

# SPDX-License-Identifier: Apache-2.0
"""Every kind of adapter of the installed PEFT on packed layers: it trains as on dense ones, or is refused at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import logits, random_model, zero_weights
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import ModelAdapter

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, of many kinds
    pytest.mark.compat,
]

LAYERS = ["q_proj", "k_proj", "up_proj", "down_proj"]
IDS = torch.arange(16).view(2, 8)
# What kinds need beyond the layers they adapt; sizes divide 64, 32 and 16.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 8},
    "P_TUNING": {"num_virtual_tokens": 4},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 16},
}
NEEDS_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")
LORA: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "the head beside it": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": [1, 2]},
    "use_dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "modules_to_save": {"modules_to_save": ["gate_proj"]},
    "target_parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
}
REFUSED_LORA = ("use_dora", "pissa", "olora", "modules_to_save", "target_parameters")
KINDS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "XLORA")


def made(packed: bool, **settings: Any) -> Any:
    adapter = ModelAdapter.of(random_model(intermediate_size=64, num_hidden_layers=1, **settings))
    zero_weights(adapter, 0.5)
    if packed:
        pack_model(adapter)
    return adapter.model


def config_of(kind: str) -> Callable[[], Any]:
    config = next(made for each, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if each.value == kind)
    settings = {"task_type": "CAUSAL_LM", "target_modules": LAYERS, **SETTINGS.get(kind, {})}
    known = getattr(config, "__dataclass_fields__", settings)
    used = {name: each for name, each in settings.items() if name in known and each is not None}
    return lambda: config(**copy.deepcopy(used))


def lora_of(name: str) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=2, target_modules=LAYERS, task_type="CAUSAL_LM", **copy.deepcopy(LORA[name]))


@contextmanager
def same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def adapted(packed: bool, config: Callable[[], Any], **settings: Any) -> Any:
    base = made(packed, **settings)
    with same_numbers():
        model = peft.get_peft_model(base, config())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # most adapters begin with zeros, of which nothing shows
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: Any, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    extra = {"task_ids": torch.zeros(2, dtype=torch.long)} if kind in NEEDS_TASKS else {}
    model.train()
    with same_numbers():
        out = model(input_ids=IDS, labels=IDS, **extra)
    out.logits.float().square().mean().backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(adapter: str, config: Callable[[], Any], **settings: Any) -> None:
    wanted, wanted_gradients = gradients(adapted(False, config, **settings), adapter)
    model = adapted(True, config, **settings)
    assert any(isinstance(module, mk.MosaicLinear) for module in model.modules())
    found, found_gradients = gradients(model, adapter)
    # each of 7 products, forwards and backwards, adds an error of its fp32 sum of 64 terms
    bound = 2 * 7 * 4 * torch.finfo(torch.float32).eps * 64**0.5
    assert float((found - wanted).norm() / wanted.norm()) <= bound
    assert found_gradients.keys() == wanted_gradients.keys()
    assert found_gradients
    for name, each in wanted_gradients.items():
        assert float((found_gradients[name] - each).norm()) <= bound * max(float(each.norm()), 1e-6), name


def check_refused(config: Callable[[], Any], **settings: Any) -> None:
    base = made(True, **settings)
    before, wanted = [(name, type(module)) for name, module in base.named_modules()], logits(base)
    with pytest.raises(UsageError, match=r"dequantize\(\)"):
        peft.get_peft_model(base, config())
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert torch.equal(logits(base), wanted)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=LAYERS))  # and plain LoRA still fits


def documented() -> dict[str, str]:
    """What docs/peft.md says of each kind: ``works``, ``refused`` or ``other parts``."""
    text = (Path(__file__).parents[1] / "docs" / "peft.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (works|refused|other parts) \|", text, flags=re.MULTILINE)
    return {kind.strip("` "): verdict for kinds, verdict in rows for kind in kinds.split(",")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str) -> None:
    try:
        config = config_of(kind)
        peft.get_peft_model(made(False), config())
    except ImportError as error:
        pytest.skip(f"PEFT's {kind} needs another package: {error}")
    verdict = documented().get(kind, "refused")  # kinds that nobody tried are refused
    if verdict == "refused":
        check_refused(config)
    else:
        check_same(kind, config)


@pytest.mark.parametrize("name", LORA)
def test_settings_of_lora(name: str) -> None:
    settings = {"kind": "qwen2"} if name.startswith("bias") else {}  # which has biases
    if name in REFUSED_LORA:
        check_refused(lora_of(name), **settings)
    else:
        check_same("LORA", lora_of(name), **settings)


def test_every_documented_kind_is_one() -> None:
    assert {kind for kind in documented() if kind not in ("XLORA", *KINDS)} == set()


def test_a_mixture_of_loras(tmp_path: Path) -> None:
    for number in "01":
        adapted(True, lora_of("gaussian")).save_pretrained(tmp_path / number)
    adapters = {number: str(tmp_path / number) for number in "01"}
    losses = []
    for packed in (False, True):
        base = made(packed)
        base.config.use_cache = False
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=adapters, xlora_depth=1)
        with same_numbers():
            model = peft.get_peft_model(base, config)
        losses.append(model.train()(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", ["LORA", "IA3", "ADALORA", "OFT", "VERA", "FOURIERFT", "RANDLORA", "WAVEFT"])
def test_no_kind_merges(kind: str) -> None:
    model = adapted(True, config_of(kind)).eval()
    wanted = logits(model)
    for merge in (model.merge_and_unload, model.base_model.merge_adapter, first_adapter(model).merge):
        with pytest.raises(UsageError, match=r"cannot be merged into packed.*dequantize\(\)"):
            merge()
    assert torch.equal(logits(model), wanted)
    again = model.unload()
    assert isinstance(again.model.layers[0].mlp.up_proj, mk.MosaicLinear)
    assert torch.equal(logits(again), logits(made(True)))


def first_adapter(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer))


def test_a_merge_that_would_stop_halfway_does_not_begin() -> None:
    base = made(True)
    base.model.layers[0].self_attn.q_proj = base.model.layers[0].self_attn.q_proj.to_dense()
    model = adapted_in(base)
    before = first_adapter(model).get_base_layer().weight.detach().clone()
    with pytest.raises(UsageError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(first_adapter(model).get_base_layer().weight, before)


def adapted_in(base: Any) -> Any:
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False))


def test_kinds_that_are_refused_may_adapt_dense_layers() -> None:
    base = made(True)
    for block in base.model.layers:
        block.self_attn.o_proj = block.self_attn.o_proj.to_dense()
    model = peft.get_peft_model(base, peft.LoHaConfig(r=2, target_modules=["o_proj"]))
    merged = model.merge_and_unload()  # no packed layer has an adapter
    assert isinstance(merged.model.layers[0].mlp.up_proj, mk.MosaicLinear)


def test_all_linear_layers_are_asked_as_well() -> None:
    check_refused(lambda: peft.LoHaConfig(r=2, target_modules="all-linear"))


def test_parameters_are_counted_without_the_bits() -> None:
    base = made(True)
    dense = sum(p.numel() for name, p in made(False).named_parameters() if "_proj" not in name)
    kept = sum(module.nnz for module in base.modules() if isinstance(module, mk.MosaicLinear))
    assert base.num_parameters() == dense + kept
    assert made(False).num_parameters() > base.num_parameters()
    model = adapted_in(base)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters() == (added, dense + kept + added)
    assert base.num_parameters(only_trainable=True) == added

# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT on packed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from small_models import composite, load, logits, prompt, save
from transformers.integrations import peft as integration

from mosaic_kernels.errors import UsageError

peft = pytest.importorskip("peft")

# peft asks every model for what the second mark lets pass
pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(params=["float", "int8"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    base = load(save(composite(weights=request.param), tmp_path))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "o_proj"]))


def test_trains(model: Any) -> None:
    packed = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any("lora_A" in name and "up_proj" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=prompt(), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert all(torch.equal(p, packed[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_transformers_lets_its_trainer_train(model: Any) -> None:
    from transformers import trainer_utils

    if not hasattr(trainer_utils, "validate_quantization_for_training"):
        pytest.skip("this transformers has the check inside Trainer only")
    trainer_utils.validate_quantization_for_training(model)


@pytest.mark.parametrize("safe", [False, True])
def test_does_not_merge_into_packed_weights(model: Any, safe: bool) -> None:
    with pytest.raises(UsageError, match=r"cannot be merged into packed.*dequantize"):
        model.merge_and_unload(safe_merge=safe)


def test_merges_into_dense_weights(tmp_path: Path) -> None:
    base = load(save(composite(), tmp_path)).dequantize()
    before = base.model.layers[1].mlp.up_proj.weight.detach().clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    update = model.base_model.model.model.layers[1].mlp.up_proj.get_delta_weight("default")
    after = model.merge_and_unload().model.layers[1].mlp.up_proj.weight
    assert update.norm() > 0
    assert torch.equal(after, before + update)


def test_adapters_of_transformers_own_integration_save_and_load(tmp_path: Path) -> None:
    wanted = getattr(integration, "MIN_PEFT_VERSION", "0")  # 5.24 wants one that nobody had released by December 2026
    if Version(wanted) > Version(peft.__version__):
        pytest.skip(f"transformers {transformers.__version__} adds adapters with PEFT {wanted}, not {peft.__version__}")
    base = save(composite(), tmp_path / "base")
    model = load(base)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    again = load(base)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))

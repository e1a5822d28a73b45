# SPDX-License-Identifier: Apache-2.0
"""Models inside something else: pruned as they are, or refused with words that say what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import load, logits, prompt, random_model
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.errors import MosaicError, UnsupportedModelError, UsageError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.wrappers import quantized_by, require_prunable

QUICK: dict[str, Any] = {
    "sparsity": 0.5, "samples": 2, "seqlen": 16, "solver": "wanda", "policy": "uniform", "calibration": "random",
}  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.slow, id="compiled"),
        pytest.param(nn.DataParallel, id="parallel"),
    ],
)
def test_what_is_inside_is_pruned_and_the_wrapper_computes_with_it(wrap: Any, tmp_path: Path) -> None:
    model = random_model()
    wrapped = wrap(model)
    dense = logits(wrapped)
    mk.prune(wrapped, output_dir=tmp_path / "out", **QUICK)
    assert any(isinstance(module, MosaicLinear) for module in model.modules())
    with torch.no_grad():
        found = wrapped(input_ids=prompt()).logits
    assert torch.allclose(found, logits(load(tmp_path / "out")), atol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)


def _adapted(target: str) -> Any:
    import peft

    return peft.get_peft_model(random_model(), peft.LoraConfig(r=2, target_modules=[target]))


# PEFT reads a property that transformers 5.24 calls deprecated
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@peft_warns
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_an_adapter_must_be_merged_first(target: str) -> None:
    model = _adapted(target)
    for given in (model, model.get_base_model(), nn.DataParallel(model)):
        with pytest.raises(UsageError, match=r"carries an adapter .* model = model\.merge_and_unload\(\)"):
            mk.prune(given, **QUICK)
    mk.prune(model.merge_and_unload(), **QUICK)


@peft_warns
def test_adapter_folders(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "both")
    for name, said in (("both", "beside the weights"), ("only", "and no model")):
        _adapted("q_proj").save_pretrained(tmp_path / name)
        with pytest.raises(MosaicError, match=f"holds an adapter .*{said}: merge it first"):
            load_model(tmp_path / name)
        with pytest.raises(MosaicError, match="holds an adapter"):
            mk.prune(tmp_path / name, output_dir=tmp_path / "out", **QUICK)


def test_offloaded_weights(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "dense")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    model = load(tmp_path / "dense", device_map=places, offload_folder=str(tmp_path / "offload"))
    with pytest.raises(UsageError, match=r"model\.layers\.1\.\S+ is offloaded .*without device_map"):
        mk.prune(model, **QUICK)


class DistributedDataParallel(nn.Module):  # the real one needs a process group
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _other(**config: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="other", **config)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: DistributedDataParallel(random_model()), UsageError, r"DistributedDataParallel.*pass model\.module"),
        (
            lambda: nn.Linear(2, 2),
            UsageError,
            "cannot prune Linear: pass a directory, a hub id or a Hugging Face model",
        ),
        (lambda: 5, UsageError, "cannot prune int"),
        (lambda: _other(is_encoder_decoder=True), UnsupportedModelError, "has an encoder and a decoder"),
        (lambda: _other(vision_config={}), UnsupportedModelError, "also reads images or sound"),
        (lambda: _other(quantization_config={"quant_method": "gptq"}), UnsupportedModelError, "quantized with 'gptq'"),
    ],
)
def test_other_models_are_refused_by_name(model: Any, error: type[MosaicError], message: str) -> None:
    with pytest.raises(error, match=message):
        require_prunable(model())


def test_the_method_is_named_as_configs_name_it() -> None:
    from transformers import BitsAndBytesConfig

    assert quantized_by(SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_8bit=True))) == "bitsandbytes"
    assert quantized_by(SimpleNamespace()) is None

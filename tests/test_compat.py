# SPDX-License-Identifier: Apache-2.0
"""Features that a release of transformers, PEFT or torch may break; `.ci/compat` tests the oldest and the newest."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import KINDS, load, random_model, save, zero_weights
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels import compat, decode
from mosaic_kernels.checkpoint import register_with_transformers
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import UsageError
from mosaic_kernels.evaluate.latency import latencies
from mosaic_kernels.models import ModelAdapter

pytestmark = pytest.mark.compat

NEW_TOKENS, BLOCKS = 12, 3


def prompt() -> Tensor:
    return torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(3))


def sparse(kind: str = "llama", weights: Any = "float") -> tuple[Any, Any]:
    """A dense model with zeros, and the same model packed."""
    dense = random_model(kind, initializer_range=0.2).requires_grad_(False)
    zero_weights(ModelAdapter.of(dense), 0.5)
    adapter = ModelAdapter.of(copy.deepcopy(dense))
    pack_model(adapter, weights)
    return dense, adapter


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and the dense form of its model."""
    dense, adapter = sparse(request.param)
    return save(adapter, tmp_path_factory.mktemp(request.param)), dense


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sparse()[1], tmp_path_factory.mktemp("llama"))


def generate(model: Any, **options: Any) -> list[int]:
    ids: Tensor = model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return ids[0, prompt().shape[1] :].tolist()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=prompt()).logits
    return found


def test_this_release_is_known() -> None:
    for kind in KINDS:
        assert compat.why_not_native(compat.decoder_layer(kind)) is None
    assert compat.why_not_native() is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_natively_what_the_dense_model_does(written: tuple[Path, Any], cache: str) -> None:
    path, dense = written
    wanted = generate(dense)
    assert len(set(wanted)) > 2  # a model that repeats itself would hide a cache that is off by one
    model = load(path)
    assert decode.native_tokens(model) == [0] * BLOCKS
    assert generate(model, cache_implementation=cache) == wanted
    assert decode.native_tokens(model) == [NEW_TOKENS - 1] * BLOCKS  # the prompt is read by the modules
    assert generate(model.dequantize(), cache_implementation=cache) == wanted


def test_a_prepared_model_does_too(written: tuple[Path, Any]) -> None:
    path, dense = written
    model = mk.prepare_inference(load(path))
    assert compat.attention_of(model.config) == "mosaic_sdpa"
    assert generate(model) == generate(dense)
    assert decode.native_tokens(model) == [NEW_TOKENS - 1] * BLOCKS


@pytest.mark.parametrize("weights", ["int8", "int8-group"])
def test_int8_checkpoints(tmp_path: Path, weights: str) -> None:
    model = load(save(sparse(weights=weights)[1], tmp_path))
    assert generate(model) == generate(load(tmp_path).dequantize())
    assert decode.native_tokens(model) == [NEW_TOKENS - 1] * BLOCKS


def test_copies_count_anew(checkpoint: Path) -> None:
    model = load(checkpoint)
    generate(model)
    assert decode.native_tokens(copy.deepcopy(model)) == [0] * BLOCKS


def test_latency_is_measured_natively(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert latencies([model], prompt_tokens=4, new_tokens=5, repeats=1)[0].decode_tokens_per_s > 0
    assert decode.native_tokens(model) == [2 * 5] * BLOCKS  # one run warms up


def test_saves_and_loads_again(written: tuple[Path, Any], tmp_path: Path) -> None:
    model = load(written[0])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert all(isinstance(layer, mk.MosaicLinear) for _, _, layer in ModelAdapter.of(again).projections())
    model.dequantize().save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert not any(isinstance(module, mk.MosaicLinear) for module in dense.modules())
    assert generate(dense) == generate(again)


def test_registers_once_and_says_what_it_can(checkpoint: Path) -> None:
    for _ in range(2):
        register_with_transformers()
    quantizer = load(checkpoint).hf_quantizer
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    assert quantizer.is_serializable()
    assert quantizer.quantization_config.quant_method == "mosaic"


def test_remote_code_registers_the_format(checkpoint: Path, tmp_path: Path) -> None:
    torch.save((prompt(), logits(load(checkpoint))), tmp_path / "wanted.pt")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "ids, wanted = torch.load(sys.argv[2]); "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "assert torch.equal(model(input_ids=ids).logits, wanted)"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "wanted.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_pruning_and_recovery(tmp_path: Path, tokenizer: Any) -> None:
    """Blocks get the arguments that this release passes; the masked adapters of recovery are merged."""
    random_model(vocab_size=4096).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    report = mk.prune(
        tmp_path / "dense", output_dir=tmp_path / "out", sparsity=0.5, calibration="random", samples=4, seqlen=16,
        category="composite", recover="lora",
    )  # fmt: skip
    assert report["removed_parameters"] / report["prunable_parameters"] == pytest.approx(0.5, abs=1e-3)
    model = load(tmp_path / "out")
    assert generate(model) == generate(load(tmp_path / "out").dequantize())
    assert decode.native_tokens(model) == [NEW_TOKENS - 1] * BLOCKS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_of_peft(checkpoint: Path) -> None:
    base = load(checkpoint)
    before = logits(base)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, settings)
    after = model(input_ids=prompt(), labels=prompt())
    assert not torch.allclose(after.logits, before, atol=1e-3)
    after.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(generate(model)) == NEW_TOKENS
    with pytest.raises(UsageError, match="cannot be merged into packed"):
        model.merge_and_unload()
    merged = peft.get_peft_model(load(checkpoint).dequantize(), settings).merge_and_unload()
    assert len(generate(merged)) == NEW_TOKENS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_cache_has_a_name(checkpoint: Path) -> None:
    """Also for a module that passes all its arguments on, and for a user's own class."""

    class Older(nn.Module):
        def forward(self, x: Tensor, past_key_values: Any = None) -> Any: ...

    model = load(checkpoint)
    name = compat.cache_name(model)
    assert {compat.cache_name(part) for part in (model.model, model.model.layers[0].self_attn)} == {name}
    assert compat.cache_name(peft.get_peft_model(load(checkpoint), peft.LoraConfig(target_modules=["q_proj"]))) == name
    assert compat.cache_name(torch.compile(model, backend="eager")) == name  # type: ignore[arg-type]
    assert compat.cache_name(Older()) == "past_key_values"
    out = model(input_ids=prompt(), use_cache=True)
    assert compat.cache_of(out).get_seq_length() == prompt().shape[1]
    assert getattr(out, name) is compat.cache_of(out)
    with torch.no_grad():
        step = model(input_ids=prompt()[:, :1], **compat.with_cache(model, compat.cache_of(out)))
    assert compat.cache_of(step).get_seq_length() == prompt().shape[1] + 1
    assert decode.native_tokens(model) == [1] * BLOCKS


class _Renamed(nn.Module):
    """A decoder block as a later release might have it."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, position_ids: Any = None, memory: Any = None,
                use_cache: bool = False, position_embeddings: Any = None, **options: Any) -> Any: ...  # fmt: skip


def test_names_that_are_gone_are_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    why_not = compat.why_not_native(_Renamed)
    assert why_not is not None
    assert why_not.endswith("_Renamed.forward has no argument cache or past_key_values")
    wanted = generate(load(checkpoint))
    monkeypatch.setattr(compat, "_CAPTURING", "transformers.utils.elsewhere")
    with caplog.at_level(logging.WARNING, "mosaic_kernels"):
        model = load(checkpoint)
        load(checkpoint)
    why_not = compat.why_not_native()
    assert why_not is not None
    assert "transformers.utils.elsewhere has no _active_collector" in why_not
    assert [record.message for record in caplog.records] == [  # one for each model
        f"this model is slower than it could be: {BLOCKS} of {BLOCKS} blocks take no token natively ({why_not}). "
        "mk.explain(model) says more"
    ] * 2
    assert generate(model) == wanted
    assert decode.native_tokens(model) == [0] * BLOCKS


def test_an_attention_setting_that_is_not_found_is_not_trusted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint)
    assert compat.attention_setting(model.config) is not None
    monkeypatch.setattr(compat, "_ATTENTION", "_elsewhere")
    assert compat.attention_setting(model.config) is None
    wanted = generate(load(checkpoint).dequantize())
    assert generate(model) == wanted
    assert decode.native_tokens(model) == [0] * BLOCKS

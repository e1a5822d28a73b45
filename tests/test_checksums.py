# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a checkpoint, and the checksums it is compared with on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    composite,
    cut_block,
    edit_json,
    edit_tensors,
    load,
    logits,
    prompt,
    random_model,
    save,
    zero_weights,
)
from torch import nn

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import ModelLoadError
from mosaic_kernels.models import ModelAdapter

# --- the numbers in config.json ---


def _cut(query: int, channels: int, **options: Any) -> ModelAdapter:
    adapter = ModelAdapter.of(random_model(num_key_value_heads=4, **options))
    for block in adapter.blocks:
        cut_block(adapter, block.index, query=query, key_value=query, channels=channels)
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    return adapter


@pytest.mark.parametrize(("query", "written"), [(2, 2), (3, 4)])
def test_equal_blocks_have_their_numbers_in_the_config(query: int, written: int, tmp_path: Path) -> None:
    """Llama's configuration takes no 3 heads for 64 features: the file holds the next number it takes."""
    from transformers import StaticCache

    adapter = _cut(query, 24)
    save(adapter, tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    adapter.model.save_pretrained(tmp_path / "three")  # type: ignore[operator]
    for name in ("one", "two", "three"):
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert (content["num_attention_heads"], content["num_key_value_heads"]) == (written, written)
        assert (content["head_dim"], content["intermediate_size"]) == (16, 24)
        model = load(tmp_path / name)
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (query, query)
        cache = StaticCache(config=model.config, max_cache_len=16)
        cache.early_initialization(2, query, 16, torch.float32, "cpu")
        with torch.no_grad():
            found = model(prompt(), **_with_cache(model, cache)).logits
        assert torch.allclose(found, logits(adapter.model), atol=1e-5)


def _with_cache(model: Any, cache: Any) -> dict[str, Any]:
    from mosaic_kernels.compat import with_cache

    return with_cache(model, cache)


def test_checkpoints_with_the_numbers_of_before_still_load(tmp_path: Path) -> None:
    adapter = _cut(2, 24)
    save(adapter, tmp_path)

    def before(content: dict[str, Any]) -> None:
        content.update(num_attention_heads=4, num_key_value_heads=4, intermediate_size=40)
        del content["quantization_config"]["checksums"], content["verify"]

    edit_json(tmp_path / "config.json", before)
    model = load(tmp_path)
    assert torch.equal(logits(model), logits(adapter.model))
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (2, 24)


# --- checksums ---


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "20KB"}, {"format": "dense"}])
def test_verify_sees_one_bit_of_any_tensor(form: dict[str, Any], tmp_path: Path) -> None:
    from mosaic_kernels.checkpoint.checksums import _places

    save(composite(tie_word_embeddings=True), tmp_path, **form)
    load(tmp_path, verify=True)
    load(tmp_path, verify=True, dtype=torch.bfloat16)  # the bytes of the file count, not what they are cast to
    for file in tmp_path.glob("*.safetensors"):
        content = file.read_bytes()
        for place in _places(file)[::5]:
            changed = bytearray(content)
            changed[place.start + place.size - 1] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ModelLoadError, match=rf"the bytes of {place.name} are not as they were written"):
                load(tmp_path, verify=True)
        file.write_bytes(content)
    load(tmp_path, verify=True)


def test_verify_passed_in_the_quantization_config(mosaic: Path) -> None:
    from mosaic_kernels.checkpoint.quantizer import MosaicConfig

    edit_tensors(mosaic, lambda t: t["model.norm.weight"].mul_(2))
    with (
        pytest.warns(UserWarning, match="loading attributes"),
        pytest.raises(ModelLoadError, match=r"model\.norm\.wei"),
    ):
        load(mosaic, quantization_config=MosaicConfig(verify=True))
    model = load(mosaic)  # not asked for, it is not compared
    assert "verify" not in model.config.quantization_config.to_dict()
    assert model.config.verify is False


def test_checkpoints_without_checksums(mosaic: Path) -> None:
    edit_json(mosaic / "config.json", lambda c: c["quantization_config"].pop("checksums"))
    load(mosaic)
    with pytest.raises(ModelLoadError, match="has no checksums and cannot be verified: an older release wrote it"):
        load(mosaic, verify=True)


def test_saving_brings_checksums_up_to_date(mosaic: Path, tmp_path: Path) -> None:
    model = load(mosaic)
    nn.init.ones_(model.model.norm.weight)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", verify=True)), logits(model))


def test_layers_on_disk_are_saved_with_checksums(mosaic_source: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" for i in range(3)}
    model = load(mosaic_source, device_map=places, offload_folder=str(tmp_path / "offload"))
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", verify=True)), logits(load(mosaic_source)))

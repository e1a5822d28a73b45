# SPDX-License-Identifier: Apache-2.0
"""Save and load in one process: what comes back is what was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_models import KINDS, composite, cut_block, load, logits, prompt, random_model, save, shapes, zero_weights

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.autoload import MosaicAutoConfig
from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import UsageError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_different_shapes_come_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    adapter = composite(kind)
    before = logits(adapter.model)
    again = load(save(adapter, tmp_path))
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(adapter.model), before)  # the one in memory is still usable
    loaded = ModelAdapter.of(again)
    assert shapes(loaded) == shapes(adapter)
    for (_, name, was), (_, _, now) in zip(adapter.projections(), loaded.projections(), strict=True):
        assert type(now) is type(was), name
        assert isinstance(now, MosaicLinear) is ("o_proj" not in name)
    assert not any(p.requires_grad for m in again.modules() if isinstance(m, MosaicLinear) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = composite(dtype=dtype)
    before = logits(adapter.model)
    again = load(save(adapter, tmp_path))
    assert again.dtype == dtype
    assert torch.equal(logits(again), before)


def test_shards(tmp_path: Path) -> None:
    adapter = composite()
    before = logits(adapter.model)
    save(adapter, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert torch.equal(logits(load(tmp_path)), before)


def test_tied_embeddings(tmp_path: Path) -> None:
    adapter = composite(tie_word_embeddings=True)
    again = load(save(adapter, tmp_path))
    assert torch.equal(logits(again), logits(adapter.model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_saved_model_saves_again(tmp_path: Path) -> None:
    adapter = composite()
    first = load(save(adapter, tmp_path / "first"))
    first.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(tmp_path / "second")), logits(adapter.model))
    assert config_of(tmp_path / "second")["quantization_config"] == config_of(tmp_path / "first")["quantization_config"]


def test_a_packed_model_saves_by_itself(tmp_path: Path) -> None:
    adapter = composite()
    adapter.model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert torch.equal(logits(load(tmp_path)), logits(adapter.model))


def test_saving_describes_what_the_model_is_now(tmp_path: Path) -> None:
    model = load(save(composite(), tmp_path / "first"))
    block = ModelAdapter.of(model).blocks[1]
    dense = block.projection("mlp.up_proj").to_dense()  # type: ignore[operator]
    dense.weight.data[:, ::3] = 0
    block.replace("mlp.up_proj", MosaicLinear.from_linear(dense))
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(tmp_path / "second")), logits(model))


def test_generates_the_same(tmp_path: Path) -> None:
    adapter = composite()
    again = load(save(adapter, tmp_path))
    ids = prompt()
    wanted = adapter.model.generate(ids, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    for cache in ("dynamic", "static"):
        found = again.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation=cache)
        assert torch.equal(found, wanted), cache


def test_quantization_config(tmp_path: Path) -> None:
    adapter = composite()
    content = config_of(save(adapter, tmp_path, source="/models/some-llama"))
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert content["model_type"] == "llama"
    assert content["num_attention_heads"] == 4
    found = content["quantization_config"]
    assert (found["quant_method"], found["version"], found["format"]) == ("mosaic", 1, "bitmask")
    assert set(found["projections"]) == set(shapes(adapter))
    for block, name, layer in adapter.projections():
        dense = layer.to_dense() if isinstance(layer, MosaicLinear) else layer
        assert found["projections"][block.full_name(name)] == {
            "shape": [layer.out_features, layer.in_features],
            "nnz": int(dense.weight.count_nonzero()),
        }
    assert found["heads"]["model.layers.2"] == {"query": 2, "key_value": 1}
    assert found["provenance"] == {
        "package": "mosaic-kernels", "version": "0.1.0", "source": "some-llama", "sparsity": 0.6,
        "category": "composite", "policy": "pod", "solver": "wanda", "seed": 7,
    }  # fmt: skip


def test_files_beside_the_weights(tmp_path: Path, tokenizer: Any) -> None:
    save(composite(), tmp_path, tokenizer=tokenizer)
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md", "mosaic_report.json", "mosaic_autoload.py",
    }  # fmt: skip
    assert json.loads((tmp_path / "mosaic_report.json").read_text())["removed_parameters"] == 600
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            assert weights.metadata() == {"format": "pt"}
    assert not any(suffix in name for name in names for suffix in (".bin", ".pt", ".pkl"))


def test_few_zeros_stay_dense(tmp_path: Path) -> None:
    """Where packing would make a projection larger it is left alone, and the file says so."""
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.02)
    pack_model(adapter)
    assert not any(isinstance(layer, MosaicLinear) for _, _, layer in adapter.projections())
    entry = config_of(save(adapter, tmp_path))["quantization_config"]["projections"]["model.layers.0.mlp.up_proj"]
    assert entry == {"shape": [40, 64], "nnz": 40 * 64 - 51, "packed": False}
    assert torch.equal(logits(load(tmp_path)), logits(adapter.model))


def test_nothing_left_of_a_projection(tmp_path: Path) -> None:
    adapter = ModelAdapter.of(random_model("qwen2"))
    zero_weights(adapter, 1.0, only="up_proj")
    pack_model(adapter)
    assert adapter.blocks[0].projection("mlp.up_proj").weight.numel() == 0
    assert torch.equal(logits(load(save(adapter, tmp_path))), logits(adapter.model))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_and_uniform_needs_no_mosaic(kind: str, pack: bool, tmp_path: Path) -> None:
    adapter = ModelAdapter.of(random_model(kind))
    for block in adapter.blocks:
        cut_block(adapter, block.index, query=2, key_value=1, channels=24)
    zero_weights(adapter, 0.5)
    before = logits(adapter.model)
    if pack:
        pack_model(adapter)
    save(adapter, tmp_path, format="dense")
    content = config_of(tmp_path)
    assert "quantization_config" not in content
    assert "auto_map" not in content
    assert not (tmp_path / "mosaic_autoload.py").exists()
    wanted = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 24}
    assert {key: content[key] for key in wanted} == wanted
    again = load(tmp_path)
    assert not any(isinstance(module, MosaicLinear) for module in again.modules())
    assert torch.equal(logits(again), before)


def test_dense_and_not_uniform_keeps_its_description(tmp_path: Path) -> None:
    adapter = composite(pack=False)
    before = logits(adapter.model)
    pack_model(adapter)
    save(adapter, tmp_path, format="dense")
    assert config_of(tmp_path)["quantization_config"]["format"] == "dense"
    again = load(tmp_path)
    assert not any(isinstance(module, MosaicLinear) for module in again.modules())
    assert torch.equal(logits(again), before)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), before)
    assert "mosaic_kernels" in (tmp_path / "README.md").read_text()


def test_heads_that_a_stock_config_cannot_express(tmp_path: Path) -> None:
    """Llama's configuration wants hidden_size to be a multiple of the heads: 64 is none of 3."""
    adapter = ModelAdapter.of(random_model(num_key_value_heads=4))
    for block in adapter.blocks:
        cut_block(adapter, block.index, query=3, key_value=3, channels=40)
    save(adapter, tmp_path, format="dense")
    assert torch.equal(logits(load(tmp_path)), logits(adapter.model))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_ways_to_load(options: dict[str, Any], tmp_path: Path) -> None:
    adapter = composite()
    assert torch.equal(logits(load(save(adapter, tmp_path), **options)), logits(adapter.model))


def test_layers_on_disk(tmp_path: Path) -> None:
    adapter = composite()
    save(adapter, tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), logits(adapter.model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_at_load_is_that_of_a_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = composite()
    again = load(save(adapter, tmp_path), dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype, torch.uint8}
    cast = copy.deepcopy(adapter.model)
    for parameter in cast.parameters():  # .to(dtype) would also round the rotary frequencies
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    assert torch.equal(logits(again), logits(cast))


def test_dequantize(tmp_path: Path) -> None:
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5)
    before = logits(adapter.model)
    pack_model(adapter)
    model = load(save(adapter, tmp_path / "packed"))
    model.dequantize()
    assert not any(isinstance(module, MosaicLinear) for module in model.modules())
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), before)


def test_dequantize_keeps_shapes_that_differ(tmp_path: Path) -> None:
    model = load(save(composite(), tmp_path / "packed"))
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))


def test_generation_defaults_that_transformers_does_not_save(tmp_path: Path) -> None:
    """Published models hold a temperature without do_sample; saving must not fail on it at the end of a run."""
    adapter = composite()
    adapter.model.generation_config.temperature = 0.6  # type: ignore[union-attr]
    save(adapter, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not saved.get("do_sample")  # the dense model is greedy, so the pruned one is
    assert "temperature" not in saved
    assert not adapter.model.generation_config.do_sample  # type: ignore[union-attr]


def test_model_card(tmp_path: Path) -> None:
    source = tmp_path / "base-llama"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\ntext")
    (source / "LICENSE").write_text("the licence")
    save(composite(), tmp_path / "out", source=str(source))
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data.to_dict()
    assert data == {
        "base_model": "org/base", "base_model_relation": "quantized", "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["mosaic", "sparsity", "pruned"],
    }  # fmt: skip
    assert "| mlp.up_proj | 12,288 | 6,144 | 50.0% |" in card
    assert "600 of 1,000 prunable parameters removed (60.00%)" in card
    assert "| before | 9.50 |\n| after | 11.25 |" in card
    assert "--sparsity 0.6" in card
    assert str(tmp_path) not in card
    assert "/home/me" not in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"


def test_only_mosaic_checkpoints_take_its_config(tiny_llama: Path) -> None:
    from mosaic_kernels.checkpoint.quantizer import MosaicConfig

    with pytest.raises(UsageError, match=r"mosaic_kernels\.prune"):
        load(tiny_llama, quantization_config=MosaicConfig())


def test_the_stand_in_gives_the_stock_configuration(tmp_path: Path) -> None:
    config = random_model().config
    config.save_pretrained(tmp_path)
    MosaicAutoConfig.register_for_auto_class()
    found = MosaicAutoConfig.from_pretrained(str(tmp_path))
    assert type(found) is type(config)
    assert (found.hidden_size, found.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)


def test_registering_again_is_harmless() -> None:
    from mosaic_kernels.checkpoint import register_with_transformers

    register_with_transformers()
    register_with_transformers()


def test_real_model(tiny_llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    model, _ = load_model(tiny_llama)
    adapter = ModelAdapter.of(model)
    zero_weights(adapter, 0.6)
    pack_model(adapter)
    ids = tokenizer("It was a bright cold day", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    again, reader = load_model(save(adapter, tmp_path, tokenizer=tokenizer))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, before)
    assert reader.decode(ids[0]) == "It was a bright cold day"
    assert (tmp_path / "model.safetensors").stat().st_size < (tiny_llama / "model.safetensors").stat().st_size
    assert mk.__version__

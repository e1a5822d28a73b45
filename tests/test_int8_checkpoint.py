# SPDX-License-Identifier: Apache-2.0
"""Models with int8 values: saved, loaded, described, refused where they contradict themselves, pruned into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import QUICK, Run
from safetensors.torch import load_file, save_file
from small_models import KINDS, composite, load, logits, random_model, save

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.reader import load_model, load_skeleton
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError, ModelLoadError, MosaicError, UsageError
from mosaic_kernels.evaluate.latency import weight_bytes
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter

pytestmark = pytest.mark.usefixtures("one_thread")

INT8: tuple[Weights, ...] = ("int8", "int8-group")
UP = "model.layers.1.mlp.up_proj"


def _made(weights: Weights = "int8-group", **settings: Any) -> ModelAdapter:
    """96 features: two groups of columns, the second half full."""
    return composite(weights=weights, hidden_size=96, **settings)


def _packed(model: Any) -> list[MosaicLinear]:
    return [layer for _, _, layer in ModelAdapter.of(model).projections() if isinstance(layer, MosaicLinear)]


def _quantization_config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", INT8)
def test_comes_back_bit_by_bit(kind: str, weights: Weights, tmp_path: Path) -> None:
    adapter = _made(weights, kind=kind, dtype=torch.bfloat16)
    before = logits(adapter.model)
    again = load(save(adapter, tmp_path))
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(adapter.model), before)
    layers = _packed(again)
    assert len(layers) == 3 * 7  # also o_proj, which has no zeros: 9 bits are fewer than 16
    for was, now in zip(_packed(adapter.model), layers, strict=True):
        assert now.scales is not None
        assert now.scales.dtype == torch.float32
        assert now.scales.shape[1] == (1 if weights == "int8" else -(-now.in_features // 64))
        assert torch.equal(now.scales, was.scales)
        assert now.bias is None or now.bias.dtype == torch.bfloat16
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("weights", INT8)
def test_the_description_says_so_and_float_models_say_nothing(weights: Weights, tmp_path: Path) -> None:
    found = _quantization_config(save(_made(weights), tmp_path / "int8"))
    assert found["version"] == 1
    assert found["weights"] == {"dtype": "int8", "group": None if weights == "int8" else 64}
    assert found["projections"]["model.layers.1.self_attn.o_proj"] == {"shape": [96, 64], "nnz": 96 * 64}
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert stored[f"{UP}.weight"].dtype == torch.int8
    assert stored[f"{UP}.scales"].dtype == torch.float32
    assert "weights" not in _quantization_config(save(_made("float"), tmp_path / "float"))
    skeleton = load_skeleton(tmp_path / "int8")
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in load(tmp_path / "int8").named_parameters()
    }


def test_saves_again_and_by_itself(tmp_path: Path) -> None:
    adapter = _made()
    before = logits(adapter.model)
    first = load(save(adapter, tmp_path / "first", max_shard_size="20KB"))
    first.save_pretrained(tmp_path / "second")
    adapter.model.save_pretrained(tmp_path / "by-itself")  # type: ignore[operator]
    assert _quantization_config(tmp_path / "second") == _quantization_config(tmp_path / "first")
    for name in ("first", "second", "by-itself"):
        assert torch.equal(logits(load(tmp_path / name)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_at_load_leaves_values_and_scales_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = _made()
    again = load(save(adapter, tmp_path), dtype=dtype)
    assert again.dtype == dtype
    for was, now in zip(_packed(adapter.model), _packed(again), strict=True):
        assert torch.equal(now.weight, was.weight)
        assert torch.equal(now.scales, was.scales)
    others = {p.dtype for name, p in again.named_parameters() if not name.endswith(".scales")}
    assert others == {dtype, torch.int8, torch.uint8}
    cast = adapter.model.to(dtype)
    assert torch.equal(_packed(cast)[0].scales, _packed(again)[0].scales)


def test_layers_on_disk(tmp_path: Path) -> None:
    adapter = _made()
    save(adapter, tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert model.model.layers[1].mlp.up_proj.scales.is_meta
    assert torch.equal(logits(model), logits(adapter.model))


def test_a_projection_that_stays_dense(tmp_path: Path) -> None:
    adapter = _made()
    layer = adapter.blocks[1].projection("mlp.up_proj")
    assert isinstance(layer, MosaicLinear)
    adapter.blocks[1].replace("mlp.up_proj", layer.to_dense())
    assert _quantization_config(save(adapter, tmp_path))["projections"][UP]["packed"] is False
    assert torch.equal(logits(load(tmp_path)), logits(adapter.model))


def test_values_of_two_kinds_have_no_description(tmp_path: Path) -> None:
    adapter = _made()
    dense = adapter.blocks[1].projection("mlp.up_proj").to_dense()  # type: ignore[operator]
    for other in ("float", "int8"):
        adapter.blocks[1].replace("mlp.up_proj", MosaicLinear.from_linear(dense, other))
        with pytest.raises(UsageError, match=f"values of one kind, and these hold {other}, int8"):
            save(adapter, tmp_path)


def test_float_values_become_int8_in_place() -> None:
    once, twice = _made(), _made("float")
    pack_model(twice, "int8-group")
    assert torch.equal(logits(once.model), logits(twice.model))
    for weights in ("float", "int8"):  # what is rounded is left alone
        pack_model(twice, weights)
    assert torch.equal(logits(once.model), logits(twice.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_forms_hold_what_the_values_stand_for(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = _made(dtype=dtype)
    wanted = [mk.unpack(layer.packed).to(dtype) for layer in _packed(adapter.model)]
    save(adapter, tmp_path / "dense", format="dense")
    save(adapter, tmp_path / "packed")
    assert "weights" not in _quantization_config(tmp_path / "dense")
    model = load(tmp_path / "packed")
    model.dequantize()
    model.save_pretrained(tmp_path / "dequantized")
    for directory in (tmp_path / "dense", tmp_path / "dequantized"):
        layers = [layer for _, _, layer in ModelAdapter.of(load(directory)).projections()]
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, wanted, strict=True))


def _edited(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(f"{UP}.scales"), ModelLoadError, rf"lack {UP}\.scales"),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].bfloat16()}),
            FormatError,
            rf"{UP}\.weight: the file holds BF16 values but the config asks for I8",
        ),
        (
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].to(torch.int8)}),
            FormatError,
            rf"{UP}\.scales: the file holds I8 values but the config asks for floats",
        ),
        (
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :1].clone()}),
            FormatError,
            rf"{UP}\.scales: the file holds shape \[40, 1\] but the config asks for \[40, 2\]",
        ),
        (lambda t: t[f"{UP}.scales"].neg_(), FormatError, rf"{UP}: scales must be finite and not negative"),
        (lambda t: t[f"{UP}.scales"].fill_(torch.nan), FormatError, rf"{UP}: scales must be finite"),
        (lambda t: t[f"{UP}.weight"].fill_(-128), FormatError, rf"{UP}: int8 values lie in -127 to 127"),
        (lambda t: t[f"{UP}.bitmask"].zero_(), FormatError, rf"{UP}: the bitmask counts 0 weights"),
    ],
)
def test_files_that_contradict_the_description(
    edit: Callable[[dict[str, torch.Tensor]], Any], error: type[MosaicError], message: str, tmp_path: Path
) -> None:
    _edited(save(_made(), tmp_path), edit)
    for read in (load, load_model):
        with pytest.raises(error, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("made", "weights", "message"),
    [
        ("int8", {"dtype": "int4", "group": None}, "unknown packed values .*int4.*update mosaic-kernels"),
        ("int8", {"dtype": "int8", "group": 32}, "unknown packed values .*32"),
        ("int8", {"dtype": "int8"}, "unknown packed values"),
        ("int8", "int8", "unknown packed values 'int8'"),
        ("int8", None, r"\.weight: the file holds I8 values but the config asks for floats"),
        ("int8", {"dtype": "int8", "group": 64}, r"scales: the file holds shape \[\d+, 1\] but the config asks"),
        ("float", {"dtype": "int8", "group": None}, r"\.weight: the file holds F32 values but the config asks for I8"),
    ],
)
def test_descriptions_that_contradict_the_files(made: Weights, weights: Any, message: str, tmp_path: Path) -> None:
    config = save(_made(made), tmp_path) / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["weights"] = weights
    config.write_text(json.dumps(content))
    for read in (load, load_model):
        with pytest.raises(FormatError, match=message):
            read(tmp_path)


def test_weight_bytes_count_scales() -> None:
    layer = MosaicLinear.from_packed(mk.quantize(torch.randn(7, 128), 64))
    assert weight_bytes(layer) == 7 * 128 + 7 * 16 + 4 * 7 * 2 + 8 * 8  # values, bits, scales, row offsets


# --- the command ---


def test_the_report_tells_what_rounding_costs(run: Run, dense_dir: Path, tmp_path: Path, validation_text: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(validation_text.read_text()[:5000])
    reports = {}
    for weights in ("float", *INT8):
        options = ("--sparsity", "0.6", "--policy", "uniform", "--eval-text", text, "--weights", weights)
        result = run(dense_dir, "--output-dir", weights, "--json", *QUICK, *options)
        assert result.code == 0, result.err
        reports[weights] = json.loads(result.out)
        stored = load_file(Path(weights, "model.safetensors"))
        assert reports[weights]["bytes"]["pruned"] == sum(t.nbytes for t in stored.values())
        assert reports[weights]["weights"] == weights
    assert "before_int8" not in reports["float"]["perplexity"]
    for weights in INT8:
        found, plain = reports[weights], reports["float"]
        assert found["removed_parameters"] == plain["removed_parameters"]
        assert found["projections"] == plain["projections"]  # a weight that rounds to 0 is still kept
        assert found["bytes"]["dense"] == plain["bytes"]["dense"]
        assert found["bytes"]["pruned"] < plain["bytes"]["pruned"]
        assert found["perplexity"]["before_int8"] == plain["perplexity"]["pruned"]
        assert found["perplexity"]["pruned"] != found["perplexity"]["before_int8"]
        card = Path(weights, "README.md").read_text()
        assert "values are int8" in card
        assert f"| pruned, before int8 | {plain['perplexity']['pruned']:.2f} |" in card
        assert {layer.packed.weights for layer in _packed(load(Path(weights)))} == {"int8"}  # 64 features or fewer


def test_the_table_tells_it_too(run: Run, dense_dir: Path, tmp_path: Path, validation_text: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(validation_text.read_text()[:2000])
    options = ("--sparsity", "0.5", "--policy", "uniform", "--eval-text", text, "--weights", "int8")
    result = run(dense_dir, "--output-dir", "out", *QUICK, *options)
    assert result.code == 0, result.err
    assert ", weights int8" in result.out
    assert "before int8)" in result.out


@pytest.mark.parametrize("options", [("--sparsity", "0"), ("--category", "structured", "--sparsity", "0.4")])
def test_without_zeros_every_weight_is_rounded(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    random_model(dtype=torch.bfloat16, hidden_size=96).save_pretrained(tmp_path / "model")
    options = (*options, "--policy", "uniform", "--weights", "int8-group")
    result = run(tmp_path / "model", "--output-dir", "out", "--json", *QUICK, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["unstructured_zeros"] == 0
    layers = _packed(load(Path("out")))
    assert len(layers) == 3 * 7
    assert all(layer.density == 1 for layer in layers)
    plan = json.loads(run(tmp_path / "model", "--dry-run", "--json", *options).out)
    assert plan["bytes"] == report["bytes"]


def test_a_rounded_model_can_be_pruned_again(run: Run, dense_dir: Path) -> None:
    quick = (*QUICK, "--policy", "uniform", "--category", "unstructured", "--json")
    assert run(dense_dir, "--output-dir", "first", "--sparsity", "0.3", "--weights", "int8", *quick).code == 0
    result = run("first", "--output-dir", "second", "--sparsity", "0.6", *quick)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["removed_parameters"] == round(0.6 * report["prunable_parameters"])
    assert report["bytes"]["dense"] == sum(p.nbytes for p in load(dense_dir).parameters())
    layers = _packed(load(Path("second")))
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}

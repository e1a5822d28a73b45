# SPDX-License-Identifier: Apache-2.0
"""Every way a directory can be wrong ends in an error that names the file or tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import load, logits, random_model, shapes

from mosaic_kernels.checkpoint.reader import check_finite, load_model, load_skeleton
from mosaic_kernels.errors import (
    EnvironmentError_,
    FormatError,
    ModelLoadError,
    MosaicError,
    NonFiniteError,
    UnsupportedModelError,
    UsageError,
)
from mosaic_kernels.models import ModelAdapter

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def dense_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "dense"
    random_model().save_pretrained(path, max_shard_size="50KB")
    return path


@pytest.fixture
def dense(dense_source: Path, tmp_path: Path) -> Path:
    """A fresh copy of a dense model in shards."""
    return Path(shutil.copytree(dense_source, tmp_path / "dense"))


def _shard(directory: Path, number: int) -> Path:
    return next(directory.glob(f"model-{number:05}-of-*.safetensors"))


def _edit_config(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "config.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def _edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_loads_ready_for_inference(dense: Path, mosaic: Path) -> None:
    for path in (dense, mosaic):
        model, tokenizer = load_model(path, dtype="float32")
        assert tokenizer is None
        assert not model.training
        assert torch.equal(logits(model), logits(load(path)))
    assert load_model(dense, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(dense, dtype=torch.float16)[0].dtype == torch.float16


def test_skeleton_has_shapes_and_no_weights(dense: Path, mosaic: Path) -> None:
    for path in (dense, mosaic):
        skeleton = load_skeleton(path)
        assert all(p.is_meta for p in skeleton.parameters())
        assert shapes(ModelAdapter.of(skeleton)) == shapes(ModelAdapter.of(load(path)))
        assert {n: p.shape for n, p in skeleton.named_parameters()} == {
            n: p.shape for n, p in load(path).named_parameters()
        }
    assert load_skeleton(dense, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda d: shutil.rmtree(d), ModelLoadError, "no such directory"),
        (lambda d: (d / "config.json").unlink(), ModelLoadError, "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), ModelLoadError, "config.json is not readable as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), ModelLoadError, "does not hold a JSON object"),
        (lambda d: [f.unlink() for f in d.glob("*.safetensors*")], ModelLoadError, "a config but no weights"),
        (lambda d: _shard(d, 2).unlink(), ModelLoadError, "lacks the shard model-00002-of"),
        (lambda d: _edit_config(d, lambda c: c.update(model_type="gpt2")), UnsupportedModelError, "'gpt2' is not supp"),
        (lambda d: _edit_config(d, lambda c: c.pop("model_type")), UnsupportedModelError, "None is not supported"),
        (
            lambda d: _edit_config(d, lambda c: c.update(architectures=["LlamaForSequenceClassification"])),
            UnsupportedModelError,
            "LlamaForSequenceClassification is not a causal language model",
        ),
        (
            lambda d: _edit_config(d, lambda c: c.update(quantization_config={"quant_method": "gptq"})),
            UnsupportedModelError,
            "quantized with 'gptq'",
        ),
        (lambda d: _edit_config(d, lambda c: c.update(num_hidden_layers=4)), ModelLoadError, "lack model.layers.3."),
        (lambda d: _edit_config(d, lambda c: c.update(intermediate_size=48)), ModelLoadError, "does not load"),
        (lambda d: _edit_config(d, lambda c: c.update(hidden_size="wide")), ModelLoadError, "does not load"),
        (lambda d: (d / "tokenizer.json").write_text("{"), ModelLoadError, "its tokenizer does not load"),
    ],
)
def test_dense_directories_that_are_wrong(
    dense: Path, break_it: Callable[[Path], Any], error: type[MosaicError], message: str
) -> None:
    break_it(dense)
    with pytest.raises(error, match=message) as caught:
        load_model(dense)
    assert type(caught.value) is error
    assert str(dense) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_cut_shard_is_named(dense: Path, keep: int) -> None:
    file = _shard(dense, 3)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model-00003-of-\d+\.safetensors is truncated or corrupt"):
        load_model(dense)


def test_a_header_of_garbage_is_named(dense: Path) -> None:
    file = _shard(dense, 1)
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ModelLoadError, match=r"model-00001-of-\d+\.safetensors is truncated or corrupt"):
        load_model(dense)


def _projection(change: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["quantization_config"]["projections"][UP].update(change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["quantization_config"].update(version=2), "format version 2 and this release reads version 1"),
        (lambda c: c["quantization_config"].update(format="ternary"), "unknown mosaic format 'ternary'"),
        (_projection({"shape": [39, 64]}), r"gate_proj: out_features is 40 but out_features of mlp\.up_proj is 39"),
        (_projection({"shape": [40]}), rf"{UP}: its entry must be"),
        (_projection({"shape": [40, -64]}), rf"{UP}: shape and nnz must be whole numbers"),
        (_projection({"nnz": 4000}), rf"{UP}: 4000 weights do not fit into 40x64"),
        (_projection({"nnz": 7}), rf"{UP}\.weight: the file holds shape \[1280\] but the config asks for \[7\]"),
        (
            _projection({"nnz": 2560}),
            rf"{UP}\.weight: the file holds shape \[1280\] but the config asks for \[40, 64\]",
        ),
        (
            lambda c: c["quantization_config"]["projections"].update(
                {"model.layers.9.mlp.up_proj": {"shape": [2, 2], "nnz": 1}}
            ),
            r"model\.layers\.9\.mlp\.up_proj: described in quantization_config, but the model has no such",
        ),
        (
            lambda c: c["quantization_config"]["heads"].update({"model.layers.2": {"query": 2, "key_value": 2}}),
            r"model\.layers\.2: heads are described as",
        ),
    ],
)
def test_descriptions_that_contradict_something(
    mosaic: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _edit_config(mosaic, edit)
    for read in (load, load_model):
        with pytest.raises(FormatError, match=message):
            read(mosaic)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(f"{UP}.bitmask"), ModelLoadError, rf"lack {UP}\.bitmask"),
        (lambda t: t.pop(f"{UP}.weight"), ModelLoadError, rf"lack {UP}\.weight"),
        (lambda t: t.pop("model.norm.weight"), ModelLoadError, r"lack model\.norm\.weight"),
        (lambda t: t[f"{UP}.bitmask"].zero_(), FormatError, rf"{UP}: the bitmask counts 0 weights but 1280 values"),
        (lambda t: t[f"{UP}.bitmask"][0, 0].bitwise_xor_(1), FormatError, rf"{UP}: the bitmask counts 1\d\d\d weights"),
    ],
)
def test_weights_that_contradict_the_description(
    mosaic: Path, edit: Callable[[dict[str, torch.Tensor]], Any], error: type[MosaicError], message: str
) -> None:
    _edit_weights(mosaic, edit)
    for read in (load, load_model):
        with pytest.raises(error, match=message):
            read(mosaic)


@pytest.mark.parametrize("dtype", ["int8", "auto ", torch.float64])
def test_dtypes(dense: Path, dtype: Any) -> None:
    with pytest.raises(UsageError, match="use auto, float32, bfloat16, float16"):
        load_model(dense, dtype=dtype)


@pytest.mark.parametrize("name", ["some-org/some-model", "some-model"])
def test_a_hub_id_without_the_hub(name: str) -> None:
    with pytest.raises(EnvironmentError_, match=f"{name} is not a local directory and the hub cannot be reached"):
        load_model(name)


@pytest.mark.parametrize("name", ["/not/there", "./not-there", "not/there/either", "not-there/"])
def test_a_path_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such directory"):
        load_model(name)


def test_a_file_is_no_model(dense: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file; give the directory"):
        load_model(dense / "config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = random_model(dtype=torch.bfloat16)
    check_finite(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(NonFiniteError, match=rf"{UP}\.weight: 1 of 2560 weights"):
        check_finite(model)

# SPDX-License-Identifier: Apache-2.0
"""What a mosaic checkpoint must not load with, and every way in which it must load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import composite, edit_json, edit_tensors, load, logits, prompt, random_model, save, zero_weights

from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import EnvironmentError_, FormatError, ModelLoadError, MosaicError, NonFiniteError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(composite(), tmp_path_factory.mktemp("source") / "sharded", max_shard_size="20KB")


@pytest.fixture
def sharded(sharded_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (f"{UP}.weight", float("nan"), NonFiniteError),
        (f"{UP}.weight", -float("inf"), NonFiniteError),
        (f"{UP}.weight", 0.0, FormatError),
        (f"{UP}.weight", -0.0, FormatError),
        ("model.layers.0.self_attn.o_proj.weight", float("nan"), NonFiniteError),
        ("model.embed_tokens.weight", float("inf"), NonFiniteError),
        ("model.norm.weight", float("nan"), NonFiniteError),
        ("lm_head.weight", float("nan"), NonFiniteError),
    ],
)
def test_values_that_nothing_writes(
    dtype: torch.dtype, name: str, value: float, error: type[MosaicError], tmp_path: Path
) -> None:
    save(composite(dtype=dtype), tmp_path)
    edit_tensors(tmp_path, lambda t: t[name].view(-1)[5:6].fill_(value))
    for read in (load, load_model):
        with pytest.raises(error, match=rf"^{name}: 1 of \d+ "):
            read(tmp_path)


def test_a_chunk_of_values_ends_where_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from mosaic_kernels.checkpoint import values

    monkeypatch.setattr(values, "_CHUNK", 16)
    for place in (0, 15, 16, 39):
        for value, error in ((float("nan"), NonFiniteError), (0.0, FormatError)):
            given = torch.ones(40)
            values.check_values("w", given, packed=True, stored="F32")
            given[place] = value
            with pytest.raises(error, match="w: 1 of 40"):
                values.check_values("w", given, packed=True, stored="F32")


def test_values_that_a_cast_makes_zero_load_and_those_that_overflow_do_not(tmp_path: Path) -> None:
    save(composite(), tmp_path)
    edit_tensors(tmp_path, lambda t: t[f"{UP}.weight"][5:6].fill_(1e-30))
    load(tmp_path, dtype=torch.float16)
    edit_tensors(tmp_path, lambda t: t[f"{UP}.weight"][5:6].fill_(1e30))
    load(tmp_path)
    with pytest.raises(NonFiniteError, match="NaN or Inf in float16; the file holds F32 values"):
        load(tmp_path, dtype=torch.float16)


# --- the description ---


def _deep(depth: int = 200) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("heads",), 5, "^heads of quantization_config in config.json must be a table, got 5"),
        (("heads",), [1], "^heads .* must be a table"),
        (("heads", "model.layers.0"), [2, 1], r"^heads\['model.layers.0'\] .* must be a table"),
        (("heads", "model.layers.0", "query"), "2", r"heads\['model.layers.0'\].query .* whole number"),
        (("heads", "model.layers.0", "query"), True, r"heads\['model.layers.0'\].query .* whole number"),
        (("heads", "model.layers.9"), {"query": 1, "key_value": 1}, "layers.9: its heads are described"),
        (("projections",), "x", "^projections .* must be a table"),
        (("projections", UP), None, rf"^projections\['{UP}'\] .* must be a table"),
        (("projections", UP, "shape"), {"a": 1}, rf"^{UP}: its entry must be"),
        (("projections", UP, "shape"), [2**40, 2**40], rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "shape"), [10**30, 64], rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "shape"), [40.0, 64], rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "shape"), _deep(), rf"^{UP}: its entry must be"),
        (("projections", UP, "nnz"), True, rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "nnz"), float("nan"), rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "nnz"), -1, rf"^{UP}: shape and nnz must be whole numbers"),
        (("projections", UP, "packed"), "no", rf"projections\['{UP}'\].packed .* true or false"),
        (("provenance",), 3, "^provenance .* must be a table"),
        (("version",), True, "format version True"),
        (("version",), "1", "format version '1'"),
        (("format",), ["bitmask"], "unknown mosaic format"),
        (("weights",), {"dtype": [], "group": None}, "unknown packed values"),
        (("weights",), {"dtype": "int8", "group": False}, "unknown packed values"),
        (("weights",), "x" * 100_000, "unknown packed values"),
        (("checksums",), [], "^checksums .* must be a table"),
        (("checksums", "header"), "abc", "^checksums.header .* a SHA-256 of 64"),
        (("checksums", "tensors", "lm_head.weight"), 7, r"^checksums.tensors\['lm_head.weight'\] .* a SHA-256"),
    ],
)
def test_parts_of_another_type(mosaic: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        node = content["quantization_config"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    edit_json(mosaic / "config.json", edit)
    for read in (load, load_model):
        with pytest.raises(FormatError, match=message) as caught:
            read(mosaic)
        assert len(str(caught.value)) < 500


def test_keys_of_later_releases_are_ignored(mosaic: Path) -> None:
    edit_json(mosaic / "config.json", lambda c: c["quantization_config"].update(later={"a": 1}))
    load(mosaic)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config.json says num_hidden_layers is 1000000000, but .* it is 3"),
        ({"vocab_size": 2**40}, "config.json says vocab_size is 1099511627776, but .* it is 96"),
        ({"hidden_size": 2**40}, "config.json says hidden_size is"),
        ({"hidden_act": "silly"}, r"config.json was changed .* makes no model of it \(KeyError"),
        ({"hidden_size": "wide"}, "config.json of .* is damaged .*hidden_size"),
        ({"dtype": []}, "config.json of .* is damaged"),
        ({"auto_map": 5}, "auto_map in config.json of .* must be a table"),
        ({"auto_map": {"AutoConfig": 5}}, "auto_map in config.json of .* must be a table of names"),
        ({"model_type": []}, "model_type in config.json|architecture \\[\\] is not supported"),
        (
            {"quantization_config": float("nan")},
            "quantization_config in config.json of .* must be a table|is quantized",
        ),
        ({"quantization_config": {"quant_method": []}}, "quantization_config in .* must be a table|is quantized with"),
        ({"rope_parameters": _deep(900)}, "nests values too deeply"),
    ],
)
def test_configs_that_transformers_would_fail_at(mosaic: Path, edit: dict[str, Any], message: str) -> None:
    edit_json(mosaic / "config.json", lambda c: c.update(edit))
    for read in (load, load_model):
        with pytest.raises(MosaicError, match=message):
            read(mosaic)


def test_a_changed_config_is_not_silent(mosaic: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(mosaic)
    assert "was changed" not in caplog.text
    edit_json(mosaic / "config.json", lambda c: c.update(rms_norm_eps=0.1))
    load(mosaic)
    assert "config.json was changed after the checkpoint was written" in caplog.text
    with pytest.raises(ModelLoadError, match=r"config\.json is not as it was written"):
        load(mosaic, verify=True)


# --- files ---


def _become(kind: str) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(kind)

    return change


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "is a named pipe, not a file"),
        ("folder", "is a directory, not a file"),
        ("/dev/zero", "is a device, not a file"),
        ("/dev/null", "is a device, not a file"),
        ("nowhere", "is a link to nowhere, which does not exist"),
    ],
)
@pytest.mark.parametrize("which", ["model-00002-of", "model.safetensors.index.json"])
def test_a_shard_of_another_kind_is_refused_at_once(sharded: Path, which: str, kind: str, message: str) -> None:
    file = next(file for file in sharded.iterdir() if file.name.startswith(which))
    _become(kind)(file)
    for read in (load, load_model):
        with pytest.raises(ModelLoadError, match=message):
            read(sharded)


@pytest.mark.parametrize("where", ["model.safetensors", "config.json"])
def test_what_may_not_be_read_is_not_called_corrupt(mosaic: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read everything, so the refusal of the system is played."""
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == where:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    (mosaic / where).chmod(0o600)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentError_, match=rf"no permission to read .*{where} \(mode 600, owner \d+"):
        load_model(mosaic)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(weight_map=[]), "weight_map must be a table"),
        (lambda c: c.update(weight_map={}), "weight_map must be a table"),
        (lambda c: c.pop("metadata"), "metadata must be a table"),
        (lambda c: c["weight_map"].update({"lm_head.weight": 5}), "the file of lm_head.weight must be a name"),
        (
            lambda c: c["weight_map"].update({"lm_head.weight": "../other/model.safetensors"}),
            "lies outside the directory",
        ),
        (lambda c: c["weight_map"].update({"lm_head.weight": "/x/model.safetensors"}), "lies outside the directory"),
        (lambda c: c["weight_map"].update({"x": c["weight_map"]["lm_head.weight"]}), "names the tensor x, which"),
        (lambda c: c["weight_map"].pop("lm_head.weight"), "lm_head.weight"),
        (
            lambda c: c["weight_map"].update({"lm_head.weight": c["weight_map"]["model.norm.weight"]}),
            "says that lm_head.weight is in|lack lm_head.weight|does not hold",
        ),
    ],
)
def test_indices_that_do_not_fit(sharded: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", edit)
    for read in (load, load_model):
        with pytest.raises(ModelLoadError, match=message):
            read(sharded)


def test_two_files_with_the_same_tensor(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"{name} is in {first.name} and in {second.name}"):
        load(sharded)


def test_a_dtype_in_the_header_that_was_not_written(mosaic: Path) -> None:
    """F16 and BF16 take the same bytes, so that only the digest of the header sees it."""
    half = save(composite(dtype=torch.bfloat16), mosaic.parent / "half") / "model.safetensors"
    content = half.read_bytes()
    place = content.index(b'"BF16"')
    half.write_bytes(content[:place] + content[place:].replace(b'"BF16"', b'"F16" ', 1))
    with pytest.raises(FormatError, match="other names, dtypes or shapes than when they were written"):
        load(half.parent)


# --- ways to load ---


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("AutoModel", None),
        ("AutoModelForSequenceClassification", "score"),
        ("AutoModelForTokenClassification", "score"),
    ],
)
def test_other_auto_classes(kind: str, head: str | None, mosaic_source: Path, tmp_path: Path) -> None:
    import transformers

    wanted = load(mosaic_source).model
    auto = getattr(transformers, kind)
    model, info = auto.from_pretrained(mosaic_source, output_loading_info=True)
    body = model if head is None else model.model
    with torch.no_grad():
        assert torch.equal(body(prompt()).last_hidden_state, wanted(prompt()).last_hidden_state)
    assert all(name.startswith(f"{head}.") for name in info["missing_keys"])
    assert isinstance(body.layers[1].mlp.up_proj, MosaicLinear)
    model.save_pretrained(tmp_path)  # and again, under its own names
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True, verify=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(again(prompt()[:1])[0], model(prompt()[:1])[0])


def test_a_class_under_whose_names_transformers_finds_nothing(mosaic_source: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    with pytest.raises(ModelLoadError, match=r"lack transformer\.embed_tokens\.weight"):
        AutoModelForQuestionAnswering.from_pretrained(mosaic_source)


def test_a_base_model_has_no_head_for_a_language_model(mosaic_source: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(mosaic_source).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"lack lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_accelerate_fills_an_empty_model(weights: Any, tmp_path: Path) -> None:
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = composite(weights=weights)
    save(adapter, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    model = accelerate.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(adapter.model))
    dense = AutoModelForCausalLM.from_config(config)  # with weights it stays a model to train
    assert not any(isinstance(module, MosaicLinear) for module in dense.modules())


def test_a_checkpoint_in_a_subfolder_and_behind_links(mosaic_source: Path, tmp_path: Path) -> None:
    shutil.copytree(mosaic_source, tmp_path / "repo" / "inside")
    links = tmp_path / "links"
    links.mkdir()
    for file in mosaic_source.iterdir():
        (links / file.name).symlink_to(file)
    wanted = logits(load(mosaic_source))
    assert torch.equal(logits(load(tmp_path / "repo", subfolder="inside")), wanted)
    assert torch.equal(logits(load(links, verify=True)), wanted)


@pytest.mark.parametrize("made", ["loaded", "in memory"])
def test_saved_again_it_needs_only_trust(made: str, mosaic_source: Path, tmp_path: Path) -> None:
    model = load(mosaic_source) if made == "loaded" else composite().model
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mosaic_autoload.py").read_bytes() == (mosaic_source / "mosaic_autoload.py").read_bytes()
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["auto_map"] == {"AutoConfig": "mosaic_autoload.MosaicAutoConfig"}
    assert set(content["quantization_config"]["checksums"]) == {"config", "header", "tensors"}
    assert torch.equal(logits(load(tmp_path, verify=True)), logits(model))


def test_a_dequantized_model_saves_without_our_files(tmp_path: Path) -> None:
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    model = load(save(adapter, tmp_path / "packed"), trust_remote_code=True)
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    content = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"auto_map", "verify", "quantization_config"} & set(content)
    assert not list((tmp_path / "dense").glob("*.py"))

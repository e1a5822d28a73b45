# SPDX-License-Identifier: Apache-2.0
"""What people do with a model after it was loaded, or packed in memory: cast, train, dequantize, save."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import torch

from mosaic_kernels.checkpoint import manifest
from mosaic_kernels.checkpoint.checksums import config_is_as_written
from mosaic_kernels.errors import FormatError, ModelLoadError, UsageError
from mosaic_kernels.linear import MosaicLinear


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(small_models.composite(), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("loaded", [True, False])
def test_half_and_float_cast_packed_models(saved: Path, loaded: bool) -> None:
    model = small_models.load(saved) if loaded else small_models.composite().model
    before = small_models.logits(model)
    halved = small_models.logits(model.half())
    assert halved.dtype is torch.float16
    # 3 blocks of 7 products and about as many other roundings: 2^-11 each, of values below 4
    torch.testing.assert_close(halved.float(), before, atol=42 * 4 * 2**-11, rtol=0)
    assert small_models.logits(model.float()).dtype is torch.float32


def test_models_quantized_otherwise_are_not_cast() -> None:
    model = small_models.random_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()


def test_only_models_with_packed_layers_count_as_quantized(tmp_path: Path, saved: Path) -> None:
    dense = small_models.save(small_models.composite(pack=False), tmp_path, format="dense")
    assert small_models.load(dense).is_quantized is False  # or else a Trainer refuses it
    assert small_models.load(saved).is_quantized is True


def test_a_model_loaded_in_inference_mode_trains(saved: Path) -> None:
    with torch.inference_mode():
        model = small_models.load(saved)
    ids = small_models.prompt()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_an_offloaded_model_says_why_it_stays_packed(saved: Path, tmp_path: Path) -> None:
    model = small_models.load(
        saved, device_map="auto", max_memory={"cpu": "40KB"}, offload_folder=str(tmp_path / "offloaded")
    )
    with pytest.raises(UsageError, match=r"offloaded.*device_map"):
        model.dequantize()
    assert any(isinstance(module, MosaicLinear) for module in model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_below_an_adapter_says_what_to_do(saved: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small_models.load(saved), peft.LoraConfig(target_modules=["q_proj"]))
    for act in (adapted.base_model.model.dequantize, lambda: adapted.base_model.model.save_pretrained(tmp_path)):
        with pytest.raises(UsageError, match=r"adapter.*unload\(\)"):
            act()


def test_a_run_says_nothing_of_its_own_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = small_models.composite()
    adapter.model.config.train_data_path = "/home/me/texts"  # which is cleaned after the configuration was saved
    with caplog.at_level(logging.WARNING):
        small_models.save(adapter, tmp_path)
        small_models.load(tmp_path)
    assert not [record for record in caplog.messages if "mosaic_autoload" in record or "was changed" in record]
    content = json.loads((tmp_path / "config.json").read_text())
    assert "/home/me" not in json.dumps(content)
    assert config_is_as_written(tmp_path, content["quantization_config"]["checksums"])


def test_a_head_that_no_file_holds_names_the_class_of_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(saved).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"lack lm_head.weight \(the checkpoint is of LlamaModel\)"):
        small_models.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, "\N{LATIN SMALL LETTER E WITH ACUTE}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_without_a_json_object_is_named(saved: Path, tmp_path: Path, name: str, content: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ModelLoadError, match=name):
        small_models.load(tmp_path)


def test_a_pipe_in_the_place_of_the_configuration_is_named(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mosaic_autoload.py").symlink_to(saved / "mosaic_autoload.py")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelLoadError, match="named pipe"):
        small_models.load(tmp_path)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE_NAME).mkdir()
    with pytest.raises(FormatError, match="folder, not a manifest"):
        manifest.read(tmp_path)


_FIRST = """
import sys, mosaic_kernels
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1])
except mosaic_kernels.MosaicError as error:
    print(error)
"""


def test_the_first_configuration_of_a_process_is_checked(saved: Path, tmp_path: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "rms_norm_eps": "x"}))
    done = subprocess.run([sys.executable, "-c", _FIRST, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "is damaged" in done.stdout

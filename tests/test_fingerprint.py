# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a run: whatever decides the bytes of a block is in it, and what differs has a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_model
from torch import nn

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import fingerprint as module
from mosaic_kernels.prune.calibration import Calibration
from mosaic_kernels.prune.fingerprint import OTHER_OPTIONS, RESULT_OPTIONS, SETTLED_OPTIONS, fingerprint
from mosaic_kernels.prune.journal import Journal

pytestmark = pytest.mark.usefixtures("one_thread")


def of(model: Any = None, config: PruneConfig | None = None, processes: int = 1, tokenizer: Any = None) -> Any:
    calibration = Calibration(torch.arange(32).view(2, 16), "tensor")
    adapter = ModelAdapter.of(random_model() if model is None else model)
    return fingerprint(adapter, tokenizer, calibration, config or PruneConfig(), "float32", processes)


def test_every_option_has_its_place() -> None:
    """A new option must be put into one of the three lists: does it change a block?"""
    listed = [*RESULT_OPTIONS, *SETTLED_OPTIONS, *OTHER_OPTIONS]
    assert sorted(listed) == sorted(PruneConfig.__dataclass_fields__)


def test_the_same_run_has_the_same_fingerprint(tmp_path: Path) -> None:
    Journal(tmp_path, of())
    Journal(tmp_path, of())


Q = "model.layers.0.self_attn.q_proj.weight"


def swap_rows(model: nn.Module) -> None:
    weight = model.get_parameter(Q)
    weight.data = weight.data.flip(0)


def negate(model: nn.Module) -> None:
    model.get_parameter(Q).data.neg_()


def flip_one_bit(model: nn.Module) -> None:
    model.get_parameter("model.layers.2.mlp.down_proj.weight").data.view(torch.int32)[5, 7] ^= 1


def scale_norm(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.input_layernorm.weight").data *= 1.5


def swap_embeddings(model: nn.Module) -> None:
    weight = model.get_parameter("model.embed_tokens.weight")
    weight.data = weight.data.flip(0)


def change_head(model: nn.Module) -> None:
    model.get_parameter("lm_head.weight").data[0, 0] += 1


def change_rotation(model: nn.Module) -> None:
    model.get_buffer("model.rotary_emb.inv_freq").mul_(0.5)


def add_bias_to_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def other_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (swap_rows, Q),
        (negate, Q),
        (flip_one_bit, "model.layers.2.mlp.down_proj.weight"),
        (scale_norm, "model.layers.1.input_layernorm.weight"),
        (swap_embeddings, "model.embed_tokens.weight"),
        (change_head, "lm_head.weight"),
        (change_rotation, "model.rotary_emb.inv_freq"),
        (add_bias_to_config, "rms_norm_eps in config.json"),
        (other_attention, "attention"),
    ],
)
def test_another_model_is_named(change: Callable[[Any], None], name: str, tmp_path: Path) -> None:
    Journal(tmp_path, of())
    model = random_model()
    change(model)
    with pytest.raises(UsageError, match=rf"^cannot resume: {name} differ from"):
        Journal(tmp_path, of(model))


def test_a_rotary_base_is_named(tmp_path: Path) -> None:
    Journal(tmp_path, of())
    settings = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
    with pytest.raises(UsageError, match=r"rope_parameters in config.json, model.rotary_emb.inv_freq.* differ"):
        Journal(tmp_path, of(random_model(**settings)))


def test_another_tokenizer_is_named(tmp_path: Path, tokenizer: Any) -> None:
    Journal(tmp_path, of(tokenizer=tokenizer))
    with pytest.raises(UsageError, match="cannot resume: tokenizer differ"):
        Journal(tmp_path, of())


def test_another_number_of_processes_is_named(tmp_path: Path) -> None:
    Journal(tmp_path, of())
    with pytest.raises(UsageError, match=r"cannot resume: processes differ .*\(processes 1, now 2\)"):
        Journal(tmp_path, of(processes=2))


def test_another_ranking_is_named(tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text("{}")
    Journal(tmp_path / "journal", of(config=PruneConfig(ranks=tmp_path / "ranks.json")))
    (tmp_path / "ranks.json").write_text("{ }")
    with pytest.raises(UsageError, match="cannot resume: ranks differ"):
        Journal(tmp_path / "journal", of(config=PruneConfig(ranks=tmp_path / "ranks.json")))


@pytest.mark.parametrize("option", [name for name in RESULT_OPTIONS if name != "dtype"])
def test_every_option_that_changes_a_block_is_named(option: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "sparsity": 0.6, "category": "unstructured", "structured_share": 0.1, "pattern": "row", "channel_multiple": 16,
        "policy": "pod", "outlier_threshold": 6.0, "max_deviation": 0.1, "solver": "wanda", "quality": "best",
        "recover": "reconstruct", "seed": 1,
    }  # fmt: skip
    Journal(tmp_path, of())
    with pytest.raises(UsageError, match=rf"cannot resume: {option} differ .*, now .*repeat its options, or"):
        Journal(tmp_path, of(config=PruneConfig(**{option: values[option]})))


def test_other_versions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path, of())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.1+cpu")
        with pytest.raises(UsageError, match=r"cannot resume: torch differ .*now 2.99.1\+cpu\); use the versions it"):
            Journal(tmp_path, of())
    with monkeypatch.context() as patch:
        patch.setattr("mosaic_kernels.__version__", "0.0.9")
        with pytest.raises(UsageError, match=r"mosaic-kernels differ .*now 0.0.9\)"):
            Journal(tmp_path, of())
    with monkeypatch.context() as patch:  # a checkout that was changed and has the version it had
        patch.setattr(module, "_code_digest", lambda: "0" * 32)
        with pytest.raises(UsageError, match=r"cannot resume: the code of mosaic-kernels differ from the [^(]*; use"):
            Journal(tmp_path, of())


def test_the_code_digest_sees_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prune").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "prune" / "fingerprint.py"))
    seen = set()
    for name, content in (("a.py", "1"), ("prune/b.py", "1"), ("prune/b.py", "2"), ("_C.so", "x"), ("notes.md", "x")):
        (tmp_path / name).write_text(content)
        seen.add(module._code_digest.__wrapped__())
    assert len(seen) == 4  # the notes do not count


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path, of())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        patch.setattr(torch, "get_num_threads", lambda: 1234)
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        with pytest.raises(UsageError) as caught:
            Journal(tmp_path, of())
    for words in (
        "MKL_CBWR", "instruction set of torch", "now DEFAULT", "threads of torch (OMP_NUM_THREADS) 1, now 1234",
        "resume on a machine and with settings like those it began with",
    ):  # fmt: skip
        assert words in str(caught.value)


def test_lower_kernels_are_named(tmp_path: Path, cpu_level: str) -> None:
    from mosaic_kernels import _C_cpu

    Journal(tmp_path, of())
    if cpu_level != "scalar":
        _C_cpu.set_isa("scalar")
        with pytest.raises(UsageError, match=rf"MOSAIC_ISA\) {cpu_level}, now scalar"):
            Journal(tmp_path, of())


def test_what_an_older_or_newer_release_noted_is_a_difference(tmp_path: Path) -> None:
    found = of()
    Journal(tmp_path / "older", {name: value for name, value in found.items() if name != "machine"})
    with pytest.raises(UsageError, match="cannot resume: machine differ"):
        Journal(tmp_path / "older", found)
    Journal(tmp_path / "newer", found | {"weather": "rain"})
    with pytest.raises(UsageError, match=r"cannot resume: weather differ .*weather rain, now none"):
        Journal(tmp_path / "newer", found)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    Journal(tmp_path, of())
    with pytest.raises(UsageError, match=r"\.weight and \d\d more differ"):
        Journal(tmp_path, of(random_model(seed=1)))

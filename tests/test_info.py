# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic_kernels import info
from mosaic_kernels.info import collect, format_table, main
from mosaic_kernels.ops import isa, use_backend
from mosaic_kernels.ops.isa import LEVELS


def test_json_and_table_say_the_same(capsys: Any) -> None:
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([]) == 0
    table = capsys.readouterr().out
    assert found["versions"]["torch"] == torch.__version__
    for name, entry in found["backends"].items():
        assert f"{name:<16}{entry['why_not'] or 'runs here'}" in table
    assert f"cpu tensors     {found['active']['cpu']}" in table


def test_the_active_backend_is_one_that_runs() -> None:
    found = collect()
    assert found["backends"][found["active"]["cpu"]]["why_not"] is None
    assert found["backends"]["reference"]["why_not"] is None
    assert found["cpu"]["threads"] == torch.get_num_threads()


def test_a_forced_backend_that_cannot_run_is_explained() -> None:
    with use_backend("reference"):
        assert collect()["active"]["cpu"] == "reference"
    with use_backend("triton"):
        assert "backend 'triton' was forced but cannot run" in collect()["active"]["cpu"]


def test_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSAIC_LOG_LEVEL", "debug")
    monkeypatch.delenv("MOSAIC_CUDA", raising=False)
    found = collect()
    assert found["environment"]["MOSAIC_LOG_LEVEL"] == "debug"
    assert "MOSAIC_CUDA" not in found["environment"]
    assert "MOSAIC_LOG_LEVEL=debug" in format_table(found)


def with_isa(wish: str) -> subprocess.CompletedProcess[str]:
    """What the command finds in a fresh process, as JSON and behind it as a table."""
    program = (
        "import json; from mosaic_kernels.info import collect, format_table; "
        "found = collect(); print(json.dumps(found)); print(format_table(found))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MOSAIC_ISA": wish}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("wish", LEVELS)
def test_the_instruction_set_can_be_limited(wish: str) -> None:
    """To a level that is there; a higher one leaves the best."""
    found, table = with_isa(wish).stdout.split("\n", 1)
    best = json.loads(found)["cpu"]["best_isa"]
    expected = min(wish, best, key=LEVELS.index)
    assert json.loads(found)["cpu"]["isa"] == expected
    limited = f"limited from {best} by MOSAIC_ISA; " if expected != best else ""
    lacking = isa.lacking(best, json.loads(found)["cpu"]["features"])
    assert f"instructions    {expected} ({limited}{f'{lacking}; ' if lacking else ''}CPU has: " in table
    assert f"MOSAIC_ISA={wish}" in table


@pytest.mark.parametrize(
    ("best", "features", "words"),
    [
        ("avx2", "avx2 fma avx512 avx512_vbmi2 avx512_vnni", "the avx512 kernels need avx512_bf16, too"),
        ("avx2", "avx2 fma f16c bmi2", ""),
        ("avx512", "avx512 avx512_bf16 amx_bf16", "the amx kernels need amx_int8, too"),
        ("amx", "avx512 amx_bf16 amx_int8", ""),
        ("scalar", "avx2", ""),
    ],
)
def test_an_instruction_that_is_missing_is_named(best: str, features: str, words: str) -> None:
    assert isa.lacking(best, features) == words


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    refused = with_isa("sse9")
    assert refused.returncode != 0
    assert "MOSAIC_ISA='sse9' is not an instruction set; choose one of scalar, avx2, avx512, amx" in refused.stderr


def test_missing_cuda_kernels_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    monkeypatch.setattr(info, "find_gpu", lambda: None)
    monkeypatch.setattr(info, "find_nvcc", lambda: "/some/nvcc")
    (line,) = [line for line in format_table(collect()).splitlines() if line.startswith("CUDA kernels")]
    assert "not built: no NVIDIA GPU was found" in line
    assert "MOSAIC_CUDA=on pip install" in line
    monkeypatch.setattr(info, "find_spec", lambda name: object())
    assert "CUDA kernels    built" in format_table(collect())


WITHOUT_KERNELS = "import sys; sys.modules['mosaic_kernels._C_cpu'] = sys.modules['mosaic_kernels._C_cuda'] = None; "


def test_a_broken_build_is_not_slow_in_silence() -> None:
    """One line at the first use, none before it and none after."""
    program = WITHOUT_KERNELS + (
        "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s'); "
        "import torch, mosaic_kernels as mk; print('imported', file=sys.stderr); "
        "mk.unpack(mk.pack(torch.eye(3))); mk.MosaicLinear.from_linear(torch.nn.Linear(3, 2))(torch.ones(3))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    imported, warning = done.stderr.splitlines()
    assert imported == "imported"
    assert warning.startswith(
        "mosaic_kernels.ops.select WARNING backend 'cpu' cannot run, so cpu tensors use 'reference'"
    )
    assert "the native module _C_cpu did not load" in warning


def test_a_build_without_kernels_is_explained() -> None:
    """Its main use: the native modules are missing."""
    program = WITHOUT_KERNELS + "from mosaic_kernels.info import main; sys.exit(main(['--json']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert "_C_cpu did not load" in found["backends"]["cpu"]["why_not"]
    assert found["backends"]["cuda"]["why_not"]
    assert found["active"]["cpu"] == "reference"
    assert found["cpu"]["isa"] is None


# --- --verify ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from small_models import composite, save

    return save(composite(), tmp_path / "out", max_shard_size="50KB")


def test_verify_names_what_is_damaged(checkpoint: Path, capsys: Any) -> None:
    from mosaic_kernels.checkpoint.checksums import _places

    assert main([str(checkpoint), "--verify"]) == 0
    assert re.fullmatch(r"all \d+ tensors are as written\n", capsys.readouterr().out)
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    place = _places(file)[2]
    content = bytearray(file.read_bytes())
    content[place.start] ^= 4
    file.write_bytes(content)
    assert main([str(checkpoint), "--verify"]) == 1
    assert f"{place.name} was changed" in capsys.readouterr().err
    assert main([str(checkpoint), "--verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "model": str(checkpoint),
        "tensors": found["tensors"],
        "files": 0,
        "damaged": [f"{place.name} was changed"],
    }


def test_verify_sees_headers_and_config(checkpoint: Path, capsys: Any) -> None:
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    assert main([str(checkpoint), "--verify"]) == 1
    said = capsys.readouterr().err
    assert "config.json was changed" in said
    assert "names, dtypes or shapes of the tensors were changed" in said


def test_verify_needs_something_to_compare(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    from small_models import random_model

    random_model().save_pretrained(tmp_path / "dense")
    for arguments, code, said in (
        (["--verify"], 2, "--verify needs a directory"),
        (["~nobody-of-this-name/x", "--verify"], 2, "the home directory that '~' stands for is not known"),
        ([str(tmp_path / "not-there"), "--verify"], 1, "no such directory"),
        ([str(tmp_path / "dense"), "--verify"], 1, "has no checksums and cannot be verified"),
    ):
        assert main(arguments) == code
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["mosaic", "dense"])
def test_verify_reads_the_manifest(form: Any, tmp_path: Path, capsys: Any) -> None:
    """A plain dense result has no checksums of its own: there the manifest's digests are of the weights too."""
    from small_models import random_model, save, zero_weights

    from mosaic_kernels.checkpoint import manifest
    from mosaic_kernels.models import ModelAdapter

    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5)
    directory = save(adapter, tmp_path / "out", format=form)
    manifest.write(directory)
    assert main([str(directory), "--verify"]) == 0
    assert re.fullmatch(r"all (\d+ tensors and )?\d+ files are as written\n", capsys.readouterr().out)
    (directory / "notes.txt").write_text("of the user")
    assert main([str(directory), "--verify"]) == 0
    capsys.readouterr()
    (directory / "generation_config.json").unlink()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main([str(directory), "--verify"]) == 1
    said = capsys.readouterr().err
    assert "generation_config.json is missing" in said
    assert "model.safetensors has changed" in said
    assert "notes.txt" not in said

# SPDX-License-Identifier: Apache-2.0
"""An installation builds CUDA kernels only if it finds a GPU and nvcc, or on request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_kernels.cuda_toolkit import (
    ALL_ARCHS,
    Toolkit,
    architectures,
    choose,
    find_gpu,
    find_nvcc,
    read_toolkit,
    why_not_built,
)

ROOT = Path(__file__).parents[1]
GPU, NVCC, HERE, ALL = "/dev/nvidia0", "/usr/bin/nvcc", "90", "80;86;89;90"


def machine(folder: Path, *devices: str) -> Path:
    """A root directory with these files."""
    for name in devices:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def program(folder: Path, name: str, said: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '%s' '{said}'\nexit 0\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("environment", "gpu", "nvcc", "build", "required", "archs", "words"),
    [
        ({}, GPU, NVCC, True, False, HERE, (GPU, NVCC)),
        ({}, None, NVCC, False, False, "", ("no NVIDIA GPU was found", "MOSAIC_CUDA=on")),
        ({}, GPU, None, False, False, "", (GPU, "nvcc was not found", "CUDA_HOME")),
        ({}, None, None, False, False, "", ("no NVIDIA GPU was found",)),
        ({"MOSAIC_CUDA": ""}, None, NVCC, False, False, "", ("no NVIDIA GPU was found",)),
        ({"MOSAIC_CUDA": "AUTO"}, None, NVCC, False, False, "", ("no NVIDIA GPU was found",)),
        ({"MOSAIC_CUDA": "on"}, None, NVCC, True, True, ALL, ("MOSAIC_CUDA=on",)),
        ({"MOSAIC_CUDA": "on"}, GPU, NVCC, True, True, ALL, ("MOSAIC_CUDA=on",)),
        ({"MOSAIC_CUDA_ARCHS": "80;90"}, None, NVCC, True, True, "80;90", ("MOSAIC_CUDA_ARCHS=80;90",)),
        ({"MOSAIC_CUDA": "auto", "MOSAIC_CUDA_ARCHS": "86"}, GPU, NVCC, True, True, "86", ("MOSAIC_CUDA_ARCHS",)),
        ({"MOSAIC_CUDA": "on", "MOSAIC_CUDA_ARCHS": "86"}, None, NVCC, True, True, "86", ("MOSAIC_CUDA=on",)),
        ({"MOSAIC_CUDA": "off", "MOSAIC_CUDA_ARCHS": "86"}, GPU, NVCC, False, False, "", ("MOSAIC_CUDA=off",)),
        ({"CUDA_VISIBLE_DEVICES": ""}, GPU, NVCC, True, False, HERE, (GPU,)),
    ],
)
def test_choice(
    environment: dict[str, str], gpu: str | None, nvcc: str | None, build: bool, required: bool, archs: str,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    found = choose(environment, gpu, nvcc, HERE)
    assert (found.build, found.required, found.archs, found.error) == (build, required, archs, None)
    assert "\n" not in found.why
    for word in words:
        assert word in found.why


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MOSAIC_CUDA": "on"}, ("MOSAIC_CUDA=on", "nvcc was not found", "CUDACXX")),
        ({"MOSAIC_CUDA_ARCHS": "90"}, ("MOSAIC_CUDA_ARCHS=90", "nvcc was not found")),
        ({"MOSAIC_CUDA": "yes"}, ("MOSAIC_CUDA='yes'", "auto, on or off")),
    ],
)
def test_a_wish_that_cannot_be_met(environment: dict[str, str], words: tuple[str, ...]) -> None:
    found = choose(environment, GPU, None, ALL)
    assert not found.build
    for word in words:
        assert word in (found.error or "")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["dev/nvidia0"], "dev/nvidia0"),
        (["dev/nvidia7", "dev/nvidia3"], "dev/nvidia3"),
        (["proc/driver/nvidia/gpus/0000:01:00.0/information"], "proc/driver/nvidia/gpus/0000:01:00.0"),
        (["dev/nvidiactl", "dev/nvidia-uvm", "dev/null", "proc/driver/nvidia/version"], None),
        ([], None),
    ],
)
def test_a_gpu_is_seen_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], expected: str | None
) -> None:
    """A driver without a device does not count as a GPU; a GPU hidden by CUDA_VISIBLE_DEVICES does."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = find_gpu(machine(tmp_path, *devices))
    assert found == (None if expected is None else str(tmp_path / expected))


@pytest.mark.parametrize(("said", "seen"), [("GPU 0: NVIDIA A100 (UUID: 1)", True), ("No devices were found", False)])
def test_a_gpu_is_seen_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, seen: bool) -> None:
    program(tmp_path, "nvidia-smi", said)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (find_gpu(tmp_path) is not None) is seen


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [("9.0\n", "90"), ("8.6\n8.0\n8.6\n", "80;86"), ("", ALL), ("10.0\n", ALL), ("9.0\n7.5\n", ALL)],
)
def test_code_for_the_gpus_that_are_here(capabilities: str, archs: str) -> None:
    assert architectures(capabilities) == archs


def nvcc_that_says(folder: Path, version: str, archs: str) -> str:
    path = folder / "nvcc"
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        f"--list-gpu-arch) echo '{archs}';;\nesac\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("said", "version", "archs"),
    [
        ("compute_80\ncompute_90\ncompute_100\ncompute_120\ncompute_121", (13, 0), (*ALL_ARCHS, 100, 120)),
        ("compute_80\ncompute_90\ncompute_100a", (12, 8), ALL_ARCHS),
    ],
)
def test_a_toolkit_says_which_later_gpus_it_knows(
    tmp_path: Path, said: str, version: tuple[int, int], archs: tuple[int, ...]
) -> None:
    found = read_toolkit(nvcc_that_says(tmp_path, ".".join(map(str, version)), said))
    assert found == Toolkit(version, archs)
    assert choose({"MOSAIC_CUDA": "on"}, None, NVCC, HERE, found).archs == ";".join(map(str, archs))


def test_a_later_gpu_takes_code_of_its_own_or_ptx() -> None:
    assert architectures("12.0\n9.0\n", (*ALL_ARCHS, 100, 120)) == "90;120"
    assert architectures("12.0\n", ALL_ARCHS) == ALL


def test_an_nvcc_that_cannot_be_asked() -> None:
    assert read_toolkit(None) == read_toolkit("/nowhere/nvcc") == Toolkit(None, ALL_ARCHS)


def test_a_toolkit_that_is_too_old_is_refused(tmp_path: Path) -> None:
    nvcc = nvcc_that_says(tmp_path, "12.4", "compute_90")
    old = read_toolkit(nvcc)
    for environment in ({"MOSAIC_CUDA": "on"}, {"MOSAIC_CUDA_ARCHS": "90"}):
        error = choose(environment, GPU, nvcc, HERE, old).error or ""
        assert f"{nvcc} is of CUDA 12.4, and the kernels need 12.5 or later" in error
    found = choose({}, GPU, nvcc, HERE, old)
    assert not found.build
    assert "12.5 or later" in found.why
    assert choose({"MOSAIC_CUDA": "on"}, GPU, nvcc, HERE, Toolkit((12, 5))).build


def test_where_nvcc_is_looked_for(tmp_path: Path) -> None:
    named, home = program(tmp_path, "named/nvcc"), program(tmp_path, "home/bin/nvcc")
    path = program(tmp_path, "path/nvcc")
    environment = {"CUDACXX": str(named), "CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    assert find_nvcc(environment) == str(named)
    del environment["CUDACXX"]
    assert find_nvcc(environment) == str(home)
    del environment["CUDA_HOME"]
    assert find_nvcc(environment) == str(path)


def test_why_it_is_missing_and_how_to_get_it() -> None:
    for gpu, nvcc, words in (
        (None, NVCC, ("no NVIDIA GPU",)),
        (None, None, ("neither an NVIDIA GPU nor nvcc was found", "CUDA toolkit")),
        (GPU, None, (GPU, "nvcc was not found", "CUDA toolkit")),
        (GPU, NVCC, (GPU, NVCC)),
    ):
        said = why_not_built(gpu, nvcc)
        for word in (*words, "not built", "MOSAIC_CUDA=on pip install"):
            assert word in said


@pytest.mark.parametrize(
    ("wish", "says"),
    [("off", "building CPU kernels, no CUDA kernels (MOSAIC_CUDA=off)"), ("maybe", "MOSAIC_CUDA='maybe': choose")],
)
def test_setup_says_what_it_builds_and_why(wish: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env={**os.environ, "MOSAIC_CUDA": wish}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is (wish == "off")
    assert says in done.stderr
    assert done.stderr.count("building") == (wish == "off")

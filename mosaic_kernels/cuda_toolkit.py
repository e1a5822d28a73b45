# SPDX-License-Identifier: Apache-2.0
"""Finds a GPU and ``nvcc``, and decides if an installation builds the CUDA module.

``setup.py`` uses it before anything is installed, and ``info`` afterwards. ``setup.py`` runs this file by its path, so
it imports only the standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ALL_ARCHS",
    "LATER_ARCHS",
    "OLDEST_CUDA",
    "Choice",
    "Toolkit",
    "architectures",
    "choose",
    "find_gpu",
    "find_nvcc",
    "read_toolkit",
    "why_not_built",
]

ALL_ARCHS = (80, 86, 89, 90)
# Compiled for as well where nvcc knows them. Where it does not, these GPUs run the PTX of 90.
LATER_ARCHS = (100, 120)
OLDEST_CUDA = (12, 5)  # the first with mma.sp::ordered_metadata, which the 2:4 kernel uses
HOW_TO_BUILD = "run `MOSAIC_CUDA=on pip install --force-reinstall --no-deps -e .` in the checkout"


@dataclass(frozen=True)
class Choice:
    """The decision if an installation builds the CUDA module.

    Attributes:
        build: True if it builds the module.
        why: the reason, for the line that the installation prints.
        required: True if the installation fails when the module cannot be built.
        archs: the architectures to compile for, as CMake takes them.
        error: why the environment's request cannot be met, and what to do; ``None`` if it can.
    """

    build: bool
    why: str
    required: bool = False
    archs: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Toolkit:
    """What an ``nvcc`` says of itself.

    Attributes:
        version: of CUDA, ``(12, 5)``; ``None`` if it does not say.
        archs: those of ``ALL_ARCHS`` and ``LATER_ARCHS`` to compile for.
    """

    version: tuple[int, int] | None = None
    archs: tuple[int, ...] = ALL_ARCHS


def choose(
    environment: Mapping[str, str], gpu: str | None, nvcc: str | None, archs: str, toolkit: Toolkit | None = None
) -> Choice:
    """Decide by ``MOSAIC_CUDA`` and ``MOSAIC_CUDA_ARCHS``, and by the GPU and ``nvcc`` that were found.

    Args:
        environment: ``os.environ``, or a part of it.
        gpu: the result of ``find_gpu``.
        nvcc: the result of ``find_nvcc``.
        archs: the result of ``architectures``.
        toolkit: the result of ``read_toolkit``.
    """
    toolkit = toolkit or Toolkit()
    wanted, listed = environment.get("MOSAIC_CUDA", "").lower() or "auto", environment.get("MOSAIC_CUDA_ARCHS", "")
    if wanted not in ("auto", "on", "off"):
        return Choice(False, "", error=f"MOSAIC_CUDA={wanted!r}: choose auto, on or off")
    if wanted == "off":
        return Choice(False, "MOSAIC_CUDA=off")
    wish = "MOSAIC_CUDA=on" if wanted == "on" else f"MOSAIC_CUDA_ARCHS={listed}" if listed else None
    if wish and nvcc is None:
        return Choice(False, "", error=f"{wish} is set but nvcc was not found: set CUDACXX or CUDA_HOME, or unset it")
    needs = ""
    if nvcc is not None and toolkit.version is not None and toolkit.version < OLDEST_CUDA:
        needs = f"{nvcc} is of CUDA {_dotted(toolkit.version)}, and the kernels need {_dotted(OLDEST_CUDA)} or later"
    if wish and needs:
        return Choice(False, "", error=f"{wish} is set but {needs}: install a later toolkit and set CUDA_HOME to it")
    if wish:
        return Choice(True, wish, required=True, archs=listed or ";".join(map(str, toolkit.archs)))
    if gpu is None:
        return Choice(False, "no NVIDIA GPU was found; MOSAIC_CUDA=on builds CUDA kernels without one")
    if nvcc is None:
        return Choice(False, f"{gpu} was found, but nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    if needs:
        return Choice(False, f"{needs}: install a later CUDA toolkit, and set CUDA_HOME to it")
    return Choice(True, f"{gpu} and {nvcc} were found", archs=archs)


def find_gpu(root: Path = Path("/")) -> str | None:
    """Evidence of an NVIDIA GPU in this machine, or ``None``. ``CUDA_VISIBLE_DEVICES`` has no effect on it."""
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*"):
        found = sorted(root.glob(pattern))
        if found:
            return str(found[0])
    # the Windows Subsystem for Linux has neither file
    return "a GPU that nvidia-smi lists" if _nvidia_smi("-L").startswith("GPU ") else None


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """The compiler in CUDACXX, then CUDA_HOME, then PATH, then the usual place."""
    candidates = [environment.get("CUDACXX")]
    candidates += [f"{environment[home]}/bin/nvcc" for home in ("CUDA_HOME", "CUDA_PATH") if environment.get(home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = environment.get("PATH")
    return next((found for name in candidates if name and (found := shutil.which(name, path=path))), None)


def read_toolkit(nvcc: str | None) -> Toolkit:
    """Ask ``nvcc`` for its version and for the architectures that it knows."""
    if nvcc is None:
        return Toolkit()
    version = re.search(r"release (\d+)\.(\d+)", _output_of(nvcc, "--version"))
    known = _output_of(nvcc, "--list-gpu-arch").split()
    later = tuple(arch for arch in LATER_ARCHS if f"compute_{arch}" in known)
    return Toolkit((int(version[1]), int(version[2])) if version else None, ALL_ARCHS + later)


def architectures(capabilities: str | None = None, archs: tuple[int, ...] = ALL_ARCHS) -> str:
    """The architectures of the GPUs here, for CMake; all of ``archs`` if a GPU has another, or none is known.

    Args:
        capabilities: lines such as ``9.0``, as nvidia-smi prints them; ``None`` runs nvidia-smi.
        archs: those that can be compiled for.
    """
    if capabilities is None:
        capabilities = _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader")
    found = {line.strip().replace(".", "") for line in capabilities.splitlines() if line.strip()}
    known = {str(arch) for arch in archs}
    return ";".join(sorted(found, key=int) if found and found <= known else map(str, archs))


def why_not_built(gpu: str | None, nvcc: str | None) -> str:
    """Why an installation here left the CUDA module out, and how to get it."""
    if nvcc is None:
        there = f"{gpu} was found, but nvcc was not found" if gpu else "neither an NVIDIA GPU nor nvcc was found"
        return f"not built: {there}; install the CUDA toolkit, then {HOW_TO_BUILD}"
    if gpu is None:
        return f"not built: no NVIDIA GPU was found, and MOSAIC_CUDA=auto needs one; to build them, {HOW_TO_BUILD}"
    return f"not built, but {gpu} and {nvcc} were found; to build them and see any error, {HOW_TO_BUILD}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _nvidia_smi(*arguments: str) -> str:
    return _output_of("nvidia-smi", *arguments)


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

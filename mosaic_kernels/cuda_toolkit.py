# SPDX-License-Identifier: Apache-2.0
"""Is there a GPU and a compiler for it? setup.py asks before anything is installed, ``info`` asks afterwards.

setup.py runs this file by its path: it may import nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ALL_ARCHS", "Choice", "architectures", "choose", "find_gpu", "find_nvcc", "why_not_built"]

ALL_ARCHS = (80, 86, 89, 90)
HOW_TO_BUILD = "run `MOSAIC_CUDA=on pip install --force-reinstall --no-deps -e .` in the checkout"


@dataclass(frozen=True)
class Choice:
    """Whether an installation builds the CUDA module.

    Attributes:
        build: it does.
        required: the installation fails where it cannot.
        why: for the line that the installation prints.
        archs: to compile for, as CMake takes them.
        error: the wish cannot be met; says what to do.
    """

    build: bool
    why: str
    required: bool = False
    archs: str = ""
    error: str | None = None


def choose(environment: Mapping[str, str], gpu: str | None, nvcc: str | None, archs: str) -> Choice:
    """``MOSAIC_CUDA`` and ``MOSAIC_CUDA_ARCHS`` against what is there.

    Args:
        environment: ``os.environ``, or a part of it.
        gpu: what ``find_gpu`` found.
        nvcc: what ``find_nvcc`` found.
        archs: those of the GPUs here, or all (``architectures``).
    """
    wanted, listed = environment.get("MOSAIC_CUDA", "").lower() or "auto", environment.get("MOSAIC_CUDA_ARCHS", "")
    if wanted not in ("auto", "on", "off"):
        return Choice(False, "", error=f"MOSAIC_CUDA={wanted!r}: choose auto, on or off")
    if wanted == "off":
        return Choice(False, "MOSAIC_CUDA=off")
    wish = "MOSAIC_CUDA=on" if wanted == "on" else f"MOSAIC_CUDA_ARCHS={listed}" if listed else None
    if wish and nvcc is None:
        return Choice(False, "", error=f"{wish} but nvcc was not found: set CUDACXX or CUDA_HOME, or unset the wish")
    if wish:
        return Choice(True, wish, required=True, archs=listed or ";".join(map(str, ALL_ARCHS)))
    if gpu is None:
        return Choice(False, "no NVIDIA GPU here; MOSAIC_CUDA=on builds them all the same")
    if nvcc is None:
        return Choice(False, f"{gpu} is there but nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    return Choice(True, f"{gpu} and {nvcc} are there", archs=archs)


def find_gpu(root: Path = Path("/")) -> str | None:
    """What shows that an NVIDIA GPU is in this machine. ``CUDA_VISIBLE_DEVICES`` hides none from an installation."""
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*"):
        found = sorted(root.glob(pattern))
        if found:
            return str(found[0])
    # Windows' Linux has neither file
    return "a GPU that nvidia-smi lists" if _nvidia_smi("-L").startswith("GPU ") else None


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """The compiler in CUDACXX, then CUDA_HOME, then PATH, then the usual place."""
    candidates = [environment.get("CUDACXX")]
    candidates += [f"{environment[home]}/bin/nvcc" for home in ("CUDA_HOME", "CUDA_PATH") if environment.get(home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = environment.get("PATH")
    return next((found for name in candidates if name and (found := shutil.which(name, path=path))), None)


def architectures(capabilities: str | None = None) -> str:
    """Code for the GPUs that are here; for all if one of them is none of those.

    Args:
        capabilities: as nvidia-smi lists them, ``9.0`` on a line; None asks it.
    """
    if capabilities is None:
        capabilities = _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader")
    found = {line.strip().replace(".", "") for line in capabilities.splitlines() if line.strip()}
    known = {str(arch) for arch in ALL_ARCHS}
    return ";".join(sorted(found) if found and found <= known else map(str, ALL_ARCHS))


def why_not_built(gpu: str | None, nvcc: str | None) -> str:
    """Why an installation here left the CUDA module out, and how to get it."""
    if nvcc is None:
        there = f"{gpu} is there" if gpu else "no NVIDIA GPU here"
        return f"not built: {there} and nvcc was not found; install the CUDA toolkit, then {HOW_TO_BUILD}"
    if gpu is None:
        return f"not built: no NVIDIA GPU here, so MOSAIC_CUDA=auto leaves them out; to build them, {HOW_TO_BUILD}"
    return f"not built, but {gpu} and {nvcc} are there; to build them and see what fails, {HOW_TO_BUILD}"


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

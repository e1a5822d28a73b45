# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.info [MODEL]``: versions and backends, or how a model runs and why not faster."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mosaic_kernels.cli import run_command, show
from mosaic_kernels.cuda_toolkit import find_gpu, find_nvcc, why_not_built
from mosaic_kernels.errors import BackendError, ModelLoadError, UsageError
from mosaic_kernels.explain import explain
from mosaic_kernels.explanation import Explanation
from mosaic_kernels.ops import cpu, isa
from mosaic_kernels.ops.select import backends, running
from mosaic_kernels.paths import local_path

PACKAGES = ("mosaic-kernels", "torch", "transformers", "triton", "safetensors", "numpy", "peft")
TOOLS = ("c++", "cmake", "nvcc")
VARIABLES = (
    "MOSAIC_BACKEND",
    "MOSAIC_LOG_LEVEL",
    "MOSAIC_NUM_THREADS",
    "MOSAIC_ISA",
    "MOSAIC_CUDA",
    "MOSAIC_CUDA_ARCHS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)


def collect() -> dict[str, Any]:
    """Everything the command prints, under the names of ``--json``; needs neither kernels nor a GPU."""
    return {
        "versions": _versions(),
        "tools": {name: _tool_version(name) for name in TOOLS},
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "threads": cpu.threads(), **_native_cpu()},
        "cuda": _cuda(),
        "backends": {
            name: {"devices": list(backend.devices), "why_not": backend.why_not(), "kernels": sorted(backend.kernels)}
            for name, backend in backends().items()
        },
        "active": {device: _active(device) for device in ("cpu", "cuda")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def format_table(found: dict[str, Any]) -> str:
    """The same as people read it."""
    processor, cuda = found["cpu"], found["cuda"]
    lines = [f"{name:<16}{value or 'not installed'}" for name, value in found["versions"].items()]
    lines += ["", f"{'CPU':<16}{processor['name']}, {processor['cores']} cores, {processor['threads']} threads"]
    limit = "" if processor["isa"] == processor["best_isa"] else f"limited from {processor['best_isa']} by MOSAIC_ISA; "
    has = processor["features"] or "unknown"
    lacking = isa.lacking(processor["best_isa"], has) if processor["best_isa"] else ""
    limit += f"{lacking}; " if lacking else ""
    lines += [f"{'instructions':<16}{processor['isa'] or 'unknown'} ({limit}CPU has: {has})"]
    lines += [f"{'CUDA':<16}{cuda['why_not'] or ', '.join(cuda['devices'])} (torch built for {cuda['torch'] or 'CPU'})"]
    lines += [f"{'CUDA kernels':<16}{cuda['not_built'] or 'built'}"]
    lines += [f"{name:<16}{value or 'not found'}" for name, value in found["tools"].items()]
    lines += ["", *(f"{name:<16}{entry['why_not'] or 'runs here'}" for name, entry in found["backends"].items())]
    lines += ["", *(f"{device + ' tensors':<16}{name}" for device, name in found["active"].items())]
    lines += ["", *(f"{name}={value}" for name, value in found["environment"].items())]
    return "\n".join(lines).rstrip()


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tool_version(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    lines = done.stdout.splitlines()
    # nvcc names its release in the fourth line, the others in the first
    return next((line for line in lines if "release" in line), lines[0] if lines else path)


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _native_cpu() -> dict[str, str | None]:
    if cpu.why_not() is not None:
        return {"isa": None, "best_isa": None, "features": None}
    from mosaic_kernels import _C_cpu

    return {"isa": _C_cpu.isa(), "best_isa": cpu.BEST_ISA, "features": _C_cpu.features()}


def _cuda() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    why_not: str | None
    if torch.version.cuda is None:
        why_not = "this torch was built without CUDA"
    else:
        why_not = None if devices else "no device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    built = find_spec("mosaic_kernels._C_cuda") is not None
    not_built = None if built else why_not_built(find_gpu(), find_nvcc())
    return {"torch": torch.version.cuda, "devices": devices, "why_not": why_not, "not_built": not_built}


def _active(device: str) -> str:
    """The backend that multiplies on ``device``, or the reason why none does."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no device"
    try:
        return running("sparse_linear", torch.device(device))
    except BackendError as error:
        return str(error)


def explain_model(source: str, dtype: str = "auto", device: str = "auto") -> Explanation:
    """Load a model as every command does, and tell how it runs; only a mosaic checkpoint is prepared for inference.

    Raises:
        The errors of :func:`~mosaic_kernels.checkpoint.reader.load_model`.
    """
    from mosaic_kernels.checkpoint.reader import load_model

    model, _ = load_model(source, dtype=dtype, device=device)
    return explain(model)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mosaic_kernels.info",
        description="Shows versions, backends, and why a backend does not run. With MODEL, shows how every block and "
        "layer of it runs, and why not faster.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face directory or a hub id")
    parser.add_argument("--device", default="auto", help="for MODEL: auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", help="for MODEL: auto, float32, bfloat16 or float16 (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="only compare the files of MODEL, a directory, with their checksums; name what is damaged and end with "
        "exit code 1",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def body() -> None:
        arguments = make_parser().parse_args(argv)
        if arguments.verify:
            return _verify(arguments.model, as_json=arguments.json)
        if arguments.model is None:
            found = collect()
            text = format_table(found)
        else:
            explanation, versions = explain_model(arguments.model, arguments.dtype, arguments.device), _versions()
            found = {"model": arguments.model, "versions": versions, **explanation.as_dict()}
            text = f"{explanation}\n\n{', '.join(f'{name} {value}' for name, value in versions.items() if value)}"
        show(json.dumps(found) if arguments.json else text)
        return None

    return run_command(body)


def _verify(source: str | None, *, as_json: bool) -> None:
    from mosaic_kernels.checkpoint.verify import verify_directory

    if source is None:
        raise UsageError("--verify needs a directory: python -m mosaic_kernels.info DIR --verify")
    found = verify_directory(local_path(source, "DIR"))
    if as_json:
        show(json.dumps(found.as_dict()))
    if found.damaged:
        raise ModelLoadError(f"{found}\ncopy or download the checkpoint again")
    if not as_json:
        show(str(found))


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""One run: on which device, how large, how long, and the file that its rows go to as soon as they are known."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import machine

Row = dict[str, Any]


@dataclass
class Bench:
    """Options of a stage.

    Attributes:
        device: where it runs.
        tiny: small shapes and few rounds: tries the code, measures nothing.
        seconds: a stage starts nothing new after so many.
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 3600.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds until no more is started."""
        return self.seconds - (time.perf_counter() - self.started)

    def free(self) -> None:
        """Give back what the last measurement held."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, Any]:
    """The machine a figure depends on, with the GPU where there is one."""
    found = machine()
    found["commit"] = found["commit"] or os.environ.get("BENCH_COMMIT", "")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    for name in ("triton", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def slug(device: torch.device) -> str:
    """The device's name as part of a file name: ``nvidia-h200``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(stage: str, rows: Iterable[Row], bench: Bench, folder: Path) -> Path:
    """Take every row as it comes and write the file anew, so that a run that is cut off leaves what it has.

    A stage that runs out of time, or fails, says so in its file (``complete``, ``error``).
    """
    path = folder / f"gpu-{stage}-{slug(bench.device)}.json"
    content: dict[str, Any] = {
        "machine_info": describe(bench.device), "tiny": bench.tiny, "complete": False, "error": None, "rows": []
    }  # fmt: skip

    def save() -> None:
        content["seconds"] = round(time.perf_counter() - bench.started, 1)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(path)

    folder.mkdir(parents=True, exist_ok=True)
    save()
    try:
        for row in rows:
            content["rows"].append(row)
            save()
        content["complete"] = bench.left > 0
    except Exception as error:
        content["error"] = reason(error)
        raise
    finally:
        save()
    return path


def load(stage: str, folder: Path) -> dict[str, Any] | None:
    """The file of a stage, if there is one; a GPU's before a CPU's, which only tries the code."""
    paths = sorted(folder.glob(f"gpu-{stage}-*.json"), key=lambda path: (path.stem.endswith("-cpu"), path.name))
    found: dict[str, Any] | None = json.loads(paths[0].read_text()) if paths else None
    return found


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def note(*words: object, sep: str = " ") -> None:
    """Progress, apart from what is printed last."""
    print(*words, sep=sep, file=sys.stderr, flush=True)

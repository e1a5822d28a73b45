# SPDX-License-Identifier: Apache-2.0
"""Sizes of the kernels' tiles: what was measured on this GPU, and defaults where nothing was.

``configs.json`` holds what was measured, ``{GPU name: {operation: {"config": ..., "microseconds": ...}}}``;
``python -m mosaic_kernels.ops.triton`` measures the candidates on the GPU at hand and writes its entry.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]

MEASURED = Path(__file__).with_name("configs.json")

# Measured on no GPU: those with the fewest instructions a weight in code compiled for sm_90, without spills.
# register_N sums N rows and tiles_N has tiles of N rows, with OUT features and WORDS of 32 columns in a program.
# most_in_*: rows up to which each path is taken in half precision; rows of a weight in a program of obs_block.
DEFAULTS: dict[str, Config] = {
    "register_1": {"OUT": 8, "WORDS": 16, "num_warps": 4},
    "register_2": {"OUT": 4, "WORDS": 32, "num_warps": 4},
    "register_4": {"OUT": 8, "WORDS": 8, "num_warps": 4},
    "register_8": {"OUT": 8, "WORDS": 4, "num_warps": 4},
    "register_16": {"OUT": 8, "WORDS": 2, "num_warps": 4},
    "tiles_16": {"OUT": 32, "WORDS": 4, "num_warps": 4},
    "tiles_32": {"OUT": 32, "WORDS": 4, "num_warps": 4},
    "tiles_64": {"OUT": 64, "WORDS": 2, "num_warps": 4},
    "tiles_128": {"OUT": 64, "WORDS": 2, "num_warps": 4},
    "most_in_registers": {"ROWS": 4},
    "most_in_tiles": {"ROWS": 256},
    "obs_block": {"ROWS": 4, "num_warps": 4},
}


def candidates(op: str) -> list[Config]:
    """What is worth measuring for ``op``, the default among it."""
    kind = op.partition("_")[0]
    if kind == "most":
        return [
            {"ROWS": rows} for rows in ((1, 2, 4, 8, 16) if op == "most_in_registers" else (64, 128, 256, 512, 1024))
        ]
    if kind == "obs":
        return [{"ROWS": rows, "num_warps": warps} for rows in (4, 8, 16, 32) for warps in (1, 2, 4, 8)]
    if kind == "tiles":
        sizes = [(out, words) for out in (16, 32, 64, 128) for words in (2, 4, 8) if out * words <= 256]
    else:
        sizes = [(out, words) for out in (2, 4, 8, 16) for words in (2, 4, 8, 16, 32) if 16 <= out * words <= 128]
    return [{"OUT": out, "WORDS": words, "num_warps": warps} for out, words in sizes for warps in (2, 4, 8)]


_tried: dict[str, Config] = {}


@contextmanager
def trying(op: str, chosen: Config) -> Iterator[None]:
    """Use ``chosen`` for ``op`` inside a ``with`` block."""
    _tried[op] = chosen
    try:
        yield
    finally:
        del _tried[op]


@functools.cache
def _measured_on(device: torch.device) -> dict[str, dict[str, Any]]:
    if device.type != "cuda":
        return {}
    entries: dict[str, dict[str, dict[str, Any]]] = json.loads(MEASURED.read_text())
    return entries.get(torch.cuda.get_device_name(device), {})


def config(op: str, device: torch.device) -> Config:
    """The sizes for ``op`` on ``device``."""
    entry = _measured_on(device).get(op)
    return _tried.get(op) or (DEFAULTS[op] if entry is None else entry["config"])


def record(gpu: str, op: str, entry: dict[str, Any]) -> None:
    """Write what was measured for ``op`` on ``gpu`` (``config``, ``microseconds`` and how) to ``configs.json``."""
    entries = json.loads(MEASURED.read_text())
    entries.setdefault(gpu, {})[op] = entry
    MEASURED.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    _measured_on.cache_clear()

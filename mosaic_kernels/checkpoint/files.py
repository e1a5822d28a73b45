# SPDX-License-Identifier: Apache-2.0
"""What the weight files of a directory hold, read from their headers before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mosaic_kernels.errors import ModelLoadError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory.

    Raises:
        ModelLoadError: the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path.parent} has no {path.name}: it is not a Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, all present; empty for a model in another format.

    Raises:
        ModelLoadError: there are no weights at all, or a shard that the index names is missing.
    """
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if (directory / WEIGHTS_INDEX).exists():
        names = sorted(set(read_json(directory / WEIGHTS_INDEX).get("weight_map", {}).values()))
        for name in names:
            if not (directory / name).exists():
                raise ModelLoadError(f"{directory} lacks the shard {name} that {WEIGHTS_INDEX} names: copy it again")
        return [directory / name for name in names]
    if any(directory.glob("pytorch_model*.bin")):
        return []
    raise ModelLoadError(f"{directory} has a config but no weights ({WEIGHTS} or {WEIGHTS_INDEX}): copy it again")


class Header(NamedTuple):
    """What a file says of a tensor before it is read; dtypes are safetensors' words, such as ``BF16``."""

    shape: tuple[int, ...]
    dtype: str


def tensor_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """Shape and dtype of every tensor in safetensors files, by name.

    Raises:
        ModelLoadError: a file is truncated or no safetensors file.
    """
    headers: dict[str, Header] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    headers[name] = Header(tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{path} is truncated or corrupt ({error}): copy or download it again") from error
    return headers

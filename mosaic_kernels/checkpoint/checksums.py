# SPDX-License-Identifier: Apache-2.0
"""SHA-256 digests of a checkpoint's tensors, headers and configuration: made at saving, compared on request.

``quantization_config`` holds them under ``checksums``::

    {"config": digest, "header": digest, "tensors": {name: digest, ...}}

``tensors`` are the digests of the bytes in the files, 64 hexadecimal digits each. ``header`` covers the names, dtypes
and shapes of all tensors, and ``config`` everything else in ``config.json``. Loading always compares the last two,
which takes milliseconds, and ``tensors`` only if ``verify`` is set.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic_kernels.checkpoint.files import DTYPE_NAMES, Header, read_json, require_readable
from mosaic_kernels.errors import ModelLoadError

_PIECE = 1 << 20  # bytes that are read and hashed at a time, few enough to stay in the cache between both steps
_THREADS = 4  # hashlib releases Python's lock; with more than four threads they would wait for the disk


def of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The checksums of weight files that will hold ``tensors``; the module's docstring has their form."""
    headers = {name: Header(tuple(t.shape), DTYPE_NAMES.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
    return {"header": header_digest(headers), "tensors": {name: _tensor_digest(t) for name, t in tensors.items()}}


def _tensor_digest(tensor: Tensor) -> str:
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


def header_digest(headers: Mapping[str, Header]) -> str:
    """The digest of all names, dtypes and shapes. It does not depend on how the tensors are spread over files."""
    rows = sorted([name, header.dtype, list(header.shape)] for name, header in headers.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def config_digest(content: Mapping[str, Any]) -> str:
    """The digest of a ``config.json`` without its checksums. It does not depend on the order of keys or the layout."""
    described = dict(content.get("quantization_config") or {})
    described.pop("checksums", None)
    rest = {**content, "quantization_config": described}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Place(NamedTuple):
    """Where the bytes of a tensor lie."""

    name: str
    path: Path
    start: int
    size: int


def damaged_tensors(files: Iterable[str | Path], checksums: Mapping[str, Any]) -> list[str]:
    """Read all weight files and return the sorted names of tensors whose bytes differ from what was written.

    Tensors without a checksum, and tensors that no file holds, count as damaged.

    Raises:
        ModelLoadError: a file is not readable as safetensors.
        EnvironmentError_: a file may not be read.
    """
    expected: Mapping[str, str] = checksums.get("tensors", {})
    places = [place for file in files for place in _places(Path(file))]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = dict(zip((place.name for place in places), threads.map(_digest, places), strict=True))
    return sorted(name for name in {*expected, *found} if found.get(name) != expected.get(name))


def _places(path: Path) -> list[_Place]:
    require_readable(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return [_Place(name, path, 8 + length + start, end - start) for name, (start, end) in tensors.items()]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is truncated or corrupt ({error}): copy or download it again") from error


def _digest(place: _Place) -> str:
    digest = hashlib.sha256()
    left = place.size
    with place.path.open("rb") as file:
        file.seek(place.start)
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def config_is_as_written(directory: Path, checksums: Mapping[str, Any]) -> bool:
    """False if a directory's ``config.json`` was changed since it was written; True if not, or if it has no digest.

    Raises:
        ModelLoadError: the file is no JSON object.
        EnvironmentError_: it may not be read.
    """
    expected = checksums.get("config")
    return expected is None or config_digest(read_json(directory / "config.json")) == expected


def seal_config(path: Path) -> None:
    """Update the digest inside a ``config.json`` that has checksums."""
    content = read_json(path)
    described = content.get("quantization_config") or {}
    if described.get("checksums"):
        described["checksums"]["config"] = config_digest(content)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

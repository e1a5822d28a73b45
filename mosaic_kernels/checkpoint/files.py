# SPDX-License-Identifier: Apache-2.0
"""What the weight files of a directory hold, read from their headers before any weight is loaded."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mosaic_kernels.errors import EnvironmentError_, ModelLoadError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# safetensors' words for dtypes.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8",
    torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_AGAIN = "copy or download it again"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_readable(path: Path) -> None:
    """Raise unless ``path`` is an ordinary file, or a link to one, that this process may read. Nothing else is opened.

    Raises:
        ModelLoadError: there is no such file, or it is a directory, pipe, socket or device.
        EnvironmentError_: reading is not permitted; the message has the file's mode and owner.
    """
    try:
        found = path.stat()
        for is_kind, kind in _KINDS:
            if is_kind(found.st_mode):  # opening a pipe would wait for its writer
                raise ModelLoadError(f"{path} is {kind}, not a file: {_AGAIN}")
        with path.open("rb"):
            return
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ModelLoadError(f"{path} is a link to {path.readlink()}, which does not exist: {_AGAIN}") from error
        raise ModelLoadError(f"{path} does not exist: copy or download the model again") from error
    except PermissionError as error:
        raise EnvironmentError_(_forbidden(path)) from error
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error


def _forbidden(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return f"no permission to read {path}: a directory above it is closed to user {os.getuid()}"
    mode = f"mode {found.st_mode & 0o777:o}, owner {found.st_uid}"
    return (
        f"no permission to read {path} ({mode}; this process runs as user {os.getuid()}): give it read permission, "
        "for example with chmod a+r"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory.

    Raises:
        ModelLoadError: the file is missing, no ordinary file or not a JSON object.
        EnvironmentError_: reading is not permitted.
    """
    if not path.exists() and not path.is_symlink() and os.access(path.parent, os.X_OK):
        raise ModelLoadError(f"{path.parent} has no {path.name}: it is not a Hugging Face model directory")
    require_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelLoadError(f"{path} nests values too deeply to be read: {_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, all present; empty for a model in another format.

    Raises:
        ModelLoadError: there are no weights at all, or a shard that the index names is missing, no ordinary file, or
            outside the directory.
        EnvironmentError_: a file may not be read.
    """
    if _is_there(directory / WEIGHTS):
        require_readable(directory / WEIGHTS)
        return [directory / WEIGHTS]
    if _is_there(directory / WEIGHTS_INDEX):
        names = sorted(set(weight_map(directory / WEIGHTS_INDEX).values()))
        for name in names:
            if not _is_there(directory / name):
                raise ModelLoadError(f"{directory} lacks the shard {name} that {WEIGHTS_INDEX} names: copy it again")
            require_readable(directory / name)
        return [directory / name for name in names]
    if any(directory.glob("pytorch_model*.bin")):
        return []
    raise ModelLoadError(f"{directory} has a config but no weights ({WEIGHTS} or {WEIGHTS_INDEX}): copy it again")


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def weight_map(index: Path) -> dict[str, str]:
    """Which shard holds each tensor, as an index file says; every shard is a file beside the index.

    Raises:
        ModelLoadError: the index is unreadable, not of this form, or names a file elsewhere.
        EnvironmentError_: the index may not be read.
    """
    content = read_json(index)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelLoadError(f"{index}: weight_map must be a table from tensor names to file names: {_AGAIN}")
    if not isinstance(content.get("metadata"), dict):
        raise ModelLoadError(f"{index}: metadata must be a table: {_AGAIN}")
    for tensor, name in found.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: the file of {tensor} must be a name such as {WEIGHTS}, got {name!r:.60}")
        if name != Path(name).name or "\0" in name:
            raise ModelLoadError(f"{index}: the file of {tensor} is {name!r:.60}, which lies outside the directory")
    return found


class Header(NamedTuple):
    """What a file says of a tensor before it is read; dtypes are safetensors' words, such as ``BF16``."""

    shape: tuple[int, ...]
    dtype: str


def tensor_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """Shape and dtype of every tensor in safetensors files, by name.

    Raises:
        ModelLoadError: a file is truncated or no safetensors file, two files hold the same tensor, or an index beside
            several files gives another file for a tensor.
        EnvironmentError_: a file may not be read.
    """
    headers: dict[str, Header] = {}
    places: dict[str, str] = {}
    paths = [Path(file) for file in files]
    for path in paths:
        require_readable(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    if name in headers:
                        raise ModelLoadError(f"{name} is in {places[name]} and in {path.name}: {_AGAIN}")
                    headers[name] = Header(tuple(part.get_shape()), part.get_dtype())
                    places[name] = path.name
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{path} is truncated or corrupt ({error}): {_AGAIN}") from error
    if paths and paths[0].name != WEIGHTS and _is_there(paths[0].with_name(WEIGHTS_INDEX)):
        _check_index(paths[0].with_name(WEIGHTS_INDEX), places)
    return headers


def _check_index(index: Path, places: dict[str, str]) -> None:
    named = weight_map(index)
    for name, file in named.items():
        if name not in places:
            raise ModelLoadError(f"{index} names the tensor {name}, which {file} does not hold: {_AGAIN}")
        if places[name] != file:
            raise ModelLoadError(f"{index} says that {name} is in {file}, but it is in {places[name]}: {_AGAIN}")
    unknown = next((name for name in places if name not in named), None)
    if unknown is not None:
        raise ModelLoadError(f"{index} does not name the tensor {unknown}, which {places[unknown]} holds: {_AGAIN}")

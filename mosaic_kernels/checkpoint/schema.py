# SPDX-License-Identifier: Apache-2.0
"""Checks the types and ranges of everything in a ``quantization_config`` before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mosaic_kernels.errors import FormatError
from mosaic_kernels.format import FORMAT_VERSION, GROUP_COLUMNS

FORMATS = ("bitmask", "dense")
_MOST_FEATURES = 2**31 - 1  # the kernels count features in 32 bits
_WHERE = "quantization_config in config.json"
_DO = "copy or download the checkpoint again"


def check_description(found: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` with a part of a wrong type or out of range.

    Keys that this release does not know are ignored: a change that older releases must not ignore gets a new version.

    Args:
        found: the values of its keys; a key that is absent has its default.

    Raises:
        FormatError: an entry is wrong; the message names its key, the path to it, and the expected value.
    """
    version = found.get("version", FORMAT_VERSION)
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FormatError(
            f"this checkpoint has mosaic format version {_short(version)} and this release reads version "
            f"{FORMAT_VERSION}; update mosaic-kernels"
        )
    form = found.get("format", FORMATS[0])
    if form not in FORMATS:
        raise FormatError(f"unknown mosaic format {_short(form)}; this release reads {' and '.join(FORMATS)}")
    for name, entry in _table(found.get("projections"), "projections").items():
        _check_projection(name, entry)
    for name, entry in _table(found.get("heads"), "heads").items():
        path = f"heads[{_short(name)}]"
        heads = _table(entry, path, required=True)
        for key in ("query", "key_value"):
            if not _is_count(heads.get(key), 1, _MOST_FEATURES):
                raise _wrong(f"{path}.{key}", f"a whole number from 1 to {_MOST_FEATURES}", heads.get(key))
    _table(found.get("provenance"), "provenance")
    _check_weights(found.get("weights"))
    _check_checksums(found.get("checksums"))


def _check_projection(name: Any, entry: Any) -> None:
    path = f"projections[{_short(name)}]"
    table = _table(entry, path, required=True)
    shape = table.get("shape")
    if not (isinstance(shape, (list, tuple)) and len(shape) == 2) or "nnz" not in table:
        raise FormatError(
            f'{name}: its entry must be {{"shape": [out, in], "nnz": n}}, got {_short(entry)} ({_WHERE}, {path}): {_DO}'
        )
    for value, most in ((shape[0], _MOST_FEATURES), (shape[1], _MOST_FEATURES), (table["nnz"], None)):
        if not _is_count(value, 0 if most is None else 1, most):
            raise FormatError(
                f"{name}: shape and nnz must be whole numbers, and the sides of the shape 1 to {_MOST_FEATURES}, "
                f"got {_short(entry)} ({_WHERE}, {path}): {_DO}"
            )
    rows, columns = shape
    if table["nnz"] > rows * columns:
        raise FormatError(
            f"{name}: {_short(table['nnz'])} weights do not fit into {rows}x{columns} ({_WHERE}, {path}.nnz): {_DO}"
        )
    if not isinstance(table.get("packed", False), bool):
        raise _wrong(f"{path}.packed", "true or false", table["packed"])


def _check_weights(weights: Any) -> None:
    known = [{"dtype": "int8", "group": group} for group in (None, GROUP_COLUMNS)]
    if weights is not None and (weights not in known or isinstance(weights["group"], bool)):
        raise FormatError(
            f"unknown packed values {_short(weights)}: this release reads float ones and int8 with a scale for each "
            f"row or {GROUP_COLUMNS} columns; update mosaic-kernels"
        )


def _check_checksums(checksums: Any) -> None:
    table = _table(checksums, "checksums")
    for key in ("config", "header"):
        if key in table:
            _digest(table[key], f"checksums.{key}")
    for name, digest in _table(table.get("tensors"), "checksums.tensors").items():
        _digest(digest, f"checksums.tensors[{_short(name)}]")


def _digest(value: Any, path: str) -> None:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise _wrong(path, "a SHA-256 of 64 hexadecimal digits", value)


def _table(value: Any, path: str, *, required: bool = False) -> Mapping[str, Any]:
    if value is None and not required:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(path, "a table", value)
    for key in value:
        if not isinstance(key, str):
            raise _wrong(path, "a table with names for keys", key)
    return value


def _is_count(value: Any, least: int, most: int | None) -> bool:
    """True for a whole number in this range, but not for ``true``, which Python counts as a number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= least and (most is None or value <= most)


def _wrong(path: str, wanted: str, value: Any) -> FormatError:
    return FormatError(f"{path} of {_WHERE} must be {wanted}, got {_short(value)}: {_DO}")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or very deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."

# SPDX-License-Identifier: Apache-2.0
"""Removes absolute paths, user names and access tokens from texts that are published."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mosaic_kernels.paths import home_directory

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w-]+)?")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://[^\s'\"<>]+", re.IGNORECASE)
# A path inside a text: its beginning, its folders, and its last part, which is kept.
_PATH = re.compile(
    r"(?:(?<![\w:/\\.~])[A-Za-z]:[\\/]|(?<![\w/\\.~-])(?:~[\w.-]*|\.{1,2})?[\\/])"
    r"(?:[^\\/\s,;'\"()\[\]]+[\\/]+)*(?=[^\\/\s])"
)
_ROOTED = re.compile(r"(?:[A-Za-z]:[\\/]|\\\\|/|~|\.{1,2}(?:[\\/]|$)|file:)")
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}|\b(?:sk|ghp|gho|github_pat|glpat)[-_][A-Za-z0-9_-]{16,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_HIDDEN = "***"
# Options whose values are always local paths.
_PATH_OPTIONS = ("--output-dir", "--eval-text", "--ranks", "--profile", "--plan")
_SOURCE_OPTIONS = ("--calibration",)  # a path or a name on the hub


def public_name(source: str | os.PathLike[str]) -> str:
    """A name to publish: a hub id as it is, the last part of a path, or the hub id of a snapshot in the hub's cache.

    Args:
        source: path, hub id, URL or description.
    """
    text = os.fspath(source)
    if (snapshot := re.search(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/][^\\/]+[\\/]*$", text)) is not None:
        return f"{snapshot[1]}/{snapshot[2]}"
    if _URL.match(text) is not None:
        return public_text(text)
    if _is_local(text):
        return public_text(_last_part(text))
    return public_text(text)


def public_text(text: str) -> str:
    """``text`` with every path cut to its last part, and without access tokens and secrets in URLs."""
    for name in _SECRET_VARIABLES:
        if len(secret := os.environ.get(name, "")) > 5:
            text = text.replace(secret, _HIDDEN)
    text = _SECRET.sub(_HIDDEN, text)
    text = _URL.sub(lambda found: _public_url(found[0]), text)
    home = home_directory()
    if home is not None and len(home.parts) > 2:  # also behind letters, as in -I/home/me/x
        text = text.replace(f"{home}/", "").replace(str(home), "~")
    text = _PATH.sub("", text)
    return text.encode("utf-8", "replace").decode()  # a file name may be invalid Unicode


def public_command(command: Sequence[str]) -> list[str]:
    """The words of a command line, to publish: options stay, paths are cut to their last part."""
    found, option = [], ""
    for word in command:
        name, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            found.append(f"{name}={_public_value(name, value)}")
        elif word.startswith("-") and len(word) > 1:
            found.append(public_text(word))
        else:
            found.append(_public_value(option, word))
        option = word if word.startswith("--") and not equals else ""
    return found


def _public_value(option: str, value: str) -> str:
    """The value of an option, to publish; ``option`` may be abbreviated, as argparse allows."""
    if len(option) > 3 and any(full.startswith(option) for full in _PATH_OPTIONS):
        return value if "/" not in value and "\\" not in value and value[:1] != "~" else public_name_of_path(value)
    if (
        len(option) > 3
        and any(full.startswith(option) for full in _SOURCE_OPTIONS)
        and Path(value).suffix
        and "/" in value
    ):
        return public_name(value) if _URL.match(value) else public_name_of_path(value)
    return public_name(value)


def public_name_of_path(path: str) -> str:
    """The last part of a path."""
    return public_name(path) if _URL.match(path) else public_text(_last_part(path))


def without_paths(value: Any) -> Any:
    """A JSON value with every string that is a path cut to its last part."""
    if isinstance(value, str):
        return public_name(value) if _ROOTED.match(value) and re.search(r"[\w.-]+[\\/]+[\w.-]", value) else value
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    return [without_paths(part) for part in value] if isinstance(value, list) else value


def _is_local(text: str) -> bool:
    if _ROOTED.match(text):
        return True
    if "/" not in text and "\\" not in text:
        return False
    if any(space in text for space in "\n\t"):
        return False
    try:
        there = Path(text).exists() or Path(text.rpartition(":")[0] or text).exists()
    except (OSError, ValueError):
        there = False
    return there or (_HUB_ID.fullmatch(text) is None and not re.search(r"\s", text))


def _last_part(text: str) -> str:
    home = home_directory()
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        path = Path(text)
    if home is not None and path == home:
        return "~"
    if path.name in ("", ".."):  # '.', '..' and '/' have no name of their own
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError):
            return "."
        return "~" if resolved == home else resolved.name or "."
    last = re.split(r"[\\/]+", text.rstrip("\\/"))[-1]
    return "~" if last.startswith("~") else last


def _public_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return _HIDDEN
    if parts.scheme.lower() == "file" or not host:
        return _last_part(parts.path) or _HIDDEN
    return f"{parts.scheme}://{host}{parts.path}"

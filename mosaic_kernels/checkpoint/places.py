# SPDX-License-Identifier: Apache-2.0
"""Decides where an output directory may stand: not where replacing it would harm other files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mosaic_kernels.errors import UsageError
from mosaic_kernels.paths import home_directory, local_path

_MOUNTS = Path("/proc/self/mountinfo")
_LONGEST_NAME = 255  # bytes, on every common filesystem
_REPOSITORIES = (".git", ".hg", ".svn")
_ELSEWHERE = "choose an --output-dir"

Identity = tuple[int, int]


def resolved(path: str | Path) -> Path:
    """``path`` as an absolute path without links and ``~``.

    Raises:
        UsageError: it is not a path, or a name in it is too long once this package adds its own prefix and suffix.
    """
    try:
        found = local_path(path, "--output-dir").resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise UsageError(f"{str(path)!r} is not a path for --output-dir: {error}") from error
    longest = max((len(os.fsencode(part)) for part in (*found.parts[:-1], f".{found.name}.previous")), default=0)
    if longest > _LONGEST_NAME:
        raise UsageError(f"a name in {str(path)!r} is {longest - _LONGEST_NAME} bytes too long: shorten --output-dir")
    return found


def require_place(path: Path, source: str | Path | None) -> None:
    """Raise unless a directory at ``path`` may be made, and replaced, without harm to anything else.

    Args:
        path: an absolute path without links.
        source: directory or hub id of the source model, if there is one.

    Raises:
        UsageError: ``path`` is a file, or it is, contains or lies in the source model; it is or contains a mount
            point, the working directory or the home directory; or it is a repository.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --output-dir takes a directory")
    require_no_mounts(path)
    for place, what in ((_here(), "the working directory"), (_home(), "the home directory")):
        if place is not None and _identity(path) in set(_lineage(place)):
            raise UsageError(f"{path} is or contains {what}, which holds other work; {_ELSEWHERE} inside it")
    if any(os.path.lexists(path / name) for name in _REPOSITORIES) or _is_bare_repository(path):
        raise UsageError(f"{path} is a repository, which holds other work; {_ELSEWHERE} inside it")
    for folder in _folders_of(source):
        if _identity(path) in set(_lineage(folder)):
            raise UsageError(f"{path} is or contains the source model {source}: {_ELSEWHERE} outside of it")
        if _identity(folder) in set(_lineage(path)):
            raise UsageError(f"{path} lies inside the source model {source}: {_ELSEWHERE} outside of it")
    if any(_identity(path) in set(_lineage(file)) for file in _linked_files(source)):
        raise UsageError(f"{path} contains files of the source model {source}: {_ELSEWHERE} outside of it")


def require_no_mounts(path: Path) -> None:
    """Raise if a filesystem is mounted at or below ``path``: then ``path`` cannot be renamed and must not be emptied.

    Raises:
        UsageError: one is; the message names the mount point.
    """
    for place in _mounts(path):
        if place == path:
            raise UsageError(f"{path} is a mount point and cannot be renamed; {_ELSEWHERE} inside it")
        if path in place.parents:
            raise UsageError(f"{path} contains the mount point {place}: unmount it or choose another --output-dir")


def _mounts(path: Path) -> Iterator[Path]:
    if path.is_mount():
        yield path
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # not Linux: mounts of the same device are not found
        yield from _other_devices(path)
        return
    for line in lines:
        place = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split(b" ")[4])
        yield Path(os.fsdecode(place))


def _other_devices(path: Path) -> Iterator[Path]:
    if path.is_dir():
        device = path.stat().st_dev
        for folder, names, _ in os.walk(path):
            for name in list(names):
                info = Path(folder, name).lstat()
                if stat.S_ISDIR(info.st_mode) and info.st_dev != device:
                    names.remove(name)
                    yield Path(folder, name)


def _identity(path: Path) -> Identity | None:
    """Device and inode, which are equal for all names of one place, also through links and mounts."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _lineage(path: Path) -> Iterator[Identity]:
    """The identities of ``path``, where it exists, and of every folder above it."""
    for place in (path, *path.parents):
        found = _identity(place)
        if found is not None:
            yield found


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # the working directory was deleted
        return None


def _home() -> Path | None:
    home = home_directory()
    return None if home is None else Path(os.path.realpath(home))


def _is_bare_repository(path: Path) -> bool:
    return (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()


def _folders_of(source: str | Path | None) -> list[Path]:
    """The folders of a source model: its own and, in the hub's cache, the folder of all its versions."""
    if source is None or not str(source):
        return []
    try:
        local = Path(source).expanduser().resolve()
        if not local.is_dir():
            return [cached for cached in [_cached(str(source))] if cached.is_dir()]
    except (OSError, RuntimeError, ValueError):
        return []  # not a path; loading the model will report that
    whole = [place for place in local.parents if place.name.startswith("models--") and local.parent.name == "snapshots"]
    return [local, *whole[:1]]


def _cached(name: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}").resolve()


def _linked_files(source: str | Path | None) -> list[Path]:
    folders = [folder for folder in _folders_of(source)[:1] if os.access(folder, os.R_OK)]
    links = [entry for folder in folders for entry in folder.iterdir() if entry.is_symlink()]
    return [Path(os.path.realpath(link)) for link in links]  # resolve() refuses links in a circle

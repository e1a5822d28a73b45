# SPDX-License-Identifier: Apache-2.0
"""The list of files that this package wrote into a directory, with their sizes and digests."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mosaic_kernels.errors import FormatError

FILE_NAME = "mosaic_manifest.json"
PACKAGE = "mosaic-kernels"
SCHEMA = 1

# Larger files are hashed only by a thorough comparison: reading and hashing takes 1.0 s of processor time per GB (Xeon,
# Ice Lake class, with SHA instructions, Dec 2026), so 1 ms for a file of this size.
_SMALL = 1 << 20
_LARGEST_MANIFEST = 1 << 26  # bytes; a model of 1,000 shards needs 0.2 MB


class Entry(NamedTuple):
    """Size in bytes and SHA-256 (hexadecimal) of a whole file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory held when it was written.

    Attributes:
        version: version of the package that wrote the directory.
        files: every file but the manifest itself, by its path in the directory, with ``/`` between folders.
    """

    version: str
    files: Mapping[str, Entry]

    def folders(self) -> set[str]:
        """The folders that hold the listed files."""
        above = (parent for name in self.files for parent in PurePosixPath(name).parents)
        return {str(folder) for folder in above} - {"."}


class Difference(NamedTuple):
    """One way in which a directory is not what its manifest says.

    Attributes:
        name: path in the directory, with ``/`` between folders.
        kind: ``missing``, ``changed`` or ``extra``.
        detail: the difference in words, without the name.
    """

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} {self.detail}"


def write(directory: Path, *, leave_out: Set[str] = frozenset()) -> Manifest:
    """List every file below ``directory`` in ``mosaic_manifest.json``; folders without files are removed.

    Args:
        directory: where the files are.
        leave_out: names directly in ``directory`` that are not listed.

    Raises:
        FormatError: the directory holds something that is neither a file nor a folder, such as a link.
    """
    names = []
    for name, info in sorted(_walk(directory), reverse=True):  # reverse order: a folder comes after its contents
        if PurePosixPath(name).parts[0] in leave_out:
            continue
        path = directory / name
        if stat.S_ISDIR(info.st_mode):
            if not any(path.iterdir()):
                path.rmdir()
        elif not stat.S_ISREG(info.st_mode):
            raise FormatError(f"{path} {_kind(info)}: only files and folders belong into a finished directory")
        elif name != FILE_NAME:
            names.append(name)
    manifest = Manifest(_version(), _entries(directory, sorted(names)))
    files = {name: entry._asdict() for name, entry in manifest.files.items()}
    body = {"schema": SCHEMA, "package": PACKAGE, "version": manifest.version, "files": files}
    part = directory / f"{FILE_NAME}.part"
    part.write_text(json.dumps(body, indent=1) + "\n", encoding="ascii")
    part.replace(directory / FILE_NAME)  # by rename, so it is never half written
    return manifest


def read(directory: Path) -> Manifest | None:
    """The manifest of a directory; ``None`` for a directory without one, as older releases wrote it.

    Raises:
        FormatError: the manifest is not one that this package wrote.
        OSError: it cannot be read.
    """
    path = directory / FILE_NAME
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # follows no link, waits for no pipe
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_symlink():
            raise FormatError(f"{path} is a link, not a manifest") from error
        if path.is_socket():
            raise FormatError(f"{path} is a socket, not a manifest") from error
        raise
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path} is a folder, not a manifest")
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_MANIFEST:
            raise FormatError(f"{path} is not a manifest: it {_kind(info)} of {info.st_size} bytes")
        content = file.read()
    try:
        return _parse(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not a manifest of this package: {error}") from error


def compare(directory: Path, manifest: Manifest, *, thorough: bool) -> list[Difference]:
    """Every file that is missing, changed or not listed, in order of names.

    Args:
        directory: the directory. Links are not followed, and mounted filesystems are not entered.
        manifest: the files that it should hold.
        thorough: read every file whole; otherwise files above 1 MiB are compared by size alone.
    """
    folders, device = manifest.folders(), directory.stat().st_dev
    found = dict(_walk(directory, folders))
    found.pop(FILE_NAME, None)
    differences, suspects = [], []
    for name in sorted(found.keys() | manifest.files.keys() | folders):
        info = found.get(name)
        if info is None:
            if name in manifest.files:
                differences.append(Difference(name, "missing", "is missing"))
        elif name not in manifest.files and name not in folders:
            differences.append(Difference(name, "extra", f"{_kind(info)} that mosaic-kernels did not write"))
        elif stat.S_ISDIR(info.st_mode) is not (name in folders) or info.st_dev != device:
            kind = "is on another filesystem" if info.st_dev != device else _kind(info)
            differences.append(Difference(name, "changed", f"was replaced: it {kind}"))
        elif name in manifest.files and not stat.S_ISREG(info.st_mode):
            differences.append(Difference(name, "changed", f"was replaced: it {_kind(info)}"))
        elif name in manifest.files:
            size = manifest.files[name].size
            if info.st_size != size:
                detail = f"has changed: {info.st_size} bytes instead of {size}"
                differences.append(Difference(name, "changed", detail))
            elif thorough or size <= _SMALL:
                suspects.append(name)
    now = _entries(directory, suspects)
    changed = [name for name in suspects if now[name] != manifest.files[name]]
    differences += [Difference(name, "changed", "has changed: another sha256") for name in changed]
    return sorted(differences)


def differences(directory: Path, *, thorough: bool) -> list[str]:
    """How a directory differs from its manifest, a line for each file; empty if it does not differ.

    Args:
        directory: the directory, with its manifest.
        thorough: read every file whole (about 1 s per GB); otherwise files above 1 MiB are compared by size alone.

    Raises:
        FormatError: there is no manifest, or it is not one of this package.
        OSError: a file cannot be read.
    """
    manifest = read(directory)
    if manifest is None:
        raise FormatError(f"{directory} has no {FILE_NAME}: an older release or another program wrote it")
    return [str(difference) for difference in compare(directory, manifest, thorough=thorough)]


def remove(directory: Path, manifest: Manifest) -> bool:
    """Delete the files that a manifest lists, and the manifest last; all other files stay.

    Returns:
        False if the directory is still there, because something that is not listed is in it.
    """
    folders = sorted(manifest.folders(), reverse=True)
    known = {".", *(name for name in folders if _is_folder(directory, name))}
    for name in manifest.files:
        if str(PurePosixPath(name).parent) in known:  # otherwise the path may lead through a link
            (directory / name).unlink(missing_ok=True)
    try:
        for name in folders:
            if name in known:
                (directory / name).rmdir()
        if {entry.name for entry in directory.iterdir()} <= {FILE_NAME}:
            (directory / FILE_NAME).unlink(missing_ok=True)
            directory.rmdir()
    except OSError:
        return False
    return not directory.exists()


def _is_folder(directory: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    return all(_is_real_folder(directory.joinpath(*parts[: count + 1])) for count in range(len(parts)))


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.is_mount()


def _walk(directory: Path, known: Set[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """All files, folders and links below ``directory``; links are not followed.

    Mounted filesystems are yielded but not entered. If ``known`` is given, other folders are not entered either.
    """
    device, waiting = directory.stat().st_dev, [directory]
    while waiting:
        for entry in waiting.pop().iterdir():
            info = entry.lstat()
            name = entry.relative_to(directory).as_posix()
            yield name, info
            if stat.S_ISDIR(info.st_mode) and info.st_dev == device and (known is None or name in known):
                waiting.append(entry)


def _entries(directory: Path, names: list[str]) -> dict[str, Entry]:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:  # hashlib releases Python's lock
        return dict(zip(names, threads.map(lambda name: _entry(directory / name), names), strict=True))


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(os.fstat(file.fileno()).st_size, digest)


def _parse(body: Any) -> Manifest:
    if body["package"] != PACKAGE or body["schema"] != SCHEMA:
        raise ValueError(f"package {body['package']!r}, schema {body['schema']!r}; expected {PACKAGE!r}, {SCHEMA}")
    files = {_checked(name): Entry(int(each["size"]), str(each["sha256"])) for name, each in body["files"].items()}
    return Manifest(str(body["version"]), files)


def _checked(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", ".", FILE_NAME) or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this directory")
    return name


def _kind(info: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "is a folder", stat.S_IFREG: "is a file", stat.S_IFLNK: "is a link"}
    return kinds.get(stat.S_IFMT(info.st_mode), "is a device, pipe or socket")


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "0+unknown"

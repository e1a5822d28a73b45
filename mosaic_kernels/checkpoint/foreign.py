# SPDX-License-Identifier: Apache-2.0
"""Which files in a model's directory are the model's own, and which are links to something else of its user."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

MOST_LICENCE_BYTES = 1 << 20


class ForeignFileError(OSError):
    """A file that is not copied; the message says why."""


def own_file(path: Path, source: Path) -> Path:
    """The regular file that ``path`` in the model's directory is, if it belongs to the model.

    A link is followed only inside ``source``, and from a snapshot of the hub's cache to the blobs beside it.

    Raises:
        ForeignFileError: it leads elsewhere, or is no regular file.
    """
    target, in_cache = _inside(path, source)
    found = target.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ForeignFileError("it is no regular file")
    if found.st_nlink > 1 and not in_cache:
        raise ForeignFileError("it is a hard link to a file that stands elsewhere, too")
    return target


def _inside(path: Path, source: Path) -> tuple[Path, bool]:
    """What ``path`` leads to in the model's directory, and whether that is in the hub's cache."""
    try:
        root, target = source.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ForeignFileError("it cannot be read, or is a broken link") from error
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    if not target.is_relative_to(root) and not (blobs is not None and target.is_relative_to(blobs)):
        raise ForeignFileError("it is a link that leads out of the model's directory")
    return target, blobs is not None


def read_own_file(path: Path, source: Path, most: int = MOST_LICENCE_BYTES) -> bytes:
    """The bytes of a small file of the model, see :func:`own_file`.

    Raises:
        ForeignFileError: it is not the model's, larger than ``most``, or cannot be read.
    """
    target = own_file(path, source)
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ForeignFileError(f"it cannot be read ({error.strerror})") from error
    if len(data) > most:
        raise ForeignFileError(f"it is larger than {most >> 10} KiB")
    return data


def foreign_links(source: Path, names: Iterable[str | Path]) -> list[str]:
    """Those of these files that are links out of the model's directory, in words.

    A directory of links to the files of one model is that model: what stands beside the file that ``config.json``
    leads to belongs to it.

    Args:
        source: directory of the model, or a hub id, which has no links of this kind.
        names: files in it, which may be missing.
    """
    beside = Path(os.path.realpath(source / "config.json")).parent
    found = []
    for name in names:
        path = source / name
        if os.path.lexists(path) and Path(os.path.realpath(path)).parent != beside:
            try:
                _inside(path, source)
            except ForeignFileError as error:
                found.append(f"{path} is not used for the result: {error}")
    return found

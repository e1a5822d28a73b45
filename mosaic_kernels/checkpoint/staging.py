# SPDX-License-Identifier: Apache-2.0
"""Folders for work in progress, with a marker and closed to other users. Only such folders are deleted."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from mosaic_kernels.checkpoint.lock import is_own
from mosaic_kernels.checkpoint.places import require_no_mounts
from mosaic_kernels.errors import UsageError

MARKER = ".mosaic_staging"
_CONTENT = (
    "Work in progress of mosaic-kernels. Its prune command goes on with it (--resume) or deletes it (--overwrite).\n"
)
_AWAY = "move it away or choose another --output-dir"


def make(folder: Path) -> None:
    """Make a marked folder that only this user may enter."""
    folder.mkdir(mode=0o700)
    mark(folder)


def mark(folder: Path) -> None:
    """Write the marker into a folder, once."""
    if _has_marker(folder):
        return
    path = folder / MARKER
    path.unlink(missing_ok=True)  # the process ended while writing it
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(_CONTENT)


def unmark(folder: Path) -> None:
    """Take the marker out of a folder."""
    (folder / MARKER).unlink(missing_ok=True)


def is_marked(folder: Path) -> bool:
    """True for a folder that :func:`make` made, even if the process ended before the marker was written."""
    return _has_marker(folder) or {entry.name for entry in folder.iterdir()} <= {MARKER}


def _has_marker(folder: Path) -> bool:
    path = folder / MARKER
    try:
        return stat.S_ISREG(path.lstat().st_mode) and path.read_text(encoding="ascii") == _CONTENT
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def require_folder(path: Path) -> None:
    """Raise unless ``path`` is a folder of this user, and no link.

    Raises:
        UsageError: it is no folder, belongs to another user, or has a mount point at or below it.
    """
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        kind = "a link" if stat.S_ISLNK(info.st_mode) else "not a folder"
        raise UsageError(f"{path} is in the way: it is {kind}, and no run made it; {_AWAY}")
    if not is_own(info, path.parent):
        raise UsageError(f"{path} is in the way: it belongs to another user (uid {info.st_uid}); {_AWAY}")
    require_no_mounts(path)


def require_own(folder: Path) -> None:
    """Raise unless an earlier run of this user made ``folder``; close it to other users.

    Raises:
        UsageError: it is no folder, belongs to another user, or lacks our marker.
    """
    require_folder(folder)
    if not is_marked(folder):
        raise UsageError(f"{folder} is in the way: it has no {MARKER}, so no run of this release made it; {_AWAY}")
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        folder.chmod(0o700)


def require_plain_journal(journal: Path) -> None:
    """Raise unless the journal, where there is one, is a folder of plain files of this user.

    Raises:
        UsageError: it holds a link or a file of another user; the message names it.
    """
    if not os.path.lexists(journal):
        return
    require_folder(journal)
    for entry in sorted(journal.iterdir()):
        info = entry.lstat()
        if not stat.S_ISREG(info.st_mode) or not is_own(info, journal):
            raise UsageError(f"{entry} is not a file that a run of this user wrote; remove it, or the whole {journal}")


def clear(folder: Path, *, keep: str | None = None) -> None:
    """Empty a marked folder, but keep its marker and the finished files in its folder ``keep``.

    A run that was killed also leaves unfinished files in ``keep``, which are deleted.
    """
    for entry in folder.iterdir():
        if entry.name == keep:
            for part in (*entry.glob("*.part"), *entry.glob("*.unsealed"), *entry.glob(".*")):
                part.unlink()
        elif entry.name != MARKER:
            _delete(entry)


def remove(folder: Path) -> None:
    """Delete a marked folder; the marker goes last, so that a later run can go on with the deletion."""
    clear(folder)
    unmark(folder)
    folder.rmdir()


def _delete(path: Path) -> None:
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)  # does not follow links
    else:
        path.unlink()


def make_parents(path: Path) -> list[Path]:
    """Make the folders above ``path``; those that were missing, the deepest first.

    Raises:
        UsageError: one of them is a file.
    """
    missing = [place for place in path.parents if not place.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path} cannot be made: {error.filename} is a file; choose another --output-dir") from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that :func:`make_parents` made, if they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def apply_umask(folder: Path, *, leave_out: str) -> None:
    """Give ``folder`` and everything in it the modes of new files and folders under the umask.

    safetensors writes files that only this user can read, and work in progress is closed to others.

    Args:
        folder: a marked folder.
        leave_out: the name of a folder inside ``folder`` that stays as it is.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:  # os.umask() cannot be read without setting it
        for_folders = _mode(Path(place), os.mkdir)
        for_files = _mode(Path(place), lambda path, mode: os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode)))
    waiting = [folder]
    while waiting:
        for entry in waiting.pop().iterdir():
            info = entry.lstat()
            if stat.S_ISDIR(info.st_mode) and entry != folder / leave_out:
                waiting.append(entry)
                _change_mode(entry, info, for_folders)
            elif stat.S_ISREG(info.st_mode):
                _change_mode(entry, info, for_files)
    _change_mode(folder, folder.lstat(), for_folders)


def _mode(place: Path, make: Callable[[Path, int], object]) -> int:
    path = place / "probe"
    make(path, 0o777 if make is os.mkdir else 0o666)
    mode = stat.S_IMODE(path.lstat().st_mode) & 0o777
    _delete(path)
    return mode


def _change_mode(path: Path, info: os.stat_result, mode: int) -> None:
    wanted = stat.S_IMODE(info.st_mode) & ~0o777 | mode  # keeps setgid
    if wanted != stat.S_IMODE(info.st_mode):
        path.chmod(wanted)

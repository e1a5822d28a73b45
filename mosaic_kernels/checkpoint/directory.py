# SPDX-License-Identifier: Apache-2.0
"""An output directory that appears finished or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mosaic_kernels.cli import DISK_FULL
from mosaic_kernels.errors import EnvironmentError_, UsageError


class OutputDirectory:
    """Files are written into a hidden sibling, ``.{name}.partial``, which :meth:`publish` renames.

    Attributes:
        path: where the finished directory will stand.
        staging: where to write meanwhile, on the same filesystem.
        journal: folder inside ``staging`` for what a resumed run needs; never published.
        complete: :meth:`publish` was called: ``staging`` holds a whole result, wherever it stands.

    Args:
        path: the directory to make.
        overwrite: replace what stands at ``path``, once the new directory is complete.
        resume: keep what an interrupted run left in ``staging``; without such a run, start afresh.

    Raises:
        UsageError: ``path`` holds files, or ``staging`` finished blocks, and neither ``overwrite`` nor ``resume``
            is given; another run is writing there; or ``path`` cannot be replaced (a file, a mount point, the home
            directory, a git repository).
        EnvironmentError_: the place is not writable.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        self.staging = self.path.with_name(f".{self.path.name}.partial")
        self.journal = self.staging / "journal"
        self._aside = self.path.with_name(f".{self.path.name}.previous")
        self._may_replace = overwrite or resume
        self.complete = False
        _require_replaceable(self.path)
        if self.has_files and not self._may_replace:
            raise UsageError(
                f"{path} is not empty: choose another --output-dir, or use --overwrite to replace it "
                "or --resume to continue an interrupted run"
            )
        with write_errors(self.path):
            held = self._lock()  # before anything of another run is touched
            self._recover()
            if not resume:
                if not overwrite and any(self.journal.glob("block-*")):
                    raise UsageError(
                        f"an interrupted run has left finished blocks in {self.journal}: --resume goes on with them, "
                        "--overwrite starts afresh"
                    )
                self.discard()
            self.journal.mkdir(parents=True, exist_ok=True)
            if not (held and resume):
                self._lock()

    def _lock(self) -> bool:
        """Hold the journal's folder, if there is one, while this object lives: no second run may write into it."""
        if not self.journal.exists():
            return False
        handle = os.open(self.journal, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing {self.path}: wait for it, or choose another --output-dir"
            ) from None
        return True

    @property
    def has_files(self) -> bool:
        """Whether something stands at ``path`` now."""
        return self.path.is_dir() and any(self.path.iterdir())

    def publish(self) -> None:
        """Make ``staging`` the finished directory: without the journal, safely on disk, in one rename.

        Raises:
            UsageError: files appeared at ``path`` since the start.
            EnvironmentError_: the disk is full; ``path`` is as it was.
        """
        self.complete = True
        if self.has_files and not self._may_replace:
            raise UsageError(f"{self.path} was filled by something else meanwhile; the result is in {self.staging}")
        with write_errors(self.path):
            shutil.rmtree(self.journal, ignore_errors=True)
            for folder, _, files in os.walk(self.staging):
                for name in (*files, "."):
                    _sync(Path(folder, name))
            if self.has_files:
                self.path.rename(self._aside)
            try:
                self.staging.rename(self.path)
            except BaseException:
                self._recover()
                raise
            _sync(self.path.parent)
            shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was staged; ``path`` is untouched."""
        if self.staging.exists():
            shutil.rmtree(self.staging)

    def _recover(self) -> None:
        """Undo or finish a replacement that was cut off between its two renames."""
        if self._aside.exists():
            if self.path.exists():
                shutil.rmtree(self._aside)
            else:
                self._aside.rename(self.path)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk, also as safetensors reports it, and a forbidden place into an error of ours.

    Args:
        path: what is being written, for the message.

    Raises:
        EnvironmentError_: the disk or a quota is full, or writing is not allowed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _os_error(str(error))
        if code in DISK_FULL:
            raise EnvironmentError_(
                f"disk full while writing {path} ({_free_mib(Path(path))} MiB free, {os.strerror(code)}): "
                "free some space or choose another --output-dir"
            ) from error
        if isinstance(error, PermissionError):
            raise EnvironmentError_(f"no permission to write {error.filename or path}: choose another place") from error
        raise


def _os_error(message: str) -> int | None:
    # safetensors writes in Rust and passes the system's error on as "... (os error 28)"
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else None


def require_space(path: Path, needed: int) -> None:
    """Raise before writing where ``needed`` bytes cannot fit.

    Raises:
        EnvironmentError_: the filesystem of ``path`` has less room.
    """
    free = _free_mib(path)
    if needed >> 20 > free:
        raise EnvironmentError_(
            f"{path} needs {needed >> 20} MiB and {free} MiB are free: free {(needed >> 20) - free} MiB "
            "or choose another --output-dir"
        )


def _free_mib(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free >> 20


def _require_replaceable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --output-dir takes a directory")
    if path.is_mount():
        raise UsageError(f"{path} is a mount point and cannot be renamed; choose a directory inside it")
    here = Path.cwd()
    if (path / ".git").exists() or any(path == place or path in place.parents for place in (here, Path.home())):
        raise UsageError(f"{path} is not a place for a model (it holds other work); choose a directory inside it")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

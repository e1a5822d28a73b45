# SPDX-License-Identifier: Apache-2.0
"""An output directory that appears finished or not at all, and that replaces only what this package wrote."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from mosaic_kernels.checkpoint import manifest, staging
from mosaic_kernels.checkpoint.disk import require_space, write_errors
from mosaic_kernels.checkpoint.lock import Lock
from mosaic_kernels.checkpoint.ownership import require_leave, require_ours
from mosaic_kernels.checkpoint.places import require_no_mounts, require_place, resolved
from mosaic_kernels.errors import EnvironmentError_, MosaicError, UsageError

__all__ = ["OutputDirectory", "require_space", "write_errors"]

logger = logging.getLogger(__name__)

# Errors of fsync on filesystems that cannot sync directories (CIFS, some FUSE mounts).
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


class OutputDirectory:
    """Files are written into a hidden sibling, ``.{name}.partial``, which :meth:`publish` renames.

    The directory is locked, by ``.{name}.lock`` beside it, from here to the end of :meth:`publish` or
    :meth:`discard`, or until the object is deleted or the process ends.

    Attributes:
        path: where the finished directory will stand, without links.
        staging: where to write meanwhile, on the same filesystem; only this user may enter it.
        journal: folder inside ``staging`` for what a resumed run needs; never published.
        complete: True once :meth:`publish` was called, so a whole result is in ``staging`` or at ``path``.

    Args:
        path: the directory to make. A link is followed; what it points to is made or replaced.
        overwrite: replace what stands at ``path``, once the new directory is complete.
        resume: keep what an interrupted run left in ``journal``; without such a run, start afresh.
        source: directory or hub id of the source model, which must stay as it is.

    Raises:
        UsageError: neither ``overwrite`` nor ``resume`` is given, and ``path`` holds files or ``staging`` holds
            finished blocks or a finished result. Or ``path`` holds anything that this package did not write, or is
            no place for a model (:func:`~mosaic_kernels.checkpoint.places.require_place`). Or another run is writing
            there. Or a file or folder that no run of this user made is in the way.
        EnvironmentError_: the place is not writable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        source: str | Path | None = None,
    ) -> None:
        self.path = resolved(path)
        with write_errors(self.path):
            require_place(self.path, source)
        self._may_replace = overwrite or resume
        self.complete = False
        self.staging, self._journal_aside, self._aside, lock = (
            self.path.with_name(f".{self.path.name}.{kind}") for kind in ("partial", "journal", "previous", "lock")
        )
        self.journal = self.staging / "journal"
        with write_errors(self.path):
            if not (os.path.lexists(self._aside) or os.path.lexists(self._journal_aside)):
                require_leave(self.path, self._may_replace)
            self._made = staging.make_parents(self.path)
            busy = f"another run is writing {self.path}: wait for it, or choose another --output-dir"
            self._lock = Lock(lock, busy)  # before this run touches anything that another one may be using
            try:
                self._recover()
                require_leave(self.path, self._may_replace)
                require_ours(self.path)
                self._prepare(overwrite=overwrite, resume=resume)
            except BaseException:
                self._lock.release()
                raise
        self._identity = _identity(self.staging)

    @property
    def has_files(self) -> bool:
        """Whether something stands at ``path`` now."""
        return self.path.is_dir() and any(self.path.iterdir())

    def publish(self) -> None:
        """Write the manifest, flush ``staging`` to disk and rename it to ``path``.

        The files get the modes that the umask gives. The journal is deleted after the rename, and so is the old
        directory.

        Raises:
            UsageError: files appeared at ``path`` since the start.
            EnvironmentError_: the disk is full, or the directory could not be renamed. ``path`` is as it was, and the
                result and the journal are in ``staging``.
        """
        self.complete = True
        if _identity(self.staging) != self._identity:
            raise UsageError(f"{self.staging} was replaced while the run was writing into it: start the run again")
        if self.has_files and not self._may_replace:
            raise UsageError(f"{self.path} was filled by something else meanwhile; the result is in {self.staging}")
        try:
            with write_errors(self.path):
                self._put_in_place()
        except (OSError, MosaicError) as error:
            self._undo()
            kind = UsageError if isinstance(error, UsageError) else EnvironmentError_
            raise kind(
                f"{error}. The result is finished but not at {self.path}: it is in {self.staging}, with the finished "
                "blocks. Run the same command with --resume, or move the files to where you want them; without "
                "--resume or --overwrite no run touches them"
            ) from error
        except BaseException:
            self._undo()
            raise
        self._clean_up()

    def discard(self) -> None:
        """Remove what was staged, and end the lock; ``path`` is untouched."""
        if _identity(self.staging) == self._identity and staging.is_marked(self.staging):
            require_no_mounts(self.staging)
            staging.remove(self.staging)
        self._lock.release()
        staging.remove_empty(self._made)

    def release(self) -> None:
        """End the lock; what was staged stays, for a run that resumes this one."""
        self._lock.release()

    def _recover(self) -> None:
        """Undo or finish a replacement that was cut off between its renames."""
        if os.path.lexists(self._journal_aside):
            staging.require_own(self._journal_aside)
            if os.path.lexists(self.staging) and not os.path.lexists(self.journal):
                staging.require_folder(self.staging)
                if not staging.is_marked(self.staging):  # it was about to be renamed
                    require_ours(self.staging, thorough=False)
                self._bring_journal_back()
            else:  # the result was published
                staging.remove(self._journal_aside)
        if os.path.lexists(self._aside):
            staging.require_folder(self._aside)
            require_ours(self._aside, thorough=False)
            if not self.has_files:
                self._aside.rename(self.path)
            elif manifest.read(self.path) is not None:
                self._remove_old()

    def _prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Make ``staging``, or take over what an interrupted run left in it."""
        if not os.path.lexists(self.staging):
            staging.make(self.staging)
        else:
            staging.require_own(self.staging)
            staging.require_plain_journal(self.journal)
            if not (overwrite or resume):
                self._require_no_work()
            staging.clear(self.staging, keep=self.journal.name if resume else None)
        if not self.journal.is_dir():
            self.journal.mkdir()

    def _require_no_work(self) -> None:
        if any(self.journal.glob("block-*")):
            raise UsageError(
                f"an interrupted run has left finished blocks in {self.journal}: --resume goes on with them, "
                "--overwrite starts afresh"
            )
        if any(entry.name not in (self.journal.name, staging.MARKER) for entry in self.staging.iterdir()):
            raise UsageError(
                f"an unfinished run has left its result, or a part of it, in {self.staging}: move "
                "the files to where you want them, or use --resume or --overwrite to make the result again"
            )

    def _put_in_place(self) -> None:
        staging.apply_umask(self.staging, leave_out=self.journal.name)
        manifest.write(self.staging, leave_out={self.journal.name, staging.MARKER})
        staging.mark(self.journal)
        self.journal.rename(self._journal_aside)  # deleted when the result stands at its place
        for folder, _, files in os.walk(self.staging):
            for name in (*files, "."):
                _sync(Path(folder, name))
        staging.unmark(self.staging)
        if self.has_files:
            require_ours(self.path, thorough=False)  # a file may have been put there since the start
            self.path.rename(self._aside)
        self.staging.rename(self.path)

    def _undo(self) -> None:
        """Bring back what :meth:`_put_in_place` moved; do nothing if it succeeded."""
        if not os.path.lexists(self.staging):
            return
        if os.path.lexists(self._aside) and not self.path.exists():
            self._aside.rename(self.path)
        if os.path.lexists(self._journal_aside):
            self._bring_journal_back()

    def _bring_journal_back(self) -> None:
        staging.mark(self.staging)
        self._journal_aside.rename(self.journal)
        staging.unmark(self.journal)

    def _clean_up(self) -> None:
        """Delete the old directory and the journal. Failures do no harm: the result is already at its place."""
        try:
            _sync(self.path.parent)
            if os.path.lexists(self._aside):
                self._remove_old()
            staging.remove(self._journal_aside)
        except OSError as error:
            logger.warning("the result is in %s, but a folder beside it was not deleted: %s", self.path, error)
        self._lock.release()

    def _remove_old(self) -> None:
        listed = manifest.read(self._aside)
        gone = manifest.remove(self._aside, listed) if listed is not None else False
        if not gone and not any(self._aside.iterdir()):
            self._aside.rmdir()
        elif not gone:
            logger.warning("%s holds files that mosaic-kernels did not write; they stay there", self._aside)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # a folder that others may write into but not list
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)

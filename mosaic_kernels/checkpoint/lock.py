# SPDX-License-Identifier: Apache-2.0
"""A lock on an output directory that one process holds until its run ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import tempfile
import weakref
from pathlib import Path

from mosaic_kernels.errors import UsageError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_TRIES = 100  # a try fails only if the holder ends during it


class Lock:
    """Held from construction until :meth:`release`, or until this process ends in any way.

    The lock is on an empty file, which the holder removes. After ``kill -9`` the file stays, but it locks nothing. If
    the filesystem has no locks, a warning says so and the run goes on.

    Args:
        path: the file, in a folder that exists.
        busy: the error message if another process holds the lock.

    Raises:
        UsageError: another process holds the lock, or ``path`` is not a file of this user.
        OSError: the folder is not writable.
    """

    def __init__(self, path: Path, busy: str) -> None:
        for _ in range(_TRIES):
            handle = _open(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise UsageError(busy) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
                logger.warning("no locks on this filesystem (%s): start one run at a time in %s", error, path.parent)
            if _is_at(handle, path):
                break
            os.close(handle)  # the holder before us removed this file while we waited for it
        else:
            raise UsageError(busy)
        self.release = weakref.finalize(self, _release, handle, path, os.getpid())


def _open(path: Path) -> int:
    # does not follow links and does not wait for pipes
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if os.path.lexists(path) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
            raise UsageError(_in_the_way(path)) from error
        raise
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode) or info.st_size or not is_own(info, path.parent):
        os.close(handle)
        raise UsageError(_in_the_way(path))
    return handle


def _in_the_way(path: Path) -> str:
    return f"{path} is in the way: no run of this user made it; move it away or choose another --output-dir"


def is_own(info: os.stat_result, folder: Path) -> bool:
    """True if what ``info`` describes belongs to the user that new files in ``folder`` belong to."""
    if info.st_uid == os.geteuid():
        return True
    with tempfile.TemporaryFile(dir=folder) as probe:  # on NFS, files of root may belong to nobody
        return os.fstat(probe.fileno()).st_uid == info.st_uid


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _release(handle: int, path: Path, holder: int) -> None:
    if os.getpid() != holder:  # a forked child shares the lock but must not end it
        return
    try:
        if _is_at(handle, path):
            path.unlink(missing_ok=True)  # before the unlock, so that a waiting process sees that the file is gone
    finally:
        os.close(handle)

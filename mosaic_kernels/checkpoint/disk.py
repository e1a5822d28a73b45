# SPDX-License-Identifier: Apache-2.0
"""Errors for full disks and places that may not be written to, with what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mosaic_kernels.cli import DISK_FULL
from mosaic_kernels.errors import EnvironmentError_


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of full disks and missing permissions, also from safetensors, into :class:`EnvironmentError_`.

    Args:
        path: the file or directory being written, for the message.

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
        if isinstance(error, OSError) and (isinstance(error, PermissionError) or code == errno.EROFS):
            raise EnvironmentError_(f"no permission to write {error.filename or path}: choose another place") from error
        raise


def _os_error(message: str) -> int | None:
    # safetensors writes in Rust and passes the system's error on as "... (os error 28)"
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else None


def require_space(path: Path, needed: int) -> None:
    """Raise before writing if ``needed`` bytes do not fit.

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

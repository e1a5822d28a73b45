# SPDX-License-Identifier: Apache-2.0
"""Decides whether a directory may be replaced: only if this package wrote everything in it and nothing was changed."""

from __future__ import annotations

import logging
from pathlib import Path

from mosaic_kernels.checkpoint import manifest
from mosaic_kernels.checkpoint.disk import write_errors
from mosaic_kernels.checkpoint.places import require_place, resolved
from mosaic_kernels.errors import FormatError, UsageError

logger = logging.getLogger(__name__)


def require_leave(path: Path, may_replace: bool) -> None:
    """Raise if ``path`` holds files and the user has not asked to replace them.

    Raises:
        UsageError: ``path`` is a directory that is not empty.
    """
    if not may_replace and path.is_dir() and any(path.iterdir()):
        raise UsageError(
            f"{path} is not empty: choose another --output-dir, or use --overwrite to replace it "
            "or --resume to continue an interrupted run"
        )


def require_output(
    path: str | Path, *, overwrite: bool = False, resume: bool = False, source: str | Path | None = None
) -> None:
    """Raise if an ``OutputDirectory`` could not be made for ``path``; change nothing.

    Raises:
        UsageError: ``path`` cannot be made or replaced.
    """
    place = resolved(path)
    with write_errors(place):
        require_place(place, source)
        require_leave(place, overwrite or resume)
        require_ours(place)


def require_ours(path: Path, *, thorough: bool = True) -> None:
    """Raise if ``path`` holds anything that this package did not write, or that was changed afterwards.

    Args:
        path: a directory, or nothing.
        thorough: read every file whole, about 1 s per GB.

    Raises:
        UsageError: it does; the message names the first such file.
    """
    first = next(iter(sorted(path.iterdir())), None) if path.is_dir() else None
    if first is None:
        return
    what_to_do = f"choose another --output-dir, or move {path.name} away"
    try:
        listed = manifest.read(path)
    except FormatError as error:
        raise UsageError(f"{path} is not replaced: {error}; {what_to_do}") from error
    if listed is None:
        raise UsageError(
            f"{path} is not replaced: it holds {first.name} and no {manifest.FILE_NAME}, so mosaic-kernels did not "
            f"write it, or an older release did: {what_to_do}"
        )
    size = sum(entry.size for entry in listed.files.values())
    if thorough and size > 1e9:
        logger.info("comparing the %.0f GB in %s with its %s", size / 1e9, path, manifest.FILE_NAME)
    for difference in manifest.compare(path, listed, thorough=thorough):
        if difference.kind != "missing":
            raise UsageError(
                f"{path} is not replaced, because it is not as mosaic-kernels wrote it: {difference}; {what_to_do}"
            )

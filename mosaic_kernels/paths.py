# SPDX-License-Identifier: Apache-2.0
"""Resolves ``~`` in paths and opens text files, pipes and compressed files, with clear errors before work starts."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mosaic_kernels.errors import EnvironmentError_, TextFileError, UsageError

# First bytes of a compressed file -> the module that opens it.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma", b"\x28\xb5\x2f\xfd": "zstandard"}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def local_path(given: str | os.PathLike[str], what: str = "path") -> Path:
    """``given`` with ``~`` and ``~user`` resolved.

    Args:
        given: a path; nothing else in it is expanded.
        what: the option that names it, for the message.

    Raises:
        UsageError: the home directory is unknown, or no such user exists.
    """
    path = Path(given)
    if not str(path).startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{what}: {given}: the home directory that '~' stands for is not known here (is HOME set?): "
            "give the whole path"
        ) from error


def home_directory() -> Path | None:
    """The user's home directory, or ``None`` where neither ``HOME`` nor the list of users names one."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def is_pipe(path: Path) -> bool:
    """True for named pipes and for the pipes that a shell makes of ``<(command)`` and ``command |``."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode)


@contextmanager
def open_text_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of texts for reading and decompress it if needed. A pipe is opened once and read to its end.

    Raises:
        TextFileError: no such file, a directory, a device, damaged, or reading is not allowed.
        EnvironmentError_: ``zstandard`` is needed and missing.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise TextFileError(f"{path}: no such text file") from error
    except (OSError, ValueError) as error:
        raise TextFileError(f"{path}: cannot read this text file: {_reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise TextFileError(f"{path}: cannot read this text file: it is a directory")
    if not (stat.S_ISREG(mode) or is_pipe(path)):
        raise TextFileError(f"{path}: this is a device, not a text file; give a file or a pipe, such as <(command)")
    with ExitStack() as opened:
        try:
            whole = opened.enter_context(path.open("rb"))
            yield opened.enter_context(_decompressed(whole, path))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # also raised later, at a damaged place
            raise TextFileError(f"{path}: cannot read this text file: {_reason(error)}") from error


def _decompressed(stream: io.BufferedReader, path: Path) -> IO[bytes]:
    begin = stream.peek(8)[:8]
    kind = next((kind for magic, kind in _COMPRESSED.items() if begin.startswith(magic)), None)
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if kind == "bz2":
        return cast(IO[bytes], bz2.BZ2File(stream))
    if kind == "lzma":
        return cast(IO[bytes], lzma.LZMAFile(stream))
    if kind == "zstandard":
        try:
            zstandard: Any = importlib.import_module("zstandard")
        except ImportError as error:
            raise EnvironmentError_(
                f"{path} is compressed with zstd, which needs a package: pip install zstandard, "
                f"or decompress it first (zstd -d {path.name})"
            ) from error
        return cast(IO[bytes], io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stream)))
    return stream


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

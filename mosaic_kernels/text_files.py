# SPDX-License-Identifier: Apache-2.0
"""Reads texts from text files, tables with a column of texts, pipes, and folders of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mosaic_kernels.cli import launched
from mosaic_kernels.documents import Conversation, Texts, documents
from mosaic_kernels.errors import CalibrationError, TextFileError, UsageError
from mosaic_kernels.paths import is_pipe, local_path, open_text_file
from mosaic_kernels.tables import (
    arrow_rows,
    csv_rows,
    decode,
    json_rows,
    jsonl_rows,
    kind_of,
    looks_like_json_lines,
    parquet_rows,
)

logger = logging.getLogger(__name__)

_OTHER_SPLITS = ("test", "valid", "val", "dev", "eval")
# Names of files that stand beside data and hold none.
_NO_DATA = (
    "readme", "license", "licence", "notice", "copying", "requirements", "dataset_info", "dataset_dict", "state",
)  # fmt: skip


def read_texts(source: str | Path, column: str | None = None) -> Texts:
    """All texts of a file or folder, for example to measure perplexity on.

    Args:
        source: path of a text, JSON, JSON Lines, CSV, Parquet or Arrow file (also compressed), a pipe, ``-`` for the
            standard input, or a folder of such files; ``PATH:COLUMN`` names the column of a table.
        column: name of the column, if ``source`` does not name it.

    Raises:
        TextFileError: the file is missing or not readable, or the folder has no such files.
        CalibrationError: the file is empty, damaged or binary, or holds token ids.
        UsageError: there is no such column.
    """
    if not str(source).strip():
        raise UsageError("an empty string names no text file")
    path, named = split_column(source)
    items = list(read_items(path, named or column))
    if not all(isinstance(item, (str, Conversation)) for item in items):
        raise CalibrationError(f"{path}: holds token ids, and a text is needed here")
    return Texts(tuple(items), description_of(path))


def description_of(path: Path) -> str:
    """The name of a source of texts in logs and reports."""
    if str(path) in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
        return "standard input"
    return "a pipe" if path.is_relative_to("/dev/fd") or path.is_relative_to("/proc") else str(path)


def split_column(source: str | Path) -> tuple[Path, str | None]:
    """The two parts of ``PATH:COLUMN``. If a file with the whole name exists, all of it is the path."""
    path = Path("/dev/stdin") if str(source) == "-" else local_path(source, "text")
    whole, _, column = str(path).rpartition(":")
    if whole and column and "/" not in column and not _exists(path) and _exists(Path(whole)):
        return Path(whole), column
    return path, None


def read_items(path: Path, column: str | None = None) -> Iterator[Any]:
    """The documents of a file or folder one by one: strings, :class:`Conversation` or lists of token ids.

    Errors are those of :func:`read_texts`.
    """
    if is_folder(path):
        files = folder_files(path)
        yield from chain.from_iterable(read_items(file, column) for file in files)
        return
    if launched() and is_pipe(path):
        raise UsageError(f"{path}: this is a pipe, and every process would get a part of it: write the text to a file")
    with open_text_file(path) as stream:
        if is_pipe(path):
            logger.info("reading %s to its end", path)
        yield from _items(stream, path, column)


def _items(stream: Any, path: Path, column: str | None) -> Iterator[Any]:
    name, kind = str(path), kind_of(path)
    if kind == "parquet":
        yield from documents(parquet_rows(stream, name, column), name, column)
    elif kind == "arrow":
        yield from documents(arrow_rows(stream, name), name, column)
    elif kind == "jsonl":
        yield from documents(jsonl_rows(stream, name), name, column)
    else:
        data = stream.read()
        if data[:4] == b"PAR1":
            raise CalibrationError(f"{name}: this is a binary file (Parquet): name it .parquet")
        text = decode(data, name)
        if not text.strip():
            raise CalibrationError(f"{name}: this text file is empty")
        if kind == "json":
            yield from documents(json_rows(text, name), name, column)
        elif kind in ("csv", "tsv"):
            yield from documents(csv_rows(text, name, "\t" if kind == "tsv" else None), name, column)
        elif kind is None and looks_like_json_lines(text):
            logger.info("%s: read as JSON Lines", name)
            yield from documents(json_rows(text, name), name, column)
        else:
            if column is not None:
                raise UsageError(f"{name}: a plain text has no column {column!r}; a table is named .jsonl or .csv")
            if looks_like_json_lines(text):
                logger.warning("%s is read as plain text, but looks like JSON Lines: name it .jsonl if it is", name)
            yield text


def folder_files(folder: Path) -> list[Path]:
    """The files of a folder's training split: a saved data set, or files that people put there.

    Files whose names begin with ``train`` are taken; without any, all but those of other splits. Files in the folders
    ``data`` and ``train`` count, too. Scripts are never run.

    Raises:
        TextFileError: there are none.
    """
    places = [place for place in (folder, folder / "data", folder / "train") if place.is_dir()]
    try:
        found = [file for place in places for file in sorted(place.iterdir())]
    except OSError as error:
        raise TextFileError(f"{folder}: cannot read this folder: {error.strerror}") from error
    data = [file for file in found if kind_of(file) and file.is_file() and not _beside(file)]
    train = [file for file in data if file.name.startswith("train") or file.parent.name == "train"]
    chosen = train or [file for file in data if not file.name.lower().startswith(_OTHER_SPLITS)]
    if scripts := [file.name for file in found if file.suffix == ".py"]:
        logger.info("%s: the script %s is not run", folder, scripts[0])
    if not chosen:
        has = ", ".join(file.name for file in found[:6]) or "nothing"
        raise TextFileError(
            f"{folder} is a directory without texts for training (it has {has}): give a folder with train.txt, "
            ".jsonl, .json, .csv, .parquet or .arrow files, or one such file"
        )
    logger.info("%s: reading %s", folder, ", ".join(file.name for file in chosen[:6]))
    return chosen


def _beside(file: Path) -> bool:
    """True for hidden files and for files that hold no data, such as a README."""
    name = file.name.lower()
    return name.startswith(".") or name.partition(".")[0] in _NO_DATA or name.endswith(".md")


def is_folder(path: Path) -> bool:
    """True for a folder; False if this user may not look at it."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

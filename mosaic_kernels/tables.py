# SPDX-License-Identifier: Apache-2.0
"""Reads rows of JSON, JSON Lines, CSV, Parquet and Arrow files. Nothing in the files is executed."""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mosaic_kernels.errors import CalibrationError, EnvironmentError_, UsageError
from mosaic_kernels.paths import COMPRESSED_SUFFIXES

logger = logging.getLogger(__name__)

# Suffix of a file's name -> kind of its contents. Other files are recognised by their contents.
SUFFIXES = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".txt": "text", ".text": "text", ".md": "text", ".raw": "text", ".tokens": "text",
}  # fmt: skip
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32"}
_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ROWS_AT_ONCE = 1024
_LONGEST_COLUMN_NAME = 5  # words


def kind_of(path: Path) -> str | None:
    """``text``, ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``arrow``, by the name; ``None`` if unknown.

    A compressed file's kind is that of its name without ``.gz``, ``.bz2``, ``.xz`` or ``.zst``.
    """
    name = Path(path.name.lower())
    return SUFFIXES.get((name.with_suffix("") if name.suffix in COMPRESSED_SUFFIXES else name).suffix)


def decode(data: bytes, name: str) -> str:
    r"""Text of UTF-8 bytes, or of UTF-16 and UTF-32 that begin with a mark; every line ends with ``\n``.

    If the last character is cut off, as ``head -c`` may do, and the text holds other characters beyond ASCII, the last
    one is dropped with a warning.

    Raises:
        CalibrationError: binary data, or another encoding; the message names the first byte that shows this.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        cut = error.end == len(data) and error.reason == "unexpected end of data"
        if cut and not data[: error.start].isascii():
            logger.warning("%s: the last character is cut off, and is left out", name)
            return decode(data[: error.start], name)
        if b"\0" in data:
            raise CalibrationError(f"{name}: this is a binary file; give plain UTF-8 text") from error
        raise CalibrationError(
            f"{name}: not UTF-8 text (byte {error.start}): convert it, e.g. with "
            "iconv -f latin1 -t utf-8 OLD > NEW (latin1, or the encoding it has)"
        ) from error
    if "\0" in text:
        at = data.index(b"\0")
        raise CalibrationError(
            f"{name}: this is a binary file (a zero byte at {at}), or UTF-16 without a mark; give plain UTF-8 text"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def looks_like_json_lines(text: str) -> bool:
    """True if the first non-empty line is a whole JSON object."""
    first = next((line for line in text[: 1 << 22].split("\n", 64) if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def json_rows(text: str, name: str) -> Iterator[Any]:
    """Items of a JSON list, or rows of an object that holds columns or one list of objects, or JSON Lines.

    Raises:
        CalibrationError: not JSON, or nested too deeply.
    """
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise CalibrationError(f"{name}: this JSON is nested too deeply") from error
    except ValueError as error:
        if looks_like_json_lines(text):
            yield from json_lines(text.split("\n"), name)
            return
        raise CalibrationError(f"{name}: not JSON ({error})") from error
    if isinstance(whole, dict):
        yield from _rows_of_object(whole)
    else:
        yield from whole if isinstance(whole, list) else [whole]


def _rows_of_object(whole: dict[str, Any]) -> list[Any]:
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    tables = [value for value in lists.values() if isinstance(value[0], dict) and not is_message(value[0])]
    if len(tables) == 1 and len(lists) == 1:  # {"version": 1, "data": [{"text": ...}, ...]}
        return tables[0]
    whole_columns = len(lists) == len(whole) and len(set(map(len, lists.values()))) == 1
    if whole_columns and any(isinstance(value[0], (str, list)) for value in lists.values()):  # {"text": [...], ...}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return [whole]


def is_message(item: Any) -> bool:
    """True for a message of a conversation: ``role`` and ``content``, or ``from`` and ``value``."""
    return isinstance(item, Mapping) and (item.keys() >= {"role", "content"} or item.keys() >= {"from", "value"})


def json_lines(lines: Iterable[str | bytes], name: str) -> Iterator[Any]:
    """The values of JSON Lines; error messages name the line."""
    for number, line in enumerate(lines, start=1):
        text = decode(line, f"{name}, line {number}") if isinstance(line, bytes) else line
        if not text.strip():
            continue
        try:
            yield json.loads(text)
        except RecursionError as error:
            raise CalibrationError(f"{name}, line {number}: this JSON is nested too deeply") from error
        except ValueError as error:
            raise CalibrationError(f"{name}, line {number}: not JSON ({error})") from error


def jsonl_rows(stream: IO[bytes], name: str) -> Iterator[Any]:
    """Rows of a JSON Lines file, read line by line unless it is in UTF-16 or UTF-32."""
    first = stream.readline()
    wide = any(first.startswith(mark) for mark, encoding in _MARKS.items() if encoding != "utf-8-sig")
    if wide:
        yield from json_lines(decode(first + stream.read(), name).split("\n"), name)
        return

    def lines() -> Iterator[bytes]:
        yield first
        yield from stream

    yield from json_lines(lines(), name)


def csv_rows(text: str, name: str, delimiter: str | None = None) -> Iterator[dict[str, str]]:
    """Rows of a table whose first line names the columns; a field may hold line ends and may be of any length.

    Args:
        text: the whole file.
        name: of the file, for messages.
        delimiter: the delimiter; ``None``: a comma, or a semicolon, tab or bar if the first line has that instead.

    Raises:
        UsageError: the first line is a text and names no columns.
        CalibrationError: the file is not a table.
    """
    first = text.partition("\n")[0]
    if delimiter is None:
        delimiter = next((sign for sign in ",;\t|" if sign in first), ",")
    names = next(csv.reader([first], delimiter=delimiter), [])
    if len(names) == 1 and len(names[0].split()) > _LONGEST_COLUMN_NAME:
        raise UsageError(f"{name}: the first line must name the columns, but it is a text: put a line 'text' before it")
    before = csv.field_size_limit(min(sys.maxsize, 2**63 - 1))
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in reader:
            yield {str(key): value for key, value in row.items() if isinstance(value, str)}
    except csv.Error as error:
        raise CalibrationError(f"{name}, line {reader.line_num}: not a table ({error})") from error
    finally:
        csv.field_size_limit(before)


def parquet_rows(stream: IO[bytes], name: str, wanted: str | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a Parquet file with the columns that may hold texts; needs pyarrow.

    Raises:
        CalibrationError: the file is damaged.
        EnvironmentError_: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow(name), importlib.import_module("pyarrow.parquet")
    seekable = stream if stream.seekable() else io.BytesIO(stream.read())
    try:
        file = parquet.ParquetFile(seekable)
        names = [wanted] if wanted in file.schema_arrow.names else _worth_reading(file.schema_arrow, pyarrow)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{name}: not a readable Parquet file ({_first_line(error)})") from error


def arrow_rows(stream: IO[bytes], name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of an Arrow file or stream; needs pyarrow. Errors are those of :func:`parquet_rows`."""
    pyarrow, data = _pyarrow(name), stream.read()
    try:
        ipc = pyarrow.ipc
        reader = ipc.open_file(data) if data.startswith(b"ARROW1") else ipc.open_stream(data)
        for batch in reader.read_all().to_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{name}: not a readable Arrow file ({_first_line(error)})") from error


def _worth_reading(schema: Any, pyarrow: Any) -> list[str]:
    """All columns except those of bytes, such as pictures, which would fill the memory."""
    types = pyarrow.types
    kept = [field.name for field in schema if not (types.is_binary(field.type) or types.is_large_binary(field.type))]
    return kept or list(schema.names)


def _pyarrow(name: str) -> Any:
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise EnvironmentError_(
            f"{name} needs the package pyarrow: pip install 'mosaic-kernels[datasets]', or convert it to JSON Lines"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the option ``calibration`` before a model is loaded: a name, texts, or token ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.config import DEFAULT_SEQLEN
from mosaic_kernels.documents import Conversation, Texts, documents
from mosaic_kernels.errors import CalibrationError, TextFileError, UsageError
from mosaic_kernels.prune.hub import DATASETS, source_of
from mosaic_kernels.tables import is_message, kind_of
from mosaic_kernels.text_files import description_of, read_items, read_texts, split_column

logger = logging.getLogger(__name__)

MAY_BE = (
    "calibration may be the path of a text file, of a table or a folder of such files, the name of a dataset, "
    "'random', a list of texts, a tensor of token ids [sequences, tokens], or any iterable of texts or of sequences of "
    "token ids"
)
# Most items that are read from an iterable without a length, such as a generator or a streamed dataset.
MOST_ITEMS = 20_000
# Single token ids among such items: as many as the texts would hold at a thousand each.
MOST_IDS = 1000 * MOST_ITEMS
# Documents of a file are read until there are MOST_ITEMS with this many characters; calibration needs far fewer.
ENOUGH_CHARACTERS = 1 << 26
_LONGEST_NAME = 4096  # characters of a path on Linux


@dataclass(frozen=True)
class Stream:
    """Token ids ``int64 [tokens]``, from which windows are drawn as from a text."""

    tokens: Tensor
    description: str


@dataclass(frozen=True)
class Sequences:
    """Token ids ``int64 [sequences, tokens]``; every sequence is used as it is."""

    tokens: Tensor
    description: str


def given_calibration(given: Any, samples: int) -> str | Texts | Stream | Sequences:
    """Read the option ``calibration`` and check it as far as this is possible without a model.

    Args:
        given: see :data:`MAY_BE`. Token ids are of any integer dtype, as tensors, arrays or lists. A flat sequence of
            ids is cut into windows like a text; sequences of one length are used as they are; sequences of different
            lengths are joined in their order and cut into windows.
        samples: the number of sequences that will be used; no more are read from an iterable without a length.

    Returns:
        The name of a dataset, ``random``, or the contents. Files, folders and pipes are read by this call.

    Raises:
        UsageError: ``given`` is none of these kinds.
        TextFileError: a file is missing or cannot be opened.
        CalibrationError: ``given`` is empty or damaged.
    """
    if isinstance(given, (Texts, Stream, Sequences)):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _named(given, samples)
    if (rows := _rows_of_table(given)) is not None:
        return _read(rows, samples, "table")
    if isinstance(given, Tensor) or (hasattr(given, "__array__") and not _holds_texts(given)):
        tokens, kind = _tokens(given, "calibration"), "tensor" if isinstance(given, Tensor) else "array"
        return (Stream if tokens.dim() == 1 else Sequences)(tokens, f"{kind} {list(tokens.shape)}")
    if isinstance(given, Mapping):
        return given_calibration(_column_or_split(given), samples)
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Iterable):
        raise UsageError(f"{MAY_BE}; got {type(given).__name__}")
    return _read(given, samples)


def given_text(given: Any) -> Texts:
    """Read a text to evaluate on: a path (see :func:`~mosaic_kernels.text_files.read_texts`) or a list of texts.

    Raises:
        UsageError: ``given`` is neither.
        CalibrationError: it is empty or damaged.
    """
    if isinstance(given, Texts):
        return given
    if isinstance(given, (str, os.PathLike)):
        _require_name(given, "eval text")
        return read_texts(Path(given))
    if isinstance(given, (list, tuple)) and given and all(isinstance(item, str) for item in given):
        if not any(item.strip() for item in given):
            raise CalibrationError(f"the {len(given)} texts given as eval text are empty")
        return Texts(tuple(given), f"{type(given).__name__} of {len(given)} text{'s' if len(given) > 1 else ''}")
    raise UsageError(f"eval text may be the path of a text file or a table, or a list of texts; got {_what(given)}")


def require_ranks_file(path: Path) -> None:
    """Raise before a model is loaded if ``--ranks`` names no JSON file that can be read.

    Raises:
        UsageError: it does; the message says what is wrong with the file.
    """
    try:
        if not path.is_file():  # a pipe could not be read twice
            what = "not a file" if path.exists() else "no such file"
            raise UsageError(f"{path} is not a readable ranking ({what}); a run without --ranks makes one")
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a readable ranking ({error}); a run without --ranks makes one") from error


def sequence_length(given: Any, asked: int | None, limit: int) -> int:
    """The number of tokens in a calibration sequence.

    Args:
        given: the result of :func:`given_calibration`; sequences that are used as they are decide the number.
        asked: the option ``seqlen``, which decides otherwise.
        limit: the number of positions that the model knows.

    Raises:
        UsageError: the number is more than ``limit``, or ``asked`` contradicts the sequences.
    """
    if isinstance(given, Sequences):
        own = given.tokens.shape[1]
        if asked not in (None, own):
            raise UsageError(
                f"seqlen is {asked}, but the sequences of the calibration ({given.description}) have {own} tokens and "
                "are used as they are: leave seqlen out, or give one flat sequence of token ids, which is cut"
            )
        if own > limit:
            raise UsageError(
                f"the sequences of the calibration ({given.description}) have {own} tokens, more than the {limit} "
                "positions this model knows: cut them, or give tokens.reshape(-1), from which windows are drawn"
            )
        return own
    if asked is not None and asked > limit:
        raise UsageError(f"--seqlen {asked} is more than the {limit} positions this model knows")
    return min(DEFAULT_SEQLEN, limit) if asked is None else asked


def _require_name(given: str | os.PathLike[str], what: str) -> str:
    name = os.fspath(given)
    if not isinstance(name, str):
        raise UsageError(f"{what}: a path of bytes is not taken; give a str")
    if not name.strip() or "\n" in name or "\0" in name or len(name) > _LONGEST_NAME:
        shown = "an empty string" if not name.strip() else f"a string of {len(name):,} characters"
        raise UsageError(f"{what} is {shown}, which names no file and no dataset; texts go into a list: [text]")
    return name


def _named(given: str | os.PathLike[str], samples: int) -> str | Texts | Stream | Sequences:
    name = _require_name(given, "calibration")
    bare = name.partition(":")[0]
    if isinstance(given, str) and (bare in DATASETS or name == "random"):
        if Path(bare).exists():
            logger.info("calibration %s: the dataset of that name; ./%s would be the file or folder here", name, bare)
        return name
    try:
        path, column = split_column(name)
        there = path.exists()
    except OSError as error:
        raise UsageError(f"calibration: {name[:80]}: {error.strerror}; texts go into a list: [text]") from error
    if there:
        return _file(path, column, samples)
    looks_local = not isinstance(given, str) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or kind_of(path) is not None or kind_of(Path(bare)) is not None:
        raise TextFileError(f"{path}: no such text file")
    source_of(name)
    return name


def _file(path: Path, column: str | None, samples: int) -> Texts | Stream | Sequences:
    """The first documents of a file or folder, see :data:`ENOUGH_CHARACTERS`."""
    kept: list[Any] = []
    characters, items = 0, read_items(path, column)
    for item in items:
        kept.append(item)
        characters += sum(len(m["content"]) for m in item.messages) if isinstance(item, Conversation) else len(item)
        if len(kept) >= MOST_ITEMS and characters >= ENOUGH_CHARACTERS:
            logger.info("calibration: the first %d documents of %s", len(kept), path)
            break
    if kept and isinstance(kept[0], (str, Conversation)):
        if not all(isinstance(item, (str, Conversation)) for item in kept):
            raise CalibrationError(f"{path}: holds texts and token ids; give a file of one kind")
        return Texts(tuple(kept), description_of(path))
    found = _sequences(iter(kept), str(path), None)
    return type(found)(found.tokens, description_of(path))


def _rows_of_table(given: Any) -> Iterable[Any] | None:
    """Rows of a table of pandas, polars or pyarrow; ``None`` for anything else."""
    if hasattr(given, "itertuples") and hasattr(given, "columns"):
        names = [str(name) for name in given.columns]
        return (dict(zip(names, row, strict=True)) for row in given.itertuples(index=False, name=None))
    if hasattr(given, "iter_rows") and hasattr(given, "columns"):
        rows: Iterable[Any] = given.iter_rows(named=True)
        return rows
    if hasattr(given, "to_batches") and hasattr(given, "schema"):
        return (row for batch in given.to_batches() for row in batch.to_pylist())
    return None


def _column_or_split(given: Mapping[Any, Any]) -> Any:
    """The part of a mapping to read: the split ``train`` of data sets, or a column of texts or token ids."""
    for key in ("train", "text", "messages", "input_ids"):
        if key in given:
            value = given[key]
            if isinstance(value, str):
                return [value]
            return value
    if len(given) == 1 and not isinstance(value := next(iter(given.values())), (str, int, float, type(None))):
        return value
    raise UsageError(
        f"calibration is a mapping of {_some(given)}: give its 'input_ids', its split 'train', or its texts in a list"
    )


def _read(given: Iterable[Any], samples: int, kind: str | None = None) -> Texts | Stream | Sequences:
    if kind is None:
        kind = type(given).__name__ if isinstance(given, (list, tuple)) else "iterable"
    items = iter(given)
    first = next(items, None)
    if first is None:
        raise CalibrationError(f"the {kind} given as calibration is empty")
    items = chain([first], items)
    if not isinstance(given, Sized) and kind != "table":
        items = islice(items, MOST_IDS if _is_id(first) else MOST_ITEMS)
    if isinstance(first, Mapping) or (isinstance(first, (list, tuple)) and first and is_message(first[0])):
        if is_message(first) and "text" not in first:  # one conversation
            items = iter([list(items)])
        items = documents(items, f"the {kind} given as calibration")
        first = next(items)
        items = chain([first], items)
    if isinstance(first, (str, Conversation)):
        return _texts(items, kind)
    if _is_id(first):
        ids = list(items)
        if not all(map(_is_id, ids)):
            raise UsageError(f"the {kind} given as calibration mixes token ids and other things; {MAY_BE}")
        tokens = _tokens(ids, "calibration")
        return Stream(tokens, f"{kind} of {len(tokens)} tokens")
    return _sequences(items, kind, None if isinstance(given, Sized) else samples)


def _texts(items: Iterator[Any], kind: str) -> Texts:
    texts: list[str | Conversation] = []
    for place, item in enumerate(items):
        if not isinstance(item, (str, Conversation)):
            raise UsageError(f"calibration: item {place} is {_what(item)} among texts: give texts alone, or token ids")
        texts.append(item)
    if not any(isinstance(text, Conversation) or text.strip() for text in texts):
        raise CalibrationError(f"the {len(texts)} texts given as calibration are empty")
    if all(isinstance(text, str) and _is_file(text) for text in texts):
        raise UsageError(f"calibration: strings in a list are texts, but {texts[0]!r} is a file: give its path alone")
    return Texts(tuple(texts), f"{kind} of {len(texts)} text{'s' if len(texts) > 1 else ''}")


def _sequences(items: Iterator[Any], kind: str, enough: int | None) -> Stream | Sequences:
    """Read all sequences; stop after ``enough`` if these have one length."""
    rows: list[Tensor] = []
    for place, item in enumerate(items):
        if isinstance(item, (str, Path, Mapping)):
            hint = "give its 'input_ids' or its text" if isinstance(item, Mapping) else "give texts, or token ids"
            raise UsageError(f"calibration: item {place} is {_what(item)}: {hint}; {MAY_BE}")
        tokens = _tokens(item, f"calibration: item {place}")
        rows += [tokens] if tokens.dim() == 1 else list(tokens)
        if enough is not None and len(rows) >= enough and len(set(map(len, rows))) == 1:
            break
    lengths = sorted(set(map(len, rows)))
    if len(lengths) == 1:
        return Sequences(torch.stack(rows), f"{kind} of {len(rows)} sequences of {lengths[0]} tokens")
    said = f"{kind} of {len(rows)} sequences of {lengths[0]} to {lengths[-1]} tokens, joined"
    return Stream(torch.cat(rows), said)


def _tokens(given: Any, where: str) -> Tensor:
    """Token ids as ``int64``, one- or two-dimensional and not empty."""
    if isinstance(given, Tensor) and given.is_meta:
        raise UsageError(f"{where} is a tensor on the device 'meta', which holds no token ids")
    try:
        tokens = (
            given.detach() if isinstance(given, Tensor) else torch.tensor(given)
        )  # a copy, also of what cannot be written to
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{where} is {_what(given)}, which is no tensor of token ids ({error}); {MAY_BE}") from error
    if not tokens.numel():
        raise CalibrationError(f"{where} holds no tokens: its shape is {list(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise UsageError(f"{where} holds {tokens.dtype}, and token ids are integers")
    if tokens.dim() not in (1, 2):
        raise UsageError(f"{where} has {tokens.dim()} dimensions: token ids are [tokens] or [sequences, tokens]")
    return tokens.to("cpu", torch.int64)


def _holds_texts(array: Any) -> bool:
    """True for a flat array or column of strings, as numpy and pandas have them: an iterable of texts."""
    kind = getattr(getattr(array, "dtype", None), "kind", "")
    if len(getattr(array, "shape", ())) != 1 or kind not in tuple("OTU"):
        return False
    return isinstance(next(iter(array), None), str)


def _is_id(item: Any) -> bool:
    """True for one token id: an integer, of Python, numpy or torch."""
    return isinstance(item, Integral) or (isinstance(item, Tensor) and item.dim() == 0)


def _is_file(text: str) -> bool:
    try:
        return len(text) <= _LONGEST_NAME and "\n" not in text and Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _what(item: Any) -> str:
    return f"a mapping of {_some(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"


def _some(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(mapping)[:4])) or "nothing"

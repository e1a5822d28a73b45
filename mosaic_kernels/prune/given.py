# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the option ``calibration`` before a model is loaded: a name, texts, or token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.config import DEFAULT_SEQLEN
from mosaic_kernels.errors import CalibrationError, UsageError

MAY_BE = (
    "calibration may be the path of a text file, the name of a dataset, 'random', a list of texts, a tensor of token "
    "ids [sequences, tokens], or any iterable of texts or of sequences of token ids"
)
# Most items that are read from an iterable without a length, such as a generator or a streamed dataset.
MOST_ITEMS = 20_000
# Single token ids among such items: as many as the texts would hold at a thousand each.
MOST_IDS = 1000 * MOST_ITEMS
_LONGEST_NAME = 4096  # characters of a path on Linux
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")


@dataclass(frozen=True)
class Texts:
    """Documents.

    Attributes:
        texts: at least one.
        description: the kind and size of the calibration, for logs and the report.
    """

    texts: tuple[str, ...]
    description: str


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
        The path or name, with ``~`` resolved, or the contents.

    Raises:
        UsageError: ``given`` is none of these kinds.
        CalibrationError: ``given`` is empty.
    """
    if isinstance(given, (Texts, Stream, Sequences)):
        return given
    if isinstance(given, (str, Path)):
        return _named(given)
    if isinstance(given, Tensor) or (hasattr(given, "__array__") and not _holds_texts(given)):
        tokens, kind = _tokens(given, "calibration"), "tensor" if isinstance(given, Tensor) else "array"
        return (Stream if tokens.dim() == 1 else Sequences)(tokens, f"{kind} {list(tokens.shape)}")
    if isinstance(given, Mapping):
        raise UsageError(f"calibration is a mapping of {_some(given)}: give its 'input_ids', or its texts in a list")
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Iterable):
        raise UsageError(f"{MAY_BE}; got {type(given).__name__}")
    return _read(given, samples)


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


def _named(given: str | Path) -> str:
    name = str(given)
    if not name.strip() or "\n" in name or "\0" in name or len(name) > _LONGEST_NAME:
        shown = "an empty string" if not name.strip() else f"a string of {len(name):,} characters"
        raise UsageError(f"calibration is {shown}, which names no file and no dataset; texts go into a list: [text]")
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UsageError(f"calibration: {name[:80]}: {error.strerror}; texts go into a list: [text]") from error
    if is_folder:
        raise UsageError(f"calibration: {name} is a directory; {MAY_BE}")
    if is_file and path.suffix.lower() in _TABLES:
        raise UsageError(
            f"calibration: {name} is not plain text, and its field names would be read as text: give its texts in "
            'a list (in Python, e.g. [json.loads(line)["text"] for line in open(path)]), or write them to a .txt file'
        )
    return str(path) if name.startswith("~") else name


def _read(given: Iterable[Any], samples: int) -> Texts | Stream | Sequences:
    kind = type(given).__name__ if isinstance(given, (list, tuple)) else "iterable"
    items = iter(given)
    first = next(items, None)
    if first is None:
        raise CalibrationError(f"the {kind} given as calibration is empty")
    items = chain([first], items)
    if not isinstance(given, Sized):
        items = islice(items, MOST_IDS if _is_id(first) else MOST_ITEMS)
    if isinstance(first, str):
        return _texts(items, kind)
    if _is_id(first):
        ids = list(items)
        if not all(map(_is_id, ids)):
            raise UsageError(f"the {kind} given as calibration mixes token ids and other things; {MAY_BE}")
        tokens = _tokens(ids, "calibration")
        return Stream(tokens, f"{kind} of {len(tokens)} tokens")
    return _sequences(items, kind, None if isinstance(given, Sized) else samples)


def _texts(items: Iterator[Any], kind: str) -> Texts:
    texts = []
    for place, item in enumerate(items):
        if not isinstance(item, str):
            raise UsageError(f"calibration: item {place} is {_what(item)} among texts: give texts alone, or token ids")
        texts.append(item)
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"the {len(texts)} texts given as calibration are empty")
    if all(_is_file(text) for text in texts):
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

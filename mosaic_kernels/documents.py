# SPDX-License-Identifier: Apache-2.0
"""Makes documents of the rows of a table or list, renders conversations, and joins documents to one text."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.tables import is_message

logger = logging.getLogger(__name__)

# Columns that need not be named: the first of these that a row has, else the only column that holds a text.
COLUMNS = ("text", "messages", "conversations", "conversation", "input_ids")
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages, each with ``role`` and ``content``; the tokenizer's chat template makes a text of them."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Texts:
    """Documents.

    Attributes:
        texts: at least one document.
        description: the file, or the kind and size, for logs and the report.
    """

    texts: tuple[str | Conversation, ...]
    description: str

    def __str__(self) -> str:
        return self.description


def documents(rows: Iterable[Any], name: str, column: str | None = None) -> Iterator[Any]:
    """The documents that rows hold: strings, :class:`Conversation`, or token ids as the row has them.

    Args:
        rows: strings, conversations, lists of token ids, or mappings of column names to values.
        name: the source of the rows, for messages.
        column: the column to read of mappings; ``None``: the first of :data:`COLUMNS`, else the only one with a text.

    Raises:
        CalibrationError: no row holds anything.
        UsageError: there is no such column, or it holds something else.
    """
    chosen, empty, count = column, 0, 0
    for number, row in enumerate(rows, start=1):
        value = row
        if isinstance(row, Mapping):
            if chosen is None:
                chosen = choose_column(row, name)
            elif number == 1 and chosen not in row:
                raise UsageError(f"{name} has no column {chosen!r}; it has {_columns(row)}")
            value = row.get(chosen)
        item = _document(value)
        if item is None:
            raise UsageError(
                f"{name}, row {number}: {f'the column {chosen!r} holds ' if chosen else ''}a {type(value).__name__}, "
                "but a text, messages or token ids are needed"
            )
        if item == "":
            empty += 1
            continue
        count += 1
        yield item
    if not count:
        raise CalibrationError(f"{name} is empty" + (f": {empty} rows without a text" if empty else ""))
    if empty:
        logger.info("%s: %d of %d rows hold no text and are left out", name, empty, empty + count)


def choose_column(row: Mapping[str, Any], name: str) -> str:
    """The column of a table to read, see :func:`documents`."""
    if (known := next((key for key in COLUMNS if key in row), None)) is not None:
        return known
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if len(texts) > 1:  # all cells of a CSV file are strings
        texts = [key for key in texts if not _is_number(row[key])]
    if len(texts) != 1:
        raise UsageError(
            f"{name} has no column 'text', and {'several' if texts else 'none'} that may be it; it has "
            f"{_columns(row)}: give PATH:COLUMN (in Python, the values of one column)"
        )
    return str(texts[0])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True


def _document(value: Any) -> Any:
    """A string (empty for nothing), a conversation, or token ids; ``None`` for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how pandas writes a missing text
        return ""
    if isinstance(value, (str, Conversation)):
        return value if isinstance(value, Conversation) or value.strip() else ""
    if isinstance(value, (list, tuple)):
        if not value:
            return ""
        if all(map(is_message, value)):
            return Conversation(tuple(map(_message, value)))
        return value if isinstance(value[0], (Integral, list, tuple)) or hasattr(value[0], "__array__") else None
    return value if hasattr(value, "__array__") else None


def _message(item: Mapping[str, Any]) -> Mapping[str, str]:
    role = str(item.get("role", item.get("from")))
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # parts of a message; only texts are used
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return {"role": _ROLES.get(role, role), "content": "" if content is None else str(content)}


def joined(texts: Texts, tokenizer: Any) -> str:
    """All documents as one text, with an empty line between them.

    Conversations go through the tokenizer's chat template; without one their contents are joined line by line.

    Raises:
        CalibrationError: the template takes none of the conversations.
    """
    template, parts = getattr(tokenizer, "chat_template", None), []
    refused: list[Exception] = []
    for text in texts.texts:
        if isinstance(text, str):
            parts.append(text)
        elif template is None:
            parts.append("\n".join(message["content"] for message in text.messages))
        else:
            try:
                parts.append(tokenizer.apply_chat_template([dict(m) for m in text.messages], tokenize=False))
            except Exception as error:  # the template is the model's and may raise anything
                refused.append(error)
    if template is None and any(isinstance(text, Conversation) for text in texts.texts):
        logger.info("%s: the tokenizer has no chat template, so messages are joined line by line", texts)
    if refused and not parts:
        raise CalibrationError(f"{texts}: the tokenizer's chat template takes no conversation of it ({refused[0]})")
    if refused:
        logger.warning(
            "%s: the tokenizer's chat template refuses %d of %d conversations, which are left out (%s)",
            texts, len(refused), len(texts.texts), refused[0],
        )  # fmt: skip
    whole = "\n\n".join(parts)
    try:
        whole.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold and tokenizers refuse
        logger.warning("%s: halves of characters (single surrogates) are replaced by U+FFFD", texts)
        whole = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:12])) or "none"

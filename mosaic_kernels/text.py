# SPDX-License-Identifier: Apache-2.0
"""From texts to windows of tokens, for calibration and for perplexity."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.documents import Texts, joined
from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.progress import station
from mosaic_kernels.text_files import read_texts

# One encoding of a tokenizer holds about 100 bytes for each token; pieces of this many characters
# keep that under 30 MB whatever the size of the file.
_PIECE_CHARACTERS = 1 << 20
_LINE_END = re.compile(r"\n(?=\S)")
# Where to cut a line that is longer than several pieces, such as a book in one line: before a single space.
_WORD_END = re.compile(r"(?<=\S)(?= \S)")
_LONG_LINE = 4  # pieces


def load_tokens(source: str | Path | Texts, tokenizer: Any) -> Tensor:
    """All tokens of texts, without special tokens.

    Args:
        source: texts, or the path of a file of any kind that :func:`~mosaic_kernels.text_files.read_texts` reads.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        ``int64 [tokens]``; texts are joined by an empty line.

    Raises:
        TextFileError: the file is missing or cannot be opened.
        CalibrationError: the file is empty, binary or in no known encoding.
    """
    texts = source if isinstance(source, Texts) else read_texts(source)
    tokens = tokenize(joined(texts, tokenizer), tokenizer)
    if not len(tokens):
        raise CalibrationError(f"{texts}: the tokenizer makes no tokens of this text; give another file")
    return tokens


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """All tokens of a text, ``int64 [tokens]``, without special tokens."""
    with station("read text", -(-len(text) // _PIECE_CHARACTERS), "piece", detail=True) as here:
        found = [torch.empty(0, dtype=torch.int64)]
        for piece in _pieces(text, tokenizer):
            found.append(torch.tensor(piece, dtype=torch.int64))
            here.advance()
    return torch.cat(found)


def windows(tokens: Tensor, seqlen: int, name: str = "the text") -> Tensor:
    """Cut tokens into windows that do not overlap; the rest at the end is left out.

    Args:
        tokens: ``int64 [tokens]``.
        seqlen: tokens in a window, at least 2.
        name: of the text, for the message.

    Returns:
        ``int64 [windows, seqlen]``.

    Raises:
        UsageError: ``seqlen`` is below 2.
        CalibrationError: there are fewer tokens than one window takes.

    Example:
        >>> import torch
        >>> from mosaic_kernels.text import windows
        >>> windows(torch.arange(7), 3).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    if seqlen < 2:
        raise UsageError(f"seqlen is {seqlen} but a window needs at least 2 tokens, one to predict the next")
    count = len(tokens) // seqlen
    if not count:
        raise CalibrationError(
            f"{name} has {len(tokens)} tokens but one window needs {seqlen}: "
            f"give at least {seqlen - len(tokens)} tokens more, or lower --seqlen"
        )
    return tokens[: count * seqlen].view(count, seqlen)


def _pieces(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of consecutive pieces of ``text``, the same as those of the whole text at once.

    Pieces end at the end of a line, and the next piece begins with a letter or sign: every common tokenizer splits
    there anyway. It also splits before a single space, where long lines are cut. Tokenizers that mark the beginning of
    a text would mark each piece, so each piece is tokenised behind a line break, whose tokens are then dropped.
    """

    def encode(part: str) -> list[int]:
        # verbose=False: no warning that a book is longer than the model's context
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    line_break = encode("\n") if len(text) > _PIECE_CHARACTERS else []
    begin = 0
    while begin < len(text):
        least = begin + _PIECE_CHARACTERS
        cut = _LINE_END.search(text, least, least + _LONG_LINE * _PIECE_CHARACTERS) or _WORD_END.search(text, least)
        end = cut.end() if cut else len(text)
        if begin == 0:
            yield encode(text[:end])
        else:
            yield encode("\n" + text[begin:end])[len(line_break) :]
        begin = end

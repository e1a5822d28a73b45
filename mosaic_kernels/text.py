# SPDX-License-Identifier: Apache-2.0
"""From a text file to windows of tokens, for calibration and for perplexity."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.progress import station

# One encoding of a tokenizer holds about 100 bytes for each token; pieces of this many characters
# keep that under 30 MB whatever the size of the file.
_PIECE_CHARACTERS = 1 << 20
_LINE_END = re.compile(r"\n(?=\S)")


def load_tokens(path: str | Path, tokenizer: Any) -> Tensor:
    """All tokens of a text file, without special tokens.

    Args:
        path: a UTF-8 text file.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        ``int64 [tokens]``.

    Raises:
        CalibrationError: the file is missing, unreadable, empty, binary or not UTF-8.
    """
    tokens = tokenize(_read(Path(path).expanduser()), tokenizer)
    if not len(tokens):
        raise CalibrationError(f"{path}: the tokenizer makes no tokens of this text; give another file")
    return tokens


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """All tokens of a text, ``int64 [tokens]``, without special tokens."""
    with station("read text", -(-len(text) // _PIECE_CHARACTERS), "piece", detail=True) as here:
        found = [torch.empty(0, dtype=torch.int64)]
        for piece in _pieces(text, tokenizer):
            found.append(torch.tensor(piece, dtype=torch.int64))
            here.advance()
    return torch.cat(found)


def windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut tokens into windows that do not overlap; the rest at the end is left out.

    Args:
        tokens: ``int64 [tokens]``.
        seqlen: tokens in a window, at least 2.

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
            f"the text has {len(tokens)} tokens but one window needs {seqlen}: "
            f"give at least {seqlen - len(tokens)} tokens more, or lower --seqlen"
        )
    return tokens[: count * seqlen].view(count, seqlen)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such text file") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot read this text file: {error.strerror}") from error
    if b"\0" in data:
        raise CalibrationError(f"{path}: this is a binary file; give plain UTF-8 text")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start}): convert it, e.g. with iconv -t utf-8"
        ) from error
    if not text.strip():
        raise CalibrationError(f"{path}: this text file is empty")
    return text


def _pieces(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of consecutive pieces of ``text``, the same as those of the whole text at once.

    Pieces end with a line and the next begins with a letter or sign: there every common tokenizer
    splits anyway. Those that mark the beginning of a text would mark each piece, so a piece is read
    behind a line break whose own tokens are then dropped.
    """

    def encode(part: str) -> list[int]:
        # verbose=False: no warning that a book is longer than the model's context
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    line_break = encode("\n") if len(text) > _PIECE_CHARACTERS else []
    begin = 0
    while begin < len(text):
        cut = _LINE_END.search(text, begin + _PIECE_CHARACTERS)
        end = cut.end() if cut else len(text)
        if begin == 0:
            yield encode(text[:end])
        else:
            yield encode("\n" + text[begin:end])[len(line_break) :]
        begin = end

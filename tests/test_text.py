# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from mosaic_kernels import text
from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.text import load_tokens, windows


@pytest.fixture
def piecewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE_CHARACTERS", 1000)


@pytest.fixture(scope="module")
def marking_tokenizer(validation_text: Path) -> Any:
    """One that marks the beginning of every text it reads, as Llama 2's does."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(validation_text.read_text()) - {" "})
    model = BPE(vocab={token: i for i, token in enumerate(["▁", *letters])}, merges=[], fuse_unk=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_are_those_of_the_text(tokenizer: Any, validation_text: Path) -> None:
    whole = validation_text.read_text()
    tokens = load_tokens(validation_text, tokenizer)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == whole


@pytest.mark.usefixtures("piecewise")
def test_pieces_give_the_same_tokens(tokenizer: Any, validation_text: Path) -> None:
    expected = tokenizer(validation_text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    assert load_tokens(validation_text, tokenizer).tolist() == expected


@pytest.mark.usefixtures("piecewise")
@pytest.mark.parametrize("which", ["tokenizer", "marking_tokenizer"])
def test_a_long_line_is_cut_between_words(which: str, validation_text: Path, request: pytest.FixtureRequest) -> None:
    """A book in one line is not tokenised as a whole, and gives the tokens that it would give as a whole."""
    tokenizer, line = request.getfixturevalue(which), " ".join(validation_text.read_text().split())
    expected = tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
    longest = 0

    def watched(part: str, **options: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(part))
        return tokenizer(part, **options)

    assert text.tokenize(line, watched).tolist() == expected
    assert longest < 1100  # a piece, and the word that ends it


@pytest.mark.usefixtures("piecewise")
def test_pieces_are_not_marked_as_beginnings(marking_tokenizer: Any, validation_text: Path) -> None:
    expected = marking_tokenizer(validation_text.read_text(), add_special_tokens=False)["input_ids"]
    assert load_tokens(validation_text, marking_tokenizer).tolist() == expected


def test_no_warning_about_long_texts(tokenizer: Any, validation_text: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            assert len(load_tokens(validation_text, tokenizer)) > tokenizer.model_max_length
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records


def test_byte_order_mark_and_windows_line_ends(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert tokenizer.decode(load_tokens(file, tokenizer)) == "one\ntwo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such text file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        (b"PK\0\x01", "binary"),
    ],
)
def test_unusable_files(tokenizer: Any, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_tokens(file, tokenizer)
    assert str(file) in str(caught.value)


def test_a_directory_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="directory"):
        load_tokens(tmp_path, tokenizer)


@pytest.mark.parametrize("rest", [0, 1, 255])
def test_windows_cover_the_beginning_once(rest: int) -> None:
    tokens = torch.arange(512 + rest)
    assert windows(tokens, 256).flatten().tolist() == list(range(512))


def test_too_short_a_text_says_by_how_much() -> None:
    with pytest.raises(CalibrationError, match=r"book\.txt has 3 tokens but one window needs 4"):
        windows(torch.arange(3), 4, "book.txt")
    with pytest.raises(CalibrationError, match=r"37 tokens but one window needs 256: give at least 219 .*--seqlen"):
        windows(torch.arange(37), 256)


@pytest.mark.parametrize("seqlen", [1, 0, -4])
def test_a_window_predicts_something(seqlen: int) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        windows(torch.arange(37), seqlen)

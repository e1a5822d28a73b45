# SPDX-License-Identifier: Apache-2.0
"""Every accepted form of calibration, and the error message for every other form."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune_runs import Run

import mosaic_kernels as mk
from mosaic_kernels.errors import CalibrationError, Interrupted, MosaicError, UsageError
from mosaic_kernels.prune.calibration import Calibration, calibrate
from mosaic_kernels.prune.given import MOST_ITEMS, Sequences, Stream, Texts, given_calibration, sequence_length

VOCABULARY = 4096
TOKENS = torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1))


def draw(given: Any, tokenizer: Any = None, samples: int = 128, seqlen: int = 64) -> Calibration:
    return calibrate(given, tokenizer, VOCABULARY, samples=samples, seqlen=seqlen, seed=0)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64, torch.uint64], ids=str
)
def test_a_tensor_of_any_integers_is_used_as_it_is(dtype: torch.dtype) -> None:
    found = draw(TOKENS.to(dtype))
    assert torch.equal(found.tokens, TOKENS)
    assert found.tokens.dtype is torch.int64
    assert found.source == "tensor [8, 64]"
    small = torch.randint(128, (3, 5), dtype=torch.uint8)
    assert torch.equal(draw(small, seqlen=5).tokens, small.long())


def read_only(tokens: torch.Tensor) -> Any:
    """Such as an array of a memory map that was opened for reading only."""
    array = tokens.numpy().copy()
    array.flags.writeable = False
    return array


SAME: dict[str, Any] = {
    "array [8, 64]": read_only(TOKENS),
    "list of 8 sequences of 64 tokens": TOKENS.tolist(),
    "tuple of 8 sequences of 64 tokens": tuple(TOKENS),
}
SAME_ITEMS: dict[str, Any] = {
    "rows": lambda: list(TOKENS),
    "lists": lambda: TOKENS.tolist(),
    "arrays": lambda: [read_only(row) for row in TOKENS],
    "tensors of one row": lambda: [row[None] for row in TOKENS],
    "batches": lambda: [TOKENS[:3], TOKENS[3:]],
    "nested lists": lambda: [TOKENS[:3].tolist(), TOKENS[3:].tolist()],
}


@pytest.mark.parametrize("source", SAME)
def test_arrays_and_lists_are_the_same(source: str) -> None:
    found = draw(SAME[source])
    assert torch.equal(found.tokens, TOKENS)
    assert found.source == source
    assert found.digest == draw(TOKENS).digest


@pytest.mark.parametrize("items", SAME_ITEMS)
@pytest.mark.parametrize("lazy", [False, True])
def test_iterables_are_the_same(items: str, lazy: bool) -> None:
    made = SAME_ITEMS[items]()
    found = draw(iter(made) if lazy else made)
    assert torch.equal(found.tokens, TOKENS)
    assert found.source == f"{'iterable' if lazy else 'list'} of 8 sequences of 64 tokens"


def test_the_given_is_not_kept(tokenizer: Any) -> None:
    own = TOKENS.clone()
    found = draw(own)
    own.zero_()
    assert torch.equal(found.tokens, TOKENS)


def test_the_first_samples_are_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mosaic_kernels"):
        assert torch.equal(draw(TOKENS, samples=3).tokens, TOKENS[:3])
    assert caplog.messages == ["calibration: the first 3 sequences of the tensor [8, 64]"]


def test_a_generator_is_not_read_further_than_needed() -> None:
    read: list[int] = []

    def endless() -> Iterator[torch.Tensor]:
        for i in itertools.count():
            read.append(i)
            yield TOKENS[i % 8]

    found = draw(endless(), samples=5)
    assert torch.equal(found.tokens, TOKENS[:5])
    assert len(read) == 5


def test_a_generator_of_texts_ends(tokenizer: Any) -> None:
    found = given_calibration(("a text" for _ in itertools.count()), 4)
    assert isinstance(found, Texts)
    assert len(found.texts) == MOST_ITEMS
    assert found.description == f"iterable of {MOST_ITEMS} texts"


@pytest.mark.parametrize("given", [TOKENS.flatten(), TOKENS.flatten().tolist(), TOKENS.numpy().ravel()])
def test_one_flat_sequence_is_cut_as_a_text(given: Any) -> None:
    found = draw(given, samples=4, seqlen=32)
    assert found.tokens.shape == (4, 32)
    flat = TOKENS.flatten().tolist()
    for window in found.tokens.tolist():
        assert any(flat[start : start + 32] == window for start in range(len(flat) - 31))
    assert found.source in ("tensor [512]", "array [512]", "list of 512 tokens")
    assert torch.equal(draw(given, samples=4, seqlen=32).tokens, found.tokens)
    with pytest.raises(CalibrationError, match=r"has 512 tokens but one window needs 513"):
        draw(given, seqlen=513)


def test_sequences_of_different_lengths_are_joined_and_cut() -> None:
    ragged = [TOKENS[0], TOKENS[1, :10], TOKENS[2, :30].tolist()]
    found = draw(ragged, seqlen=26)
    assert found.source == "list of 3 sequences of 10 to 64 tokens, joined"
    joined = [*TOKENS[0].tolist(), *TOKENS[1, :10].tolist(), *TOKENS[2, :30].tolist()]
    assert sorted(found.tokens.tolist()) == sorted(joined[i : i + 26] for i in range(0, 104, 26))


def test_texts(tokenizer: Any, calibration_text: Path) -> None:
    texts = calibration_text.read_text()[:20_000].split("\n")
    found = draw(texts, tokenizer, samples=8, seqlen=32)
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    for window in found.tokens.tolist():
        assert any(ids[start : start + 32] == window for start in range(len(ids)))
    assert found.source == f"list of {len(texts)} texts"
    assert torch.equal(found.tokens, draw(iter(texts), tokenizer, samples=8, seqlen=32).tokens)
    assert draw(["word " * 99], tokenizer, seqlen=8).source == "list of 1 text"
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        draw(texts)
    with pytest.raises(CalibrationError, match=r"list of 1 text has \d tokens but one window needs 64"):
        draw(["short"], tokenizer)


class Odd:
    pass


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, UsageError, "calibration may be the path of a text file, .*'random'.*a tensor.*; got NoneType"),
        (7, UsageError, "got int"),
        (b"bytes", UsageError, "got bytes"),
        (Odd(), UsageError, "got Odd"),
        ("", UsageError, r"an empty string.*texts go into a list: \[text\]"),
        ("A long text.\nOf two lines.", UsageError, r"a string of 26 characters.*a list: \[text\]"),
        ("word " * 2000, UsageError, r"a string of 10,000 characters.*a list: \[text\]"),
        ("x" * 300, UsageError, r"File name too long; texts go into a list"),
        ([], CalibrationError, "the list given as calibration is empty"),
        ((), CalibrationError, "the tuple given as calibration is empty"),
        (iter(()), CalibrationError, "the iterable given as calibration is empty"),
        (["", " \n"], CalibrationError, "the 2 texts given as calibration are empty"),
        (torch.empty(0, 64, dtype=torch.int64), CalibrationError, r"holds no tokens: its shape is \[0, 64\]"),
        ([[1, 2], []], CalibrationError, r"item 1 holds no tokens"),
        (torch.rand(4, 8), UsageError, r"holds torch\.float32, and token ids are integers"),
        (torch.ones(4, 8, dtype=torch.bool), UsageError, r"holds torch\.bool, and token ids are integers"),
        ([[1.0, 2.0]], UsageError, r"item 0 holds torch\.float32"),
        ([True, False], UsageError, r"holds torch\.bool, and token ids are integers"),
        (torch.ones(2, 3, 4, dtype=torch.int64), UsageError, r"3 dimensions: token ids are \[tokens\] or \[sequences"),
        (torch.tensor(3), UsageError, "0 dimensions"),
        ({"a": 1, "b": 2}, UsageError, "a mapping of 'a', 'b': give its 'input_ids', its split 'train', or its texts"),
        ([{"a": "x", "b": "y"}], UsageError, "no column 'text', and several that may be it; it has 'a', 'b'"),
        ([{"text": ""}, {"text": None}], CalibrationError, "is empty: 2 rows without a text"),
        ([{"text": 3}], UsageError, "row 1: the column 'text' holds a int"),
        ([TOKENS[0], {"input_ids": [1]}], UsageError, "item 1 is a mapping of 'input_ids'"),
        (["a text", 3], UsageError, "item 1 is a int among texts"),
        (["a text", TOKENS[0]], UsageError, "item 1 is a Tensor among texts"),
        ([TOKENS[0], "a text"], UsageError, "item 1 is a str: give texts, or token ids"),
        ([Path("a")], UsageError, "item 0 is a PosixPath"),
        ([(TOKENS[:1], TOKENS[:1, 1:])], UsageError, "item 0 is a tuple, which is no tensor of token ids"),
        ([1, 2, "three"], UsageError, "mixes token ids and other things"),
        ([[[1, 2], [3]]], UsageError, "item 0 is a list, which is no tensor of token ids"),
    ],
)
def test_what_is_no_calibration_is_told(given: Any, error: type[MosaicError], words: str) -> None:
    with pytest.raises(error, match=words):
        given_calibration(given, 8)


def test_strings_in_a_list_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(
        UsageError, match=r"strings in a list are texts, but '.*text\.txt' is a file: give its path alone"
    ):
        given_calibration([str(tmp_path / "text.txt")], 8)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[1, 2], [3, 4096]]), r"tensor \[2, 2\].*token 1 of sequence 1 is 4096.*knows the ids 0 to 4095"),
        (torch.tensor([[1, -2], [3, 4]]), "token 1 of sequence 0 is -2"),
        (torch.tensor([1, 2, 9999]), "token 2 is 9999"),
        (torch.tensor([[2**63 + 5]], dtype=torch.uint64), "token 0 of sequence 0 is -"),
        (np.array([[5000]], dtype=np.uint16), r"array \[1, 1\].*is 5000"),
    ],
)
def test_ids_that_the_model_does_not_know(tokens: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        draw(tokens, seqlen=1)


def test_the_length_of_a_sequence() -> None:
    own = given_calibration(TOKENS, 8)
    assert isinstance(own, Sequences)
    assert sequence_length(own, None, 100) == sequence_length(own, 64, 64) == 64
    with pytest.raises(
        UsageError, match=r"seqlen is 32, but .*tensor \[8, 64\].* have 64 tokens and are used as they are"
    ):
        sequence_length(own, 32, 100)
    with pytest.raises(UsageError, match=r"have 64 tokens, more than the 63 positions"):
        sequence_length(own, None, 63)
    flat = given_calibration(TOKENS.flatten(), 8)
    assert isinstance(flat, Stream)
    for given in (flat, "random"):
        assert sequence_length(given, None, 5000) == 2048
        assert sequence_length(given, None, 100) == 100
        assert sequence_length(given, 32, 100) == 32
        with pytest.raises(UsageError, match="--seqlen 101 is more than the 100 positions"):
            sequence_length(given, 101, 100)


OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "policy": "uniform", "category": "unstructured"}


@pytest.mark.parametrize(
    ("given", "source", "shape"),
    [
        (TOKENS[:, :32], "tensor [8, 32]", (8, 32)),
        (list(TOKENS[:3, :16]), "list of 3 sequences of 16 tokens", (3, 16)),
        ((row for row in TOKENS[:2]), "iterable of 2 sequences of 64 tokens", (2, 64)),
        (["Once upon a time there was a word. " * 40] * 2, "list of 2 texts", (4, 64)),
        (TOKENS.flatten().to(torch.int16), "tensor [512]", (4, 64)),
    ],
)
def test_pruning_takes_it_and_reports_it(
    dense_dir: Path, tmp_path: Path, given: Any, source: str, shape: tuple[int, int]
) -> None:
    cut = {} if "sequences" in source or source == "tensor [8, 32]" else {"samples": 4, "seqlen": 64}
    report = mk.prune(dense_dir, output_dir=tmp_path / "out", calibration=given, **cut, **OPTIONS)
    assert report["calibration"] == {"samples": shape[0], "seqlen": shape[1], "source": source}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- calibration: samples {shape[0]}, seqlen {shape[1]}, source {source}\n" in card


def test_the_same_tokens_prune_alike(dense_dir: Path, tmp_path: Path) -> None:
    for name, given in (("a", TOKENS), ("b", TOKENS.int().tolist())):
        mk.prune(dense_dir, output_dir=tmp_path / name, calibration=given, **OPTIONS)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_resumed_run_knows_its_tokens(dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mosaic_kernels.prune import pipeline

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_prune_blocks", stop)
        with pytest.raises(Interrupted, match="no block is finished yet"):
            mk.prune(dense_dir, output_dir=out, calibration=TOKENS, **OPTIONS)
    changed = TOKENS.clone()
    changed[3, 3] += 1
    with pytest.raises(UsageError, match="cannot resume: calibration differ"):
        mk.prune(dense_dir, output_dir=out, resume=True, calibration=changed, **OPTIONS)
    mk.prune(dense_dir, output_dir=out, resume=True, calibration=TOKENS.tolist(), **OPTIONS)


def test_a_wrong_calibration_shows_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got int"):
        mk.prune(tmp_path / "no model", output_dir=tmp_path / "out", calibration=3)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_home_directory(
    run: Run, dense_dir: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell does not expand ~ after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text(calibration_text.read_text()[:4000])
    options = ("--solver=wanda", "--policy=uniform", "--category=unstructured", "--samples=4", "--seqlen=16")
    result = run(
        dense_dir, "--output-dir=out", "--calibration=~/text.txt", "--eval-text=~/text.txt", "--json", *options
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["calibration"] == {
        "samples": 4, "seqlen": 16, "source": "text.txt",
    }  # fmt: skip
    (tmp_path / "ranks.json").write_bytes(Path("out/ranks.json").read_bytes())
    again = run(dense_dir, "--output-dir=again", "--calibration=random", "--ranks=~/ranks.json", *options)
    assert again.code == 0, again.err
    assert "calibration    4 sequences of 16 tokens: random" in again.out


@pytest.mark.parametrize("dtype", ["U", "O"])
def test_an_array_of_strings_is_texts(dtype: str, tokenizer: Any) -> None:
    texts = [f"The old man went home {i} times. " * 20 for i in range(3)]
    found = given_calibration(np.array(texts, dtype=dtype), 4)
    assert isinstance(found, Texts)
    assert list(found.texts) == texts
    assert torch.equal(draw(np.array(texts, dtype=dtype), tokenizer).tokens, draw(texts, tokenizer).tokens)
    with pytest.raises(UsageError, match="no tensor of token ids"):
        given_calibration(np.array([["a", "b"]]), 4)
    with pytest.raises(UsageError, match="no tensor of token ids"):
        given_calibration(np.array([None, "b"]), 4)


def test_single_ids_of_an_iterator_are_not_cut_where_texts_are() -> None:
    count = MOST_ITEMS + 5000
    found = given_calibration((i % VOCABULARY for i in range(count)), 4)
    assert isinstance(found, Stream)
    assert len(found.tokens) == count


def test_a_tensor_without_contents_is_refused() -> None:
    with pytest.raises(UsageError, match="holds no token ids"):
        given_calibration(torch.empty(4, 8, dtype=torch.int64, device="meta"), 4)

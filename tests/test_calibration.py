# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: repeatable, distinct, and clear about what is missing."""

from __future__ import annotations

import itertools
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mosaic_kernels.errors import CalibrationError, EnvironmentError_, ExitCode, UsageError
from mosaic_kernels.prune.calibration import Calibration, calibrate

VOCABULARY = 4096


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path, calibration_text: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(calibration_text.read_text()[:20_000])
    return path


def draw(source: str | Path, tokenizer: Any, samples: int = 8, seqlen: int = 32, seed: int = 0) -> Calibration:
    return calibrate(str(source), tokenizer, VOCABULARY, samples=samples, seqlen=seqlen, seed=seed)


def all_tokens(path: Path, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    return ids


def test_the_seed_decides(text: Path, tokenizer: Any) -> None:
    first, again, other = draw(text, tokenizer), draw(text, tokenizer), draw(text, tokenizer, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest
    assert not torch.equal(first.tokens, other.tokens)
    assert first.digest != other.digest
    torch.manual_seed(99)  # the global generator has no say, and is not used up
    state = torch.get_rng_state()
    assert torch.equal(draw(text, tokenizer).tokens, first.tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_are_distinct_and_of_the_text(text: Path, tokenizer: Any) -> None:
    ids = all_tokens(text, tokenizer)
    seqlen = 32
    starts = []
    for window in draw(text, tokenizer, samples=40).tokens.tolist():
        (start,) = [i for i in range(len(ids) - seqlen + 1) if ids[i : i + seqlen] == window]
        starts.append(start)
    starts.sort()
    assert len(starts) == 40
    assert all(later - earlier >= seqlen for earlier, later in itertools.pairwise(starts))


def test_too_few_windows_are_all_used(text: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    available = len(all_tokens(text, tokenizer)) // 512
    with caplog.at_level(logging.WARNING):
        found = draw(text, tokenizer, samples=1000, seqlen=512)
    assert found.tokens.shape == (available, 512)
    assert f"holds {available} windows of 512 tokens, not 1000" in caplog.text


def test_one_window_of_all_tokens(text: Path, tokenizer: Any) -> None:
    ids = all_tokens(text, tokenizer)
    assert draw(text, tokenizer, samples=1, seqlen=len(ids)).tokens.tolist() == [ids]


def test_a_single_token(text: Path, tokenizer: Any) -> None:
    assert draw(text, tokenizer, samples=1, seqlen=1).tokens.shape == (1, 1)


def test_too_short_a_text_says_how_much_is_needed(text: Path, tokenizer: Any) -> None:
    text.write_text("Too short by far.")
    have = len(all_tokens(text, tokenizer))
    with pytest.raises(CalibrationError, match=rf"text.txt has {have} tokens but one window needs 256: .*at least"):
        draw(text, tokenizer, seqlen=256)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b" \n\t\n", "empty"), (b"PK\x03\x04\x00\x00rest", "binary"), (b"caf\xe9 au lait", "not UTF-8")],
)
def test_unusable_texts(text: Path, tokenizer: Any, content: bytes, words: str) -> None:
    text.write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"text.txt: .*{words}"):
        draw(text, tokenizer)


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "/nowhere/else"])
def test_a_missing_file_is_no_dataset(source: str, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no such text file"):
        draw(source, tokenizer)


def test_a_directory_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        UsageError, match=r"is a directory without texts for training \(it has nothing\): give a folder with train.txt"
    ):
        draw(tmp_path, tokenizer)


def test_a_tokenizer_of_another_model(text: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"makes token \d+ but the model knows 16"):
        calibrate(str(text), tokenizer, 16, samples=2, seqlen=8, seed=0)


def test_text_needs_a_tokenizer(text: Path) -> None:
    with pytest.raises(CalibrationError, match=r"tokenizer.*--calibration random"):
        draw(text, None)


def test_random_tokens_need_nothing() -> None:
    found = draw("random", None, samples=500, seqlen=40)
    assert found.tokens.shape == (500, 40)
    assert found.tokens.dtype == torch.int64
    assert int(found.tokens.min()) >= 0
    assert int(found.tokens.max()) < VOCABULARY
    # uniform: 20000 draws leave a token out with probability e^-4.9, so 4065 of 4096 appear, +- 6
    assert 4000 < len(found.tokens.unique()) <= VOCABULARY
    assert torch.equal(found.tokens, draw("random", None, samples=500, seqlen=40).tokens)
    assert not torch.equal(found.tokens, draw("random", None, samples=500, seqlen=40, seed=1).tokens)


def test_a_dataset_without_the_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentError_, match=r"'wikitext2' needs the 'datasets' package.*local text file") as caught:
        draw("wikitext2", tokenizer)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


class Stream(list[dict[str, str]]):
    def take(self, count: int) -> list[dict[str, str]]:
        return self[:count]


def test_a_dataset_without_network(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    fake_datasets(monkeypatch, load)
    with pytest.raises(EnvironmentError_, match=r"'c4' could not be read \(ConnectionError: no route.*local text file"):
        draw("c4", tokenizer)


def test_a_dataset_without_the_text_column(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda *_, **__: Stream([{"body": "no text", "title": "none"}]))
    with pytest.raises(UsageError, match=r"'someone/corpus' has no column 'text', .* it has 'body', 'title'"):
        draw("someone/corpus", tokenizer)
    with pytest.raises(CalibrationError, match=r"someone/corpus:body has 4 tokens"):
        draw("someone/corpus:body", tokenizer)


def test_a_dataset(text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Stream:
        asked.append((args, kwargs))
        return Stream([{"text": paragraph} for paragraph in text.read_text().split("\n")])

    fake_datasets(monkeypatch, load)
    found = draw("wikitext2", tokenizer)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train", "streaming": True})]
    assert found.tokens.shape == (8, 32)
    assert found.source == "wikitext2"

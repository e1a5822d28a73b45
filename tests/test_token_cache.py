# SPDX-License-Identifier: Apache-2.0
"""The cache of tokens: it answers, and believes only what a run of this user has written."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosaic_kernels.prune import calibration
from mosaic_kernels.prune.calibration import calibrate
from mosaic_kernels.prune.token_cache import cache_directory

TEXT = "The old man went home again, and nobody saw him. " * 60


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every text that was really tokenised, in order."""
    seen: list[int] = []
    inner = calibration.tokenize
    monkeypatch.setattr(calibration, "tokenize", lambda text, tok: (seen.append(len(text)), inner(text, tok))[1])
    return seen


def draw(text: Path, tokenizer: Any) -> torch.Tensor:
    return calibrate(str(text), tokenizer, 4096, samples=8, seqlen=16, seed=0).tokens


def folder() -> Path:
    found = cache_directory()
    assert found is not None
    return found


def test_the_cache_answers_the_second_time(text: Path, tokenizer: Any, tokenised: list[int]) -> None:
    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    assert torch.equal(draw(text, tokenizer), first)
    assert tokenised == [len(TEXT)]
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    text.write_text(TEXT[:-100])  # another text under the same name
    draw(text, tokenizer)
    assert tokenised == [len(TEXT), len(TEXT) - 100]
    assert all(file.suffix == ".safetensors" for file in folder().iterdir())


def test_a_folder_that_others_can_read_is_closed(text: Path, tokenizer: Any) -> None:
    folder().mkdir(parents=True, mode=0o755)
    draw(text, tokenizer)
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b"{}", None])
def test_a_damaged_entry_is_made_anew(text: Path, tokenizer: Any, tokenised: list[int], damage: bytes | None) -> None:
    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert torch.equal(draw(text, tokenizer), first)
    assert entry.read_bytes() == whole
    assert len(tokenised) == 2


def changed(name: str, entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = entry["tokens"].clone()
    if name == "one token":
        tokens[5] ^= 1
    return {
        "one token": {**entry, "tokens": tokens},
        "no checksum": {"tokens": entry["tokens"]},
        "another tensor": {"other": tokens},
        "other integers": {**entry, "tokens": tokens.int()},
        "another shape": {**entry, "tokens": tokens[None]},
        "nothing": {**entry, "tokens": tokens[:0]},
        "another text's": {**entry, "key": entry["key"] ^ 1},
        "a short checksum": {**entry, "digest": entry["digest"][:3]},
        "a float checksum": {**entry, "digest": entry["digest"].float()},
    }[name]


@pytest.mark.parametrize(
    "name",
    ["one token", "no checksum", "another tensor", "other integers", "another shape", "nothing", "another text's",
     "a short checksum", "a float checksum"],
)  # fmt: skip
def test_a_planted_entry_is_not_believed(text: Path, tokenizer: Any, tokenised: list[int], name: str) -> None:
    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    whole = entry.read_bytes()
    save_file(changed(name, load_file(entry)), entry)
    assert torch.equal(draw(text, tokenizer), first)
    assert entry.read_bytes() == whole
    assert len(tokenised) == 2


def test_ids_beyond_the_vocabulary_are_not_believed(text: Path, tokenizer: Any) -> None:
    """Their checksum is right: whoever can write the entry can compute it."""
    from mosaic_kernels.prune.token_cache import _bytes, _digest

    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    found = load_file(entry)
    for wrong in (-1, 4096):
        tokens = found["tokens"].clone()
        tokens[3] = wrong
        save_file({**found, "tokens": tokens, "digest": _bytes(_digest(tokens))}, entry)
        assert torch.equal(draw(text, tokenizer), first)


def test_links_are_not_followed(text: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    whole = entry.read_bytes()
    (victim := tmp_path / "victim").write_bytes(b"not to be overwritten")
    entry.unlink()
    entry.symlink_to(victim)
    assert torch.equal(draw(text, tokenizer), first)
    assert victim.read_bytes() == b"not to be overwritten"
    assert not entry.is_symlink()
    assert entry.read_bytes() == whole
    entry.unlink()
    os.mkfifo(entry)
    assert torch.equal(draw(text, tokenizer), first)
    entry.unlink()
    folder().rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder().symlink_to(tmp_path / "elsewhere")
    assert torch.equal(draw(text, tokenizer), first)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert "is a link or another user's" in caplog.text


def test_a_folder_of_another_user_is_not_used(text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(text, tokenizer)
    (entry,) = folder().iterdir()
    entry.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: folder().lstat().st_uid + 1)
    assert torch.equal(draw(text, tokenizer), first)
    assert list(folder().iterdir()) == []


@pytest.mark.parametrize("place", ["file", "nowhere", "no home", "relative"])
def test_no_cache_costs_nothing_else(
    text: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    first = draw(text, tokenizer)
    (tmp_path / "file").write_text("in the way")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
        assert cache_directory() is None
    elif place == "nowhere":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/proc/nonexistent")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if place == "file" else "here")
        if place == "relative":
            monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert torch.equal(draw(text, tokenizer), first)


def test_the_cache_follows_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "mosaic-kernels"

# SPDX-License-Identifier: Apache-2.0
"""What is published holds no path, no user and no token; what is public already stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mosaic_kernels.checkpoint.public import public_command, public_name, public_text, without_paths


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("HF_TOKEN", "very-secret-token")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "data").mkdir()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("wikitext2", "wikitext2"),
        ("org/corpus:content", "org/corpus:content"),
        ("tensor [8, 64]", "tensor [8, 64]"),
        ("list of 3 sequences of 10 to 64 tokens, joined", "list of 3 sequences of 10 to 64 tokens, joined"),
        ("/home/jane/models/llama", "llama"),
        ("/home/jane/models/llama/", "llama"),
        ("//server/share/llama", "llama"),
        ("~/models/llama", "llama"),
        ("~jane/llama", "llama"),
        ("~jane", "~"),
        ("~", "~"),
        ("/home/jane", "~"),
        ("./llama", "llama"),
        ("../acme/llama", "llama"),
        ("acme/data", "data"),
        ("acme/data:content", "data:content"),
        ("runs/acme/llama", "llama"),
        ("C:\\Users\\jane\\llama", "llama"),
        ("C:/Users/jane/llama", "llama"),
        ("\\\\server\\share\\llama", "llama"),
        ("file:///home/jane/llama.txt", "llama.txt"),
        ("file:/home/jane/llama.txt", "llama.txt"),
        ("/data/my files/a b.txt", "a b.txt"),
        ("/data/x.jsonl:text", "x.jsonl:text"),
        ("https://jane:pw@host.org/data/x.txt?token=abc#part", "https://host.org/data/x.txt"),
        ("hf://datasets/org/corpus", "hf://datasets/org/corpus"),
        ("/cache/models--org--llama/snapshots/0123abcd", "org/llama"),
        ("/cache/models--org--llama/snapshots/0123abcd/", "org/llama"),
        ("/data/bad\udcff/na\udcffme", "na?me"),
    ],
)
def test_names(given: str, shown: str) -> None:
    assert public_name(given) == shown


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["python", "-m", "mosaic_kernels.prune"], ["python", "-m", "mosaic_kernels.prune"]),
        (["/home/jane/llama", "--output-dir", "/data/out"], ["llama", "--output-dir", "out"]),
        (["org/llama", "--output-dir=/data/acme/out"], ["org/llama", "--output-dir=out"]),
        (["--output-dir", "acme/out", "--sparsity", "0.5"], ["--output-dir", "out", "--sparsity", "0.5"]),
        (["--output-dir=acme/out"], ["--output-dir=out"]),
        (["--out", "acme/out"], ["--out", "out"]),
        (["--eval=acme/new.txt", "--ranks", "acme/r.json"], ["--eval=new.txt", "--ranks", "r.json"]),
        (["--calibration=/data/acme/text.txt"], ["--calibration=text.txt"]),
        (["--calib", "acme/text.txt"], ["--calib", "text.txt"]),
        (["--calibration", "org/corpus"], ["--calibration", "org/corpus"]),
        (["--calibration", "~/text.txt"], ["--calibration", "text.txt"]),
        (["--calibration=~/text.txt"], ["--calibration=text.txt"]),
        (["--pattern", "2:4", "--json"], ["--pattern", "2:4", "--json"]),
        (["--calibration", "hf://x?token=hf_abcdefghij"], ["--calibration", "hf://x"]),
        (["--seed=7", "-x/home/jane/y"], ["--seed=7", "-xy"]),
        (["--json", "hf_abcdefghijkl"], ["--json", "***"]),
        (["--token=very-secret-token"], ["--token=***"]),
    ],
)
def test_command_lines(words: list[str], shown: list[str]) -> None:
    assert public_command(words) == shown
    assert not any(part in " ".join(public_command(words)) for part in ("jane", "acme", "secret", "/data/"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("read [/home/jane/a.txt, /data/b.txt] and ./c/d", "read [a.txt, b.txt] and d"),
        ("ratio 1/2 of 10 tokens/s", "ratio 1/2 of 10 tokens/s"),
        ("x=/home/jane/a", "x=a"),
        ("Bearer hf_abcdefghijklmnop", "Bearer ***"),
    ],
)
def test_texts(given: str, shown: str) -> None:
    assert public_text(given) == shown


def test_json_values_lose_paths_and_nothing_else() -> None:
    kept = {"a": "</s>", "b": "/", "c": "silu", "d": ["~", "//"], "e": 3, "f": None, "g": "org/model"}
    assert without_paths(kept) == kept
    assert without_paths({"a": ["/home/jane/x"], "b": {"c": "~/y/z.json"}}) == {"a": ["x"], "b": {"c": "z.json"}}


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert public_name("~/models/llama") == "llama"
    assert public_name("~") == "~"
    assert public_name("/data/llama") == "llama"

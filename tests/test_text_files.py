# SPDX-License-Identifier: Apache-2.0
"""Files and folders of texts as people have them: read as what they are, or refused with name and reason."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic_kernels.documents import Conversation, joined
from mosaic_kernels.errors import CalibrationError, EnvironmentError_, MosaicError, TextFileError, UsageError
from mosaic_kernels.prune.calibration import calibrate
from mosaic_kernels.prune.given import Sequences, Stream, Texts, given_calibration, given_text
from mosaic_kernels.text_files import read_texts

TEXTS = ["The café is closed.", 'She said: "No, thanks."\nThen she left.', "A third, shorter one."]
ROWS = [{"id": i, "title": f"t{i}", "text": text} for i, text in enumerate(TEXTS)]


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text(LINES),
    "blank-lines.jsonl": lambda p: p.write_text("\n" + LINES.replace("\n", "\r\n\r\n")),
    "mark.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "wide.jsonl": lambda p: p.write_bytes(LINES.encode("utf-16")),
    "UPPER.JSONL": lambda p: p.write_text(LINES),
    "a.ndjson": lambda p: p.write_text(LINES),
    "no-suffix": lambda p: p.write_text(LINES),
    "a.json": lambda p: p.write_text(json.dumps(ROWS)),
    "lines.json": lambda p: p.write_text(LINES),
    "strings.json": lambda p: p.write_text(json.dumps(TEXTS)),
    "strings.jsonl": lambda p: p.write_text("\n".join(map(json.dumps, TEXTS))),
    "nested.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "columns.json": lambda p: p.write_text(json.dumps({"id": [0, 1, 2], "text": TEXTS})),
    "a.csv": as_csv,
    "a.tsv": lambda p: as_csv(p, "\t"),
    "semicolons.csv": lambda p: as_csv(p, ";"),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "a.json.bz2": lambda p: p.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES.encode())),
    "misnamed.jsonl": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_text_alone_of_a_table_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = given_calibration(str(path), 8)
    assert isinstance(found, Texts)
    assert list(found.texts) == TEXTS
    assert found.description == str(path)
    assert read_texts(path).texts == found.texts == given_text(path).texts


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_binary_tables_need_a_package(tmp_path: Path, suffix: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (pip install 'mosaic-kernels[datasets]')")
    table, path = pyarrow.table({key: [row[key] for row in ROWS] for key in ROWS[0]}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    assert list(read_texts(path).texts) == TEXTS
    assert read_texts(f"{path}:title").texts == ("t0", "t1", "t2")
    assert list(given_calibration(table, 8).texts) == TEXTS  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CalibrationError, match=rf"a\{suffix}: not a readable"):
        read_texts(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(EnvironmentError_, match=r"a\.parquet needs the package pyarrow: pip install"):
        read_texts(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(EnvironmentError_, match=r"zstd, which needs a package: pip install zstandard, .*zstd -d"):
        read_texts(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
        ("caf\u00e9\r\n".encode("utf-16"), "caf\u00e9\n"),
        ("caf\u00e9".encode("utf-16-be").join([b"\xfe\xff", b""]), "caf\u00e9"),
        ("caf\u00e9".encode("utf-32"), "caf\u00e9"),
        ("caf\u00e9 na\u00efve".encode()[:-1] + "\u20ac".encode()[:2], "caf\u00e9 na\u00efv"),
        (gzip.compress("caf\u00e9".encode()), "caf\u00e9"),
    ],
    ids=["mark and line ends", "utf-16", "utf-16-be", "utf-32", "cut off", "gzip"],
)
def test_encodings(tmp_path: Path, data: bytes, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    if text.endswith("v"):
        with caplog.at_level(logging.WARNING):
            assert read_texts(tmp_path / "a.txt").texts == (text,)
        assert "a.txt: the last character is cut off" in caplog.text
    else:
        assert read_texts(tmp_path / "a.txt").texts == (text,)


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("a.txt", "na\u00efve".encode("latin-1"), CalibrationError, r"UTF-8 text \(byte 2\).*iconv -f latin1 -t utf-8"),
        ("a.txt", b"caf\xe9", CalibrationError, r"not UTF-8 text \(byte 3\)"),
        ("a.txt", b"text\0more", CalibrationError, r"binary file \(a zero byte at 4\)"),
        ("a.txt", "text".encode("utf-16-le"), CalibrationError, "UTF-16 without a mark"),
        ("a.txt", b"", CalibrationError, "this text file is empty"),
        ("a.txt", b" \r\n\t", CalibrationError, "this text file is empty"),
        ("a.jsonl", b"", CalibrationError, "is empty"),
        ("a.json", b"[]", CalibrationError, "is empty"),
        ("a.csv", b"text\n", CalibrationError, "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', CalibrationError, r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', CalibrationError, r"line 1: not UTF-8 text \(byte 13\)"),
        ("a.json", b"{'text': 'a'}", CalibrationError, "not JSON"),
        ("a.json", b"[" * 100_000, CalibrationError, "nested too deeply"),
        ("a.jsonl", b"[" * 100_000, CalibrationError, "nested too deeply"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b", "n": 1}', UsageError, "'prompt', 'answer', 'n': give PATH:COL"),
        ("a.jsonl", b'{"n": 1}', UsageError, "no column 'text', and none that may be it; it has 'n'"),
        ("a.jsonl", b'{"text": {"a": 1}}', UsageError, "row 1: the column 'text' holds a dict"),
        ("a.jsonl", b"3\n", UsageError, "row 1: a int"),
        ("a.json.gz", gzip.compress(b'["text"]' * 999)[:40], TextFileError, "cannot read this text file"),
        ("a.csv", b"A long sentence that names no column.\nAnother.\n", UsageError, "put a line 'text' before it"),
        ("data", b"PAR1" + bytes(9), CalibrationError, r"Parquet\): name it \.parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told(
    tmp_path: Path, name: str, data: bytes, error: type[MosaicError], words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda: given_calibration(path, 8), lambda: read_texts(path)):
        with pytest.raises(error, match=words) as caught:
            read()
        assert name in str(caught.value)


def test_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "answer": "two"}\n{"prompt": "three"}\n')
    assert read_texts(f"{path}:prompt").texts == ("one", "three")
    assert given_calibration(f"{path}:answer", 8) == Texts(("two",), str(path))
    with pytest.raises(UsageError, match=r"has no column 'reply'; it has 'prompt', 'answer'"):
        read_texts(f"{path}:reply")
    (tmp_path / "b.jsonl:prompt").write_text("a file of that name")
    assert read_texts(f"{tmp_path}/b.jsonl:prompt").texts == ("a file of that name",)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="a plain text has no column 'text'"):
        read_texts(f"{tmp_path}/a.txt:text")
    for name, content in (("one.jsonl", '{"id": 7, "body": "a text"}'), ("one.csv", "id,score,body\n7,0.5,a text\n")):
        (tmp_path / name).write_text(content)
        assert read_texts(tmp_path / name).texts == ("a text",)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Chatty:
    """A tokenizer with a template that refuses a conversation that the assistant begins."""

    chat_template = "..."

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] == "assistant":
            raise ValueError("roles must alternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


@pytest.mark.parametrize(
    "given",
    [
        [{"messages": CHAT}],
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]}],
        [CHAT],
        CHAT,
    ],
    ids=["messages", "from and value", "parts", "lists", "one conversation"],
)
def test_conversations(tmp_path: Path, given: Any, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHAT}] if given is CHAT else given))
    for found in (given_calibration(given, 8), given_calibration(tmp_path / "a.json", 8)):
        assert isinstance(found, Texts)
        assert isinstance(found.texts[0], Conversation)
        assert joined(found, Chatty()) == "<user>Hi<assistant>Hello"
        with caplog.at_level(logging.INFO):
            assert joined(found, object()) == "Hi\nHello"
        assert "no chat template" in caplog.text


def test_a_template_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    found = given_calibration([{"messages": CHAT}, {"messages": CHAT[::-1]}], 8)
    assert isinstance(found, Texts)
    with caplog.at_level(logging.WARNING):
        assert joined(found, Chatty()) == "<user>Hi<assistant>Hello"
    assert "refuses 1 of 2 conversations, which are left out (roles must alternate)" in caplog.text
    with pytest.raises(CalibrationError, match=r"takes no conversation of it \(roles must alternate"):
        joined(Texts(found.texts[1:], "x"), Chatty())


def test_halves_of_characters(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """JSON may hold them; a tokenizer ends in a traceback."""
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d\\ude00 whole and \\ud83d half one"}')
    found = joined(read_texts(tmp_path / "a.jsonl"), tokenizer)
    assert found == "a \U0001f600 whole and \ufffd half one"
    assert "halves of characters" in caplog.text


def test_an_empty_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("not asked for")
    for read in (read_texts, given_text, lambda name: given_calibration(name, 8)):
        with pytest.raises(UsageError, match="an empty string"):
            read("")


def test_token_ids_of_a_file(tmp_path: Path) -> None:
    tokens = torch.randint(96, (3, 8), generator=torch.Generator().manual_seed(1))
    for name, rows in (("a.jsonl", [{"input_ids": row} for row in tokens.tolist()]), ("b.jsonl", tokens.tolist())):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        found = given_calibration(tmp_path / name, 8)
        assert isinstance(found, Sequences)
        assert torch.equal(found.tokens, tokens)
        with pytest.raises(CalibrationError, match="token ids, and a text is needed"):
            read_texts(tmp_path / name)
    (tmp_path / "c.jsonl").write_text("[1, 2, 3]\n[4]")
    assert isinstance(given_calibration(tmp_path / "c.jsonl", 8), Stream)


@contextmanager
def fed(path: Path, data: bytes) -> Iterator[Path]:
    """A named pipe that somebody writes into, once."""
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(data))
    writer.start()
    yield path
    writer.join(10)
    assert not writer.is_alive()


@pytest.mark.parametrize("data", [b"A plain text.", LINES.encode(), gzip.compress(LINES.encode())])
def test_a_pipe_is_read_once(tmp_path: Path, data: bytes) -> None:
    with fed(tmp_path / "pipe", data) as pipe:
        found = given_calibration(str(pipe), 8)
    assert isinstance(found, Texts)
    assert found.texts == (("A plain text.",) if b"plain" in data else tuple(TEXTS))
    with fed(tmp_path / "other", b"text") as pipe:
        assert read_texts(pipe).texts == ("text",)


def test_a_pipe_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("mosaic_kernels.text_files.launched", lambda: True)
    with pytest.raises(UsageError, match="every process would get a part of it"):
        given_calibration(tmp_path / "pipe", 8)


def test_devices_are_no_texts(tmp_path: Path) -> None:
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(TextFileError, match=f"{device}: this is a device"):
            given_calibration(device, 8)


def test_wrong_paths_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere.txt").symlink_to("gone")
    for path in (
        tmp_path / "circle",
        tmp_path / "nowhere.txt",
        tmp_path / "none.jsonl",
        Path("none.csv"),
        Path("wikitext2"),
    ):
        with pytest.raises(UsageError, match=r"no such text file|symbolic links") as caught:
            given_calibration(path, 8)
        assert isinstance(caught.value, CalibrationError)
        with pytest.raises(UsageError):
            given_text(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # root may read everything
    with pytest.raises(UsageError, match=r"a\.txt: cannot read this text file: Permission denied"):
        read_texts(tmp_path / "a.txt")


def test_a_folder_of_a_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train-00000-of-00002.jsonl").write_text('{"text": "one"}')
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"text": "two"}')
    (tmp_path / "test.jsonl").write_text('{"text": "not this"}')
    (tmp_path / "README.md").write_text("nor this")
    (tmp_path / "corpus.py").write_text("raise SystemExit('run')")
    with caplog.at_level(logging.INFO):
        assert read_texts(tmp_path).texts == ("one", "two")
    assert "the script corpus.py is not run" in caplog.text
    for file in tmp_path.glob("train*"):
        file.unlink()
    with pytest.raises(UsageError, match=r"without texts for training \(it has README\.md, corpus\.py, test\.jsonl\)"):
        read_texts(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "books.txt").write_text("a book")
    assert read_texts(tmp_path).texts == ("a book",)


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets (pip install 'mosaic-kernels[datasets]')")
    train = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"test": train.select([0]), "train": train})
    train.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "both")
    for given in (train, both, tmp_path / "one", str(tmp_path / "both"), train["text"], train.to_iterable_dataset()):
        found = given_calibration(given, 8)
        assert isinstance(found, Texts)
        assert list(found.texts) == TEXTS


def test_tables_of_pandas() -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame(ROWS)
    for given in (frame, frame["text"], list(frame["text"])):
        found = given_calibration(given, 8)
        assert isinstance(found, Texts)
        assert list(found.texts) == TEXTS
    assert found.description == "list of 3 texts"


def test_mappings_and_columns() -> None:
    tokens = torch.randint(96, (3, 8), generator=torch.Generator().manual_seed(1))
    for given in ({"input_ids": tokens, "attention_mask": tokens}, [{"input_ids": row} for row in tokens]):
        found = given_calibration(given, 8)
        assert isinstance(found, Sequences)
        assert torch.equal(found.tokens, tokens)
    for given in ({"text": TEXTS}, {"train": ROWS, "test": []}, iter(ROWS), {"body": TEXTS}):
        found = given_calibration(given, 8)
        assert isinstance(found, Texts)
        assert list(found.texts) == TEXTS


def test_names_of_data_sets_are_not_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """A folder in the working directory is not mistaken for the data set, and a script in it is not run."""
    monkeypatch.chdir(tmp_path)
    script = "import pathlib; pathlib.Path('run').touch()"
    for name in ("wikitext2", "ptb", "ptb_text_only", "c4"):
        Path(name).mkdir()
        Path(name, f"{name}.py").write_text(script)
    assert given_calibration("wikitext2", 8) == "wikitext2"
    assert given_calibration("ptb", 8) == "ptb"
    with pytest.raises(UsageError, match=r"ptb_text_only is a directory without texts"):
        given_calibration("ptb_text_only", 8)
    for hidden in ("Salesforce/wikitext", "ptb-text-only/ptb_text_only"):
        Path(hidden).mkdir(parents=True)
        Path(hidden, f"{Path(hidden).name}.py").write_text(script)
    monkeypatch.setitem(__import__("sys").modules, "datasets", type("datasets", (), {"load_dataset": None}))
    for name in ("wikitext2", "ptb"):
        with pytest.raises(UsageError, match=f"hides the dataset '{name}' of the hub: give ./"):
            calibrate(name, tokenizer, 4096, samples=2, seqlen=8, seed=0)
    assert not Path("run").exists()


def test_texts_to_evaluate_on() -> None:
    assert given_text(["one", "two"]).texts == ("one", "two")
    assert given_text(["one", "two"]).description == "list of 2 texts"
    for wrong in (3, [], [1], {"text": "a"}, torch.ones(3)):
        with pytest.raises(UsageError, match="eval text may be the path"):
            given_text(wrong)
    with pytest.raises(CalibrationError, match="the 2 texts given as eval text are empty"):
        given_text(["", " "])

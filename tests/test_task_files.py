# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from mosaic_kernels.errors import UsageError
from mosaic_kernels.evaluate.task_files import read_tasks

CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no examples"),
        ("\n[]\n", r"bad\.jsonl, line 2: expected the keys query, choices, gold or context_options.*, found none"),
        ('{"question": "a", "answer": "b"}', "line 1: .* or context, continuation, found question, answer"),
        (f'{json.dumps(CHOICE)}\n\n{{"query": "a"', "line 3: not JSON"),
        (
            f'{json.dumps(CHOICE)}\n{{"context": "a", "continuation": "b"}}',
            "line 2: expected the keys query, ch.* gold, f",
        ),
        (json.dumps({**CHOICE, "gold": 2}), "gold is 2; expected an index, 0 to 1"),
        (json.dumps({**CHOICE, "gold": "0"}), "gold is '0'"),
        (json.dumps({**CHOICE, "gold": True}), "gold is True"),
        (json.dumps({**CHOICE, "choices": ["b"]}), "at least two texts"),
        (json.dumps({**CHOICE, "choices": "bc"}), "at least two texts"),
        (json.dumps({**CHOICE, "choices": ["b", 3]}), "choices is .* not empty"),
        (json.dumps({**CHOICE, "query": " "}), "query is ' '"),
        (b"\xff\xfe{", "cannot read this file as UTF-8"),
    ],
)
def test_bad_files(content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        read_tasks(tmp_path)


def test_a_file_is_read_whatever_its_line_ends(tmp_path: Path) -> None:
    row = {**CHOICE, "query": "one\u2028two\x85"}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert read_tasks(tmp_path)["a"].rows == [row, row]


def test_bad_directories_and_names(tmp_path: Path) -> None:
    for directory, tasks, message in [
        (tmp_path / "none", None, "no such directory"),
        (tmp_path, None, "no .jsonl files"),
        (tmp_path, [], "list of tasks is empty"),
        (tmp_path, ["piqa"], "no task 'piqa' in .*; it has none"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_tasks(directory, tasks)
    (tmp_path / "mean.jsonl").write_text(json.dumps(CHOICE))
    with pytest.raises(UsageError, match="rename the file"):
        read_tasks(tmp_path)


def test_named_files_only_and_their_keys_only(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 7, **CHOICE}))
    (tmp_path / "c.jsonl").write_text("broken, but not asked for")
    found = read_tasks(tmp_path, ["b", "a", "b"])
    assert list(found) == ["b", "a"]
    assert found["a"].rows == [CHOICE]

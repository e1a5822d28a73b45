# SPDX-License-Identifier: Apache-2.0
"""Files of zero-shot examples: which layouts there are, and reading them with every line checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_kernels.errors import UsageError
from mosaic_kernels.paths import local_path

MEAN = "mean"  # the name of the mean among the results, so no task may have it


@dataclass(frozen=True)
class Layout:
    """What a line of a file holds, and which lm-eval task that makes."""

    keys: tuple[str, ...]
    config: Mapping[str, str]
    metrics: tuple[str, ...] = ("acc",)


LAYOUTS = (
    Layout(
        ("query", "choices", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
        ("acc", "acc_norm"),
    ),
    Layout(  # WinoGrande: lm-eval takes a text that is a number for the index of the right context
        ("context_options", "continuation", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
    ),
    Layout(  # LAMBADA
        ("context", "continuation"),
        {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": " {{continuation}}"},
    ),
)


@dataclass(frozen=True)
class TaskFile:
    """The examples of one file, with the keys of its layout only."""

    layout: Layout
    rows: list[dict[str, Any]]


def read_tasks(directory: str | Path, tasks: Sequence[str] | None = None) -> dict[str, TaskFile]:
    """The files ``TASK.jsonl`` of a directory, all or those named.

    Raises:
        UsageError: no such directory or task, or a line fits no layout; the message names file and line.
    """
    folder = local_path(directory, "--zero-shot")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give one with a TASK.jsonl for each task")
    known = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    names = list(known) if tasks is None else list(dict.fromkeys(tasks))
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no task {', '.join(map(repr, unknown))} in {folder}; it has {', '.join(known) or 'none'}")
    if not names:
        raise UsageError(f"{folder}: no .jsonl files in it" if tasks is None else "the list of tasks is empty")
    if MEAN in names:
        raise UsageError(f"{known[MEAN]}: the results keep the name {MEAN!r} for the mean; rename the file")
    return {name: _read(known[name]) for name in names}


def _read(path: Path) -> TaskFile:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a text may hold a bare U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read this file as UTF-8 ({error})") from error
    layout, rows = None, []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{place}: not JSON ({error})") from error
        possible = LAYOUTS if layout is None else (layout,)
        keys = row.keys() if isinstance(row, dict) else set()
        layout = next((one for one in possible if keys >= set(one.keys)), None)
        if layout is None:
            expected = " or ".join(", ".join(one.keys) for one in possible)
            raise UsageError(f"{place}: expected the keys {expected}, found {', '.join(keys) or 'none'}")
        rows.append({key: row[key] for key in layout.keys})
        _check(rows[-1], place)
    if layout is None:
        raise UsageError(f"{path}: the file holds no examples")
    return TaskFile(layout, rows)


def _check(row: Mapping[str, Any], place: str) -> None:
    for key in ("choices", "context_options"):
        if key in row and (not isinstance(row[key], list) or len(row[key]) < 2):
            raise UsageError(f"{place}: {key} is {row[key]!r}; expected a list of at least two texts")
    for key, value in row.items():
        texts = value if isinstance(value, list) else [value]
        if key == "gold":
            count = len(row.get("choices") or row["context_options"])
            if type(value) is not int or not 0 <= value < count:
                raise UsageError(f"{place}: gold is {value!r}; expected an index, 0 to {count - 1}")
        elif not all(isinstance(text, str) and text.strip() for text in texts):
            raise UsageError(f"{place}: {key} is {value!r}; expected text that is not empty")

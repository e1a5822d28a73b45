# SPDX-License-Identifier: Apache-2.0
"""Finished cells, one JSON line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """Finished cells, by the hash of all that decides their result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # cut off while it was written
            lines.pop()
            path.write_text("".join(lines))
        for line in lines:
            record = json.loads(line)
            self.records[record["key"]] = record

    def add(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["key"]] = record

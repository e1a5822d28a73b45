# SPDX-License-Identifier: Apache-2.0
"""docs/explain.md shows the output of the commands, and lists reasons that the code gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mosaic_kernels.info import main as info
from mosaic_kernels.ops import cpu, isa
from mosaic_kernels.prune.__main__ import main as prune

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "explain.md").read_text()
COMMANDS = {"mosaic_kernels.prune": prune, "mosaic_kernels.info": info}


def block(kind: str) -> list[str]:
    """The lines of the first block of a kind."""
    return DOCS.split(f"```{kind}\n")[1].split("```")[0].splitlines()


def test_the_table_is_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in block("bash"):
        program, option, module, *arguments = shlex.split(command)
        assert (program, option) == ("python", "-m")
        capsys.readouterr()
        assert COMMANDS[module]([*arguments, *(["--device", "cpu"] if "info" in module else [])]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = block("text")
    versions = next(number for number, line in enumerate(printed) if line.startswith("python "))
    assert printed[versions - 1] == ""
    printed = printed[: versions - 1]
    if isa.level() == cpu.BEST_ISA == "avx512":
        assert printed == shown
    else:  # dense layers may run in another way there, and notes may differ
        wanted = [" ".join(line.replace("avx512", isa.level()).split()) for line in shown if "packed, " in line]
        found = [" ".join(line.partition(": ")[0].split()) for line in printed if "packed, " in line]
        assert len(found) == len(wanted)
        assert all(
            line.startswith(start.partition(f"{isa.level()} ")[0]) for line, start in zip(found, wanted, strict=True)
        )


def test_the_reasons_are_those_that_are_given() -> None:
    sources = ("decode", "native_block", "dense", "explain", "ops/select", "ops/missing")
    code = "".join((ROOT / "mosaic_kernels" / f"{name}.py").read_text() for name in sources)
    code = re.sub(r'"\n\s*f?"', "", code)  # strings over two lines
    rows = DOCS.split("## Reasons")[1].split("|---|---|")[1].strip().splitlines()
    assert len(rows) >= 15
    for row in rows:
        for reason in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            for part in reason.split("…"):
                assert part.strip() in code, reason


def test_readme_leads_here() -> None:
    assert "(docs/explain.md)" in (ROOT / "README.md").read_text()

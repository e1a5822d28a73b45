# SPDX-License-Identifier: Apache-2.0
"""What is written down is true: examples run, options and variables exist, tables are the measured ones."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.evaluate.__main__ import make_parser as evaluate_parser
from mosaic_kernels.prune.__main__ import make_parser as prune_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["ops", "int8", "linear", "text", "prune.pipeline"])
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"mosaic_kernels.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"tmp": tmp_path})
    assert tried
    assert not failed


def test_every_option_in_the_readme_exists() -> None:
    known = {flag for parser in (prune_parser(), evaluate_parser()) for flag in parser._option_string_actions}
    known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / "quality" / "__main__.py").read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.split("## Prune your model")[1]))
    assert named
    assert named <= known


def test_every_option_of_the_command_is_a_field_with_the_default_that_help_shows() -> None:
    help_text = re.sub(r"\s+", " ", prune_parser().format_help())
    for name in ("sparsity", "category", "solver", "quality", "samples", "seed", "calibration"):
        assert f"--{name}" in help_text
        assert f"(default: {PruneConfig.__dataclass_fields__[name].default})" in help_text


def test_every_environment_variable_in_the_readme_is_read_somewhere() -> None:
    sources = [*ROOT.glob("mosaic_kernels/**/*.py"), ROOT / "setup.py"]
    code = "".join(path.read_text() for path in sources)
    named = set(re.findall(r"`((?:MOSAIC|XDG)_[A-Z_]+)`", README))
    assert len(named) >= 5
    assert all(f'"{name}"' in code for name in named)


@pytest.mark.parametrize("marker", ["main", "tests"])
def test_ci_finds_the_readmes_commands(marker: str) -> None:
    lines = README.splitlines()
    place = lines.index(f"<!-- ci: {marker} -->")
    assert lines[place + 1] == "```bash"
    assert lines[place + 2].startswith("python3 -m venv .venv && ")
    assert lines[place + 3] == "```"
    assert place < 40  # the first screen


def test_the_tables_are_the_measured_ones() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_one_row_at_half_density_is_twice_as_fast_as_dense() -> None:
    """The promise for a large bf16 projection, by the committed measurement."""
    for path in (ROOT / "benchmarks" / "results").glob("linear-*.json"):
        found = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
        (row,) = [f for f in found if f["shape"] == [4096, 11008] and f["rows"] == 1 and f["density"] > 0.45]
        assert row["speed_up"] >= 2


def test_whole_models_keep_their_promises() -> None:
    """A 1.1B Llama against the dense one, by the committed measurement."""
    for path in (ROOT / "benchmarks" / "results").glob("generate-*.json"):
        found = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
        rows = {row["variant"]: row for row in found if "prefill" in row}
        bitmap, int8, composite = rows["bitmap 50 %"], rows["int8 50 %"], rows["composite 60 %"]
        assert bitmap["ratios"]["decode"] >= 2.5
        assert bitmap["memory"]["projections"] <= 0.58
        assert int8["memory"]["projections"] <= 0.33
        assert min(composite["ratios"].values()) >= 1 / (1 - 0.3)
        assert composite["ratios"]["decode"] > bitmap["ratios"]["decode"]

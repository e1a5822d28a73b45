# SPDX-License-Identifier: Apache-2.0
"""The example of README's first command: it speaks at once, and says on how much it measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_its_first_line_waits_for_no_import(tmp_path: Path) -> None:
    """torch and transformers take seconds to import; here neither can be."""
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['mosaic_kernels'] = None\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, QUICKSTART, "--samples", "3", "--eval-tokens", "2048"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "ModuleNotFoundError" in done.stderr
    assert done.stdout.splitlines() == [
        f"pruning {QUICKSTART.parent / 'tiny-llama'} by 60%: 3 calibration sequences of 256 tokens, "
        "perplexity on 2,048 tokens"
    ]


@pytest.mark.slow
def test_it_shows_what_pruning_cost_and_gained(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, QUICKSTART, "--samples", "2", "--eval-tokens", "1024", "--output-dir", tmp_path / "out"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = dict(line.rsplit(maxsplit=2)[:2] for line in done.stdout.splitlines() if line[:1].isalpha() and "  " in line)
    assert {"parameters", "checkpoint bytes", "perplexity", "decode tokens/s", "prefill tokens/s"} <= rows.keys()
    assert rows["parameters"] == "5,475,584"
    assert "perplexity on 1,020 tokens of " in done.stdout  # the first of 256 in a window is not predicted
    assert (tmp_path / "out" / "mosaic_report.json").exists()

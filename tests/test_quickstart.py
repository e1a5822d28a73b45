# SPDX-License-Identifier: Apache-2.0
"""The example prints its first line at once; tests/test_documented_commands.py runs all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_its_first_line_waits_for_no_import(tmp_path: Path) -> None:
    """torch and transformers take seconds to import; here their import fails."""
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

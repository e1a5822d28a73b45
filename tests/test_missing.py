# SPDX-License-Identifier: Apache-2.0
"""In a source checkout without its native module, every entry point says so and names both cures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mosaic_kernels
from mosaic_kernels.ops.missing import why_missing

PACKAGE = Path(mosaic_kernels.__file__).parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `git clone` gives: the package without its native modules."""
    root = tmp_path_factory.mktemp("clone") / "mosaic"
    shutil.copytree(PACKAGE, root / "mosaic_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (root / "setup.py").touch()
    (root / "csrc").mkdir()
    # An editable install of this package would find the native modules for the copy, too.
    (root / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path\n"
        "                    if not getattr(finder, '__module__', '').startswith('__editable___mosaic')]\n"
    )
    return root


def python(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python inside the checkout, whose package comes before any installed one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout), **variables}
    return subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def cured(text: str, checkout: Path) -> bool:
    """True if a text names the problem and both cures."""
    assert "circular" not in text
    return (
        f"Python takes mosaic_kernels from the source checkout {checkout}, where the module is not built; build it "
        "there with `pip install -e .`, or run from another directory to use the installed package"
    ) in text


def test_info(checkout: Path) -> None:
    done = python(checkout, "-m", "mosaic_kernels.info")
    assert done.returncode == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("cpu  "))
    assert cured(line, checkout)
    assert "cpu tensors     reference" in done.stdout


def test_import_and_kernels(checkout: Path) -> None:
    """An import logs nothing; the first product warns once, even if logging is not configured."""
    program = (
        "import sys, torch, mosaic_kernels as mk; print('imported', file=sys.stderr); "
        "x, linear = torch.ones(8), torch.nn.Linear(8, 8); layer = mk.MosaicLinear.from_linear(linear); "
        "print(torch.allclose(layer(x), linear(x), atol=1e-6)); print(mk.explain(layer).summary)"
    )
    done = python(checkout, "-c", program)
    assert done.returncode == 0, done.stderr
    imported, warning = done.stderr.splitlines()
    assert imported == "imported"
    assert warning.startswith(
        "backend 'cpu' cannot run, so cpu tensors use 'reference': the native module _C_cpu did not"
    )
    assert cured(warning, checkout)
    right, summary = done.stdout.splitlines()
    assert right == "True"
    assert summary.startswith("1 packed layer on reference (cpu: the native module _C_cpu did not load")
    assert cured(summary, checkout)


def test_pruning(checkout: Path, dense_dir: Path, tmp_path: Path) -> None:
    options = [
        "--calibration=random",
        "--samples=2",
        "--seqlen=8",
        "--solver=wanda",
        "--policy=uniform",
        "--device=cpu",
    ]
    done = python(
        checkout, "-m", "mosaic_kernels.prune", str(dense_dir), f"--output-dir={tmp_path / 'out'}", *options,
        "--category=unstructured",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mosaic_report.json").exists()
    assert cured(done.stderr, checkout)
    assert done.stderr.count("did not load") == 1
    forced = python(
        checkout, "-m", "mosaic_kernels.prune", str(dense_dir), f"--output-dir={tmp_path / 'forced'}", *options,
        MOSAIC_BACKEND="cpu",
    )  # fmt: skip
    assert forced.returncode == 3
    assert cured(forced.stderr, checkout)


def test_elsewhere_and_built_for_another_python(tmp_path: Path) -> None:
    package = tmp_path / "mosaic_kernels"
    package.mkdir()
    error = ImportError("no such module")
    installed = why_missing("_C_cpu", error, package)
    assert installed == (
        "the native module _C_cpu did not load (no such module): install the package again, with a C++ compiler "
        "(`pip install .` in its source)"
    )
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    assert "where the module is not built; build it there" in why_missing("_C_cpu", error, package)
    (package / "_C_cpu.cpython-39-x86_64-linux-gnu.so").touch()
    assert "where the module does not fit this Python; build it there" in why_missing("_C_cpu", error, package)

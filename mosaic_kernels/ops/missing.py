# SPDX-License-Identifier: Apache-2.0
"""What to do where a native module did not load."""

from __future__ import annotations

from pathlib import Path

__all__ = ["why_missing"]

_PACKAGE = Path(__file__).parents[1]


def why_missing(module: str, error: ImportError, package: Path = _PACKAGE) -> str:
    """What is wrong and how to cure it, in one sentence.

    Inside a source checkout Python takes the checkout's package, not the installed one that has the module.

    Args:
        module: its name, such as ``_C_cpu``.
        error: what importing it raised.
        package: where the package lies.
    """
    found = f"the native module {module} did not load ({error})"
    root = package.parent
    if not ((root / "setup.py").is_file() and (root / "csrc").is_dir()):
        return f"{found}: install the package again, with a C++ compiler (`pip install .` in its source)"
    state = "does not fit this Python" if any(package.glob(f"{module}.*so")) else "is not built"
    return (
        f"{found}: Python takes mosaic_kernels from the source checkout {root}, where the module {state}; build it "
        "there with `pip install -e .`, or run from another directory to use the installed package"
    )

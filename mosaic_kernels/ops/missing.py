# SPDX-License-Identifier: Apache-2.0
"""The message for a native module that did not load."""

from __future__ import annotations

from pathlib import Path

__all__ = ["why_missing"]

_PACKAGE = Path(__file__).parents[1]


def why_missing(module: str, error: ImportError, package: Path = _PACKAGE) -> str:
    """Say in one sentence what is wrong and how to fix it.

    In a source checkout, Python imports the package of the checkout instead of the installed one that has the module.

    Args:
        module: the name of the native module, such as ``_C_cpu``.
        error: the error that its import raised.
        package: the directory of the package.
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

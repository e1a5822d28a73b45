# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: optional, imported only when something asks for it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DEVICES", "KERNELS", "why_not"]

# dense_linear is left to torch.
_MODULES = {
    "sparse_linear": "linear",
    "sparse_linear_int8": "linear",
    "pack": "pack",
    "unpack": "pack",
    "outlier_stats": "score",
    "column_square_sums": "score",
    "select": "select",
    "score_select": "select",
    "obs_block": "obs",
}


@functools.cache
def why_not() -> str | None:
    """``None`` where Triton kernels can run, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mosaic-kernels[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # the interpreter runs kernels on CPU tensors, slowly: for tests
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler for its launchers (install gcc or clang, or set CC)"
    return None


def _imported_when_called(op: str) -> Callable[..., Any]:
    def run(first: Tensor, *rest: Any) -> Any:
        kernel = getattr(importlib.import_module(f"{__name__}.{_MODULES[op]}"), op)
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return kernel(first, *rest)

    return run


KERNELS: dict[str, Callable[..., Any]] = {op: _imported_when_called(op) for op in _MODULES}
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: optional, imported only when something asks for it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DEVICES", "KERNELS", "why_not"]


@functools.cache
def why_not() -> str | None:
    """``None`` where Triton kernels can run, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mosaic-kernels[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # the interpreter runs kernels on CPU tensors, slowly: for tests
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _sparse_linear(*args: Any) -> Any:
    from mosaic_kernels.ops.triton.linear import sparse_linear

    return sparse_linear(*args)


KERNELS: dict[str, Callable[..., Any]] = {"sparse_linear": _sparse_linear}
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: optional, imported only when something asks for it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["KERNELS", "why_not"]


@functools.cache
def why_not() -> str | None:
    """``None`` where Triton kernels can run, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


KERNELS: dict[str, Callable[..., Any]] = {}

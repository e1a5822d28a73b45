# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend. Importing it touches no GPU; the first call that needs to know probes for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

try:
    from mosaic_kernels import _C_cuda
except ImportError as error:
    _IMPORT_ERROR: str | None = f"the module _C_cuda was not built or did not load ({error})"
else:
    _IMPORT_ERROR = None

__all__ = ["KERNELS", "why_not"]


@functools.cache
def why_not() -> str | None:
    """``None`` where the CUDA kernels can run, else the reason."""
    if _IMPORT_ERROR is not None:
        return _IMPORT_ERROR
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    reason: str | None = _C_cuda.why_not()
    return reason


KERNELS: dict[str, Callable[..., Any]] = {}

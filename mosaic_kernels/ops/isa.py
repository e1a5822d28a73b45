# SPDX-License-Identifier: Apache-2.0
"""The instruction sets that the CPU kernels are compiled for; ``MOSAIC_ISA`` limits them to a lower one."""

from __future__ import annotations

import os
from typing import Protocol

from mosaic_kernels.errors import UsageError

__all__ = ["LEVELS", "level", "limit"]

LEVELS = ("scalar", "avx2", "avx512", "amx")  # each includes the ones before it


class Native(Protocol):
    """The functions of the native module that this file calls."""

    def isa(self) -> str: ...

    def set_isa(self, level: str) -> None: ...


def level() -> str:
    """The level that the CPU kernels use now."""
    import mosaic_kernels._C_cpu as native

    return native.isa()


def limit(native: Native) -> str:
    """Limit the kernels to the level in ``MOSAIC_ISA`` if this processor has a higher one.

    Returns:
        The processor's own level.

    Raises:
        UsageError: ``MOSAIC_ISA`` names no level.
    """
    best, wish = native.isa(), os.environ.get("MOSAIC_ISA", "")
    if wish and wish not in LEVELS:
        raise UsageError(f"MOSAIC_ISA={wish!r} is not an instruction set; choose one of {', '.join(LEVELS)}")
    if wish and LEVELS.index(wish) < LEVELS.index(best):
        native.set_isa(wish)
    return best

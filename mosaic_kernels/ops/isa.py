# SPDX-License-Identifier: Apache-2.0
"""The instruction sets that the CPU kernels are compiled for; ``MOSAIC_ISA`` limits them to a lower one."""

from __future__ import annotations

import os
from typing import Protocol

from mosaic_kernels.errors import UsageError

__all__ = ["LEVELS", "lacking", "level", "limit"]

LEVELS = ("scalar", "avx2", "avx512", "amx")  # each includes the ones before it

# What a processor needs for the kernels of a level, beside what the level before needs; see csrc/cpu/dispatch.cpp.
_NEEDED = {"avx512": ("avx512", "avx512_vbmi2", "avx512_bf16", "avx512_vnni"), "amx": ("amx_bf16", "amx_int8")}


class Native(Protocol):
    """The functions of the native module that this file calls."""

    def isa(self) -> str: ...

    def set_isa(self, level: str) -> None: ...


def level() -> str:
    """The level that the CPU kernels use now."""
    import mosaic_kernels._C_cpu as native

    return native.isa()


def lacking(best: str, features: str) -> str:
    """Why a processor of level ``best`` that has some of the next level's instructions cannot use that level.

    Args:
        best: the processor's own level.
        features: names of its instructions, separated by spaces.

    Returns:
        One clause, or an empty string if it has none of them.
    """
    following = LEVELS[min(LEVELS.index(best) + 1, len(LEVELS) - 1)]
    has, needed = set(features.split()), _NEEDED.get(following, ())
    missing = [name for name in needed if name not in has]
    return f"the {following} kernels need {', '.join(missing)}, too" if missing and len(missing) < len(needed) else ""


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

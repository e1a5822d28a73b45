# SPDX-License-Identifier: Apache-2.0
"""Finds the floating-point types in which this processor multiplies matrices quickly."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from mosaic_kernels import _C_cpu
except ImportError:  # not built: the processor's instructions are unknown, and only the measurement counts
    _features: frozenset[str] | None = None
else:
    _features = frozenset(_C_cpu.features().split())

logger = logging.getLogger(__name__)

# A type counts as fast if its products reach this share of the speed of fp32. The measured values lie far apart: with
# instructions for them, bf16 3.3x and fp16 1.0x the speed of fp32; with AVX2 alone both 0.17x (Xeon, Sapphire Rapids
# class, Dec 2026), on Zen 3 0.06 to 0.1x. At equal speed the smaller type is better: it takes half the bytes.
FAST = 0.8

# Instructions that multiply a type, as the native module names them.
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}

# One product has 67 million operations: 0.4 ms in fp32 on the Xeon above, 27 ms in bf16 on Zen 3, where two products
# fill the 50 ms. Smaller products mislead: at 64 x 256 x 256, fp16 reaches 0.75x the speed of fp32 instead of 1.0x.
_ROWS, _FEATURES = 128, 512
_SECONDS, _MOST_ROUNDS = 0.05, 12


@dataclass(frozen=True)
class Products:
    """How the processor multiplies matrices of one floating-point type.

    Attributes:
        fast: at least about as fast as fp32.
        ratio: measured speed of torch's ``F.linear`` over its speed in fp32.
        instructions: the processor has instructions for such products; ``None`` where that is unknown.
    """

    fast: bool
    ratio: float
    instructions: bool | None


def has_fast_products(dtype: torch.dtype) -> bool:
    """True if torch multiplies matrices of ``dtype`` on this CPU at least about as fast as fp32 matrices.

    The first call for a dtype measures for about 50 ms; later calls return the remembered result. Do not call it in
    code that ``torch.compile`` traces.
    """
    return products(dtype).fast


def is_slow(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True if ``x`` is on the CPU and torch computes its products slowly there.

    Args:
        dtype: the dtype in which ``x`` is multiplied; by default its own.
    """
    dtype = x.dtype if dtype is None else dtype
    return x.is_cpu and dtype in _INSTRUCTIONS and not _is_fast(dtype)


def _is_fast(dtype: torch.dtype) -> bool:
    return has_fast_products(dtype)


# A compiled graph must hold the answer and not the measurement. This is all that torch.compiler.assume_constant_result
# does, but that function imports the whole compiler, which takes a second and imports triton.
_is_fast._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def products(dtype: torch.dtype) -> Products:
    """Compare CPUID and a measurement of products of ``dtype``; if they disagree, the measurement decides.

    They disagree if torch has no kernel for the processor's instructions or is told not to use them
    (``ONEDNN_MAX_CPU_ISA``), or if its kernel is fast without such instructions.
    """
    if dtype is torch.float32:
        return Products(True, 1.0, True)
    known = None if _features is None else not _features.isdisjoint(_INSTRUCTIONS.get(dtype, ()))
    ratio = _speed_over_fp32(dtype)
    fast = ratio >= FAST
    if known is not None and fast is not known:
        logger.info(
            "this processor %s instructions for %s products, but torch's run at %.2gx the speed of float32's: %s",
            "has" if known else "has no", name_of(dtype), ratio,
            "they are used" if fast else "products of many rows are computed in float32 here",
        )  # fmt: skip
    return Products(fast, ratio, known)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _speed_over_fp32(dtype: torch.dtype) -> float:
    """Speed of products in ``dtype`` over the speed in fp32: both take turns, and the shortest times are compared.

    The products run on one thread and the clock is its CPU time, so other programs hardly change the result.
    """
    pairs = [_operands(torch.float32), _operands(dtype)]
    least = [float("inf"), float("inf")]
    with _one_thread(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        started, rounds = time.thread_time(), 0
        # in the first round torch builds its kernels: measure at least one more
        while rounds < 2 or (rounds < _MOST_ROUNDS and time.thread_time() - started < _SECONDS):
            for i, (x, weight) in enumerate(pairs):
                before = time.thread_time()
                F.linear(x, weight)
                least[i] = min(least[i], time.thread_time() - before)
            rounds += 1
    return least[0] / max(least[1], 1e-9)


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight = (torch.ones(rows, _FEATURES, dtype=dtype, device="cpu") for rows in (_ROWS, _FEATURES))
    return x, weight


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

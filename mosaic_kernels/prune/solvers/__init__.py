# SPDX-License-Identifier: Apache-2.0
"""Solvers: given a weight, what it sees and how much must go, choose the zeros and the new values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers.admm import SCHEDULES, admm
from mosaic_kernels.prune.solvers.scores import magnitude, wanda
from mosaic_kernels.prune.solvers.sparsegpt import sparsegpt
from mosaic_kernels.prune.solvers.target import Target
from mosaic_kernels.prune.timing import timed

__all__ = ["SOLVERS", "Solver", "Target", "choose_solver", "keep_all", "solve"]


@dataclass(frozen=True)
class Solver:
    """A solver and what it needs.

    Attributes:
        run: ``(weight fp32 [out, in], statistics, target, name) -> (weight fp32, keep bool)``.
        with_gram: needs Gram matrices, not only column norms.
        every: makes do with one token in so many, where there are plenty.
        two_streams: aims at the dense model's outputs, which then runs beside the pruned one.
    """

    run: Callable[[Tensor, InputStatistics, Target, str], tuple[Tensor, Tensor]]
    with_gram: bool
    two_streams: bool = False
    every: int = 1


_ADMM = {
    # Wanda's mask and a refit. Grams of every token cost a fifth more time and changed the example's loss by less
    # than 1 % (60 to 80 % zeros, 46 tokens per feature; November 2026).
    "fast": Solver(admm(SCHEDULES["fast"]), with_gram=True, every=2),
    "default": Solver(admm(SCHEDULES["default"]), with_gram=True, two_streams=True),
    "best": Solver(admm(SCHEDULES["best"]), with_gram=True, two_streams=True),
}

SOLVERS = {
    "admm": _ADMM["default"],
    "sparsegpt": Solver(sparsegpt, with_gram=True),
    "wanda": Solver(wanda, with_gram=False),
    "magnitude": Solver(magnitude, with_gram=False),
}


def choose_solver(name: str, quality: str) -> Solver:
    """The solver called ``name``; ``quality`` chooses among the schedules of ``admm``."""
    return _ADMM[quality] if name == "admm" else SOLVERS[name]


@timed("solve")
def solve(
    solver: Solver,
    weight: Tensor,
    statistics: InputStatistics,
    target: Target,
    name: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Prune one weight; exactly ``target.remove`` of the result are zero.

    Args:
        weight: ``[out, in]``, any floating dtype.
        statistics: of this projection's inputs.
        name: the projection, for messages.
        dtype: of the result; that of ``weight`` where it is not given.

    Raises:
        NonFiniteError: a solved weight is too large for its dtype.
    """
    dtype = weight.dtype if dtype is None else dtype
    if target.remove:
        solved, keep = solver.run(weight.float(), statistics, target, name)
        rounded = _round(solved, keep, dtype)
    else:
        rounded = keep_all(weight, dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(f"{name}: the solved weights overflow {dtype}; run with --dtype float32")
    return rounded


def keep_all(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight without zeros: those it came with would add to the zeros that are planned elsewhere."""
    return _round(weight, torch.ones_like(weight, dtype=torch.bool), weight.dtype if dtype is None else dtype)


def _round(weight: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with zeros exactly where ``keep`` is false.

    A kept value that is zero, or becomes so in ``dtype``, turns into the smallest magnitude that
    survives flushing of denormals (fp16: its smallest subnormal), so that counts stay exact.
    """
    rounded = torch.where(keep, weight, 0).to(dtype)
    smallest = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(keep & (rounded == 0), torch.full_like(rounded, smallest), rounded)

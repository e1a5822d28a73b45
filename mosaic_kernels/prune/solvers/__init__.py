# SPDX-License-Identifier: Apache-2.0
"""Solvers: given a weight, what it sees and how much must go, choose the zeros and the new values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers.scores import magnitude, wanda
from mosaic_kernels.prune.solvers.sparsegpt import sparsegpt
from mosaic_kernels.prune.solvers.target import Target

__all__ = ["SOLVERS", "Solver", "Target", "keep_all", "solve"]


@dataclass(frozen=True)
class Solver:
    """A solver and what it needs.

    Attributes:
        run: ``(weight fp32 [out, in], statistics, target, name) -> (weight fp32, keep bool)``.
        with_gram: needs Gram matrices, not only column norms.
        sequential: a stage's statistics are taken after the stages before it were pruned.
    """

    run: Callable[[Tensor, InputStatistics, Target, str], tuple[Tensor, Tensor]]
    with_gram: bool
    sequential: bool


SOLVERS = {
    "sparsegpt": Solver(sparsegpt, with_gram=True, sequential=True),
    "wanda": Solver(wanda, with_gram=False, sequential=False),
    "magnitude": Solver(magnitude, with_gram=False, sequential=False),
}


def solve(solver: Solver, weight: Tensor, statistics: InputStatistics, target: Target, name: str) -> Tensor:
    """Prune one weight; exactly ``target.remove`` of the result are zero.

    Args:
        weight: ``[out, in]``, any floating dtype; the result has the same.
        statistics: of this projection's inputs.
        name: the projection, for messages.

    Raises:
        NonFiniteError: a solved weight is too large for its dtype.
    """
    if not target.remove:
        return keep_all(weight)
    solved, keep = solver.run(weight.float(), statistics, target, name)
    rounded = _round(solved, keep, weight.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(f"{name}: the solved weights overflow {weight.dtype}; run with --dtype float32")
    return rounded


def keep_all(weight: Tensor) -> Tensor:
    """The weight without zeros: those it came with would add to the zeros that are planned elsewhere."""
    return _round(weight, torch.ones_like(weight, dtype=torch.bool), weight.dtype)


def _round(weight: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with zeros exactly where ``keep`` is false.

    A kept value that is zero, or becomes so in ``dtype``, turns into the smallest magnitude that
    survives flushing of denormals (fp16: its smallest subnormal), so that counts stay exact.
    """
    rounded = torch.where(keep, weight, 0).to(dtype)
    smallest = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(keep & (rounded == 0), torch.full_like(rounded, smallest), rounded)

# SPDX-License-Identifier: Apache-2.0
"""ADMM with a gradually tightening mask, then conjugate gradients on the mask it settles on.

Both minimise ``tr((W' - W) H (W' - W)ᵀ)`` for one weight. In the coordinates ``V = W D``, ``D = diag(H)^½``,
every input feature has the same scale, so one penalty suits all (ALPS, arXiv 2406.07831, has the schedule
of ``best``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.prune.gram import InputStatistics, damped_cholesky, jacobi_ridge
from mosaic_kernels.prune.solvers.target import Target


@dataclass(frozen=True)
class Schedule:
    """How long ADMM runs.

    Attributes:
        steps: iterations; 0 keeps the Wanda mask and only refits.
        ramp: iterations until the mask has its final count.
        penalties: rho, raised in equal parts of the run; each one takes an inverse.
        refit_steps: conjugate-gradient steps on the final mask.
    """

    steps: int
    ramp: int
    penalties: tuple[float, ...]
    refit_steps: int


SCHEDULES = {
    "fast": Schedule(steps=0, ramp=0, penalties=(), refit_steps=10),
    "default": Schedule(steps=20, ramp=15, penalties=(1.0,), refit_steps=10),
    "best": Schedule(steps=60, ramp=30, penalties=(0.3, 0.6, 1.2, 2.4, 5.0, 10.0), refit_steps=20),
}


def admm(schedule: Schedule) -> Callable[[Tensor, InputStatistics, Target, str], tuple[Tensor, Tensor]]:
    """A solver with this schedule."""

    def run(weight: Tensor, statistics: InputStatistics, target: Target, name: str) -> tuple[Tensor, Tensor]:
        gram = statistics.mean_gram
        scale = jacobi_ridge(gram).sqrt()
        hessian = gram / scale / scale.unsqueeze(1)
        hessian.diagonal().add_(statistics.damping)
        dense = weight * scale
        if schedule.steps:
            start, keep = _iterate(dense, hessian, target, schedule, name)
        else:
            keep = target.keep_best_per_row(dense.abs())  # Wanda's mask
            start = dense * keep
        return refit_on_mask(start, dense, hessian, keep, schedule.refit_steps) / scale, keep

    return run


def _iterate(dense: Tensor, hessian: Tensor, target: Target, schedule: Schedule, name: str) -> tuple[Tensor, Tensor]:
    gradient = dense @ hessian
    proposal, keep = dense.clone(), torch.ones_like(dense, dtype=torch.bool)
    each = schedule.steps // len(schedule.penalties)
    for part, penalty in enumerate(schedule.penalties):
        inverse = _inverse(hessian, penalty, name)
        for step in range(part * each + 1, (part + 1) * each + 1):
            done = min(step, schedule.ramp) / schedule.ramp
            keep = target.part(1 - (1 - done) ** 3).keep_best(proposal.abs())
            if step == each * len(schedule.penalties):
                break
            dual = proposal  # from here on: it is split in place
            proposal = (ops.admm_step(dual, keep, gradient, penalty) @ inverse).add_(dual)
    return proposal * keep, keep


def _inverse(hessian: Tensor, penalty: float, name: str) -> Tensor:
    ones = torch.ones_like(hessian[0])
    return torch.cholesky_inverse(damped_cholesky(hessian, ones, penalty, name))


def refit_on_mask(start: Tensor, dense: Tensor, hessian: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Least squares on a fixed mask by conjugate gradients, all rows at once with a step size each.

    The diagonal of ``hessian`` is constant, so no preconditioner is needed.
    """
    solution = start.clone()
    residual = ((dense - solution) @ hessian).mul_(keep)
    direction, energy = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        ops.cg_step(solution, residual, direction, energy, direction @ hessian, keep)
    return solution

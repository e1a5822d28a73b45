# SPDX-License-Identifier: Apache-2.0
"""The dense and the pruned model side by side: what a projection should make of the inputs it now gets.

The pruned projection sees inputs X̃ that the pruning before it has changed. Asking it for the dense
output, ``min ‖W X - W' X̃‖²``, is the ordinary pruning problem with another weight in the place of W;
what writes back to the residual stream can also return the drift of that stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.models import STAGES
from mosaic_kernels.prune.gram import InputStatistics, add_product, damped_cholesky, jacobi_ridge, operand
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.timing import timed
from mosaic_kernels.prune.walk import WRITES_RESIDUAL, Walk

# With 16 sequences or more some are held out, and say how far to go from the given weight to the dense output's,
# and how much of the residual stream's drift to return. These are for less than that (measured on
# examples/tiny-llama at 70 %: .5, .8 and 1 are the same, 0 is 30 % worse).
TRUST = 0.8
TRUST_FEW_TOKENS = 0.5
TOKENS_PER_FEATURE_TO_TRUST = 32
DRIFT_SHARE = 0.8


class PairStatistics(InputStatistics):
    """Statistics of a projection's inputs in the pruned model, with the dense model's beside them.

    Attributes:
        cross: sum of ``x_dense x̃ᵀ``, ``float32 [dense features, features]``.
        drift: sum of ``(h_dense - h̃) x̃ᵀ`` with h the residual stream the projection adds to,
            ``float32 [hidden, features]``; ``None`` where it adds to none.
        held_out: ``(x̃, x_dense, drift)`` of tokens that are in none of the sums; the same in every process.
    """

    def __init__(self, dense_features: int, features: int, hidden: int | None, device: torch.device) -> None:
        super().__init__(features, device, with_gram=True)
        self.cross = torch.zeros(dense_features, features, device=device)
        self.drift = None if hidden is None else torch.zeros(hidden, features, device=device)
        self.held_out: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._factor: Tensor | None = None

    @timed("gram")
    def add_pair(self, x: Tensor, dense: Tensor, drift: Tensor | None) -> None:
        """Count the same tokens of both models in."""
        self.add(x)
        rows = operand(x.flatten(0, -2))
        add_product(self.cross, dense.flatten(0, -2), rows)
        if self.drift is not None and drift is not None:
            add_product(self.drift, drift.flatten(0, -2), rows)

    def hold_out(self, x: Tensor, dense: Tensor, drift: Tensor | None) -> None:
        """Keep these tokens to judge targets by."""
        rows = None if drift is None else drift.flatten(0, -2)
        self.held_out.append((x.flatten(0, -2), dense.flatten(0, -2), rows))

    def factor(self, name: str) -> Tensor:
        """Lower Cholesky factor of the damped mean Gram, made once for all projections of a stage."""
        if self._factor is None:
            gram = self.mean_gram
            self._factor = damped_cholesky(gram, jacobi_ridge(gram), self.damping, name)
        return self._factor

    def _running_sums(self) -> list[Tensor]:
        both = [self.cross] if self.drift is None else [self.cross, self.drift]
        return super()._running_sums() + both

    def finish(self, name: str, team: Team = ALONE) -> PairStatistics:
        """Check the sums of both models; see :meth:`InputStatistics.finish`."""
        super().finish(name, team)
        judging = (part for held in self.held_out for part in held)
        finite = [torch.isfinite(x).all() for x in (self.cross, self.drift, *judging) if x is not None]
        if not bool(torch.stack(finite).all()):
            raise NonFiniteError(
                f"the dense model's activations at {name} are NaN or infinite: it overflows on this text; "
                "check its weights, or run with --dtype float32"
            )
        return self


@torch.no_grad()
def collect_pair(walk: Walk, beside: Walk, stage: int, team: Team = ALONE) -> PairStatistics:
    """Statistics of one stage's input in the pruned model and, beside it, in the dense one, from all processes.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    name = STAGES[stage][0]
    layer, other = walk.block.projection(name), beside.block.projection(name)
    hidden = layer.out_features if stage in WRITES_RESIDUAL else None
    found = PairStatistics(other.in_features, layer.in_features, hidden, layer.weight.device)
    for index, batch in enumerate(walk.batches):
        x, dense = walk.input(stage, index), beside.input(stage, index)
        drift = None if hidden is None else beside.residual[index].float() - walk.residual[index].float()
        if batch.held_out:
            found.hold_out(x, dense, drift)
        else:
            found.add_pair(x, dense, drift)
    return found.finish(walk.block.full_name(name), team)


@timed("solve")
def dense_target(weight: Tensor, base: Tensor, found: PairStatistics, name: str) -> Tensor:
    """The weight that would make the dense output of the pruned model's inputs, in least squares.

    Args:
        weight: the dense projection, ``[out, dense features]`` fp32.
        base: what stands there now, ``[out, features]`` fp32: the dense weight, or its refit on fewer features.
        found: statistics of this projection's inputs.

    Returns:
        ``[out, features]`` fp32.
    """
    tokens = max(1, found.tokens)
    factor, ridge = found.factor(name), jacobi_ridge(found.mean_gram)
    wanted = weight @ (found.cross / tokens) + found.damping * base * ridge
    steps = [torch.cholesky_solve(wanted.T, factor).T - base]
    if found.drift is not None:
        steps.append(torch.cholesky_solve((found.drift / tokens).T, factor).T)
    target = base.clone()
    for share, step in zip(_shares(weight, base, steps, found), steps, strict=True):
        target += share * step
    return target


def _shares(weight: Tensor, base: Tensor, steps: list[Tensor], found: PairStatistics) -> list[float]:
    """How far to go along each step: what comes nearest to the dense output on held-out tokens, in [0, 1].

    What does not help there is not taken at all, so a target that only fits noise cannot do harm.
    """
    if not found.held_out:
        enough = found.tokens >= TOKENS_PER_FEATURE_TO_TRUST * base.shape[1]
        return [TRUST if enough else TRUST_FEW_TOKENS, DRIFT_SHARE][: len(steps)]
    normal = torch.zeros(len(steps), len(steps), dtype=torch.float64, device=base.device)
    aim = torch.zeros(len(steps), dtype=torch.float64, device=base.device)
    for x, dense, drift in found.held_out:
        missing = dense.float() @ weight.T - x.float() @ base.T
        if drift is not None:
            missing += drift
        moves = [x.float() @ step.T for step in steps]
        for i, move in enumerate(moves):
            aim[i] += (move * missing).sum(dtype=torch.float64)
            for j, other in enumerate(moves):
                normal[i, j] += (move * other).sum(dtype=torch.float64)
    normal, aim = normal.cpu(), aim.cpu()  # six numbers at most
    shares = torch.zeros_like(aim)
    for _ in range(50):  # at most two unknowns in a box: coordinate descent settles at once
        for i in range(len(steps)):
            rest = aim[i] - normal[i] @ shares + normal[i, i] * shares[i]
            shares[i] = (rest / normal[i, i].clamp_min(1e-300)).clamp(0, 1)
    return [float(share) for share in shares]

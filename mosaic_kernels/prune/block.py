# SPDX-License-Identifier: Apache-2.0
"""Pruning one decoder block: units first, with refit, then zeros in what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaic_kernels.models import STAGES, Block
from mosaic_kernels.prune.capture import Batch, collect
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.pair import PairStatistics, collect_pair, dense_target
from mosaic_kernels.prune.solvers import Solver, Target, keep_all, solve
from mosaic_kernels.prune.structured import Units, remove_channels, remove_groups

_QKV, _O, _GATE_UP, _DOWN = range(4)


def prune_block(
    block: Block,
    batches: Sequence[Batch],
    solver: Solver,
    units: Units,
    zeros: dict[str, int],
    group: tuple[int, int] | None,
    dense: Block | None = None,
) -> None:
    """Prune ``block`` in place.

    Args:
        batches: the block's inputs, from the pruned blocks before it.
        units: heads and channels to remove.
        zeros: weights to set to zero, by the projection's full name.
        group: ``(n, m)`` of an N:M pattern.
        dense: an untouched copy of the block, where the solver aims at its outputs.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    targets = {name: Target(zeros[block.full_name(name)], group) for stage in STAGES for name in stage}
    _Work(block, batches, solver, targets, dense).run(units)
    if any(zeros.values()):  # in a model that gets zeros, only the planned ones may be there
        _keep_all(block, [name for name, target in targets.items() if not target.remove])


class _Work:
    """One block on its way from dense to pruned."""

    def __init__(
        self,
        block: Block,
        batches: Sequence[Batch],
        solver: Solver,
        targets: dict[str, Target],
        dense: Block | None,
    ) -> None:
        self.block, self.batches, self.solver, self.targets, self.dense = block, batches, solver, targets, dense
        self.rows: dict[str, Tensor] = {}  # which rows of the dense weight a narrowed projection still has

    def run(self, units: Units) -> None:
        if units.groups:
            found, weight = self._consumer(_O)
            self.rows |= remove_groups(self.block, found, units.groups, weight)
        if self.solver.sequential:
            self._solve_in_order((_QKV, _O))
        if units.channels:
            found, weight = self._consumer(_DOWN)
            self.rows |= remove_channels(self.block, found, units.channels, weight)
        if self.solver.sequential:
            self._solve_in_order((_GATE_UP, _DOWN))
        elif any(target.remove for target in self.targets.values()):
            stages = range(len(STAGES))
            found_all = collect(self.block, self.batches, stages, with_gram=self.solver.with_gram)
            for stage, statistics in found_all.items():
                self._solve_stage(stage, statistics)

    def _consumer(self, stage: int) -> tuple[InputStatistics, Tensor | None]:
        """Statistics of a stage that takes units in, and the weight whose outputs it should make if not its own."""
        if self.dense is None:
            return collect(self.block, self.batches, [stage], with_gram=True)[stage], None
        found = collect_pair(self.block, self.dense, self.batches, stage)
        return found, self._wanted(STAGES[stage][0], found)

    def _solve_in_order(self, stages: tuple[int, ...]) -> None:
        """Each stage sees the inputs that the pruned stages before it make."""
        for stage in stages:
            if self.dense is not None:
                self._solve_stage(stage, collect_pair(self.block, self.dense, self.batches, stage))
            elif any(self.targets[name].remove for name in STAGES[stage]):
                found = collect(self.block, self.batches, [stage], with_gram=self.solver.with_gram)
                self._solve_stage(stage, found[stage])

    @torch.no_grad()
    def _solve_stage(self, stage: int, statistics: InputStatistics) -> None:
        for name in STAGES[stage]:
            weight = self.block.projection(name).weight
            wanted = self._wanted(name, statistics)
            full_name = self.block.full_name(name)
            weight.copy_(solve(self.solver, wanted, statistics, self.targets[name], full_name, weight.dtype))

    def _wanted(self, name: str, statistics: InputStatistics) -> Tensor:
        """The weight to come close to: what stands there, or what would make the dense model's output."""
        base = self.block.projection(name).weight.detach().float()
        if self.dense is None or not isinstance(statistics, PairStatistics):
            return base
        weight = self.dense.projection(name).weight.detach().float()
        if name in self.rows:
            weight = weight[self.rows[name]]
        return dense_target(weight, base, statistics, self.block.full_name(name))


@torch.no_grad()
def _keep_all(block: Block, names: Sequence[str]) -> None:
    for name in names:
        weight = block.projection(name).weight
        weight.copy_(keep_all(weight.detach()))

# SPDX-License-Identifier: Apache-2.0
"""Pruning one decoder block: units first, with refit, then zeros in what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.models import STAGES, Block
from mosaic_kernels.prune.capture import Batch, collect
from mosaic_kernels.prune.gram import InputStatistics
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
) -> None:
    """Prune ``block`` in place.

    Args:
        batches: the block's inputs, from the pruned blocks before it.
        units: heads and channels to remove.
        zeros: weights to set to zero, by the projection's full name.
        group: ``(n, m)`` of an N:M pattern.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    targets = {name: Target(zeros[block.full_name(name)], group) for stage in STAGES for name in stage}
    if units.groups:
        remove_groups(block, collect(block, batches, [_O], with_gram=True)[_O], units.groups)
    if solver.sequential:
        _solve_in_order(block, batches, solver, targets, (_QKV, _O))
    if units.channels:
        remove_channels(block, collect(block, batches, [_DOWN], with_gram=True)[_DOWN], units.channels)
    if solver.sequential:
        _solve_in_order(block, batches, solver, targets, (_GATE_UP, _DOWN))
    elif any(target.remove for target in targets.values()):
        found = collect(block, batches, range(len(STAGES)), with_gram=solver.with_gram)
        for stage, statistics in found.items():
            _solve_stage(block, stage, statistics, solver, targets)
    if any(zeros.values()):
        _keep_all(block, [name for name, target in targets.items() if not target.remove])


def _solve_in_order(
    block: Block, batches: Sequence[Batch], solver: Solver, targets: dict[str, Target], stages: tuple[int, ...]
) -> None:
    """Each stage sees the inputs that the pruned stages before it make."""
    for stage in stages:
        if any(targets[name].remove for name in STAGES[stage]):
            statistics = collect(block, batches, [stage], with_gram=solver.with_gram)[stage]
            _solve_stage(block, stage, statistics, solver, targets)


@torch.no_grad()
def _solve_stage(
    block: Block, stage: int, statistics: InputStatistics, solver: Solver, targets: dict[str, Target]
) -> None:
    for name in STAGES[stage]:
        weight = block.projection(name).weight
        weight.copy_(solve(solver, weight.detach(), statistics, targets[name], block.full_name(name)))


@torch.no_grad()
def _keep_all(block: Block, names: Sequence[str]) -> None:
    for name in names:
        weight = block.projection(name).weight
        weight.copy_(keep_all(weight.detach()))

# SPDX-License-Identifier: Apache-2.0
"""Pruning one decoder block: units first, with refit, then zeros in what is left.

All of it happens on the model's device. There, beside the model, are at most: the hidden states of this process's
calibration sequences, twice (before and after the block), and twice again where the dense model runs beside it, with a
copy of the block; the kept inputs of one stage (:data:`~mosaic_kernels.prune.walk.KEPT_BYTES`); one stage's
statistics, which are a Gram of fp32 ``[features, features]`` and beside the dense model a second one; and one solve,
which holds about three more such matrices and four fp32 copies of its weight. Nothing grows with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mosaic_kernels.errors import MosaicError
from mosaic_kernels.models import PROJECTIONS, STAGES, Block
from mosaic_kernels.prune.capture import Batch
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.pair import PairStatistics, collect_pair, dense_target
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.reconstruct import reconstruct
from mosaic_kernels.prune.solvers import Solver, Target, keep_all, solve
from mosaic_kernels.prune.structured import like, remove_channels, remove_groups
from mosaic_kernels.prune.units import Units
from mosaic_kernels.prune.walk import ATTENTION_OUT, FFN_OUT, Walk, collect


def prune_block(
    block: Block,
    batches: Sequence[Batch],
    solver: Solver,
    units: Units,
    zeros: dict[str, int],
    group: tuple[int, int] | None,
    dense: Block | None = None,
    *,
    per_row: bool = False,
    recover: bool = False,
    team: Team = ALONE,
) -> list[Batch]:
    """Prune ``block`` in place and take the batches through it.

    Each stage sees the inputs that the pruned stages before it make.

    Args:
        batches: the block's inputs, from the pruned blocks before it.
        units: heads and channels to remove.
        zeros: weights to set to zero, by the projection's full name.
        group: ``(n, m)`` of an N:M pattern.
        per_row: every row of a projection loses equally many.
        dense: an untouched copy of the block, for solvers that aim at its outputs, and for recovery.
        recover: tune the kept weights of each half by gradient descent; needs ``dense``.
        team: the processes that prune this block together, each with batches of its own.

    Returns:
        The batches after the pruned block, their dense side after ``dense``.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
        MosaicError: the dense model's side is missing where it is needed.
    """
    if recover and dense is None:
        raise MosaicError("reconstruction needs the dense block beside the pruned one but none was given")
    targets = {name: Target(zeros[block.full_name(name)], group, per_row) for stage in STAGES for name in stage}
    work = _Work(block, batches, solver, targets, dense, exact=any(zeros.values()), recover=recover, team=team)
    return work.run(units)


def share_block(block: Block, team: Team) -> None:
    """Make the projections of ``block`` those of the first process, shapes included."""
    if team.world == 1:
        return
    shapes = team.from_first(lambda: {name: tuple(block.projection(name).weight.shape) for name in PROJECTIONS})
    for name, (rows, columns) in shapes.items():
        old = block.projection(name)
        if old.weight.shape != (rows, columns):
            bias = None if old.bias is None else old.bias.new_empty(rows)
            block.replace(name, like(old, old.weight.new_empty(rows, columns), bias))
    block.refresh_heads()
    layers = [block.projection(name) for name in PROJECTIONS]
    team.send_([tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None])


class _Work:
    """One block on its way from dense to pruned."""

    def __init__(
        self,
        block: Block,
        batches: Sequence[Batch],
        solver: Solver,
        targets: dict[str, Target],
        dense: Block | None,
        *,
        exact: bool,
        recover: bool,
        team: Team,
    ) -> None:
        self.block, self.batches, self.solver, self.targets, self.dense = block, batches, solver, targets, dense
        self.recover, self.team = recover, team
        self.aims = dense is not None and solver.two_streams  # at the dense outputs, not only beside them
        self.exact = exact  # in a model that gets zeros, only the planned ones may be there
        self.rows: dict[str, Tensor] = {}  # which rows of the dense weight a narrowed projection still has
        self.walk = Walk(block, batches, [batch.hidden for batch in batches])
        self.beside = None if dense is None else Walk(dense, batches, [_dense_side(batch) for batch in batches])

    def run(self, units: Units) -> list[Batch]:
        if units.groups:
            found, wanted = self._consumer(ATTENTION_OUT)
            self._agree(remove_groups(self.block, found, units.groups, wanted))
        self._solve_half(0, ATTENTION_OUT)
        if units.channels:
            found, wanted = self._consumer(FFN_OUT)
            self._agree(remove_channels(self.block, found, units.channels, wanted))
        self._solve_half(2, FFN_OUT)
        dense = [None] * len(self.batches) if self.beside is None else self.beside.residual
        return [
            replace(batch, hidden=hidden, dense=beside)
            for batch, hidden, beside in zip(self.batches, self.walk.residual, dense, strict=True)
        ]

    def _agree(self, rows: dict[str, Tensor]) -> None:
        """Take note of the rows that are left; every process has found them, and the first one's count."""
        self.team.send_(list(rows.values()))
        share_block(self.block, self.team)
        self.rows |= rows

    def _consumer(self, stage: int) -> tuple[InputStatistics, Tensor]:
        """Statistics of a stage that takes units in, and the weight whose outputs it should make."""
        found = self._collect(stage, with_gram=True)
        self.walk.forget()
        return found, self._wanted(STAGES[stage][0], found)

    def _solve_half(self, first: int, last: int) -> None:
        for stage in (first, last):
            if self.aims or any(self.targets[name].remove for name in STAGES[stage]):
                self._solve_stage(stage, self._collect(stage, with_gram=self.solver.with_gram))
            elif self.exact:
                self._keep_all(stage)
        if self.recover and self.beside is not None:
            changed = reconstruct(self.walk, self.beside, last)
            share_block(self.block, self.team)  # each process has tuned for itself, and rounding may differ
            if changed or self.team.world > 1:
                self.walk.forget()
        self.walk.add(last)
        if self.beside is not None:
            self.beside.add(last)

    def _collect(self, stage: int, *, with_gram: bool) -> InputStatistics:
        if self.aims and self.beside is not None:
            return collect_pair(self.walk, self.beside, stage, self.team)
        return collect(self.walk, stage, with_gram=with_gram, every=self.solver.every, team=self.team)

    @torch.no_grad()
    def _solve_stage(self, stage: int, statistics: InputStatistics) -> None:
        weights = {name: self.block.projection(name).weight for name in STAGES[stage]}
        owners = self.team.deal({name: weight.numel() for name, weight in weights.items()})

        def solve_mine() -> None:
            for name, weight in weights.items():
                if owners[name] == self.team.rank:
                    wanted, full_name = self._wanted(name, statistics), self.block.full_name(name)
                    stored = self.block.stored_dtype(name)
                    weight.copy_(solve(self.solver, wanted, statistics, self.targets[name], full_name, stored))

        self.team.gather(solve_mine)
        for name, weight in weights.items():
            self.team.send_([weight], owners[name])

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
    def _keep_all(self, stage: int) -> None:
        for name in STAGES[stage]:
            weight = self.block.projection(name).weight
            weight.copy_(keep_all(weight.detach(), self.block.stored_dtype(name)))


def _dense_side(batch: Batch) -> Tensor:
    if batch.dense is None:
        raise MosaicError("the dense model's activations are needed beside the pruned one's but were not kept")
    return batch.dense

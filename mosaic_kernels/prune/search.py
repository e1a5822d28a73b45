# SPDX-License-Identifier: Apache-2.0
"""Policy ``curve+search``: swaps of zeros between projections, judged by the predictions of the whole model.

Evolution with one survivor: each generation makes offspring of the best plan by moving equal counts of zeros
from some projections to others, tries all on a few tokens, the better ones on more, and keeps the best of
them and their parent (the scheme of EvoPress, arXiv 2410.14649).
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosaic_kernels.models import STAGES, ModelAdapter
from mosaic_kernels.progress import station
from mosaic_kernels.prune.allocate import MOST_SPARSE
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, collect_and_advance, embed, predictions
from mosaic_kernels.prune.composite import Plan
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.sensitivity import GRAM_TOKENS, divergence
from mosaic_kernels.prune.solvers import Target, choose_solver, keep_all, solve
from mosaic_kernels.prune.timing import timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evolution:
    """How long to search.

    Attributes:
        generations: rounds.
        offspring: plans tried in each.
        rounds: (tokens, survivors) of the trials of one generation; the parent competes in the last.
        step: zeros moved at once, as a share of the smaller projection.
        swaps: moves in one offspring, at most.
    """

    generations: int = 25
    offspring: int = 16
    rounds: tuple[tuple[int, int], ...] = ((512, 4), (2048, 2), (8192, 1))
    step: float = 0.03
    swaps: int = 3


@timed("probe")
def search(adapter: ModelAdapter, plan: Plan, tokens: Tensor, seed: int, evolution: Evolution | None = None) -> Plan:
    """The plan with its zeros spread better; every count of units and the sum of the zeros stay.

    Works on a copy of the model; every projection is solved for each count that is tried, by the quickest
    solver on the dense model's Grams, and remembered for one generation. Memory: that copy, its dense weights,
    the Grams of all blocks (22 GB for 7B), and the weights solved in one generation.

    Args:
        tokens: ``int64 [sequences, seqlen]``; the last ones judge where there are enough.
        seed: of the moves.
    """
    evolution = Evolution() if evolution is None else evolution
    pool = _Pool(adapter, plan, tokens)
    sizes = {name: rows * columns for name, (rows, columns) in plan.shapes.items()}
    judges = [pool.judge(wanted) for wanted, _ in evolution.rounds]
    dice = random.Random(seed)
    best = plan.zeros
    first = cost = judges[-1](best)
    with station("search", evolution.generations, "generation", numbered=True) as here:
        for _ in range(evolution.generations):
            rivals = [_mutated(best, sizes, evolution, dice) for _ in range(evolution.offspring)]
            for judge, (_, survivors) in zip(judges, evolution.rounds, strict=True):
                marked = sorted(((judge(zeros), i) for i, zeros in enumerate(rivals)))[:survivors]
                rivals = [rivals[i] for _, i in marked]
            if marked[0][0] < cost:
                best, cost = rivals[0], marked[0][0]
            pool.forget(best)
            here.advance()
    logger.info("search: divergence %.4f -> %.4f nats", first, cost)
    return replace(plan, zeros=best)


def _mutated(zeros: dict[str, int], sizes: dict[str, int], evolution: Evolution, dice: random.Random) -> dict[str, int]:
    """A copy in which some projections have given zeros to others, as many as these have taken."""
    changed, names = dict(zeros), list(zeros)
    for _ in range(dice.randint(1, evolution.swaps)):
        giver, taker = dice.sample(names, 2)
        moved = max(1, round(evolution.step * min(sizes[giver], sizes[taker])))
        moved = min(moved, changed[giver], int(MOST_SPARSE * sizes[taker]) - changed[taker])
        if moved > 0:
            changed[giver] -= moved
            changed[taker] += moved
    return changed


class _Judge:
    """Divergence of plans on some sequences."""

    def __init__(self, pool: _Pool, tokens: Tensor) -> None:
        self.pool = pool
        self.batches = embed(pool.adapter, tokens)
        self.dense = predictions(pool.adapter, pool.adapter.blocks, self.batches)

    def __call__(self, zeros: dict[str, int]) -> float:
        self.pool.install(zeros)
        return divergence(predictions(self.pool.adapter, self.pool.blocks, self.batches), self.dense)


class _Pool:
    """A copy of the model with its units removed, whose projections take any count of zeros."""

    def __init__(self, adapter: ModelAdapter, plan: Plan, tokens: Tensor) -> None:
        self.adapter, self.solver = adapter, choose_solver("admm", "fast")
        solving = max(1, min(GRAM_TOKENS // tokens.shape[1], len(tokens) // 2))
        self.judging = tokens[solving:] if len(tokens) > solving else tokens
        batches: list[Batch] = embed(adapter, tokens[:solving])
        blocks = []
        self.statistics: dict[str, InputStatistics] = {}
        with station("search, inputs of block", len(adapter.blocks), "block", numbered=True) as here:
            for block, units in zip(adapter.blocks, plan.units, strict=True):
                twin = block.copy()
                prune_block(twin, batches, self.solver, units, dict.fromkeys(plan.zeros, 0), None)
                found, batches = collect_and_advance(twin, batches, with_gram=True)
                self.statistics |= {block.full_name(name): found[stage] for stage in found for name in STAGES[stage]}
                blocks.append(twin)
                here.advance()
        self.blocks = tuple(blocks)
        self.places = {
            block.full_name(name): block.projection(name) for block in blocks for names in STAGES for name in names
        }
        self.stored = {block.full_name(name): block.stored_dtype(name) for block, name, _ in adapter.projections()}
        self.whole = {name: layer.weight.detach().clone() for name, layer in self.places.items()}
        self.solved: dict[tuple[str, int], Tensor] = {}
        self.installed: dict[str, int] = {}

    def judge(self, tokens: int) -> _Judge:
        """A judge on about so many tokens: whole sequences, or the start of one."""
        sequences = tokens // self.judging.shape[1]
        return _Judge(self, self.judging[:sequences] if sequences else self.judging[:1, :tokens])

    def forget(self, zeros: dict[str, int]) -> None:
        """Drop the solved weights of all other plans: kept, they would be many times the model."""
        self.solved = {key: weight for key, weight in self.solved.items() if zeros[key[0]] == key[1]}

    @torch.no_grad()
    def install(self, zeros: dict[str, int]) -> None:
        """Put weights with these zeros in place."""
        for name, count in zeros.items():
            if self.installed.get(name) != count:
                self.places[name].weight.copy_(self._weight(name, count))
                self.installed[name] = count

    def _weight(self, name: str, count: int) -> Tensor:
        if (name, count) not in self.solved:
            whole, stored = self.whole[name], self.stored[name]
            self.solved[name, count] = (
                solve(self.solver, whole, self.statistics[name], Target(count), name, stored)
                if count
                else keep_all(whole, stored)
            )
        return self.solved[name, count]

# SPDX-License-Identifier: Apache-2.0
"""What pruning costs: errors at several sparsities, and the KL divergence of the model's predictions.

Outlier counts say nothing of how much the *model* suffers. A few cheap solves give each projection's error
curve; pruning one half of a block at a time (``best``: one projection) and measuring how the predictions of
the whole model change says what that error is worth. The same for heads and channels, level by level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.models import PROJECTIONS, STAGES, Block, ModelAdapter
from mosaic_kernels.progress import Station, station
from mosaic_kernels.prune.capture import Batch, advance, collect_and_advance, embed, predictions
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.solvers import Solver, Target, solve
from mosaic_kernels.prune.structured import refit, sweep
from mosaic_kernels.prune.timing import timed

CURVE_SPARSITIES = (0.5, 0.7, 0.9)
PROBE_SPARSITY = 0.7  # one of those above; probes made there serve .5 to .8
GRAM_TOKENS = 8192
PROBE_TOKENS = 4096
HALVES = ((0, 1), (2, 3))  # stages of attention, stages of the FFN
GROUP_LEVELS = (0.25, 0.5, 0.75, 1.0)  # of the KV groups that can go: all but one
CHANNEL_LEVELS = (0.15, 0.3, 0.5, 0.7, 0.9, 1.0)  # the same


@dataclass(frozen=True)
class Curve:
    """Relative output error of a projection, ``scale * s^rise * (1 - s)^fall`` at sparsity s.

    Fits within a few percent between 0.3 and 0.9 (three points, three constants).
    """

    scale: float
    rise: float
    fall: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The curve through three (sparsity, error) points."""
        rows = torch.tensor([[1.0, math.log(s), math.log1p(-s)] for s, _ in points], dtype=torch.float64)
        logs = torch.tensor([math.log(max(e, 1e-12)) for _, e in points], dtype=torch.float64)
        a, b, c = torch.linalg.solve(rows, logs).tolist()
        return cls(math.exp(a), b, c)

    def __call__(self, sparsity: float) -> float:
        if sparsity <= 0:
            return 0.0
        s = min(sparsity, 0.999)
        return float(self.scale * s**self.rise * (1 - s) ** self.fall)


@dataclass(frozen=True)
class RemovalCost:
    """KL divergence by the number of units a half block loses, linear between the points that are known.

    Attributes:
        removed: units, rising from 0.
        costs: nats per token, with all else dense.
    """

    removed: tuple[int, ...]
    costs: tuple[float, ...]

    def __call__(self, count: int) -> float:
        return float(np.interp(count, self.removed, self.costs))


@dataclass(frozen=True)
class Sensitivity:
    """What allocation by curves needs; kept in ``ranks.json``.

    Attributes:
        curves: full projection name -> error curve; empty where no run has needed zeros yet.
        weights: full projection name -> KL per unit of relative error.
        per_projection: each projection was probed alone, not pooled with its half of the block.
        removal: block prefix -> costs of losing KV groups and FFN channels; empty where not needed yet.
    """

    curves: dict[str, Curve]
    weights: dict[str, float]
    per_projection: bool
    removal: dict[str, tuple[RemovalCost, RemovalCost]]

    def to_json(self) -> dict[str, Any]:
        """For ``ranks.json``."""
        return {
            "curves": {name: [curve.scale, curve.rise, curve.fall] for name, curve in self.curves.items()},
            "weights": self.weights,
            "per_projection": self.per_projection,
            "removal": {
                prefix: [{"removed": cost.removed, "costs": cost.costs} for cost in halves]
                for prefix, halves in self.removal.items()
            },
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Sensitivity:
        """Inverse of :meth:`to_json`."""
        curves = {str(name): Curve(*map(float, constants)) for name, constants in body["curves"].items()}
        weights = {name: float(body["weights"][name]) for name in curves}
        removal = {}
        for prefix, halves in body.get("removal", {}).items():
            groups, channels = (
                RemovalCost(tuple(map(int, half["removed"])), tuple(map(float, half["costs"]))) for half in halves
            )
            removal[str(prefix)] = (groups, channels)
        numbers = [*weights.values(), *(cost for halves in removal.values() for half in halves for cost in half.costs)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("a cost is not a finite number from 0 on")
        return cls(curves, weights, bool(body.get("per_projection", False)), removal)


@torch.no_grad()
def measure(
    adapter: ModelAdapter,
    tokens: Tensor,
    solver: Solver,
    *,
    zeros: bool,
    units: bool,
    per_projection: bool = False,
    known: Sensitivity | None = None,
    team: Team = ALONE,
) -> Sensitivity:
    """Measure curves and probes on a dense model; the model is unchanged afterwards.

    Args:
        tokens: ``int64 [sequences, seqlen]``; the Grams use the first ``GRAM_TOKENS``, the probes ``PROBE_TOKENS``.
        solver: a quick one; the order of the errors hardly depends on it.
        zeros: measure error curves and what they are worth.
        units: measure the cost of losing heads and channels.
        per_projection: probe each projection alone.
        known: what was measured before, which is kept where it is not measured now.
        team: the processes among which the blocks are dealt out; all find the same, whatever their number.
    """
    before = known or Sensitivity({}, {}, False, {})
    found = Sensitivity(
        dict(before.curves),
        dict(before.weights),
        per_projection if zeros else before.per_projection,
        dict(before.removal),
    )

    def probe_mine(here: Station) -> Sensitivity:
        batches = embed(adapter, tokens[: max(1, GRAM_TOKENS // tokens.shape[1])])
        probe = _Probe(adapter, embed(adapter, tokens[: max(1, PROBE_TOKENS // tokens.shape[1])]))
        for block in adapter.blocks:
            if block.index % team.world == team.rank:
                statistics, batches = collect_and_advance(block, batches, with_gram=True)
                if zeros:
                    for part in _together(per_projection):
                        _probe_zeros(probe, block, part, statistics, solver, found)
                        here.advance()
                if units:
                    groups = _probe_groups(probe, block, statistics[1])
                    here.advance()
                    channels = _probe_channels(probe, block, statistics[3])
                    here.advance()
                    found.removal[block.prefix] = groups, channels
            else:
                batches = advance(block, batches)
                here.advance(each)
            probe.advance(block)
        return found

    each = zeros * len(_together(per_projection)) + units * 2
    with station("probe", each * len(adapter.blocks), "probe", numbered=True) as here:
        return _merged(adapter, team.gather(lambda: probe_mine(here)))


def _together(per_projection: bool) -> list[list[tuple[int, str]]]:
    """Which projections, with their stages, are pruned in one probe."""
    halves = [[(stage, name) for stage in stages for name in STAGES[stage]] for stages in HALVES]
    return [[one] for names in halves for one in names] if per_projection else halves


def _merged(adapter: ModelAdapter, parts: Sequence[Sensitivity]) -> Sensitivity:
    """What the processes have found, each in its own blocks, in the order of the model."""
    merged = Sensitivity({}, {}, parts[0].per_projection, {})
    for block in adapter.blocks:
        theirs = parts[block.index % len(parts)]
        for name in map(block.full_name, PROJECTIONS):
            if name in theirs.curves:
                merged.curves[name], merged.weights[name] = theirs.curves[name], theirs.weights[name]
        if block.prefix in theirs.removal:
            merged.removal[block.prefix] = theirs.removal[block.prefix]
    return merged


class _Probe:
    """Some tokens before a block, and what the dense model predicts for them."""

    def __init__(self, adapter: ModelAdapter, batches: list[Batch]) -> None:
        self.adapter, self.batches = adapter, batches
        self.dense = predictions(adapter, adapter.blocks, batches)

    @timed("probe")
    def advance(self, block: Block) -> None:
        self.batches = advance(block, self.batches)

    @timed("probe")
    def divergence(self, block: Block, weights: Mapping[str, Tensor]) -> float:
        """KL(dense ‖ probed) per token in nats, with these weights in the place of the block's own."""
        before = {name: block.projection(name).weight.detach().clone() for name in weights}
        try:
            for name, weight in weights.items():
                block.projection(name).weight.copy_(weight)
            rest = self.adapter.blocks[block.index :]
            return divergence(predictions(self.adapter, rest, self.batches), self.dense)
        finally:
            for name, weight in before.items():
                block.projection(name).weight.copy_(weight)


def _probe_zeros(
    probe: _Probe,
    block: Block,
    part: Sequence[tuple[int, str]],
    statistics: Mapping[int, InputStatistics],
    solver: Solver,
    found: Sensitivity,
) -> None:
    """Curves of these projections, and what a unit of relative error in them costs; relative errors are pooled."""
    pruned, errors = {}, []
    for stage, name in part:
        full_name = block.full_name(name)
        weight, stored = block.projection(name).weight.detach(), block.stored_dtype(name)
        found.curves[full_name], error, pruned[name] = _curve(weight, stored, statistics[stage], solver, full_name)
        errors.append(error)
    worth = probe.divergence(block, pruned) / max(sum(errors), 1e-12)
    for _, name in part:
        found.weights[block.full_name(name)] = worth


def _probe_groups(probe: _Probe, block: Block, statistics: InputStatistics) -> RemovalCost:
    most = block.key_value_heads - 1
    width = block.query_heads // block.key_value_heads * block.head_dim
    return _removal(probe, block, "self_attn.o_proj", statistics, width, _levels(GROUP_LEVELS, most))


def _probe_channels(probe: _Probe, block: Block, statistics: InputStatistics) -> RemovalCost:
    return _removal(probe, block, "mlp.down_proj", statistics, 1, _levels(CHANNEL_LEVELS, block.channels - 1))


def _levels(shares: Sequence[float], most: int) -> list[int]:
    return sorted({round(share * most) for share in shares} - {0})


def _removal(
    probe: _Probe, block: Block, consumer: str, statistics: InputStatistics, unit: int, levels: list[int]
) -> RemovalCost:
    """One sweep gives the loss at every level; probes of some of them say what it costs the model.

    Between two probes the logarithm of the cost goes linearly with that of the loss; before the first the
    cost is in proportion to it.
    """
    if not levels:
        return RemovalCost((0,), (0.0,))
    layer, name, gram = block.projection(consumer), block.full_name(consumer), statistics.mean_gram
    weight = layer.weight.detach().float()
    swept = sweep(weight, gram, unit, levels, name)
    costs = []
    for level in levels:
        features = swept.kept[level].repeat_interleave(unit)
        narrowed = torch.zeros_like(weight)
        narrowed[:, features] = refit(weight, gram, features, name)
        costs.append(max(probe.divergence(block, {consumer: block.rounded(consumer, narrowed)}), 1e-12))
    costs = [max(costs[: i + 1]) for i in range(len(costs))]  # noise must not make removing more look cheaper
    losses = np.maximum(swept.losses, 1e-30)
    at = [losses[swept.removed.index(level)] for level in levels]
    between = np.exp(np.interp(np.log(losses), np.log(at), np.log(costs)))
    before = costs[0] * losses / at[0]
    known = np.where(losses < at[0], before, between)
    return RemovalCost((0, *swept.removed), (0.0, *map(float, known)))


def _curve(
    weight: Tensor, stored: torch.dtype, statistics: InputStatistics, solver: Solver, name: str
) -> tuple[Curve, float, Tensor]:
    """Error curve of one projection; its error at ``PROBE_SPARSITY``, and the weight pruned to it."""
    gram, size = statistics.mean_gram, weight.numel()
    dense = weight.float()
    energy = float(((dense @ gram) * dense).sum().clamp_min(1e-30))
    points, probed = [], (0.0, weight)
    for sparsity in CURVE_SPARSITIES:
        pruned = solve(solver, dense, statistics, Target(round(sparsity * size)), name, stored)
        change = pruned.float() - dense
        error = float(((change @ gram) * change).sum()) / energy
        points.append((sparsity, error))
        if sparsity == PROBE_SPARSITY:
            probed = (error, pruned)
    return Curve.through(points), *probed


def divergence(logits: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """Mean KL(dense ‖ pruned) per token, nats.

    Args:
        logits: of the pruned model, ``[sequences, seqlen, vocabulary]`` per batch.
        dense: of the dense one.
    """
    sums, tokens = [], 0
    for ours, theirs in zip(logits, dense, strict=True):
        for a, b in zip(ours, theirs, strict=True):  # a sequence at a time: fp32 logits are large
            log_p, log_q = F.log_softmax(b.float(), -1), F.log_softmax(a.float(), -1)
            sums.append((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            tokens += a.shape[0]
    return sum(torch.stack(sums).tolist()) / tokens if sums else 0.0

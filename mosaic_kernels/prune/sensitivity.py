# SPDX-License-Identifier: Apache-2.0
"""What pruning a projection costs: its error at several sparsities, and the model's KL when it is pruned.

Outlier counts say nothing of how much the *model* suffers. A few cheap solves give each projection's error
curve; pruning one half of a block at a time and measuring the KL divergence of the model's
predictions says what that error is worth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mosaic_kernels.models import STAGES, ModelAdapter
from mosaic_kernels.prune.capture import Batch, advance, collect_and_advance, embed, predict
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers import Solver, Target, solve

CURVE_SPARSITIES = (0.5, 0.7, 0.9)
PROBE_TOKENS = 8192
GRAM_TOKENS = 32768
PROBE_RANGE = (0.3, 0.9)  # where a pruned half is neither noise nor ruin
HALVES = {"attention": (0, 1), "ffn": (2, 3)}


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
class Sensitivity:
    """What allocation by curves needs; kept in ``ranks.json``.

    Attributes:
        curves: full projection name -> error curve.
        weights: full projection name -> KL per unit of relative error.
        sparsity: where the probes were made.
    """

    curves: dict[str, Curve]
    weights: dict[str, float]
    sparsity: float

    def to_json(self) -> dict[str, Any]:
        """For ``ranks.json``."""
        curves = {name: [curve.scale, curve.rise, curve.fall] for name, curve in self.curves.items()}
        return {"sparsity": self.sparsity, "curves": curves, "weights": self.weights}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Sensitivity:
        """Inverse of :meth:`to_json`."""
        curves = {str(name): Curve(*map(float, constants)) for name, constants in body["curves"].items()}
        weights = {name: float(body["weights"][name]) for name in curves}
        return cls(curves, weights, float(body["sparsity"]))


@torch.no_grad()
def measure(adapter: ModelAdapter, tokens: Tensor, solver: Solver, sparsity: float) -> Sensitivity:
    """Measure curves and probes on a dense model; the model is unchanged afterwards.

    Args:
        tokens: ``int64 [sequences, seqlen]``; the Grams use the first ``GRAM_TOKENS``, the probes ``PROBE_TOKENS``.
        solver: a quick one; the order of the errors hardly depends on it.
        sparsity: pruning scale of the probes, moved into ``PROBE_RANGE``.
    """
    sparsity = min(max(sparsity, PROBE_RANGE[0]), PROBE_RANGE[1])
    batches = embed(adapter, tokens[: max(1, GRAM_TOKENS // tokens.shape[1])])
    count = max(1, PROBE_TOKENS // tokens.shape[1])
    probes = embed(adapter, tokens[:count])
    dense_logits = _logits(adapter, probes, 0)
    curves: dict[str, Curve] = {}
    weights: dict[str, float] = {}
    for block in tqdm(adapter.blocks, desc="probes", unit="block", disable=not sys.stderr.isatty(), file=sys.stderr):
        statistics, batches = collect_and_advance(block, batches, with_gram=True)
        for stages in HALVES.values():
            names = [(stage, name) for stage in stages for name in STAGES[stage]]
            dense = {name: block.projection(name).weight.detach().clone() for _, name in names}
            errors = {}
            try:
                for stage, name in names:
                    full_name = block.full_name(name)
                    found = _curve(dense[name], statistics[stage], solver, sparsity, full_name)
                    curves[full_name], errors[name], pruned = found
                    block.projection(name).weight.copy_(pruned)
                divergence = _divergence(_logits(adapter, probes, block.index), dense_logits)
            finally:
                for name, weight in dense.items():
                    block.projection(name).weight.copy_(weight)
            worth = divergence / max(sum(errors.values()), 1e-12)
            weights |= {block.full_name(name): worth for _, name in names}
        probes = advance(block, probes)
    return Sensitivity(curves, weights, sparsity)


def _curve(
    weight: Tensor, statistics: InputStatistics, solver: Solver, sparsity: float, name: str
) -> tuple[Curve, float, Tensor]:
    """Error curve of one projection, its error at ``sparsity``, and the weight pruned to it."""
    gram, size = statistics.mean_gram, weight.numel()
    dense = weight.float()
    energy = float(((dense @ gram) * dense).sum().clamp_min(1e-30))

    def at(s: float) -> tuple[float, Tensor]:
        pruned = solve(solver, dense, statistics, Target(round(s * size)), name, weight.dtype)
        change = pruned.float() - dense
        return float(((change @ gram) * change).sum()) / energy, pruned

    error, pruned = at(sparsity)
    return Curve.through([(s, at(s)[0]) for s in CURVE_SPARSITIES]), error, pruned


def _logits(adapter: ModelAdapter, batches: Sequence[Batch], start: int) -> list[Tensor]:
    """The model's predictions from the inputs of block ``start`` on."""
    current = list(batches)
    for block in adapter.blocks[start:]:
        current = advance(block, current)
    return [predict(adapter, batch.hidden) for batch in current]


def _divergence(logits: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """Mean KL(dense ‖ pruned) per token, nats."""
    total, tokens = 0.0, 0
    for ours, theirs in zip(logits, dense, strict=True):
        for a, b in zip(ours, theirs, strict=True):  # a sequence at a time: fp32 logits are large
            log_p, log_q = F.log_softmax(b.float(), -1), F.log_softmax(a.float(), -1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            tokens += a.shape[0]
    return total / max(1, tokens)

# SPDX-License-Identifier: Apache-2.0
"""The ranking: which projections, and which blocks, hold the outliers (arXiv 2504.06323, section 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_kernels import ops
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import STAGES, Block, ModelAdapter
from mosaic_kernels.progress import station
from mosaic_kernels.prune.capture import Batch, collect_and_advance
from mosaic_kernels.prune.sensitivity import Sensitivity

RANKS_SCHEMA = 1
DEFAULT_THRESHOLDS = (3.0, 5.0, 7.0, 10.0)


@dataclass(frozen=True)
class Ranks:
    """Outlier ratios of a dense model; made once, reusable for every sparsity and category.

    A weight's score is ``|W_ij| * norm_j``; it is an outlier when its score exceeds ``threshold``
    times the mean score of its projection (``projections``) or of its whole block (``blocks``).

    Attributes:
        model: where the model came from.
        calibration: hash of the calibration tokens.
        tokens: how many there were.
        projections: full name -> threshold -> outlier ratio.
        blocks: block prefix -> threshold -> outlier ratio.
        sensitivity: error curves and probes, where a run has measured them.
    """

    model: str
    calibration: str
    tokens: int
    projections: dict[str, dict[float, float]]
    blocks: dict[str, dict[float, float]]
    sensitivity: Sensitivity | None = None

    def save(self, path: Path) -> None:
        """Write ``ranks.json``."""
        body = {"schema": RANKS_SCHEMA, **self.__dict__}
        body["sensitivity"] = None if self.sensitivity is None else self.sensitivity.to_json()
        path.write_text(json.dumps(body, indent=1))

    @classmethod
    def load(cls, path: Path, adapter: ModelAdapter, threshold: float) -> Ranks:
        """Read a ranking and check that it is one of this model.

        Raises:
            UsageError: not a ranking, of another model, or without this threshold.
        """
        try:
            body: dict[str, Any] = json.loads(path.read_text())
            ranks = cls(
                str(body["model"]),
                str(body["calibration"]),
                int(body["tokens"]),
                _with_float_keys(body["projections"]),
                _with_float_keys(body["blocks"]),
                None if body.get("sensitivity") is None else Sensitivity.from_json(body["sensitivity"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a readable ranking ({error}); a run without --ranks makes one") from error
        if body.get("schema") != RANKS_SCHEMA:
            raise UsageError(f"{path} has ranking schema {body.get('schema')}, this version reads {RANKS_SCHEMA}")
        if (found := ranks.sensitivity) is not None:
            whole = set(found.curves) in (set(), set(ranks.projections)) and set(found.removal) in (
                set(),
                set(ranks.blocks),
            )
            if not whole:
                raise UsageError(f"{path} is damaged: its error curves are of other projections; make it anew")
        blocks = {block.prefix for block in adapter.blocks}
        odd = sorted((set(ranks.projections) ^ set(adapter.sizes())) | (set(ranks.blocks) ^ blocks))
        if odd:
            raise UsageError(f"{path} ranks another model (it differs at {odd[0]}): make one for this model")
        for name, ratios in (*ranks.projections.items(), *ranks.blocks.items()):
            if not all(0 <= ratio <= 1 for ratio in ratios.values()):  # also refuses NaN
                raise UsageError(f"{path} is damaged: an outlier ratio of {name} does not lie in [0, 1]; make it anew")
            if threshold not in ratios:
                known = ", ".join(f"{known:g}" for known in sorted(ratios))
                raise UsageError(f"{path} has no outlier threshold {threshold:g} for {name}; it has: {known}")
        return ranks

    def projection_ratios(self, threshold: float) -> dict[str, float]:
        """Outlier ratio of every projection."""
        return {name: ratios[threshold] for name, ratios in self.projections.items()}

    def block_ratios(self, threshold: float) -> dict[str, float]:
        """Outlier ratio of every block."""
        return {name: ratios[threshold] for name, ratios in self.blocks.items()}


def _with_float_keys(table: dict[str, dict[str, float]]) -> dict[str, dict[float, float]]:
    return {name: {float(key): float(value) for key, value in ratios.items()} for name, ratios in table.items()}


def rank(
    adapter: ModelAdapter, batches: Sequence[Batch], thresholds: Sequence[float], *, model: str, calibration: str
) -> Ranks:
    """Rank a dense model in one forward pass over the calibration batches.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    projections: dict[str, dict[float, float]] = {}
    blocks: dict[str, dict[float, float]] = {}
    tokens = sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in batches)
    current = list(batches)
    with station("rank", len(adapter.blocks), "block", numbered=True) as here:
        for block in adapter.blocks:
            statistics, current = collect_and_advance(block, current, with_gram=False)
            norms = {name: statistics[stage].column_norms for stage, names in enumerate(STAGES) for name in names}
            ratios, blocks[block.prefix] = _outlier_ratios(block, norms, thresholds)
            projections |= ratios
            here.advance()
    return Ranks(model, calibration, tokens, projections, blocks)


def _outlier_ratios(
    block: Block, norms: dict[str, Any], thresholds: Sequence[float]
) -> tuple[dict[str, dict[float, float]], dict[float, float]]:
    """Ratios of every projection and, in OWL's view (arXiv 2310.05175), of the block as one matrix with one mean."""
    weights = {name: block.projection(name).weight.detach() for name in norms}
    projections, totals = {}, {}
    for name, weight in weights.items():
        totals[name], counts = ops.outlier_stats(weight, norms[name], thresholds)
        projections[block.full_name(name)] = {
            t: count / weight.numel() for t, count in zip(thresholds, counts, strict=True)
        }
    size = sum(weight.numel() for weight in weights.values())
    mean = sum(totals.values()) / size
    outliers = [0] * len(thresholds)
    for name, weight in weights.items():
        own_mean = totals[name] / weight.numel()
        if own_mean == 0:
            continue  # a projection without any score has no outlier either
        _, counts = ops.outlier_stats(weight, norms[name], [t * mean / own_mean for t in thresholds])
        outliers = [total + count for total, count in zip(outliers, counts, strict=True)]
    return projections, {t: count / size for t, count in zip(thresholds, outliers, strict=True)}

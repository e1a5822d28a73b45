# SPDX-License-Identifier: Apache-2.0
"""From calibration text to the plan: what must be measured is measured once, what was found by trying is kept."""

from __future__ import annotations

from dataclasses import replace

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune.calibration import Calibration
from mosaic_kernels.prune.capture import embed
from mosaic_kernels.prune.composite import Plan, make_plan
from mosaic_kernels.prune.importance import DEFAULT_THRESHOLDS, Ranks, rank
from mosaic_kernels.prune.journal import Journal
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.search import search
from mosaic_kernels.prune.sensitivity import measure
from mosaic_kernels.prune.share import choose_share
from mosaic_kernels.prune.solvers import choose_solver

# Outlier ratios of the example differ by 2 % on average, by .0002 at most, from those on four times as many.
RANK_TOKENS = 8192


def settle_ranks(
    adapter: ModelAdapter,
    calibration: Calibration,
    config: PruneConfig,
    name: str,
    given: Ranks | None,
    journal: Journal | None,
    team: Team = ALONE,
) -> Ranks:
    """The ranking with all that the policy needs, from the journal where a run that was cut off has left it."""

    def kept() -> Ranks | None:
        if journal is None or not journal.has_ranks():
            return None
        return Ranks.load(journal.ranks, adapter, config.outlier_threshold)

    if (before := team.from_first(kept)) is not None:
        return before
    thresholds = sorted({*DEFAULT_THRESHOLDS, config.outlier_threshold})
    tokens = calibration.tokens
    if (ranks := given) is None:
        first = embed(adapter, tokens[: -(-RANK_TOKENS // tokens.shape[1])])
        ranks = team.from_first(lambda: rank(adapter, first, thresholds, model=name, calibration=calibration.digest))
    zeros, units = to_measure(config, ranks)
    if zeros or units:
        found = measure(
            adapter, tokens, choose_solver("admm", "fast"), zeros=zeros, units=units,
            per_projection=config.quality == "best", known=ranks.sensitivity, team=team,
        )  # fmt: skip
        ranks = replace(ranks, sensitivity=found)
    team.first(lambda: None if journal is None else journal.keep_ranks(ranks.save))
    return ranks


def settle_plan(
    adapter: ModelAdapter,
    ranks: Ranks,
    calibration: Calibration,
    config: PruneConfig,
    journal: Journal | None,
    team: Team = ALONE,
) -> Plan:
    """The plan; what was found by trying comes from the journal where a run that was cut off has left it."""
    searches = config.policy == "curve+search" and config.needs_curves
    if not (searches or config.chooses_share):
        return make_plan(adapter, ranks, config)
    before = team.from_first(lambda: None if journal is None else journal.plan())
    if before is not None:
        share, zeros = before
        return replace(make_plan(adapter, ranks, replace(config, structured_share=share)), zeros=zeros)
    if config.chooses_share:
        config = choose_share(adapter, ranks, config, calibration.tokens, team)
    plan = make_plan(adapter, ranks, config)
    if searches:
        start = plan
        plan = team.from_first(lambda: search(adapter, start, calibration.tokens, config.seed))
    share, zeros = config.structured_share, plan.zeros
    team.first(lambda: None if journal is None else journal.keep_plan(share, zeros))
    return plan


def to_measure(config: PruneConfig, ranks: Ranks | None) -> tuple[bool, bool]:
    """Whether error curves, and whether costs of units, are needed and not in this ranking yet."""
    known = None if ranks is None else ranks.sensitivity
    zeros, units = config.needs_curves, config.needs_removal_costs
    if known is None:
        return zeros, units
    alone = config.quality == "best" and not known.per_projection
    return zeros and (not known.curves or alone), units and not known.removal

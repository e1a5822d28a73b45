# SPDX-License-Identifier: Apache-2.0
"""How much of a composite budget goes as whole units: candidates are tried on a few tokens and judged by KL."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from torch import Tensor

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.progress import station
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, embed, predictions
from mosaic_kernels.prune.composite import Plan, make_plan
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.sensitivity import divergence
from mosaic_kernels.prune.solvers import choose_solver
from mosaic_kernels.prune.timing import timed

logger = logging.getLogger(__name__)

# Candidates, as parts of the sparsity: 10, 20 and 30 % of all parameters where 60 % go.
PARTS = (1 / 6, 1 / 3, 1 / 2)
# Whole units make every matrix and the KV cache smaller, which pays at once everywhere, but each costs
# more than as many zeros: the largest share is taken whose divergence is at most this multiple of the least.
# The example at 60 %: .041, .043 and .060 nats at 10, 20 and 30 % by the quickest solver (.022, .030, .049 by the
# default one), so 20 % are taken.
TOLERANCE = 1.25
SOLVE_TOKENS, JUDGE_TOKENS = 8192, 4096


@timed("probe")
def choose_share(
    adapter: ModelAdapter, ranks: Ranks, config: PruneConfig, tokens: Tensor, team: Team = ALONE
) -> PruneConfig:
    """The configuration with the structured share settled; the model is unchanged.

    Each candidate's plan is carried out by the quickest solver on copies of one block at a time.

    Args:
        tokens: ``int64 [sequences, seqlen]``: the first ones are pruned with, others judge where there are enough.
        team: the processes among which the candidates are dealt out.
    """
    seqlen = tokens.shape[1]
    judges = max(1, min(len(tokens) // 3, -(-JUDGE_TOKENS // seqlen)))
    solves = tokens[judges:][: max(1, SOLVE_TOKENS // seqlen)]
    batches = embed(adapter, solves if len(solves) else tokens) + embed(adapter, tokens[:judges], held_out=True)
    dense = predictions(adapter, adapter.blocks, [batch for batch in batches if batch.held_out])
    shares = [part * config.sparsity for part in PARTS]

    def try_mine() -> dict[float, float]:
        found = {}
        mine = shares[team.rank :: team.world]
        for number, share in enumerate(mine, start=1):
            plan = make_plan(adapter, ranks, replace(config, structured_share=share))
            pruned = _pruned(adapter, batches, plan, f"share trial {number}/{len(mine)}")
            found[share] = divergence(predictions(adapter, (), pruned), dense)
        return found

    tried = {share: cost for found in team.gather(try_mine) for share, cost in found.items()}
    chosen = largest_worthwhile(costs := {share: tried[share] for share in shares})
    shown = ", ".join(f"{share:.1%}: {cost:.4f}" for share, cost in costs.items())
    logger.info("structured share %.1f %% of all parameters (divergence in nats at %s)", 100 * chosen, shown)
    return replace(config, structured_share=chosen)


def largest_worthwhile(costs: dict[float, float]) -> float:
    """The largest share whose divergence is at most :data:`TOLERANCE` times the least.

    A divergence is negative only by rounding, if a model hardly changes; it then counts as 0.

    Raises:
        NonFiniteError: a divergence is NaN or infinite.
    """
    if not all(map(math.isfinite, costs.values())):
        raise NonFiniteError("the predictions of a pruned trial are NaN or Inf: check the weights, or use float32")
    least = max(0.0, min(costs.values()))
    return max(share for share, cost in costs.items() if cost <= TOLERANCE * least)


def _pruned(adapter: ModelAdapter, batches: list[Batch], plan: Plan, name: str) -> list[Batch]:
    """The batches that judge, after every block was pruned."""
    solver = choose_solver("admm", "fast")
    with station(name, len(adapter.blocks), "block") as here:
        for block, units in zip(adapter.blocks, plan.units, strict=True):
            batches = prune_block(block.copy(), batches, solver, units, plan.zeros, None)
            here.advance()
    return [batch for batch in batches if batch.held_out]

# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: whole units per block first, then zeros per projection, on one exact budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosaic_kernels import format
from mosaic_kernels.config import PruneConfig, Weights
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import PROJECTIONS, STAGES, Block, ModelAdapter
from mosaic_kernels.prune import allocate
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.sensitivity import Sensitivity
from mosaic_kernels.prune.units import BlockShape, Cost, Units, plan_by_cost, plan_evenly

PRICE_ROUNDS = 3  # the price of a zero moves by less than a percent in the third


@dataclass(frozen=True)
class Plan:
    """What will be removed where.

    Attributes:
        units: heads and channels each block loses.
        shapes: ``(out, in)`` of every projection after structured removal, by full name.
        zeros: weights to set to zero in every projection of that shape.
        original_shapes: ``(out, in)`` before.
        budget: ``round(S * prunable)``.
    """

    units: tuple[Units, ...]
    shapes: dict[str, tuple[int, int]]
    zeros: dict[str, int]
    original_shapes: dict[str, tuple[int, int]]
    budget: int

    @property
    def prunable(self) -> int:
        return sum(o * i for o, i in self.original_shapes.values())

    @property
    def structured_removed(self) -> int:
        return self.prunable - sum(o * i for o, i in self.shapes.values())

    @property
    def removed(self) -> int:
        return self.structured_removed + sum(self.zeros.values())

    def target(self, name: str) -> float:
        """Planned share of the projection's original weights that is removed, one way or the other."""
        rows, columns = self.original_shapes[name]
        kept_rows, kept_columns = self.shapes[name]
        return 1 - (kept_rows * kept_columns - self.zeros[name]) / (rows * columns)

    def predicted_bytes(self, itemsize: int, *, packed: bool = True, weights: Weights = "float") -> int:
        """Bytes of all prunable weights, without biases; packed where packing is the smaller form."""
        total = 0
        for name, (o, i) in self.shapes.items():
            dense, nnz = o * i * itemsize, o * i - self.zeros[name]
            total += min(dense, format.packed_bytes(o, i, nnz, itemsize, weights)) if packed else dense
        return total


def make_plan(adapter: ModelAdapter, ranks: Ranks | None, config: PruneConfig) -> Plan:
    """Turn the options and the ranking into exact counts.

    Args:
        ranks: may be ``None`` for policies that do not look at outliers.

    Raises:
        UsageError: the pattern does not fit the shapes, or the budget cannot be met.
    """
    original = {block.full_name(n): _shape(block, n) for block, n, _ in adapter.projections()}
    prunable = adapter.prunable_parameters
    budget = round(config.sparsity * prunable)
    units = _plan_units(adapter, ranks, budget, config)
    shapes = _shapes_of(adapter, units)
    zeros = dict.fromkeys(shapes, 0)
    rest = budget - (prunable - sum(o * i for o, i in shapes.values()))
    if config.group is not None:
        zeros = {name: _group_zeros(name, shape, config) for name, shape in shapes.items()}
        # Units come in steps; what the last step would have removed too much goes as zeros beyond the pattern.
        kept = {name: o * i - zeros[name] for name, (o, i) in shapes.items()}
        further = allocate.uniform(kept, max(0, rest - sum(zeros.values())))
        zeros = {name: count + further[name] for name, count in zeros.items()}
    elif config.category != "structured":
        zeros = _allocate(adapter, ranks, shapes, rest, config)
    return Plan(tuple(units), shapes, zeros, original, budget)


def _plan_units(adapter: ModelAdapter, ranks: Ranks | None, budget: int, config: PruneConfig) -> list[Units]:
    """Units that together hold the structured share of all prunable parameters.

    Zeros fill what whole units leave open, so composite pruning never removes more than that share.
    """
    share = round(config.share * adapter.prunable_parameters)
    if not share:
        return [Units()] * len(adapter.blocks)
    shapes = [BlockShape.of(block) for block in adapter.blocks]
    multiple, at_most = config.channel_multiple, config.category != "structured"
    units = plan_evenly(shapes, share, multiple, at_most=at_most)
    sensitivity = None if ranks is None else ranks.sensitivity
    if not config.by_curves or sensitivity is None or not sensitivity.removal:
        return units
    # What zeros cost depends on what is left for them, and what is left on what zeros cost.
    priced = config.needs_curves and bool(sensitivity.curves)
    for _ in range(PRICE_ROUNDS if priced else 1):
        removal = _removal_costs(adapter, sensitivity, units, budget, priced=priced)
        units = plan_by_cost(shapes, *removal, share, multiple, at_most=at_most)
    return units


def _removal_costs(
    adapter: ModelAdapter, sensitivity: Sensitivity, units: list[Units], budget: int, *, priced: bool
) -> tuple[list[Cost], list[Cost]]:
    """Of every block, what losing groups and what losing channels costs; ``priced``: zeros in the rest included.

    At the optimum a zero costs the same everywhere, the *price*. A half block that loses a unit loses the places
    for some zeros too: each is charged at that price, less what it would have cost there.
    """
    groups: list[Cost] = [sensitivity.removal[block.prefix][0] for block in adapter.blocks]
    channels: list[Cost] = [sensitivity.removal[block.prefix][1] for block in adapter.blocks]
    if not priced:
        return groups, channels
    shapes = _shapes_of(adapter, units)
    sizes = {name: o * i for name, (o, i) in shapes.items()}
    zeros = budget - (adapter.prunable_parameters - sum(sizes.values()))
    price = allocate.marginal_price(sizes, sensitivity.curves, sensitivity.weights, zeros)
    grid = allocate.sparsity_grid(zeros / max(1, sum(sizes.values())))
    for costs, removable, halves in (
        (groups, [block.key_value_heads for block in adapter.blocks], STAGES[:2]),
        (channels, [block.channels for block in adapter.blocks], STAGES[2:]),
    ):
        for i, (block, units_there) in enumerate(zip(adapter.blocks, removable, strict=True)):
            names = [name for stage in halves for name in stage]
            prices = np.array([price * block.projection(name).weight.numel() for name in names])
            full_names = [block.full_name(name) for name in names]
            errors = [[sensitivity.weights[n] * sensitivity.curves[n](s) for s in grid] for n in full_names]
            costs[i] = _with_zeros(costs[i], units_there, np.array(errors), np.outer(prices, grid))
    return groups, channels


def _with_zeros(removal: Cost, units: int, errors: NDArray[np.float64], worth: NDArray[np.float64]) -> Cost:
    """The cost of losing units plus that of the zeros which then pay in the rest, less what these are worth.

    Args:
        units: how many there are.
        errors: cost of every projection (rows) at every sparsity (columns).
        worth: price of the zeros at that sparsity in the whole projection.
    """

    def cost(count: int) -> float:
        return removal(count) + float((errors - worth * (1 - count / units)).min(axis=1).sum())

    return cost


def _shapes_of(adapter: ModelAdapter, units: list[Units]) -> dict[str, tuple[int, int]]:
    return {
        block.full_name(name): shape
        for block, lost in zip(adapter.blocks, units, strict=True)
        for name, shape in _shapes_after(block, lost).items()
    }


def _shape(block: Block, name: str) -> tuple[int, int]:
    layer = block.projection(name)
    return layer.out_features, layer.in_features


def _shapes_after(block: Block, lost: Units) -> dict[str, tuple[int, int]]:
    queries = block.query_heads // block.key_value_heads * block.head_dim
    fewer = {
        "self_attn.q_proj": (lost.groups * queries, 0),
        "self_attn.k_proj": (lost.groups * block.head_dim, 0),
        "self_attn.v_proj": (lost.groups * block.head_dim, 0),
        "self_attn.o_proj": (0, lost.groups * queries),
        "mlp.gate_proj": (lost.channels, 0),
        "mlp.up_proj": (lost.channels, 0),
        "mlp.down_proj": (0, lost.channels),
    }
    shapes = {name: _shape(block, name) for name in PROJECTIONS}
    return {name: (o - fewer[name][0], i - fewer[name][1]) for name, (o, i) in shapes.items()}


def _group_zeros(name: str, shape: tuple[int, int], config: PruneConfig) -> int:
    n, m = config.group or (1, 1)
    rows, columns = shape
    if columns % m:
        raise UsageError(
            f"pattern {config.pattern} needs a multiple of {m} input features but {name} has {columns}: "
            f"choose another pattern, or a --channel-multiple that is a multiple of {m}"
        )
    return rows * columns // m * (m - n)


def _allocate(
    adapter: ModelAdapter,
    ranks: Ranks | None,
    shapes: dict[str, tuple[int, int]],
    budget: int,
    config: PruneConfig,
) -> dict[str, int]:
    sizes = {name: o * i for name, (o, i) in shapes.items()}
    if config.policy == "uniform" or not budget:
        return allocate.uniform(sizes, budget)
    if ranks is None:
        raise UsageError(f"policy {config.policy} needs a ranking: give --ranks, or calibrate")
    if config.by_curves:
        if ranks.sensitivity is None:
            raise UsageError("policy curve needs error curves, which this ranking does not hold: leave out --ranks")
        return allocate.by_curves(sizes, ranks.sensitivity.curves, ranks.sensitivity.weights, budget)
    block_of = {block.full_name(name): block.prefix for block, name, _ in adapter.projections()}
    by_projection = ranks.projection_ratios(config.outlier_threshold)
    by_block = ranks.block_ratios(config.outlier_threshold)
    if config.policy == "pod":
        return allocate.pod(sizes, by_projection, budget, config.max_deviation)
    if config.policy == "owl":
        return allocate.owl(sizes, block_of, by_block, budget, config.max_deviation)
    return allocate.mosaic_reference(sizes, block_of, by_block, by_projection, budget, config.max_deviation)

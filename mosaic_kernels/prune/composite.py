# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: whole units per block first, then zeros per projection, on one exact budget."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic_kernels import format
from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import PROJECTIONS, Block, ModelAdapter
from mosaic_kernels.prune import allocate
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.structured import BlockShape, Units, plan_units


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

    def predicted_bytes(self, itemsize: int, *, packed: bool = True) -> int:
        """Bytes of all prunable weights, without biases; packed where packing is the smaller form."""
        total = 0
        for name, (o, i) in self.shapes.items():
            dense = o * i * itemsize
            total += min(dense, format.packed_bytes(o, i, o * i - self.zeros[name], itemsize)) if packed else dense
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
    units = _plan_units(adapter, round(config.share * prunable), config)
    shapes = {
        block.full_name(name): shape
        for block, lost in zip(adapter.blocks, units, strict=True)
        for name, shape in _shapes_after(block, lost).items()
    }
    zeros = dict.fromkeys(shapes, 0)
    rest = budget - (prunable - sum(o * i for o, i in shapes.values()))
    if config.group is not None:
        zeros = {name: _group_zeros(name, shape, config) for name, shape in shapes.items()}
    elif config.category != "structured":
        zeros = _allocate(adapter, ranks, shapes, rest, config)
    return Plan(tuple(units), shapes, zeros, original, budget)


def _plan_units(adapter: ModelAdapter, budget: int, config: PruneConfig) -> list[Units]:
    if not budget:
        return [Units()] * len(adapter.blocks)
    shapes = [BlockShape.of(block) for block in adapter.blocks]
    # Zeros fill what whole units leave open, so composite pruning rounds units down.
    return plan_units(shapes, budget, config.channel_multiple, at_most=config.category != "structured")


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
    if config.policy == "curve":
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

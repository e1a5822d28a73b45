# SPDX-License-Identifier: Apache-2.0
"""How many heads and channels each block loses: evenly, or where the model's predictions suffer least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosaic_kernels.models import Block

LEVELS = 64  # choices per half block in the dynamic programme; single steps come after it
CELLS = 4000  # resolution of its budget

Cost = Callable[[int], float]


@dataclass(frozen=True)
class Units:
    """How many units a block loses."""

    groups: int = 0
    channels: int = 0


@dataclass(frozen=True)
class BlockShape:
    """What structured removal must know of a block.

    Attributes:
        groups: KV groups.
        channels: FFN channels.
        group_parameters: prunable weights that leave with one group.
        channel_parameters: prunable weights that leave with one channel.
    """

    groups: int
    channels: int
    group_parameters: int
    channel_parameters: int

    @classmethod
    def of(cls, block: Block) -> BlockShape:
        hidden = block.projection("self_attn.q_proj").in_features
        queries = block.query_heads // block.key_value_heads
        return cls(
            block.key_value_heads,
            block.channels,
            (2 * queries + 2) * block.head_dim * hidden,
            3 * hidden,
        )


def plan_evenly(shapes: Sequence[BlockShape], budget: int, multiple: int, *, at_most: bool) -> list[Units]:
    """Spread ``budget`` parameters over the blocks as whole units, as evenly as units allow.

    Groups are rounded down in every block (losing one costs more than the same parameters in
    channels), channels make up the rest; widths stay multiples of ``multiple`` wherever the dense
    width is one, and at least one group and ``multiple`` channels stay.

    Args:
        at_most: never remove more than ``budget`` (composite pruning fills the rest with zeros);
            otherwise the nearest count that units allow.
    """
    total = sum(s.groups * s.group_parameters + s.channels * s.channel_parameters for s in shapes)
    share = budget / max(1, total)
    groups = [min(int(share * s.groups), s.groups - 1) for s in shapes]
    while True:
        rest = budget - sum(g * s.group_parameters for g, s in zip(groups, shapes, strict=True))
        channels = _plan_channels(shapes, rest, multiple, at_most=at_most)
        missing = rest - sum(c * s.channel_parameters for c, s in zip(channels, shapes, strict=True))
        # Only where the channels are used up do further groups go, the last blocks first: the first
        # blocks' heads are the dearest. The next round gives back channels for them.
        able = [i for i, s in enumerate(shapes) if groups[i] < s.groups - 1]
        group = shapes[able[-1]].group_parameters if able else 0
        step = min(group, multiple * max(s.channel_parameters for s in shapes))
        near = missing < step if at_most else 2 * missing <= step
        too_large = rest < group and (at_most or 2 * missing <= group)
        if near or not able or too_large:
            return [Units(g, c) for g, c in zip(groups, channels, strict=True)]
        most = min(groups[i] for i in able)
        groups[max(i for i in able if groups[i] == most)] += 1


def _plan_channels(shapes: Sequence[BlockShape], budget: int, multiple: int, *, at_most: bool) -> list[int]:
    """Channels to remove per block; a step is ``multiple`` channels of one block."""
    total = sum(s.channels * s.channel_parameters for s in shapes)
    share = max(0.0, budget / max(1, total))
    options = [_channel_counts(s.channels, multiple) for s in shapes]
    chosen = [
        max(i for i, count in enumerate(o) if count <= share * s.channels) for o, s in zip(options, shapes, strict=True)
    ]
    removed = sum(o[i] * s.channel_parameters for o, i, s in zip(options, chosen, shapes, strict=True))
    # The last blocks take the further steps first, at most one each per round.
    progress = True
    while progress:
        progress = False
        for b in reversed(range(len(shapes))):
            if chosen[b] + 1 == len(options[b]):
                continue
            step = (options[b][chosen[b] + 1] - options[b][chosen[b]]) * shapes[b].channel_parameters
            missing = budget - removed
            if step <= missing or (not at_most and step - missing < missing):
                chosen[b] += 1
                removed += step
                progress = True
    return [o[i] for o, i in zip(options, chosen, strict=True)]


def _channel_counts(channels: int, multiple: int) -> list[int]:
    """Every number of channels that may go: none, or so many that a multiple of ``multiple`` stays."""
    return [0, *(channels - kept for kept in range((channels - 1) // multiple * multiple, 0, -multiple))]


def plan_by_cost(
    shapes: Sequence[BlockShape],
    group_costs: Sequence[Cost],
    channel_costs: Sequence[Cost],
    budget: int,
    multiple: int,
    *,
    at_most: bool,
) -> list[Units]:
    """Spread ``budget`` parameters over the blocks as whole units so that the summed cost is least.

    A dynamic programme over the two halves of every block, on a grid of levels and of the budget; what
    the grids leave over goes in single steps of ``multiple`` channels where they cost least.

    Args:
        group_costs: of every block, what it costs to lose so many KV groups.
        channel_costs: the same for FFN channels.
        at_most: never remove more than ``budget``; otherwise the nearest count that units allow.
    """
    halves: list[tuple[list[int], int, Cost]] = []
    for shape, by_groups, by_channels in zip(shapes, group_costs, channel_costs, strict=True):
        halves.append((_thinned(list(range(shape.groups))), shape.group_parameters, by_groups))
        halves.append((_thinned(_channel_counts(shape.channels, multiple)), shape.channel_parameters, by_channels))
    chosen = _cheapest_levels(halves, budget, at_most=at_most)
    groups, lost = chosen[::2], chosen[1::2]
    missing = _single_steps(shapes, channel_costs, groups, lost, budget, multiple, at_most=at_most)
    step = multiple * min(shape.channel_parameters for shape in shapes)
    while abs(missing) > (step if at_most else step // 2):
        # No block has a channel to give, or one to take back: a group goes or returns, and channels make up for it.
        more = 1 if missing > 0 else -1
        able = [i for i, shape in enumerate(shapes) if 0 <= groups[i] + more < shape.groups]
        rises = {i: group_costs[i](groups[i] + more) - group_costs[i](groups[i]) for i in able}
        for i in sorted(able, key=rises.__getitem__):
            groups_now, lost_now = [*groups], [*lost]
            groups_now[i] += more
            now = _single_steps(shapes, channel_costs, groups_now, lost_now, budget, multiple, at_most=at_most)
            if abs(now) < abs(missing) and not (at_most and now < 0):
                groups, lost, missing = groups_now, lost_now, now
                break
        else:
            break
    return [Units(g, c) for g, c in zip(groups, lost, strict=True)]


def _thinned(levels: list[int]) -> list[int]:
    """At most ``LEVELS`` of them, evenly, both ends among them."""
    if len(levels) <= LEVELS:
        return levels
    return [levels[round(i * (len(levels) - 1) / (LEVELS - 1))] for i in range(LEVELS)]


def _cheapest_levels(halves: Sequence[tuple[list[int], int, Cost]], budget: int, *, at_most: bool) -> list[int]:
    """One level of every half, at the least summed cost of those that come nearest to the budget."""
    cell = max(math.gcd(*(level * size for levels, size, _ in halves for level in levels)), -(-budget // CELLS), 1)
    beyond = 0 if at_most else max(b - a for levels, size, _ in halves for a, b in _gaps(levels, size))
    cells = (budget + beyond) // cell

    def in_cells(parameters: int) -> int:
        return -(-parameters // cell) if at_most else round(parameters / cell)

    best: NDArray[np.float64] = np.full(cells + 1, np.inf)
    best[0] = 0.0
    picks: list[NDArray[np.int64]] = []
    for levels, size, cost in halves:
        found = np.full_like(best, np.inf)
        pick = np.zeros(cells + 1, dtype=np.int64)
        for index, level in enumerate(levels):
            shift = in_cells(level * size)
            if shift > cells:
                break
            candidate = np.concatenate([np.full(shift, np.inf), best[: cells + 1 - shift] + cost(level)])
            better = candidate < found
            found[better], pick[better] = candidate[better], index
        best = found
        picks.append(pick)
    reachable = np.flatnonzero(np.isfinite(best))
    at = int(reachable[np.abs(reachable - budget / cell).argmin()])
    chosen: list[int] = []
    for (levels, size, _), pick in zip(reversed(halves), reversed(picks), strict=True):
        chosen.append(levels[pick[at]])
        at -= in_cells(chosen[-1] * size)
    return chosen[::-1]


def _gaps(levels: list[int], size: int) -> list[tuple[int, int]]:
    """Parameters at neighbouring levels."""
    return [(a * size, b * size) for a, b in itertools.pairwise([0, *levels])]


def _single_steps(
    shapes: Sequence[BlockShape],
    costs: Sequence[Cost],
    groups: Sequence[int],
    channels: list[int],
    budget: int,
    multiple: int,
    *,
    at_most: bool,
) -> int:
    """Move ``channels`` step by step, in place, to the budget where it costs least; how far is left."""
    options = [_channel_counts(shape.channels, multiple) for shape in shapes]
    places = [counts.index(lost) for counts, lost in zip(options, channels, strict=True)]
    while True:
        missing = budget - sum(
            g * s.group_parameters + c * s.channel_parameters for g, c, s in zip(groups, channels, shapes, strict=True)
        )
        direction = 1 if missing > 0 else -1
        able = []
        for i, shape in enumerate(shapes):
            place = places[i] + direction
            if not 0 <= place < len(options[i]):
                continue
            step = (options[i][place] - channels[i]) * shape.channel_parameters
            if not _is_nearer(missing - step, missing, at_most=at_most):
                continue
            able.append(((costs[i](options[i][place]) - costs[i](channels[i])) / step * direction, i))
        if not missing or not able:
            return missing
        _, i = min(able)
        places[i] += direction
        channels[i] = options[i][places[i]]


def _is_nearer(after: int, before: int, *, at_most: bool) -> bool:
    """Whether so many missing parameters are better than so many; negative where too much is removed."""
    if at_most and before < 0:
        return after > before
    return abs(after) < abs(before) and not (at_most and after < 0)

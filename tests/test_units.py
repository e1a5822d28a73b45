# SPDX-License-Identifier: Apache-2.0
"""Units by cost: as good as trying everything, on budget, in the right multiples."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels.prune.units import BlockShape, Cost, Units, plan_by_cost, plan_evenly


def removed(shapes: list[BlockShape], units: list[Units]) -> int:
    return sum(
        u.groups * s.group_parameters + u.channels * s.channel_parameters for u, s in zip(units, shapes, strict=True)
    )


def power(scale: float, exponent: float, most: int) -> Cost:
    return lambda count: scale * (count / most) ** exponent


def cost(groups: list[Cost], channels: list[Cost], units: list[Units]) -> float:
    return sum(g(u.groups) + c(u.channels) for g, c, u in zip(groups, channels, units, strict=True))


SCALES = st.floats(0.01, 10)


@pytest.mark.parametrize("at_most", [True, False])
@given(st.lists(st.tuples(SCALES, SCALES), min_size=3, max_size=3), st.floats(0, 0.95), st.floats(1.1, 3))
def test_no_other_units_that_near_the_budget_cost_less(
    at_most: bool, scales: list[tuple[float, float]], share: float, exponent: float
) -> None:
    shapes = [BlockShape(3, 12, 70, 10)] * 3
    groups = [power(a, exponent, 3) for a, _ in scales]
    channels = [power(b, exponent, 12) for _, b in scales]
    budget = round(share * 990)
    found = plan_by_cost(shapes, groups, channels, budget, 4, at_most=at_most)
    levels = [Units(g, c) for g in range(3) for c in (0, 4, 8)]
    everything = [list(combination) for combination in itertools.product(levels, repeat=3)]
    distance = abs(removed(shapes, found) - budget)
    if at_most:
        assert removed(shapes, found) <= budget
        everything = [units for units in everything if removed(shapes, units) <= budget]
    assert distance <= min(abs(removed(shapes, units) - budget) for units in everything) + (40 if at_most else 20)
    rivals = [units for units in everything if removed(shapes, units) == removed(shapes, found)]
    assert cost(groups, channels, found) <= min(cost(groups, channels, units) for units in rivals) * 1.0001


@given(st.integers(1, 40), st.integers(0, 100), st.booleans(), st.sampled_from([1, 8, 64]))
def test_large_models_stay_on_budget(blocks: int, percent: int, at_most: bool, multiple: int) -> None:
    """Shapes of a 7B model: grids thin out, single steps make up for it."""
    shapes = [BlockShape(32, 11008, 4 * 128 * 4096, 3 * 4096)] * blocks
    groups = [power(1.0 + i, 1.5, 32) for i in range(blocks)]
    channels = [power(2.0 + i % 3, 1.5, 11008) for i in range(blocks)]
    most = blocks * (31 * 4 * 128 * 4096 + (11008 - multiple) * 3 * 4096)
    budget = most * percent // 100
    units = plan_by_cost(shapes, groups, channels, budget, multiple, at_most=at_most)
    missing = budget - removed(shapes, units)
    assert (0 <= missing <= 3 * 4096 * multiple) if at_most else 2 * abs(missing) <= 3 * 4096 * multiple
    assert all((11008 - u.channels) % multiple == 0 and u.channels < 11008 and u.groups < 32 for u in units)


def test_what_must_not_go_stays() -> None:
    """Dear heads stay where even units would take them; the cheap block gives most."""
    shapes = [BlockShape(4, 704, 49152, 768)] * 6
    groups = [power(100.0, 1.2, 4)] * 6
    channels = [power(100.0 if i == 0 else 1.0, 1.5, 704) for i in range(6)]
    budget = round(0.4 * 6 * (4 * 49152 + 704 * 768))
    found = plan_by_cost(shapes, groups, channels, budget, 8, at_most=False)
    even = plan_evenly(shapes, budget, 8, at_most=False)
    assert all(u.groups == 0 for u in found)
    assert found[0].channels < 100 < min(u.channels for u in found[1:])
    assert any(u.groups for u in even)
    assert cost(groups, channels, found) < 0.1 * cost(groups, channels, even)
    assert abs(removed(shapes, found) - budget) <= 768 * 4

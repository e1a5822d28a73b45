# SPDX-License-Identifier: Apache-2.0
"""Allocation: every policy meets its budget to the last parameter and ranks as it says."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels.errors import UsageError
from mosaic_kernels.prune import allocate

KINDS = ("q", "k", "down")


@dataclass(frozen=True)
class Case:
    sizes: dict[str, int]
    block_of: dict[str, str]
    ratios: dict[str, float]
    block_ratios: dict[str, float]
    budget: int
    deviation: float

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def sparsity(self) -> float:
        return self.budget / self.total


@st.composite
def cases(draw: st.DrawFn, same_blocks: bool = False) -> Case:
    """Blocks of three projections of any size, any outlier ratios (ties and all-equal included), any S."""
    size = st.integers(1, 50_000_000) | st.integers(1, 9)
    ratio = st.integers(0, 10**6).map(lambda outliers: outliers / 10**6) | st.sampled_from([0.0, 0.01, 0.02])
    blocks = [f"b{i}." for i in range(draw(st.integers(1, 6)))]
    one = {kind: draw(size) for kind in KINDS}
    sizes = {b + kind: one[kind] if same_blocks else draw(size) for b in blocks for kind in KINDS}
    total = sum(sizes.values())
    sparsity = draw(st.floats(0, 1, exclude_max=True))
    return Case(
        sizes,
        {name: name.partition(".")[0] + "." for name in sizes},
        {name: draw(ratio) for name in sizes},
        {block: draw(ratio) for block in blocks},
        round(sparsity * total),
        draw(st.floats(0, 0.2)),
    )


def require_exact(case: Case, counts: dict[str, int]) -> None:
    assert sum(counts.values()) == case.budget
    assert counts.keys() == case.sizes.keys()
    assert all(type(k) is int and 0 <= k <= case.sizes[name] for name, k in counts.items())


def slack(case: Case, *names: str) -> float:
    """Counts are whole: a target moves by less than one parameter, beside rounding errors of the bisection."""
    return sum(1 / case.sizes[name] for name in names) + 1e-12 * len(names)


@given(cases())
def test_uniform(case: Case) -> None:
    counts = allocate.uniform(case.sizes, case.budget)
    require_exact(case, counts)
    for name, k in counts.items():
        assert abs(k / case.sizes[name] - case.sparsity) <= slack(case, name)


@given(cases())
def test_pod(case: Case) -> None:
    counts = allocate.pod(case.sizes, case.ratios, case.budget, case.deviation)
    require_exact(case, counts)
    targets = {name: k / case.sizes[name] for name, k in counts.items()}
    for name, target in targets.items():
        assert abs(target - case.sparsity) <= 2 * case.deviation + slack(case, name)
        for other, ratio in case.ratios.items():
            if case.ratios[name] > ratio:  # more outliers, pruned less
                assert target <= targets[other] + slack(case, name, other)


@given(cases())
def test_pod_without_clipping_is_its_formula(case: Case) -> None:
    low, high = min(case.ratios.values()), max(case.ratios.values())
    bonus = {
        name: 0.0 if high == low else 2 * case.deviation * (ratio - low) / (high - low)
        for name, ratio in case.ratios.items()
    }
    mean = sum(bonus[name] * n for name, n in case.sizes.items()) / case.total
    wishes = {name: case.sparsity - (bonus[name] - mean) for name in case.sizes}
    counts = allocate.pod(case.sizes, case.ratios, case.budget, case.deviation)
    if all(0 <= wish <= 1 for wish in wishes.values()):
        for name, wish in wishes.items():
            assert abs(counts[name] / case.sizes[name] - wish) <= slack(case, name)


@given(cases())
def test_owl(case: Case) -> None:
    counts = allocate.owl(case.sizes, case.block_of, case.block_ratios, case.budget, case.deviation)
    require_exact(case, counts)
    targets = {name: k / case.sizes[name] for name, k in counts.items()}
    for name, target in targets.items():
        assert abs(target - case.sparsity) <= 2 * case.deviation + slack(case, name)
        for other, other_target in targets.items():
            block, other_block = case.block_of[name], case.block_of[other]
            if block == other_block:  # one target per block
                assert abs(target - other_target) <= slack(case, name, other)
            elif case.block_ratios[block] > case.block_ratios[other_block]:
                assert target <= other_target + slack(case, name, other)


@given(cases(), st.floats(0, 0.4), st.floats(0.6, 1), st.data())
def test_budget_within_bounds(case: Case, lower: float, upper: float, data: st.DataObject) -> None:
    wishes = {name: data.draw(st.floats(-1, 2)) for name in case.sizes}
    try:
        counts = allocate.fit_to_budget(case.sizes, wishes, case.budget, lower=lower, upper=upper)
    except UsageError:
        # refused only where whole parameters between the bounds do not reach the budget
        least = sum(math.floor(lower * n) for n in case.sizes.values())
        most = sum(math.ceil(upper * n) for n in case.sizes.values())
        margin = len(case.sizes)
        assert case.budget < least + margin or case.budget > most - margin
        return
    require_exact(case, counts)
    for name, n in case.sizes.items():
        assert math.floor(lower * n) <= counts[name] <= math.ceil(upper * n)


@pytest.mark.parametrize("budget", [-1, 101])
def test_an_impossible_budget_is_refused(budget: int) -> None:
    with pytest.raises(UsageError, match=f"cannot remove {budget} of 100"):
        allocate.fit_to_budget({"a": 40, "b": 60}, {"a": 0.5, "b": 0.5}, budget)


@pytest.mark.parametrize("budget", [0, 100])
def test_nothing_and_everything(budget: int) -> None:
    counts = allocate.fit_to_budget({"a": 40, "b": 60}, {"a": 0.1, "b": 0.9}, budget)
    assert counts == ({"a": 0, "b": 0} if budget == 0 else {"a": 40, "b": 60})


def transcribed(case: Case) -> dict[str, int]:
    """``ratio_p = layer_c - mean(own_c) + (1 - S)``, written out once more."""

    def scale(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [0.0 if high == low else (v - low) * (1 / (high - low) * case.deviation * 2) for v in values]

    blocks = list(case.block_ratios)
    layer_c = dict(zip(blocks, scale([case.block_ratios[b] for b in blocks]), strict=True))
    removed = {}
    for kind in KINDS:
        own_c = scale([case.ratios[b + kind] for b in blocks])
        for b in blocks:
            ratio = layer_c[b] - sum(own_c) / len(own_c) + (1 - case.sparsity)
            removed[b + kind] = (1 - min(max(ratio, 0.0), 1.0)) * case.sizes[b + kind]
    return removed


@given(cases())
def test_mosaic_reference_is_its_formula(case: Case) -> None:
    counts = allocate.mosaic_reference(
        case.sizes, case.block_of, case.block_ratios, case.ratios, case.budget, case.deviation
    )
    for name, wanted in transcribed(case).items():
        assert 0 <= counts[name] <= case.sizes[name]
        # to the nearest whole parameter; sums in another order move a fraction by a few 2^-53
        assert abs(counts[name] - wanted) <= 0.5 + 1e-12 * case.sizes[name]


@given(cases(same_blocks=True))
def test_mosaic_reference_leaks_what_its_formula_leaks(case: Case) -> None:
    """``leak = sum_p w_p (mean(layer_c) - mean(own_c,p))`` of what is kept, whatever S is."""
    low, high = min(case.block_ratios.values()), max(case.block_ratios.values())
    width = 2 * case.deviation

    def mean(values: list[float], low: float, high: float) -> float:
        return 0.0 if high == low else sum(width * (v - low) / (high - low) for v in values) / len(values)

    leak = 0.0
    blocks = list(case.block_ratios)
    for kind in KINDS:
        own = [case.ratios[b + kind] for b in blocks]
        weight = case.sizes[blocks[0] + kind] * len(blocks) / case.total
        difference = mean(list(case.block_ratios.values()), low, high) - mean(own, min(own), max(own))
        leak += weight * difference
    if not width <= case.sparsity <= 1 - width:
        return  # clipped at 0 or 1, the formula does not hold
    counts = allocate.mosaic_reference(
        case.sizes, case.block_of, case.block_ratios, case.ratios, case.budget, case.deviation
    )
    kept_too_much = case.sparsity - sum(counts.values()) / case.total
    assert abs(kept_too_much - leak) <= 0.5 * len(case.sizes) / case.total + 1e-12


def test_mosaic_reference_warns_with_its_true_sparsity(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"b0.q": 1000, "b0.k": 1000, "b1.q": 1000, "b1.k": 1000, "b2.q": 1000, "b2.k": 1000}
    block_of = {name: name[:3] for name in sizes}
    own = {"b0.q": 0.0, "b1.q": 0.0, "b2.q": 1.0, "b0.k": 0.0, "b1.k": 0.0, "b2.k": 1.0}
    layer = {"b0.": 0.0, "b1.": 1.0, "b2.": 1.0}
    with caplog.at_level(logging.WARNING):
        counts = allocate.mosaic_reference(sizes, block_of, layer, own, 3000, 0.075)
    # mean(layer) = 0.1 and mean(own) = 0.05: 5 % more is kept everywhere
    assert sum(counts.values()) == 2700
    assert "-300 parameters" in caplog.text
    assert "true sparsity 0.4500, asked 0.5000" in caplog.text


@st.composite
def curved(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Callable[[float], float]], dict[str, float]]:
    """Projections whose error rises with sparsity: bent up, straight, bent down, or nothing at all."""
    names = [f"p{i}" for i in range(draw(st.integers(1, 6)))]
    powers = {name: draw(st.sampled_from([0.5, 1.0, 1.0, 2.0, 4.0])) for name in names}
    sizes = {name: draw(st.integers(1000, 5_000_000)) for name in names}
    curves = {name: (lambda s, power=power: s**power) for name, power in powers.items()}
    return sizes, curves, {name: draw(st.sampled_from([0.0, 1.0, 1.0]) | st.floats(1e-3, 1e3)) for name in names}


@given(curved(), st.floats(0, 1, exclude_max=True))
def test_by_curves(case: Any, sparsity: float) -> None:
    sizes, curves, weights = case
    total = sum(sizes.values())
    budget = round(sparsity * total)
    counts = allocate.by_curves(sizes, curves, weights, budget)
    assert sum(counts.values()) == budget
    assert all(0 <= k <= sizes[name] for name, k in counts.items())
    mean = budget / total
    if mean + 1e-9 < allocate.MOST_SPARSE:
        for name, k in counts.items():
            assert abs(k / sizes[name] - mean) <= allocate.CURVE_DEVIATION + 1 / sizes[name] + 1e-9


@given(curved(), st.floats(0.25, 0.7))
def test_by_curves_is_optimal_for_convex_curves(case: Any, sparsity: float) -> None:
    """No two projections gain by an exchange: what one more per cent costs here is no less than it saves there."""
    sizes, _, weights = case
    curves = {name: (lambda s, power=2 + i % 3: s**power) for i, name in enumerate(sizes)}
    total = sum(sizes.values())
    budget = round(sparsity * total)
    counts = allocate.by_curves(sizes, curves, weights, budget)
    step = 2 * allocate.CURVE_DEVIATION / (allocate.CURVE_POINTS - 1)  # curves are sampled so finely
    low, high = budget / total - allocate.CURVE_DEVIATION, budget / total + allocate.CURVE_DEVIATION

    def price(name: str, s: float) -> float:  # of one parameter at sparsity s: cost' / size
        return weights[name] * (curves[name](s + 1e-6) - curves[name](s - 1e-6)) / 2e-6 / sizes[name]

    targets = {name: k / sizes[name] for name, k in counts.items()}
    for giver, taker in itertools.permutations(sizes, 2):
        less, more = targets[giver] - step, targets[taker] + step
        if less > low and more < high:
            assert price(taker, more) >= price(giver, less) * (1 - 1e-6)


def test_by_curves_puts_the_rest_on_the_marginal_projection() -> None:
    """Straight curves: the dear ones stay at the lower bound, the cheap one takes what that leaves."""
    sizes = {"cheap": 9_000_000, "a": 500_000, "b": 500_000}
    weights = {"cheap": 9.0, "a": 2.0, "b": 2.0}
    counts = allocate.by_curves(sizes, dict.fromkeys(sizes, lambda s: s), weights, 5_000_000)
    assert counts == {"cheap": 4_700_000, "a": 150_000, "b": 150_000}

# SPDX-License-Identifier: Apache-2.0
"""The plan: units and zeros that add up to the budget, for any options and shapes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_model

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import UsageError
from mosaic_kernels.format import packed_bytes
from mosaic_kernels.models import PROJECTIONS, ModelAdapter
from mosaic_kernels.prune.composite import Plan, make_plan
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.sensitivity import Curve, RemovalCost, Sensitivity
from mosaic_kernels.prune.units import BlockShape, Units, plan_evenly

ADAPTER = ModelAdapter.of(random_model("qwen2", intermediate_size=100, num_attention_heads=6, num_key_value_heads=3))


def ranks(adapter: ModelAdapter = ADAPTER) -> Ranks:
    """Outlier ratios that differ from projection to projection."""
    by_projection = {name: {5.0: 0.001 * (i * 7 % 11)} for i, name in enumerate(adapter.sizes())}
    by_block = {block.prefix: {5.0: 0.001 * (block.index * 2 % 3)} for block in adapter.blocks}
    curves = {name: Curve(0.1 + 0.01 * i, 3.0, -0.1 * (i % 3)) for i, name in enumerate(by_projection)}
    weights = {name: 1.0 + i % 5 for i, name in enumerate(by_projection)}
    removal = {
        block.prefix: (
            RemovalCost((0, 1, 2), (0.0, 0.3, 1.0 + block.index)),
            RemovalCost((0, 50, 99), (0.0, 0.1 * (1 + block.index), 2.0)),
        )
        for block in adapter.blocks
    }
    return Ranks("m", "c", 1, by_projection, by_block, Sensitivity(curves, weights, False, removal))


def require_consistent(plan: Plan, adapter: ModelAdapter = ADAPTER) -> None:
    assert plan.prunable == adapter.prunable_parameters
    assert plan.structured_removed + sum(plan.zeros.values()) == plan.removed
    assert plan.shapes.keys() == plan.zeros.keys() == plan.original_shapes.keys() == set(adapter.sizes())
    for block, units in zip(adapter.blocks, plan.units, strict=True):
        shapes = {name: plan.shapes[block.full_name(name)] for name in PROJECTIONS}
        kv = (block.key_value_heads - units.groups) * block.head_dim
        q = kv * block.query_heads // block.key_value_heads
        assert shapes["self_attn.k_proj"] == shapes["self_attn.v_proj"] == (kv, 64)
        assert shapes["self_attn.q_proj"] == (q, 64) == shapes["self_attn.o_proj"][::-1]
        width = block.channels - units.channels
        assert shapes["mlp.gate_proj"] == shapes["mlp.up_proj"] == (width, 64) == shapes["mlp.down_proj"][::-1]
    for name, (rows, columns) in plan.shapes.items():
        assert 0 <= plan.zeros[name] <= rows * columns
    weighted = sum(plan.target(name) * o * i for name, (o, i) in plan.original_shapes.items())
    assert weighted == pytest.approx(plan.removed, rel=1e-12)


@given(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["unstructured", "composite", "auto"]),
    st.sampled_from(["uniform", "owl", "pod", "curve"]),
    st.floats(0, 1) | st.none(),
    st.sampled_from([1, 8, 32]),
)
def test_the_budget_is_met_exactly(
    sparsity: float, category: Any, policy: Any, part: float | None, multiple: int
) -> None:
    share = None if part is None or category == "unstructured" else part * sparsity
    config = PruneConfig(
        sparsity=sparsity, category=category, policy=policy, structured_share=share, channel_multiple=multiple
    )
    plan = make_plan(ADAPTER, ranks(), config)
    require_consistent(plan)
    assert plan.removed == plan.budget == round(sparsity * ADAPTER.prunable_parameters)
    assert plan.structured_removed <= round(config.share * plan.prunable)


@given(st.floats(0, 1, exclude_max=True), st.sampled_from([1, 8, 32]), st.booleans())
def test_structured_removes_units_only(sparsity: float, multiple: int, by_cost: bool) -> None:
    plan = make_plan(
        ADAPTER,
        ranks() if by_cost else None,
        PruneConfig(sparsity=sparsity, category="structured", channel_multiple=multiple),
    )
    require_consistent(plan)
    assert not any(plan.zeros.values())
    # half a step of channels, unless as many units are gone as may go
    gone_at_most = all(u.groups == 2 and 100 - u.channels <= multiple for u in plan.units)
    step = 3 * 64 * multiple
    assert 2 * abs(plan.removed - plan.budget) <= step or gone_at_most


def test_nothing_is_removed_at_zero() -> None:
    for category in ("unstructured", "structured", "composite"):
        plan = make_plan(ADAPTER, ranks(), PruneConfig(sparsity=0, category=category))
        assert plan.removed == 0
        assert plan.shapes == plan.original_shapes


def test_the_default_share_is_a_third() -> None:
    plan = make_plan(ADAPTER, ranks(), PruneConfig(sparsity=0.6, policy="pod"))
    missing = 0.2 * plan.prunable - plan.structured_removed
    assert 0 <= missing < 3 * 64 * 8  # one step of channels
    assert plan.structured_removed > 0


def test_policies_differ_and_rank_as_they_say() -> None:
    found = ranks()
    plans = {
        policy: make_plan(ADAPTER, found, PruneConfig(category="unstructured", policy=policy))
        for policy in ("uniform", "owl", "pod", "curve", "mosaic-reference")
    }
    assert len({tuple(plan.zeros.values()) for plan in plans.values()}) == 5
    ratios = found.projection_ratios(5.0)
    targets = [plans["pod"].target(name) for name in sorted(ratios, key=ratios.__getitem__)]
    slack = 1 / min(ADAPTER.sizes().values())
    assert all(a >= b - 2 * slack for a, b in itertools.pairwise(targets))
    assert plans["mosaic-reference"].removed != plans["mosaic-reference"].budget


@pytest.mark.parametrize("policy", ["owl", "pod", "curve", "mosaic-reference"])
def test_a_policy_that_ranks_needs_ranks(policy: Any) -> None:
    with pytest.raises(UsageError, match=rf"policy {policy} needs a ranking"):
        make_plan(ADAPTER, None, PruneConfig(policy=policy))


def test_curves_need_a_ranking_that_holds_them() -> None:
    with pytest.raises(UsageError, match="needs error curves, which this ranking does not hold"):
        make_plan(ADAPTER, dataclasses.replace(ranks(), sensitivity=None), PruneConfig(policy="curve"))


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("2:4", 0.7), ("1:4", 0.8)])
def test_a_pattern_takes_its_share_of_every_projection(pattern: str, sparsity: float) -> None:
    n, m = map(int, pattern.split(":"))
    plan = make_plan(ADAPTER, None, PruneConfig(pattern=pattern, sparsity=sparsity))
    require_consistent(plan)
    assert plan.removed == plan.budget
    # whole units come in steps, of which a pattern leaves n of m weights: that much goes beyond the pattern
    further = {name: plan.zeros[name] * m - rows * columns * (m - n) for name, (rows, columns) in plan.shapes.items()}
    assert all(count >= 0 for count in further.values())
    assert sum(further.values()) < 3 * 64 * 8 * n
    if sparsity == (m - n) / m:
        assert not any(further.values())


def test_a_pattern_that_does_not_fit_names_the_projection() -> None:
    odd = ModelAdapter.of(random_model("llama", intermediate_size=42))
    with pytest.raises(UsageError, match=r"2:4 needs a multiple of 4 .*model.layers.0.mlp.down_proj has 42"):
        make_plan(odd, None, PruneConfig(category="unstructured", pattern="2:4"))


def test_bytes_are_those_of_the_smaller_form() -> None:
    plan = make_plan(ADAPTER, None, PruneConfig(category="unstructured", policy="uniform", sparsity=0.02))
    dense = 2 * plan.prunable
    # 2 % zeros save less than the bits cost: 1/16 in bf16
    assert plan.predicted_bytes(2) == dense == plan.predicted_bytes(2, packed=False)
    plan = make_plan(ADAPTER, None, PruneConfig(policy="uniform", sparsity=0.6))
    packed = sum(packed_bytes(o, i, o * i - plan.zeros[name], 2) for name, (o, i) in plan.shapes.items())
    assert plan.predicted_bytes(2) == packed
    assert plan.predicted_bytes(2, packed=False) == 2 * (plan.prunable - plan.structured_removed)


def test_the_plan_is_in_the_order_of_the_model() -> None:
    plan = make_plan(ADAPTER, ranks(), PruneConfig(policy="pod"))
    assert list(plan.shapes) == list(ADAPTER.sizes())
    assert all(re.fullmatch(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj", name) for name in plan.zeros)


def lost(shapes: list[BlockShape], units: list[Units]) -> int:
    return sum(
        u.groups * s.group_parameters + u.channels * s.channel_parameters for u, s in zip(units, shapes, strict=True)
    )


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[BlockShape], int, int]:
    hidden, head_dim, queries = draw(st.integers(1, 64)), draw(st.sampled_from([4, 16, 32])), draw(st.integers(1, 4))
    one = BlockShape(
        draw(st.integers(1, 8)), draw(st.integers(1, 200)), (2 * queries + 2) * head_dim * hidden, 3 * hidden
    )
    shapes = [one] * draw(st.integers(1, 6))
    total = sum(s.groups * s.group_parameters + s.channels * s.channel_parameters for s in shapes)
    return shapes, round(draw(st.floats(0, 1, exclude_max=True)) * total), draw(st.sampled_from([1, 2, 8, 64]))


def possible(shape: BlockShape, multiple: int) -> list[int]:
    """Numbers of channels that may go from a block of the dense width or less."""
    return [0, *(shape.channels - kept for kept in range(shape.channels - 1, 0, -1) if kept % multiple == 0)]


@given(plans())
def test_composite_plans_never_remove_too_much(plan: tuple[list[BlockShape], int, int]) -> None:
    shapes, budget, multiple = plan
    units = plan_evenly(shapes, budget, multiple, at_most=True)
    missing = budget - lost(shapes, units)
    assert missing >= 0
    for u, s in zip(units, shapes, strict=True):
        assert 0 <= u.groups < s.groups
        assert u.channels in possible(s, multiple)
    # what is missing is less than any step that is left
    for u, s in zip(units, shapes, strict=True):
        more = [c for c in possible(s, multiple) if c > u.channels]
        assert not more or missing < (more[0] - u.channels) * s.channel_parameters


@given(plans())
def test_structured_plans_come_nearest(plan: tuple[list[BlockShape], int, int]) -> None:
    """No block could take or give back a step of channels, or give up another group, and come nearer."""
    shapes, budget, multiple = plan
    units = plan_evenly(shapes, budget, multiple, at_most=False)
    missing = budget - lost(shapes, units)
    for u, s in zip(units, shapes, strict=True):
        assert 0 <= u.groups < s.groups
        options = possible(s, multiple)
        assert u.channels in options
        at = options.index(u.channels)
        for other in (*options[max(0, at - 1) : at], *options[at + 1 : at + 2]):
            assert abs(missing - (other - u.channels) * s.channel_parameters) >= abs(missing)
        if u.groups + 1 < s.groups:
            assert abs(missing - s.group_parameters) >= abs(missing)


@given(plans())
def test_blocks_are_treated_alike(plan: tuple[list[BlockShape], int, int]) -> None:
    """Blocks of one shape differ by one group and one step of channels at most."""
    shapes, budget, multiple = plan
    units = plan_evenly(shapes, budget, multiple, at_most=True)
    assert max(u.groups for u in units) - min(u.groups for u in units) <= 1
    options = possible(shapes[0], multiple)
    places = [options.index(u.channels) for u in units]
    assert max(places) - min(places) <= 1


@pytest.mark.parametrize("multiple", [1, 8, 16, 64])
def test_widths_are_multiples(multiple: int) -> None:
    shapes = [BlockShape(4, 704, 6 * 32 * 256, 3 * 256)] * 6
    for share in (0.05, 0.25, 0.6):
        total = sum(s.groups * s.group_parameters + s.channels * s.channel_parameters for s in shapes)
        for at_most in (True, False):
            for u in plan_evenly(shapes, round(share * total), multiple, at_most=at_most):
                assert (704 - u.channels) % multiple == 0

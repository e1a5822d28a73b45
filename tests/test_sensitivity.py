# SPDX-License-Identifier: Apache-2.0
"""Error curves, probes, and the allocation that follows from them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_model

from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import allocate
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.sensitivity import HALVES, Curve, Sensitivity, measure
from mosaic_kernels.prune.solvers import choose_solver

pytestmark = pytest.mark.usefixtures("one_thread")

# parameters of a projection, and the three constants of its curve
LAYERS = st.tuples(st.integers(1, 5000), st.floats(1e-6, 1), st.floats(1, 5), st.floats(-0.9, 0.5))
FAST = choose_solver("admm", "fast")


@given(st.floats(1e-6, 10), st.floats(0.2, 6), st.floats(-1, 1))
def test_a_curve_goes_through_its_points(scale: float, rise: float, fall: float) -> None:
    true = Curve(scale, rise, fall)
    found = Curve.through([(s, true(s)) for s in (0.5, 0.7, 0.9)])
    for s in (0.3, 0.5, 0.6, 0.7, 0.9):
        assert found(s) == pytest.approx(true(s), rel=1e-6)
    assert found(0) == 0


def measured() -> tuple[ModelAdapter, Sensitivity]:
    adapter = ModelAdapter.of(random_model(intermediate_size=64))
    tokens = torch.randint(96, (24, 32), generator=torch.Generator().manual_seed(1))
    return adapter, measure(adapter, tokens, FAST, zeros=True, units=True)


def test_measuring_leaves_the_model_as_it_was() -> None:
    before = random_model(intermediate_size=64).state_dict()
    adapter, found = measured()
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert set(found.curves) == set(found.weights) == set(adapter.sizes())


def test_errors_rise_and_halves_share_a_weight() -> None:
    adapter, found = measured()
    for curve in found.curves.values():
        errors = [curve(s) for s in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
        assert errors == sorted(errors)
        assert errors[0] > 0
        assert errors[-1] < 2
    for block in adapter.blocks:
        weights = [{found.weights[name] for name in adapter.sizes() if name.startswith(f"{block.prefix}.{part}")}
                   for part in ("self_attn", "mlp")]  # fmt: skip
        assert len(weights) == len(HALVES)
        assert all(len(part) == 1 and min(part) > 0 for part in weights)


def test_every_unit_costs_more_up_to_the_last_that_can_go() -> None:
    adapter, found = measured()
    for block in adapter.blocks:
        groups, channels = found.removal[block.prefix]
        assert groups.removed[-1] == block.key_value_heads - 1
        assert channels.removed[-1] == block.channels - 1
        for cost in (groups, channels):
            assert cost(0) == 0
            assert list(cost.costs) == sorted(cost.costs)


def test_measuring_one_part_keeps_the_other() -> None:
    adapter = ModelAdapter.of(random_model(intermediate_size=64))
    tokens = torch.randint(96, (24, 32), generator=torch.Generator().manual_seed(1))
    zeros = measure(adapter, tokens, FAST, zeros=True, units=False)
    assert not zeros.removal
    both = measure(adapter, tokens, FAST, zeros=False, units=True, per_projection=True, known=zeros)
    assert (both.curves, both.weights, both.per_projection) == (zeros.curves, zeros.weights, False)
    alone = measure(adapter, tokens, FAST, zeros=True, units=False, per_projection=True, known=both)
    assert alone.per_projection
    assert alone.removal == both.removal
    assert alone.weights != both.weights


def test_a_ranking_keeps_what_was_measured(tmp_path: Path) -> None:
    adapter, found = measured()
    projections = {name: {5.0: 0.1} for name in adapter.sizes()}
    blocks = {block.prefix: {5.0: 0.1} for block in adapter.blocks}
    ranks = Ranks("m", "c", 1, projections, blocks, found)
    ranks.save(tmp_path / "ranks.json")
    assert Ranks.load(tmp_path / "ranks.json", adapter, 5.0) == ranks
    fewer = replace(found, curves=dict(list(found.curves.items())[1:]))
    replace(ranks, sensitivity=fewer).save(tmp_path / "ranks.json")
    with pytest.raises(UsageError, match="error curves"):
        Ranks.load(tmp_path / "ranks.json", adapter, 5.0)


@given(
    st.lists(LAYERS, min_size=1, max_size=9),
    st.floats(0, 0.97),
)
def test_the_budget_is_exact(layers: list[tuple[int, float, float, float]], sparsity: float) -> None:
    sizes = {str(i): size for i, (size, *_) in enumerate(layers)}
    curves = {str(i): Curve(*constants) for i, (_, *constants) in enumerate(layers)}
    budget = round(sparsity * sum(sizes.values()))
    counts = allocate.by_curves(sizes, curves, dict.fromkeys(sizes, 1.0), budget)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[name] <= size for name, size in sizes.items())


def test_the_allocation_is_the_cheapest() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    curves = {"a": Curve(1.0, 3.0, -0.2), "b": Curve(0.2, 3.0, -0.2), "c": Curve(0.6, 2.0, 0.0)}
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}

    def cost(counts: dict[str, int]) -> float:
        return sum(weights[n] * curves[n](counts[n] / sizes[n]) for n in sizes)

    found = allocate.by_curves(sizes, curves, weights, 2400)
    grid = range(400, 801, 10)
    others = ({"a": a, "b": b, "c": 2400 - a - b} for a, b in itertools.product(grid, grid))
    best = min(cost(other) for other in others if 800 <= other["c"] <= 1600)
    assert cost(found) <= best * 1.005  # the sampled curves have 161 points
    assert found["b"] > found["a"]


def test_curves_know_a_projection_that_must_not_be_touched() -> None:
    sizes = dict.fromkeys("ab", 1000)
    curves = dict.fromkeys("ab", Curve(1.0, 2.0, 0.0))
    counts = allocate.by_curves(sizes, curves, {"a": 1.0, "b": 100.0}, 1000)
    assert counts["b"] < 400 < 600 < counts["a"]

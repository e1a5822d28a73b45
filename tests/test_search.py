# SPDX-License-Identifier: Apache-2.0
"""Search moves zeros, never their sum, and only to where the predictions suffer less."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_model

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import search as searching
from mosaic_kernels.prune.composite import Plan, make_plan
from mosaic_kernels.prune.search import Evolution, search
from mosaic_kernels.prune.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = Evolution(generations=4, offspring=4, rounds=((32, 2), (64, 1)), step=0.1)


def problem(**options: object) -> tuple[ModelAdapter, Plan, torch.Tensor]:
    adapter = ModelAdapter.of(random_model("qwen2"))
    plan = make_plan(adapter, None, PruneConfig(policy="uniform", sparsity=0.6, **options))  # type: ignore[arg-type]
    return adapter, plan, torch.randint(96, (12, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{"category": "unstructured"}, {"structured_share": 0.3}])
def test_the_budget_stays_and_the_model_too(options: dict[str, object]) -> None:
    adapter, plan, tokens = problem(**options)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    found = search(adapter, plan, tokens, 0, SHORT)
    assert found.removed == plan.removed == plan.budget
    assert found.units == plan.units
    assert found.shapes == plan.shapes
    assert options == {"category": "unstructured"} or any(units != Units() for units in plan.units)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    assert search(adapter, plan, tokens, 0, SHORT) == found


def test_what_it_keeps_is_better_on_the_tokens_that_judge(caplog: pytest.LogCaptureFixture) -> None:
    """A plan that spares an unimportant projection and ruins the others is mended."""
    adapter, plan, tokens = problem(category="unstructured")
    spared = "model.layers.1.mlp.up_proj"
    size = {name: rows * columns for name, (rows, columns) in plan.shapes.items()}
    zeros = {**plan.zeros, spared: 0}
    names = [name for name in zeros if name != spared]
    for i, name in enumerate(names):  # the others take its zeros over
        zeros[name] += plan.zeros[spared] * (i + 1) // len(names) - plan.zeros[spared] * i // len(names)
    bad = Plan(plan.units, plan.shapes, zeros, plan.original_shapes, plan.budget)
    judge = searching._Pool(adapter, bad, tokens).judge(64)
    found = search(adapter, bad, tokens, 1, Evolution(12, 8, ((64, 1),), 0.3, 2))
    assert found.removed == bad.removed
    assert all(0 <= count <= size[name] for name, count in found.zeros.items())
    assert judge(found.zeros) < judge(bad.zeros)


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=2, max_size=8))
def test_offspring_keep_the_sum(seed: int, layers: list[tuple[int, float]]) -> None:
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    zeros = {str(i): int(size * share) for i, (size, share) in enumerate(layers)}
    found = searching._mutated(zeros, sizes, Evolution(), random.Random(seed))
    assert sum(found.values()) == sum(zeros.values())
    assert all(0 <= count <= sizes[name] for name, count in found.items())

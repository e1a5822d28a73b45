# SPDX-License-Identifier: Apache-2.0
"""One sweep gives every level: losses telescope to the least-squares loss, levels are nested."""

from __future__ import annotations

import pytest
import torch
from test_structured import U, damped, features, problem, refit_loss, removed

from mosaic_kernels.prune.structured import select_units, sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("columns", "unit", "levels"), [(12, 1, [3, 7, 11]), (200, 1, [20, 90, 199]), (24, 3, [1, 4])])
def test_losses_of_batches_add_up_to_the_least_squares_loss(columns: int, unit: int, levels: list[int]) -> None:
    weight, gram = problem(5, columns, 1000)
    swept = sweep(weight, gram, unit, levels, "w")
    exact = damped(gram)
    condition = float(torch.linalg.cond(exact))
    assert swept.removed == sorted(swept.removed)
    for level in levels:
        wanted = refit_loss(weight, exact, features(removed(swept.kept[level]), unit))
        assert swept.losses[swept.removed.index(level)] == pytest.approx(wanted, rel=16 * columns * U * condition)
        assert len(removed(swept.kept[level])) == level


def test_levels_of_one_sweep_are_nested_and_as_good_as_sweeps_of_their_own() -> None:
    weight, gram = problem(32, 256, 1000)
    swept = sweep(weight, gram, 1, [64, 128, 192], "w")
    before: set[int] = set()
    for level in (64, 128, 192):
        gone = set(removed(swept.kept[level]))
        assert before < gone
        before = gone
        alone = refit_loss(weight, damped(gram), removed(select_units(weight, gram, 1, level, "w")))
        assert refit_loss(weight, damped(gram), list(gone)) <= 1.02 * alone

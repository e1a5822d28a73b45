# SPDX-License-Identifier: Apache-2.0
"""Solvers against their own textbooks, with exact counts whatever the input is like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers import SOLVERS, Target, keep_all, solve
from mosaic_kernels.prune.solvers.sparsegpt import inverse_factor

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


def statistics_of(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[-1], x.device, with_gram=True)
    found.add(x)
    return found.finish("x")


def problem(
    rows: int = 24, columns: int = 40, tokens: int = 200, seed: int = 0, decades: float = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs whose sizes span ``decades``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.5
    scale = torch.logspace(-decades / 2, decades / 2, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(tokens, columns, generator=generator) @ mix.T * scale
    return torch.randn(rows, columns, generator=generator), x


def output_error(weight: torch.Tensor, solved: torch.Tensor, x: torch.Tensor) -> float:
    """``‖W X - W' X‖² / ‖W X‖²`` in float64."""
    dense = x.double() @ weight.double().T
    return float((x.double() @ solved.double().T - dense).square().sum() / dense.square().sum())


def textbook_sparsegpt(
    weight: torch.Tensor, x: torch.Tensor, remove: int, group: tuple[int, int] | None, block: int = 128
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2301.00774 in float64, one column at a time, with an explicit inverse."""
    weight, x = weight.double().clone(), x.double()
    columns = weight.shape[1]
    gram = x.T @ x / len(x)
    dead = gram.diagonal() == 0
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    if group is not None:
        block = block // group[1] * group[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        keep = torch.ones_like(weight[:, start:end], dtype=torch.bool)
        if group is None:
            score = (weight[:, start:end] / factor.diagonal()[start:end]) ** 2
            score[:, dead[start:end]] = 0
            count = remove * end // columns - remove * start // columns
            keep.view(-1)[score.flatten().argsort(stable=True, descending=True)[score.numel() - count :]] = False
        for j in range(start, end):
            if group is not None and j % group[1] == 0:
                n, m = group
                score = (weight[:, j : j + m] / factor.diagonal()[j : j + m]) ** 2
                for row in range(len(weight)):
                    best = score[row].argsort(stable=True, descending=True)[:n]
                    keep[row, j - start : j - start + m] = False
                    keep[row, j - start + best] = True
            error = torch.where(keep[:, j - start], 0.0, weight[:, j]) / factor[j, j]
            for i in range(j, columns):
                weight[:, i] -= error * factor[j, i]
            weight[~keep[:, j - start], j] = 0
    return weight


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [
        (24, 16, 100),  # one short block
        (5, 128, 300),  # one whole block
        (8, 200, 400),  # a second, short one
        (1, 40, 10),  # one row, fewer tokens than features
        (24, 1, 5),  # one feature
    ],
)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_sparsegpt_is_the_textbook(rows: int, columns: int, tokens: int, sparsity: float) -> None:
    weight, x = problem(rows, columns, tokens)
    remove = round(sparsity * weight.numel())
    solved = solve(SOLVERS["sparsegpt"], weight, statistics_of(x), Target(remove), "w")
    wanted = textbook_sparsegpt(weight, x, remove, None)
    assert int((solved == 0).sum()) == remove
    assert output_error(weight, solved, x) == pytest.approx(output_error(weight, wanted, x), rel=1e-4)


@pytest.mark.parametrize("group", [(2, 4), (1, 4), (3, 10)])
@pytest.mark.parametrize(("rows", "columns"), [(6, 40), (3, 160)])
def test_sparsegpt_with_a_pattern_is_the_textbook(rows: int, columns: int, group: tuple[int, int]) -> None:
    weight, x = problem(rows, columns)
    n, m = group
    remove = weight.numel() // m * (m - n)
    solved = solve(SOLVERS["sparsegpt"], weight, statistics_of(x), Target(remove, group), "w")
    wanted = textbook_sparsegpt(weight, x, remove, group)
    assert output_error(weight, solved, x) == pytest.approx(output_error(weight, wanted, x), rel=1e-4)


@pytest.mark.parametrize("columns", [1, 16, 130])
def test_inverse_factor_is_that_of_the_inverse(columns: int) -> None:
    _, x = problem(1, columns)
    gram = statistics_of(x).mean_gram
    factor = inverse_factor(gram, "w").double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    # UᵀU = A⁻¹; Cholesky and the triangular solve are each off by O(n u) in the norm of A, amplified by its condition
    condition = float(torch.linalg.cond(damped))
    identity = torch.eye(columns, dtype=torch.float64)
    assert float((damped @ factor.T @ factor - identity).norm()) <= 8 * columns * 2.0**-24 * condition


def test_sparsegpt_beats_wanda_beats_magnitude() -> None:
    """On correlated inputs of different sizes, what each method adds must show."""
    weight, x = problem(64, 128, 1000, decades=1)
    errors = [
        output_error(weight, solve(SOLVERS[name], weight, statistics_of(x), Target(weight.numel() // 2), name), x)
        for name in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors[0] < errors[1] < errors[2]


def test_magnitude_is_the_smallest() -> None:
    weight, x = problem()
    solved = solve(SOLVERS["magnitude"], weight, statistics_of(x), Target(300), "w")
    wanted = weight.clone()
    wanted.view(-1)[weight.abs().flatten().argsort()[:300]] = 0
    assert torch.equal(solved, wanted)


@pytest.mark.parametrize("remove", [0, 1, 23, 24, 300, 949, 960])
def test_wanda_is_the_smallest_of_every_row(remove: int) -> None:
    weight, x = problem()
    solved = solve(SOLVERS["wanda"], weight, statistics_of(x), Target(remove), "w")
    wanted = weight.clone()
    for row, scores in enumerate(weight.abs() * x.norm(dim=0)):
        wanted[row, scores.argsort()[: remove // 24 + (row < remove % 24)]] = 0
    assert torch.equal(solved, wanted)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("group", [(2, 4), (1, 4), (4, 8), (3, 10)])
def test_a_pattern_holds_in_every_group(name: str, group: tuple[int, int]) -> None:
    n, m = group
    weight, x = problem(7, 160)
    solved = solve(SOLVERS[name], weight, statistics_of(x), Target(7 * 160 // m * (m - n), group), "w")
    assert bool(((solved != 0).view(7, -1, m).sum(-1) == n).all())


def awkward(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight, x = problem(12, 40, decades=0 if kind == "duplicate features" else 2)
    if kind == "dead inputs":
        x[:, [0, 7, 39]] = 0
    elif kind == "all inputs dead":
        x[:] = 0
    elif kind == "duplicate features":
        x[:, 20:] = x[:, :20]
    elif kind == "one token":
        x = x[:1]
    elif kind == "zero rows":
        weight[::2] = 0
    elif kind == "zero weight":
        weight[:] = 0
    elif kind == "equal scores":
        weight, x = torch.ones_like(weight), torch.ones_like(x)
    elif kind == "huge scales":
        x *= torch.logspace(-8, 8, 40)
    return weight, x


AWKWARD = (
    "dead inputs", "all inputs dead", "duplicate features", "one token", "zero rows", "zero weight", "equal scores",
    "huge scales",
)  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_exact_on_awkward_input(name: str, kind: str, dtype: torch.dtype) -> None:
    weight, x = awkward(kind)
    weight = weight.to(dtype)
    for remove in (0, 1, 240, 479, 480):
        solved = solve(SOLVERS[name], weight, statistics_of(x), Target(remove), "w")
        assert solved.dtype == dtype
        assert int((solved == 0).sum()) == remove
        assert bool(torch.isfinite(solved).all())
        if remove == 0:
            assert torch.equal(solved[weight != 0], weight[weight != 0])
    solved = solve(SOLVERS[name], weight, statistics_of(x), Target(240, (2, 4)), "w")
    assert bool(((solved != 0).view(12, -1, 4).sum(-1) == 2).all())
    assert bool(torch.isfinite(solved).all())


@given(st.data())
def test_counts_are_exact(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 140))
    weight, x = problem(rows, columns, data.draw(st.integers(1, 30)), data.draw(st.integers(0, 9)))
    weight = weight.to(data.draw(st.sampled_from(DTYPES)))
    remove = data.draw(st.integers(0, weight.numel()))
    name = data.draw(st.sampled_from(sorted(SOLVERS)))
    before = weight.clone()
    solved = solve(SOLVERS[name], weight, statistics_of(x), Target(remove), "w")
    assert int((solved == 0).sum()) == remove
    assert torch.equal(weight, before)  # the dense weight is not touched


def test_dead_inputs_go_first() -> None:
    weight, x = awkward("dead inputs")
    weight[:, [0, 7, 39]] = 100.0  # large, and worth nothing
    for name in ("sparsegpt", "wanda"):
        solved = solve(SOLVERS[name], weight, statistics_of(x), Target(3 * 12), name)
        assert output_error(weight, solved, x) <= 1e-12
        assert int((solved[:, [0, 7, 39]] == 0).sum()) == 36


def test_duplicates_take_over_for_each_other() -> None:
    """With every feature twice, half of the weights are redundant: SparseGPT finds that out."""
    weight, x = awkward("duplicate features")
    solved = solve(SOLVERS["sparsegpt"], weight, statistics_of(x), Target(240), "w")
    wanted = textbook_sparsegpt(weight, x, 240, None)
    error = output_error(weight, solved, x)
    assert error == pytest.approx(output_error(weight, wanted, x), rel=1e-4)
    assert error < 0.5 * output_error(weight, solve(SOLVERS["wanda"], weight, statistics_of(x), Target(240), "w"), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_values_that_round_to_zero_stay_counted(dtype: torch.dtype) -> None:
    """Values below the smallest of the dtype: they may not turn into zeros that nobody planned."""
    weight = torch.full((4, 8), 1e-30 if dtype == torch.float16 else 1e-43)
    weight[:, ::2] = 0.5

    def keep_everything(w: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.ones_like(w, dtype=torch.bool)
        keep[0, 0] = False
        return weight / (1 if dtype == torch.float16 else 1e3), keep

    solver = SOLVERS["magnitude"].__class__(keep_everything, with_gram=False)
    solved = solve(solver, weight.to(dtype), statistics_of(torch.randn(3, 8)), Target(1), "w")
    assert int((solved == 0).sum()) == 1
    assert bool((solved[:, 1::2] == SMALLEST[dtype]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_all_fills_zeros_and_nothing_else(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 7).to(dtype)
    weight[2, 3] = 0
    filled = keep_all(weight)
    assert int((filled == 0).sum()) == 0
    assert float(filled[2, 3]) == SMALLEST[dtype]
    filled[2, 3] = 0
    assert torch.equal(filled, weight)


def test_an_overflow_is_named() -> None:
    weight = torch.tensor([[6e4, 6e4]], dtype=torch.float16)
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # what one loses the other gains: 120000
    with pytest.raises(NonFiniteError, match=r"block 1: .*float16; run with --dtype float32"):
        solve(SOLVERS["sparsegpt"], weight, statistics_of(x), Target(1), "block 1")


@pytest.mark.parametrize("name", SOLVERS)
def test_two_runs_are_equal_whatever_the_layout(name: str) -> None:
    weight, x = problem(16, 136)
    target = Target(1000)
    first, again = (solve(SOLVERS[name], weight, statistics_of(x), target, "w") for _ in range(2))
    assert torch.equal(first, again)
    for same in (torch.stack([weight, -weight], dim=-1)[..., 0], weight.T.contiguous().T):
        solved = solve(SOLVERS[name], same, statistics_of(x), target, "w")
        assert int((solved == 0).sum()) == 1000
        assert output_error(weight, solved, x) == pytest.approx(output_error(weight, first, x), rel=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("remove", [0, 1, 7 * 300 // 2, 7 * 300 - 4])
def test_rows_lose_equally_many_over_many_blocks_of_columns(solver: str, remove: int) -> None:
    generator = torch.Generator().manual_seed(4)
    found = InputStatistics(300, torch.device("cpu"), with_gram=True)
    found.add(torch.randn(400, 300, generator=generator))
    weight = torch.randn(7, 300, generator=generator)
    pruned = solve(SOLVERS[solver], weight, found.finish("x"), Target(remove, per_row=True), "w")
    per_row = (pruned == 0).sum(1)
    assert int(per_row.sum()) == remove
    assert int(per_row.max() - per_row.min()) <= 1

# SPDX-License-Identifier: Apache-2.0
"""ADMM: its refit is the least-squares optimum on the mask, and its masks beat SparseGPT's by the promised margin."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_solvers import output_error, problem, statistics_of

from mosaic_kernels.prune.solvers import SOLVERS, Target, choose_solver, solve
from mosaic_kernels.prune.solvers.admm import refit_on_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def power_law_layer(
    seed: int, rows: int = 192, columns: int = 256, tokens: int = 8192
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs with a power-law spectrum and a few outlier channels, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    x = torch.randn(tokens, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.75 @ basis.T
    x[:, torch.randperm(columns, generator=generator)[:4]] *= 10
    return torch.randn(rows, columns, generator=generator), x


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8])
def test_relative_output_error_against_sparsegpt(sparsity: float) -> None:
    ratios = []
    for seed in range(3):
        weight, x = power_law_layer(seed)
        target, statistics = Target(round(sparsity * weight.numel())), statistics_of(x)
        errors = {
            name: output_error(weight, solve(SOLVERS[name], weight, statistics, target, name), x)
            for name in ("admm", "sparsegpt")
        }
        ratios.append(errors["admm"] / errors["sparsegpt"])
    assert sorted(ratios)[1] <= 0.55


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_qualities_are_in_order(sparsity: float) -> None:
    weight, x = power_law_layer(7)
    target, statistics = Target(round(sparsity * weight.numel())), statistics_of(x)
    errors = [
        output_error(weight, solve(solver, weight, statistics, target, "w"), x)
        for solver in (*(choose_solver("admm", q) for q in ("best", "default", "fast")), SOLVERS["sparsegpt"])
    ]
    assert errors == sorted(errors)


def test_refit_is_least_squares_on_the_mask() -> None:
    weight, x = problem(rows=6, columns=30, tokens=400)
    hessian = (x.double().T @ x.double() / len(x)).float()
    scale = hessian.diagonal().sqrt()
    hessian = hessian / scale / scale.unsqueeze(1) + 0.01 * torch.eye(30)
    dense, keep = weight * scale, torch.rand(6, 30) < 0.4
    found = refit_on_mask(dense * keep, dense, hessian, keep, steps=200)
    exact = torch.zeros(6, 30, dtype=torch.float64)
    for row in range(6):  # the optimum has no gradient on the mask: H_KK a = (v H)_K
        inside = keep[row]
        right = (dense[row].double() @ hessian.double())[inside]
        exact[row, inside] = torch.linalg.solve(hessian.double()[inside][:, inside], right)
    assert not bool(found[~keep].any())
    # fp32 conjugate gradients stop improving at eps times the condition number
    limit = torch.finfo(torch.float32).eps * float(torch.linalg.cond(hessian.double()))
    assert float((found.double() - exact).norm() / exact.norm()) <= limit


def test_more_refit_steps_never_hurt() -> None:
    weight, x = power_law_layer(3)
    hessian = x.T @ x / len(x)
    hessian.diagonal().mul_(1.01)
    keep = torch.rand_like(weight) < 0.5

    def loss(solution: torch.Tensor) -> float:
        change = (solution - weight).double()
        return float(((change @ hessian.double()) * change).sum())

    losses = [loss(refit_on_mask(weight * keep, weight, hessian, keep, steps)) for steps in (0, 1, 3, 10, 30)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_a_solve_of_the_widest_projection_of_7b_takes_less_than_6_gib() -> None:
    """Measured at a quarter of 4096 x 11008: everything that is held grows with the product of two widths."""
    script = """
import resource, torch
from mosaic_kernels.prune.pair import PairStatistics, dense_target
from mosaic_kernels.prune.solvers import Solver, Target, solve
from mosaic_kernels.prune.solvers.admm import Schedule, admm

features, rows = 2752, 1024
weight, x, drift = torch.randn(rows, features).bfloat16(), torch.randn(64, features).bfloat16(), torch.randn(64, rows)
torch.linalg.cholesky(torch.eye(64))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
found = PairStatistics(features, features, rows, weight.device)
found.add_pair(x, x, drift)
wanted = dense_target(weight.float(), weight.float(), found.finish("w"), "w")
short = Schedule(steps=2, ramp=1, penalties=(1.0,), refit_steps=2)
solve(Solver(admm(short), with_gram=True, two_streams=True), wanted, found, Target(weight.numel() // 2), "w")
print(peak() - before)
"""
    kibibytes = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 16 * kibibytes * 1024 <= 6 << 30

# SPDX-License-Identifier: Apache-2.0
"""Input statistics against float64, and the damping that makes any Gram matrix invertible."""

from __future__ import annotations

import logging

import pytest
import torch

from mosaic_kernels.errors import MosaicError, NonFiniteError
from mosaic_kernels.prune.gram import InputStatistics, damped_cholesky, jacobi_ridge, mean_ridge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U = 2.0**-24  # unit roundoff of fp32


def gram_error_bound(x: torch.Tensor) -> torch.Tensor:
    """A sum of n rounded products is off by at most (n + 1) u times the sum of their magnitudes."""
    rows = x.flatten(0, -2).double().abs()
    return (rows.shape[0] + 1) * U * (rows.T @ rows)


def statistics_of(*parts: torch.Tensor, with_gram: bool = True) -> InputStatistics:
    found = InputStatistics(parts[0].shape[-1], parts[0].device, with_gram=with_gram)
    for part in parts:
        found.add(part)
    return found.finish("this input")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 17), (1, 1, 4), (2, 8, 1), (0, 3, 4)])
def test_sums_equal_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    exact = x.flatten(0, -2).double()
    found = statistics_of(x)
    assert found.gram is not None
    assert found.tokens == shape[0] * shape[1]
    error = (found.gram.double() - exact.T @ exact).abs()
    assert bool((error <= gram_error_bound(x)).all())
    mean = found.mean_gram * max(1, found.tokens)
    assert bool(((mean - found.gram).abs() <= 2 * U * found.gram.abs()).all())

    norms = statistics_of(x, with_gram=False).column_norms
    wanted = exact.square().sum(0).sqrt()
    # squares and their sum in fp32 at worst, then a root
    assert bool(((norms - wanted).abs() <= (shape[0] * shape[1] + 3) * U * wanted).all())


def test_batches_add_up() -> None:
    parts = torch.randn(4, 6, 9).split([1, 2, 1])
    found, whole = statistics_of(*parts), statistics_of(torch.cat(parts))
    assert found.tokens == whole.tokens == 24
    assert found.gram is not None
    assert whole.gram is not None
    assert bool(((found.gram - whole.gram).abs() <= 2 * gram_error_bound(torch.cat(parts))).all())
    assert torch.equal(found.column_norms, found.gram.diagonal().double().sqrt().float())


def test_non_contiguous_input() -> None:
    x = torch.randn(4, 7, 10)[:, ::2, 1::3]
    for with_gram in (True, False):
        a = statistics_of(x, with_gram=with_gram)
        b = statistics_of(x.contiguous(), with_gram=with_gram)
        assert torch.equal(a.square_sums, b.square_sums)


@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_named(bad: float, with_gram: bool) -> None:
    x = torch.randn(2, 3, 8)
    x[1, 2, 5] = bad
    with pytest.raises(NonFiniteError, match=r"this input .* feature 5: .*--dtype float32"):
        statistics_of(x, with_gram=with_gram)


def test_norms_alone_give_no_gram() -> None:
    with pytest.raises(MosaicError, match="only column norms"):
        _ = statistics_of(torch.randn(1, 2, 3), with_gram=False).mean_gram


def test_a_definite_matrix_is_damped_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(50, 8)
    gram = x.T @ x / 50
    ridge = jacobi_ridge(gram)
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(gram, ridge, 0.01, "p").double()
    assert not caplog.records
    wanted = gram.double() + 0.01 * torch.diag(ridge).double()
    # Higham, Accuracy and Stability, theorem 10.3: |L Lᵀ - A| <= gamma_(n+1) |L| |Lᵀ|, and one rounding of the sum
    bound = 2 * 10 * U * (factor.abs() @ factor.abs().T)
    assert bool(((factor @ factor.T - wanted).abs() <= bound).all())


def test_damping_rises_until_it_holds_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # smallest eigenvalue -0.5: needs more than 0.5
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(gram, torch.ones(2), 0.01, "block 3")
    assert [record.getMessage() for record in caplog.records] == [
        "block 3: Gram matrix is not positive definite at damping 0.01; trying 0.1",
        "block 3: Gram matrix is not positive definite at damping 0.1; trying 1",
    ]
    assert torch.equal(factor, torch.linalg.cholesky(gram + torch.eye(2)))


def test_a_hopeless_matrix_is_an_error() -> None:
    with pytest.raises(MosaicError, match=r"block 3: .* more --samples"):
        damped_cholesky(torch.diag(torch.tensor([1.0, -100.0])), torch.ones(2), 0.01, "block 3")
    with pytest.raises(MosaicError, match="block 3"):
        damped_cholesky(torch.full((2, 2), float("nan")), torch.ones(2), 0.01, "block 3")


def test_ridges_are_positive_whatever_is_dead() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 2.0, 0.0]))
    assert mean_ridge(gram).tolist() == [1.5] * 4
    assert jacobi_ridge(gram).tolist() == pytest.approx([4.0, 1.5e-4, 2.0, 1.5e-4], rel=2 * U)
    dead = torch.zeros(3, 3)
    assert mean_ridge(dead).tolist() == [1.0] * 3
    assert bool((jacobi_ridge(dead) > 0).all())
    assert bool(torch.isfinite(damped_cholesky(dead, jacobi_ridge(dead), 0.01, "p")).all())

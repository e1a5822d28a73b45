# SPDX-License-Identifier: Apache-2.0
"""What solvers do between two products: in place, in one pass, and as the reference does it in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from guarded import Guarded
from torch import Tensor

from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import KernelError
from mosaic_kernels.ops import reference

LEVELS = ("scalar", "avx2", "avx512", "amx")
BEST = _C_cpu.isa()
EPS = torch.finfo(torch.float32).eps

# nothing, one, off a vector by one, several vectors, enough for several chunks (65536 elements)
SHAPES = [(0, 5), (3, 0), (1, 1), (5, 33), (4, 128), (9, 515), (300, 1001)]


@pytest.fixture(params=("reference", *LEVELS[: LEVELS.index(BEST) + 1]))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    native = request.param != "reference"
    if native:
        _C_cpu.set_isa(request.param)
    with ops.use_backend("cpu" if native else "reference"):
        yield request.param
    _C_cpu.set_isa(BEST)


def guarded(tensor: Tensor) -> Tensor:
    return Guarded(tensor).view()


def close(found: Tensor, exact: Tensor, terms: Tensor) -> bool:
    """Whether ``found`` is ``exact`` but for a few roundings of ``terms``, the sizes of what was added up."""
    return bool(((found.double() - exact).abs() <= 8 * EPS * terms.double()).all())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_proposal_is_split(
    backend: str, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosaic_kernels.ops.threads._FORCED_THREADS", threads)
    proposal, gradient, keep = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.5
    dual = guarded(proposal)
    target = ops.admm_step(dual, guarded(keep), guarded(gradient), 0.3)
    assert torch.equal(dual, torch.where(keep, 0, proposal))
    kept = torch.where(keep, proposal, 0)
    exact = gradient.double() + 0.3 * (kept.double() - dual.double())
    assert close(target, exact, gradient.abs() + proposal.abs())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_of_conjugate_gradients(
    backend: str, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosaic_kernels.ops.threads._FORCED_THREADS", threads)
    keep = torch.rand(shape) < 0.5
    solution, residual, image = torch.randn(shape), torch.randn(shape) * keep, torch.randn(shape)
    direction = residual + 0.1 * image * keep
    image = direction + 0.1 * image  # so that the curvature is positive, and not the difference of large sums
    energy = residual.square().sum(1, keepdim=True)
    state = [guarded(tensor) for tensor in (solution, residual, direction, energy)]
    ops.cg_step(*state, guarded(image), guarded(keep))  # type: ignore[call-arg]
    exact = [tensor.double() for tensor in (solution, residual, direction, energy)]
    reference.cg_step(*exact, image.double(), keep)  # type: ignore[call-arg]
    # sums of squares are relatively exact to the square root of their length, and so are quotients of them
    size = 1 + shape[1] ** 0.5
    terms = solution.abs() + residual.abs() + direction.abs() + image.abs()
    for found, wanted in zip(state[:3], exact[:3], strict=True):
        assert close(found, wanted, size * 4 * terms)
    assert close(state[3], exact[3], size * (energy + exact[3]))
    assert not bool(state[1][~keep].any())


def test_a_row_that_is_solved_stays(backend: str) -> None:
    solution, zeros, keep = torch.randn(2, 40), torch.zeros(2, 40), torch.ones(2, 40, dtype=torch.bool)
    state = [solution.clone(), zeros.clone(), zeros.clone(), torch.zeros(2, 1)]
    ops.cg_step(*state, zeros, keep)  # type: ignore[call-arg]
    assert torch.equal(state[0], solution)
    assert not any(bool(tensor.any()) for tensor in state[1:])


def test_what_does_not_fit_is_refused(backend: str) -> None:
    a, keep = torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(KernelError, match=r"gradient must be fp32 \[2, 6\], got torch.float64 \[2, 6\]"):
        ops.admm_step(a, keep, a.double(), 1.0)
    with pytest.raises(KernelError, match="proposal is updated in place and must be contiguous"):
        ops.admm_step(torch.ones(6, 2).T, keep, a, 1.0)
    with pytest.raises(KernelError, match=r"keep must be bool \[2, 6\]"):
        ops.admm_step(a, keep[:1], a, 1.0)
    with pytest.raises(KernelError, match=r"energy must be fp32 \[2, 1\]"):
        ops.cg_step(a.clone(), a.clone(), a.clone(), torch.ones(2), a, keep)
    with pytest.raises(KernelError, match="direction must be fp32"):
        ops.cg_step(a.clone(), a.clone(), a[:1].clone(), torch.ones(2, 1), a, keep)


def test_strided_inputs_are_read_as_they_are(backend: str) -> None:
    gradient, keep = torch.randn(6, 2).T, (torch.rand(6, 2) < 0.5).T
    proposal = torch.randn(2, 6)
    one, other = proposal.clone(), proposal.clone()
    target = ops.admm_step(one, keep, gradient, 2.0)
    assert torch.equal(target, ops.admm_step(other, keep.contiguous(), gradient.contiguous(), 2.0))
    assert torch.equal(one, other)


def test_the_operators_keep_torchs_contract() -> None:
    def matrix() -> Tensor:
        return torch.randn(4, 8)

    keep = torch.rand(4, 8) < 0.5
    torch.library.opcheck(torch.ops.mosaic.admm_step, (matrix(), keep, matrix(), 0.5))
    torch.library.opcheck(torch.ops.mosaic.cg_step, (matrix(), matrix(), matrix(), torch.rand(4, 1), matrix(), keep))

# SPDX-License-Identifier: Apache-2.0
"""What a projection sees: the Gram matrix, or only the column norms, of its calibration inputs.

All of it stays on the model's device; the host reads one flag per input, that its sums are finite.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.errors import MosaicError, NonFiniteError
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.timing import timed

logger = logging.getLogger(__name__)

MAX_DAMPING = 10.0

# Columns of a Gram that are added to at once. A strip of 1024 columns and 4096 rows is one wave of 128 x 256 tiles
# for a GPU of 132 processors; on a CPU narrow strips waste the least below the diagonal.
GRAM_STRIP = {"cpu": 128, "cuda": 1024}
HALF = (torch.bfloat16, torch.float16)

# Share of each feature's own energy added to the diagonal; below so many tokens per feature the Gram is
# noise to a good part, and ten times as much is added.
DAMPING, DAMPING_FEW_TOKENS = 0.01, 0.1
FEW_TOKENS_PER_FEATURE = 16


class InputStatistics:
    """Running sums over the inputs of one projection, or of several that share an input.

    Attributes:
        tokens: number of rows seen.
        square_sums: ``float64 [features]``.
        sums: ``float64 [features]``; only beside a Gram.
        gram: ``float32 [features, features]``, the sum of outer products, or ``None``.
    """

    def __init__(self, features: int, device: torch.device, *, with_gram: bool) -> None:
        self.tokens = 0
        self.square_sums = torch.zeros(features, dtype=torch.float64, device=device)
        self.sums = torch.zeros(features, dtype=torch.float64, device=device)
        self.gram = torch.zeros(features, features, device=device) if with_gram else None

    @timed("gram")
    def add(self, x: Tensor) -> None:
        """Count the rows of ``x [..., features]`` in."""
        rows = x.detach().flatten(0, -2)
        self.tokens += rows.shape[0]
        if self.gram is None:
            self.square_sums += ops.column_square_sums(rows)
        else:
            rows = operand(rows)
            self.sums += rows.sum(0, dtype=torch.float32)
            add_outer_products(self.gram, rows)

    def finish(self, name: str, team: Team = ALONE) -> InputStatistics:
        """Add up what every process has seen, and check it; ``name`` says whose input this is.

        Raises:
            NonFiniteError: an activation was NaN or infinite, or its square overflowed.
        """
        self.tokens = team.total(self.tokens)
        team.sum_(*self._running_sums())
        if self.gram is not None:
            mirror(self.gram)
            self.square_sums = self.gram.diagonal().double()
        if not bool(torch.isfinite(self.square_sums).all()):
            feature = int((~torch.isfinite(self.square_sums)).nonzero()[0])
            raise NonFiniteError(
                f"the input of {name} is NaN or infinite in feature {feature}: the model overflows on this text; "
                "check its weights, or run with --dtype float32"
            )
        return self

    def _running_sums(self) -> list[Tensor]:
        return [self.square_sums] if self.gram is None else [self.sums, self.gram]

    @property
    def column_norms(self) -> Tensor:
        """L2 norm of each feature over all tokens, ``float32 [features]``."""
        return self.square_sums.sqrt().float()

    @property
    def damping(self) -> float:
        """Ridge for problems on this Gram, as a share of each feature's energy."""
        few = self.tokens < FEW_TOKENS_PER_FEATURE * self.square_sums.numel()
        return DAMPING_FEW_TOKENS if few else DAMPING

    @property
    def mean_gram(self) -> Tensor:
        """``X Xᵀ / tokens``, ``float32 [features, features]``."""
        if self.gram is None:
            raise MosaicError("this solver needs Gram matrices but only column norms were collected")
        return self.gram / max(1, self.tokens)


def centred(statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """Mean Gram of the inputs less their mean, and that mean, both fp32."""
    mean = (statistics.sums / max(1, statistics.tokens)).float()
    return statistics.mean_gram - torch.outer(mean, mean), mean


def operand(rows: Tensor) -> Tensor:
    """Rows as :func:`add_product` multiplies them: in half precision on a GPU, in fp32 elsewhere."""
    return rows if rows.is_cuda and rows.dtype in HALF else rows.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += aᵀ b`` for ``a [n, rows]``, ``b [n, columns]`` and an fp32 total.

    Two half-precision operands on a GPU meet in the tensor cores: products of bf16 or fp16 numbers are exact
    in fp32 and are summed in fp32, so nothing is lost against a product in fp32, and no fp32 copy is made.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype in HALF:
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.T.float(), b.float())


def add_outer_products(gram: Tensor, rows: Tensor) -> None:
    """``gram += rowsᵀ rows`` on and above the diagonal, in strips: little more than half the work of all of it.

    What is below the diagonal is not to be read before :func:`mirror`.
    """
    for start, end in _strips(gram):
        add_product(gram[:end, start:end], rows[:, :end], rows[:, start:end])


def mirror(gram: Tensor) -> None:
    """Copy what is above the diagonal below it."""
    for start, end in _strips(gram):
        gram[start:end, :start] = gram[:start, start:end].T
        gram[start:end, start:end] = gram[start:end, start:end].triu() + gram[start:end, start:end].triu(1).T


def _strips(gram: Tensor) -> Iterator[tuple[int, int]]:
    strip = GRAM_STRIP[gram.device.type]
    return ((start, min(start + strip, len(gram))) for start in range(0, len(gram), strip))


def damped_cholesky(gram: Tensor, ridge: Tensor, damping: float, name: str) -> Tensor:
    """Lower Cholesky factor of ``gram + damping * diag(ridge)``.

    Where it is not positive definite the damping is raised tenfold until it is, and the log says so.

    Args:
        gram: ``[n, n]``, symmetric.
        ridge: ``[n]``, positive.

    Raises:
        MosaicError: not even the largest damping makes it positive definite.
    """
    while damping <= MAX_DAMPING:
        damped = gram.clone()
        damped.diagonal().add_(damping * ridge)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if bool((info == 0) & torch.isfinite(factor.diagonal()).all()):
            return factor
        logger.warning("%s: Gram matrix is not positive definite at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise MosaicError(f"{name}: the Gram matrix of the calibration inputs cannot be factorised; use more --samples")


def mean_ridge(gram: Tensor) -> Tensor:
    """The mean of the diagonal for every feature; one where the input is dead altogether."""
    mean = gram.diagonal().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean)).expand(gram.shape[0])


def jacobi_ridge(gram: Tensor) -> Tensor:
    """The diagonal itself, so that outlier features do not set everyone's ridge; dead ones get 1e-4 of the mean."""
    diagonal = gram.diagonal()
    floor = mean_ridge(gram) * 1e-4
    return torch.maximum(diagonal, floor)

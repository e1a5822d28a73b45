# SPDX-License-Identifier: Apache-2.0
"""Solvers that only choose a mask: magnitude, and Wanda (arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers.target import Target


def magnitude(weight: Tensor, statistics: InputStatistics, target: Target, name: str) -> tuple[Tensor, Tensor]:
    """Keep the largest weights of the matrix."""
    return weight, target.keep_best(weight.abs())


def wanda(weight: Tensor, statistics: InputStatistics, target: Target, name: str) -> tuple[Tensor, Tensor]:
    """Keep the largest ``|W_ij| * norm_j`` of every output row."""
    if target.group is not None:
        return weight, target.keep_best_per_row(weight.abs() * statistics.column_norms)
    counts = weight.shape[1] - target.removed_per_row(len(weight))
    return weight, ops.score_select(weight, statistics.column_norms, counts, "row")

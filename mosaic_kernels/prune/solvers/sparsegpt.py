# SPDX-License-Identifier: Apache-2.0
"""SparseGPT (arXiv 2301.00774) with exact counts."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_kernels import ops
from mosaic_kernels.prune.gram import InputStatistics, damped_cholesky, mean_ridge
from mosaic_kernels.prune.solvers.target import Target

BLOCK = 128
DAMPING = 0.01


def sparsegpt(weight: Tensor, statistics: InputStatistics, target: Target, name: str) -> tuple[Tensor, Tensor]:
    """Sweep over blocks of columns; each block's errors are made up for by the columns to its right.

    Every block loses its share of ``target.remove``, rounded so that the sum is exact.
    """
    gram = statistics.mean_gram
    weight = weight.clone()
    dead = gram.diagonal() == 0
    factor = inverse_factor(gram, name)
    columns = weight.shape[1]
    keep = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, columns, _block(target)):
        end = min(start + _block(target), columns)
        inner = factor[start:end, start:end].contiguous()
        part = weight[:, start:end].contiguous()
        if target.group is None:
            scores = (part / inner.diagonal()).square().masked_fill_(dead[start:end], 0)
            if target.per_row:
                whole = target.removed_per_row(len(scores))
                mask = ops.select(scores, end - start - (whole * end // columns - whole * start // columns), "row")
            else:
                remove = target.remove * end // columns - target.remove * start // columns
                mask = ops.select(scores, scores.numel() - remove, "matrix")
            part, errors, mask = ops.obs_block(part, inner, mask)
        else:
            n, m = target.group
            part, errors, mask = ops.obs_block(part, inner, n=n, m=m)
        weight[:, start:end], keep[:, start:end] = part, mask
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    if target.group is None:
        return weight, keep
    keep = target.thin(weight.square() * gram.diagonal(), keep)  # the few zeros beyond the pattern
    return weight * keep, keep


def _block(target: Target) -> int:
    """128 columns, or the nearest whole number of groups below."""
    return BLOCK if target.group is None else max(1, BLOCK // target.group[1]) * target.group[1]


def inverse_factor(gram: Tensor, name: str, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U of the inverse, ``UᵀU = (H + damping * mean(diag H))⁻¹``.

    With J the reversal of the order, ``U = J inv(chol(J H J)) J``: one factorisation and one
    triangular inverse instead of inverting H and factorising that.
    """
    flipped = gram.flip(0, 1)
    lower = damped_cholesky(flipped, mean_ridge(gram), damping, name)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    upper: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous()
    return upper

# SPDX-License-Identifier: Apache-2.0
"""One block of the SparseGPT sweep: rows are independent, so a few rows stay in registers for all of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels.ops.triton.configs import config
from mosaic_kernels.ops.triton.select import require_finite
from mosaic_kernels.ops.triton.tiles import launch

_WIDEST = 128  # columns that a program holds; a wider block is swept in parts


@triton.jit
def _choose(weight, diagonal, column, first, n, GROUP: tl.constexpr):
    """Which of the GROUP columns from ``first`` are the n best of each row, and their scores; -1 elsewhere."""
    ratio = tl.div_rn(weight, tl.broadcast_to(diagonal[None, :], weight.shape))
    group = (column >= first) & (column < first + GROUP)
    scores = tl.where(group[None, :], ratio * ratio, -1.0)
    ahead = tl.zeros_like(weight)
    for other in range(first, first + GROUP):
        score = tl.sum(tl.where(column[None, :] == other, scores, 0.0), axis=1)[:, None]
        before = (score > scores) | ((score == scores) & (other < column)[None, :])
        ahead += before.to(tl.float32)
    return ahead < n, scores


@triton.jit
def _obs_kernel(weight, factor, keep, out, errors, mask, flag, rows, block, n,
                CHOOSE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """ROWS rows of the block. The weight is read once; the factor, at most 64 KiB, comes from a cache at every step.

    Each column waits for the one before: a step is one sum over the row (who holds column j), one division,
    and one multiply-add of what is to the right.
    """
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < block)[None, :]
    place = row[:, None] * block + column[None, :]
    current = tl.load(weight + place, mask=inside, other=0.0)
    kept = tl.load(keep + place, mask=inside, other=1) != 0
    made = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    diagonal = tl.load(factor + column * (block + 1), mask=column < block, other=1.0)
    for first in range(0, block, GROUP):
        if CHOOSE:
            best, scores = _choose(current, diagonal, column, first, n, GROUP)
            group = ((column >= first) & (column < first + GROUP))[None, :]
            kept = tl.where(group, best, kept)
            finite = scores < float("inf")  # false of NaN
            tl.store(flag, 1, mask=tl.min(tl.min((finite | ~inside).to(tl.int32), axis=1), axis=0) == 0)
        for j in range(first, tl.minimum(first + GROUP, block)):
            own = (column == j)[None, :]
            removed = tl.sum(tl.where(own & ~kept, current, 0.0), axis=1)
            error = tl.div_rn(removed, tl.zeros_like(removed) + tl.load(factor + j * (block + 1)))[:, None]
            right = tl.load(factor + j * block + column, mask=(column >= j) & (column < block), other=0.0)
            current -= error * right[None, :]
            current = tl.where(own & ~kept, current * 0.0, current)
            made = tl.where(own, error, made)
    tl.store(out + place, current, mask=inside)
    tl.store(errors + place, made, mask=inside)
    tl.store(mask + place, kept.to(tl.uint8), mask=inside)


def _sweep(weight: Tensor, factor: Tensor, keep: Tensor, n: int, m: int, flag: Tensor) -> tuple[Tensor, ...]:
    weight, factor, keep = weight.contiguous(), factor.contiguous(), keep.contiguous()
    rows, block = weight.shape
    out, errors, mask = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(keep)
    chosen = config("obs_block", weight.device)
    meta: Any = {"CHOOSE": m > 0, "GROUP": m or _WIDEST, "COLUMNS": triton.next_power_of_2(block), **chosen}
    tensors = (weight, factor, keep.view(torch.uint8), out, errors, mask.view(torch.uint8), flag)
    launch(_obs_kernel, (-(-rows // chosen["ROWS"]),), *tensors, rows, block, n, **meta)
    return out, errors, mask


def obs_block(weight: Tensor, factor: Tensor, keep: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    block = weight.shape[1]
    if not weight.numel():
        return weight.clone(), weight.clone(), keep.clone()
    flag = weight.new_zeros(1, dtype=torch.int32)
    width = max(m, _WIDEST // m * m) if m else _WIDEST  # whole groups
    swept, rest = [], weight
    for first in range(0, block, width):
        here = slice(first, first + width)
        part = _sweep(rest[:, :width], factor[here, here], keep[:, here], n, m, flag)
        swept.append(part)
        if first + width < block:
            rest = rest[:, width:] - part[1] @ factor[here, first + width :]
    if m:
        require_finite(flag)
    out, errors, mask = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*swept, strict=True))
    return out, errors, mask

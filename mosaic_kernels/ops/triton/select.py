# SPDX-License-Identifier: Apache-2.0
"""Exact top-k: radix select of a matrix or of rows, ranks inside small groups; equal scores in the order of index.

Scores become whole numbers of the same order. The k-th largest is found digit by digit, from histograms of one
digit among the numbers that share the digits found before: 4 digits of 8 bits, since Triton 3.6 makes a histogram of
256 bins in 60 instructions a score and one of 2048 in 237 (sm_90 code). What equals it is kept until k are.

The 4 passes, a count of the equals in every tile and the mask are 6 reads of what makes the scores (a row's later
ones from a cache); nothing but the mask is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.ops.triton.score import scores_of
from mosaic_kernels.ops.triton.tiles import TILE, Tiles, launch, tile_places

_SEGMENT_STEP = 1024  # scores of a row at a time; twice as many spill on sm_80
_LARGEST_RANKED = 32  # members of a group that are compared each with each; larger groups are selected like rows
_COMPARISONS = 2048  # in a program that does so


@triton.jit
def _numbers(scores, norms, start, place, column, inside, HAS_NORMS: tl.constexpr):
    """Scores as uint32 in their order, the two zeros as one, and whether each is NaN or infinite.

    A finite score's number is greater than 0.
    """
    if HAS_NORMS:
        score = scores_of(scores, norms, start, place, column, inside)
    else:
        score = tl.load(scores + start + place, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed numbers; the next line makes the least one 0
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000, (bits & 0x7F800000) == 0x7F800000


@triton.jit
def _histogram(numbers, inside, found, shift):
    """How often each digit ``shift`` bits up occurs among the numbers that share the digits above it."""
    shared = (((numbers ^ found) >> shift) >> 8) == 0  # in two steps: a shift by 32 is undefined
    digits = ((numbers >> shift) & 255).to(tl.int32)
    return tl.histogram(digits, 256, mask=inside & shared)


@triton.jit
def _narrow(histogram, found, wanted, shift):
    """With the next digit of the ``wanted``-th largest number, and how many are wanted of those that have it too."""
    digits = tl.arange(0, 256)
    digit = tl.sum((tl.cumsum(histogram, axis=0, reverse=True) >= wanted).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
    return found | (digit.to(tl.uint32) << shift), wanted - above


@triton.jit
def _report(flag, broken):
    tl.store(flag, 1, mask=tl.max(broken.to(tl.int32), axis=0) > 0)  # who else writes writes the same


@triton.jit
def _histogram_kernel(scores, norms, state, histogram, rows, columns, in_a_row, shift,
                      HAS_NORMS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    start, place, column, inside = tile_places(tl.program_id(0), rows, columns, in_a_row, SIZE, WIDTH)
    numbers, _ = _numbers(scores, norms, start, place, column, inside, HAS_NORMS)
    counts = _histogram(numbers, inside, tl.load(state).to(tl.uint32), shift.to(tl.uint32))
    tl.atomic_add(histogram + tl.arange(0, 256), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _narrow_kernel(state, histogram, shift):
    counts = tl.load(histogram + tl.arange(0, 256))
    found, wanted = _narrow(counts, tl.load(state).to(tl.uint32), tl.load(state + 1), shift.to(tl.uint32))
    tl.store(state, found.to(tl.int64))
    tl.store(state + 1, wanted)


@triton.jit
def _ties_kernel(scores, norms, state, ties, rows, columns, in_a_row,
                 HAS_NORMS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    start, place, column, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    numbers, _ = _numbers(scores, norms, start, place, column, inside, HAS_NORMS)
    equal = inside & (numbers == tl.load(state).to(tl.uint32))
    tl.store(ties + tile, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit
def _mask_kernel(scores, norms, state, ties, ends, mask, flag, rows, columns, in_a_row,
                 HAS_NORMS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    start, place, column, inside = tile_places(tile, rows, columns, in_a_row, SIZE, WIDTH)
    numbers, broken = _numbers(scores, norms, start, place, column, inside, HAS_NORMS)
    least, wanted = tl.load(state).to(tl.uint32), tl.load(state + 1)
    equal = (inside & (numbers == least)).to(tl.int32)
    rank = tl.load(ends + tile) - tl.load(ties + tile) + tl.cumsum(equal, axis=0) - equal
    kept = (numbers > least) | ((equal != 0) & (rank < wanted))
    tl.store(mask + start + place, kept.to(tl.uint8), mask=inside)
    _report(flag, broken & inside)


@triton.jit
def _segments_kernel(scores, norms, keep, keep_step, mask, flag, length, in_a_row,
                     HAS_NORMS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """One program selects in one row, or in one of the equal parts of a row; after its first pass it reads a cache."""
    segment = tl.program_id(0)
    start, first_column = segment.to(tl.int64) * length, (segment % in_a_row) * length
    lane = tl.arange(0, SIZE)
    found = tl.full((), 0, tl.uint32)
    wanted = tl.load(keep + segment.to(tl.int64) * keep_step)
    for step in range(4):
        shift = tl.full((), 24, tl.uint32) - 8 * step
        histogram = tl.zeros((256,), dtype=tl.int64)
        for first in range(0, length, SIZE):
            place = first + lane
            numbers, _ = _numbers(scores, norms, start, place, first_column + place, place < length, HAS_NORMS)
            histogram += _histogram(numbers, place < length, found, shift).to(tl.int64)
        found, wanted = _narrow(histogram, found, wanted, shift)
    for first in range(0, length, SIZE):
        place = first + lane
        inside = place < length
        numbers, broken = _numbers(scores, norms, start, place, first_column + place, inside, HAS_NORMS)
        equal = (inside & (numbers == found)).to(tl.int32)
        kept = (numbers > found) | ((equal != 0) & (tl.cumsum(equal, axis=0) <= wanted))
        tl.store(mask + start + place, kept.to(tl.uint8), mask=inside)
        wanted -= tl.sum(equal, axis=0)
        _report(flag, broken & inside)


@triton.jit
def _groups_kernel(scores, norms, mask, flag, n, m, groups, in_a_row,
                   HAS_NORMS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):  # fmt: skip
    """Each member's rank is how many of its group come before it: one read, no digits."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)
    inside = (first + group < groups)[:, None] & (member < m)[None, :]
    place = group[:, None] * m + member[None, :]
    column = (((first + group) % in_a_row) * m)[:, None] + member[None, :]
    numbers, broken = _numbers(scores, norms, first * m, place, column, inside, HAS_NORMS)
    numbers = tl.where(inside, numbers, 0)
    other, own = numbers[:, None, :], numbers[:, :, None]
    earlier = (member[None, :] < member[:, None])[None, :, :]
    rank = tl.sum(((other > own) | ((other == own) & earlier)).to(tl.int32), axis=2)
    tl.store(mask + first * m + place, (rank < n).to(tl.uint8), mask=inside)
    _report(flag, tl.max((broken & inside).to(tl.int32), axis=1))


def require_finite(flag: Tensor) -> None:
    """Raise where a kernel saw a score that is not finite; the one wait for the device."""
    if bool(flag):
        raise NonFiniteError("select: scores hold NaN or Inf; check the weight and its calibration statistics")


def _of_matrix(scores: Tensor, norms: Tensor, keep: Tensor, mask: Tensor, flag: Tensor, scored: bool) -> None:
    tiles = Tiles.of(*scores.shape)
    grid, shape = (tiles.programs,), (*scores.shape, tiles.in_a_row)
    meta: Any = {"HAS_NORMS": scored, "SIZE": TILE, "WIDTH": tiles.width}
    state = torch.cat((keep.new_zeros(1), keep))  # the digits found, and how many are wanted of what begins so
    histograms = keep.new_zeros(4, 256)
    for shift, histogram in zip((24, 16, 8, 0), histograms, strict=True):
        launch(_histogram_kernel, grid, scores, norms, state, histogram, *shape, shift, **meta)
        launch(_narrow_kernel, (1,), state, histogram, shift)
    ties = keep.new_empty(tiles.programs, dtype=torch.int32)
    launch(_ties_kernel, grid, scores, norms, state, ties, *shape, **meta)
    launch(_mask_kernel, grid, scores, norms, state, ties, ties.cumsum(0), mask, flag, *shape, **meta)


def _select(scores: Tensor, norms: Tensor | None, keep: Tensor, scope: str) -> Tensor:
    columns = scores.shape[1]
    mask = scores.new_empty(scores.shape, dtype=torch.uint8)
    if not scores.numel():
        return mask.view(torch.bool)
    scores, flag = scores.contiguous(), scores.new_zeros(1, dtype=torch.int32)
    operands = (scores, scores if norms is None else norms.float().contiguous())
    meta: Any = {"HAS_NORMS": norms is not None}
    n, m = keep.tolist() if scope == "group" else (0, columns)
    groups, in_a_row = scores.numel() // m, columns // m
    if scope == "matrix":
        _of_matrix(*operands, keep.to(scores.device), mask, flag, norms is not None)
    elif scope == "group" and m <= _LARGEST_RANKED:
        members = triton.next_power_of_2(m)
        meta |= {"GROUPS": _COMPARISONS // members**2, "MEMBERS": members}
        grid = (-(-groups // meta["GROUPS"]),)
        launch(_groups_kernel, grid, *operands, mask, flag, n, m, groups, in_a_row, **meta)
    else:
        meta["SIZE"] = min(_SEGMENT_STEP, max(128, triton.next_power_of_2(m)))
        counts = (keep[:1] if scope == "group" else keep).to(scores.device)
        step = 0 if scope == "group" else 1
        launch(_segments_kernel, (groups,), *operands, counts, step, mask, flag, m, in_a_row, **meta)
    require_finite(flag)
    return mask.view(torch.bool)


def select(scores: Tensor, keep: Tensor, scope: str) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    return _select(scores, None, keep, scope)


def score_select(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> Tensor:
    """The operator of the same name, without the scores; see :mod:`mosaic_kernels.ops.reference`."""
    return _select(weight, column_norms, keep, scope)

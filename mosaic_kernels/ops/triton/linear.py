# SPDX-License-Identifier: Apache-2.0
"""Sparse linear in Triton, on the row bitmap: the portable path of any GPU that Triton supports."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_WORDS = 8  # 256 columns a step


@triton.jit
def _sparse_linear_kernel(
    x, values, words, offsets, bias, out, in_features, out_features, word_count,
    HAS_BIAS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program makes one output: row ``program_id(1)`` of x times output feature ``program_id(0)``.

    A step loads WORDS words; the place of each kept value is the row's running base, plus the kept
    weights in the words before its own, plus those before it in its word.
    """
    feature, row = tl.program_id(0), tl.program_id(1)
    base = tl.load(offsets + feature)
    lanes, word_ids = tl.arange(0, 32), tl.arange(0, WORDS)
    total = tl.zeros((WORDS, 32), dtype=tl.float32)
    for first in range(0, word_count, WORDS):
        inside = first + word_ids < word_count
        bits = tl.load(words + feature.to(tl.int64) * word_count + first + word_ids, mask=inside, other=0)
        kept = (bits[:, None] >> lanes[None, :]) & 1
        in_word = tl.cumsum(kept, axis=1) - kept
        counts = tl.sum(kept, axis=1)
        before = tl.cumsum(counts, axis=0) - counts
        index = base + before[:, None] + in_word
        columns = (first + word_ids)[:, None] * 32 + lanes[None, :]
        weight = tl.load(values + index, mask=kept != 0, other=0.0).to(tl.float32)
        feature_x = tl.load(x + row.to(tl.int64) * in_features + columns, mask=kept != 0, other=0.0).to(tl.float32)
        total += weight * feature_x
        base += tl.sum(counts, axis=0)
    result = tl.sum(tl.sum(total, axis=1), axis=0)
    if HAS_BIAS:
        result += tl.load(bias + feature).to(tl.float32)
    tl.store(out + row.to(tl.int64) * out_features + feature, result.to(out.dtype.element_ty))


def sparse_linear(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], words.shape[0]))
    grid = (words.shape[0], x.shape[:-1].numel())
    if grid[0] and grid[1]:
        kernel: Any = _sparse_linear_kernel
        kernel[grid](
            x, values, words, offsets, x if bias is None else bias, out, in_features, words.shape[0], words.shape[1],
            HAS_BIAS=bias is not None, WORDS=_WORDS,
        )  # fmt: skip
    return out

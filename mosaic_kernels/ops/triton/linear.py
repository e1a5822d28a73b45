# SPDX-License-Identifier: Apache-2.0
"""Products with a sparse weight, on the row bitmap: the portable path of any GPU that Triton supports.

Few rows: every program sums in registers and reads its part of the weight once for all rows. More rows, in
half precision or whole numbers: tiles for the matrix units. Beyond that, and in fp32, which those would round,
the weight is unpacked once and the dense product is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import dequantize
from mosaic_kernels.ops.triton.configs import config
from mosaic_kernels.ops.triton.pack import unpack
from mosaic_kernels.ops.triton.tiles import launch

_MOST_IN_REGISTERS = 16
_MOST_IN_A_TILE = 128
_MOST_IN_A_GROUPED_TILE = 64  # it has two accumulators, and twice these rows would spill
# Whole numbers up to 256 are exact in bf16; the interpreter's dot takes no bf16, and in fp32 they are exact, too.
_BFLOAT16 = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
_GROUP_WORDS = tl.constexpr(2)  # a group of 64 columns


@triton.jit
def _ones(words):
    """Set bits of each word; compilers know the idiom and make it one instruction."""
    words = words.to(tl.uint32, bitcast=True)
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _expand(values, words, start, feature, exists, before, word, word_count):
    """WORDS words of each feature as dense values ``[OUT, WORDS, 32]``, and how many each has had so far.

    A value's place: where its row begins, plus the kept ones of the words before its own, plus those before it
    in its word. Counting bits takes 13 instructions a weight on sm_90 where prefix sums over them take 30.
    """
    inside = exists[:, None] & (word < word_count)[None, :]
    bits = tl.load(words + feature.to(tl.int64)[:, None] * word_count + word[None, :], mask=inside, other=0)
    counts = _ones(bits)
    first = before[:, None] + tl.cumsum(counts, axis=1) - counts
    lane = tl.arange(0, 32)
    place = first[:, :, None] + _ones(bits[:, :, None] & ((1 << lane) - 1)[None, None, :])
    kept = ((bits[:, :, None] >> lane[None, None, :]) & 1) != 0
    return tl.load(values + start[:, None, None] + place, mask=kept, other=0), before + tl.sum(counts, axis=1)


@triton.jit
def _store(out, total, row, feature, rows, out_features, scales, steps, bias,
           SCALED: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """What is common to a row or a feature is applied to the sums ``[ROWS, OUT]``, once."""
    exists = feature < out_features
    if SCALED:
        total *= tl.load(scales + feature, mask=exists, other=0.0)[None, :]
    if ROUNDED:
        total *= tl.load(steps + row, mask=row < rows, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=exists, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * out_features + feature[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & exists[None, :])


@triton.jit
def _register_kernel(
    x, values, words, offsets, scales, steps, bias, out, rows, in_features, out_features, word_count, groups,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """All rows times OUT features: ROWS sums for each feature and column of a step, added up at the end."""
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)
    exists, row = feature < out_features, tl.arange(0, ROWS)
    start = tl.load(offsets + feature, mask=exists, other=0)
    before = tl.zeros((OUT,), dtype=tl.int32)
    total = tl.zeros((ROWS, OUT, WORDS * 32), dtype=tl.float32)
    for first in range(0, word_count, WORDS):
        word = first + tl.arange(0, WORDS)
        kept, before = _expand(values, words, start, feature, exists, before, word, word_count)
        kept = kept.to(tl.float32)
        if GROUPED:
            scale = scales + feature.to(tl.int64)[:, None] * groups + word[None, :] // _GROUP_WORDS
            kept *= tl.load(scale, mask=exists[:, None] & (word < word_count)[None, :], other=0.0)[:, :, None]
        weight = tl.reshape(kept, (OUT, WORDS * 32))
        column = first * 32 + tl.arange(0, WORDS * 32)
        inside = (row < rows)[:, None] & (column < in_features)[None, :]
        activations = tl.load(x + row.to(tl.int64)[:, None] * in_features + column[None, :], mask=inside, other=0)
        total += weight[None, :, :] * activations.to(tl.float32)[:, None, :]
    _store(out, tl.sum(total, axis=2), row, feature, rows, out_features, scales, steps, bias, SCALED, ROUNDED, HAS_BIAS)


@triton.jit
def _tiles_kernel(
    x, values, words, offsets, scales, steps, bias, out, rows, in_features, out_features, word_count, groups,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """ROWS rows times OUT features on the matrix units; OPERAND holds int8 values and rounded rows exactly.

    Where columns share scales in groups a step is one group.
    """
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)
    exists, row = feature < out_features, tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = tl.load(offsets + feature, mask=exists, other=0)
    before = tl.zeros((OUT,), dtype=tl.int32)
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for first in range(0, word_count, WORDS):
        kept, before = _expand(values, words, start, feature, exists, before, first + tl.arange(0, WORDS), word_count)
        weight = tl.trans(tl.reshape(kept.to(OPERAND), (OUT, WORDS * 32)))
        column = first * 32 + tl.arange(0, WORDS * 32)
        inside = (row < rows)[:, None] & (column < in_features)[None, :]
        activations = tl.load(x + row.to(tl.int64)[:, None] * in_features + column[None, :], mask=inside, other=0)
        if GROUPED:
            scale = scales + feature.to(tl.int64) * groups + first // _GROUP_WORDS
            total += tl.dot(activations.to(OPERAND), weight) * tl.load(scale, mask=exists, other=0.0)[None, :]
        else:
            total = tl.dot(activations.to(OPERAND), weight, total)
    _store(out, total, row, feature, rows, out_features, scales, steps, bias, SCALED, ROUNDED, HAS_BIAS)


@triton.jit
def _round_kernel(x, rounded, steps, columns, SIZE: tl.constexpr):
    """One row as whole numbers of -127 to 127, ties to even, in steps of absmax / 127; not finite: a step of NaN."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    largest = tl.zeros((SIZE,), dtype=tl.float32)
    finite = lane >= 0
    for first in range(0, columns, SIZE):
        size = tl.abs(tl.load(x + row * columns + first + lane, mask=first + lane < columns, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, size)
        finite &= size < float("inf")  # false of NaN
    every = tl.full((SIZE,), 127.0, tl.float32)
    step = tl.div_rn(tl.zeros_like(every) + tl.max(largest, axis=0), every)
    for first in range(0, columns, SIZE):
        inside = first + lane < columns
        share = tl.load(x + row * columns + first + lane, mask=inside, other=0.0).to(tl.float32)
        share = tl.where(step == 0.0, 0.0, tl.div_rn(share, step))
        nearest = (share + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 has no halves there
        nearest = tl.minimum(tl.maximum(nearest, -127.0), 127.0)
        tl.store(rounded + row * columns + first + lane, nearest.to(tl.int8), mask=inside)
    all_finite = tl.min(finite.to(tl.int32), axis=0) != 0
    tl.store(steps + row, tl.where(all_finite, tl.max(step, axis=0), float("nan")))


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_rows``, as int8."""
    rows, columns = x.shape
    rounded, steps = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    launch(_round_kernel, (rows,), x, rounded, steps, columns, SIZE=1024)
    return rounded, steps


def _product(
    x: Tensor, values: Tensor, scales: Tensor | None, words: Tensor, offsets: Tensor, bias: Tensor | None,
    in_features: int, round_x: bool = False,
) -> Tensor:  # fmt: skip
    if x.shape[-1] != in_features:
        raise KernelError(f"x has {x.shape[-1]} features but this projection takes {in_features}")
    if scales is None and x.dtype is not values.dtype:
        raise KernelError(f"x is {x.dtype} but the packed values are {values.dtype}")
    if not x.device == values.device == words.device == offsets.device:
        raise KernelError(f"x is on {x.device} but the packed values are on {values.device}")
    out_features, word_count = words.shape
    out = x.new_empty((*x.shape[:-1], out_features))
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, in_features).contiguous()
    halves = round_x or x.dtype != torch.float32
    in_registers = rows <= (config("most_in_registers", x.device)["ROWS"] if halves else _MOST_IN_REGISTERS)
    if not in_registers and (not halves or (scales is None and rows > config("most_in_tiles", x.device)["ROWS"])):
        weight = values if scales is None else dequantize(values, scales, words.view(torch.uint8))
        dense = unpack(weight, words.view(torch.uint8), in_features)
        return F.linear(x.to(dense.dtype), dense, None if bias is None else bias.to(dense.dtype)).to(x.dtype)
    flat, steps = _round_rows(flat) if round_x else (flat, None)
    groups = 1 if scales is None else scales.shape[1]
    tensors = (values, words, offsets, scales, steps, bias)
    operands = (flat, *(flat if t is None else t.contiguous() for t in tensors), out)
    block = triton.next_power_of_2(max(1, rows))
    meta: dict[str, Any] = {
        "SCALED": scales is not None and groups == 1, "GROUPED": groups > 1, "ROUNDED": round_x,
        "HAS_BIAS": bias is not None, "ROWS": block,
    }  # fmt: skip
    if in_registers:
        kernel, meta = _register_kernel, meta | config(f"register_{block}", x.device)
    else:
        block = min(max(block, 16), _MOST_IN_A_TILE if groups == 1 else _MOST_IN_A_GROUPED_TILE)
        half = tl.float16 if x.dtype == torch.float16 else _BFLOAT16
        kernel, meta = _tiles_kernel, meta | config(f"tiles_{block}", x.device) | {"ROWS": block, "OPERAND": half}
        if groups > 1:
            meta["WORDS"] = _GROUP_WORDS.value
    grid = (-(-out_features // meta["OUT"]), 1 if in_registers else -(-rows // block))
    launch(kernel, grid if rows else (0,), *operands, rows, in_features, out_features, word_count, groups, **meta)
    return out


def sparse_linear(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    return _product(x, values, None, words, offsets, bias, in_features)


def sparse_linear_int8(
    x: Tensor, values: Tensor, scales: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None,
    in_features: int, quantize_x: bool,
) -> Tensor:  # fmt: skip
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    return _product(x, values, scales, words, offsets, bias, in_features, quantize_x)

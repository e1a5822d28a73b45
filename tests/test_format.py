# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError
from mosaic_kernels.format import (
    PackedWeight,
    RowIndex,
    bitmask_bytes,
    bitmask_words,
    bits_to_mask,
    dequantize,
    mask_to_bits,
    packed_bytes,
    row_offsets,
    scale_counts,
    words_from_bits,
)

# (rows, columns): none, one, around a byte, around a word, several words
SHAPES = [(0, 8), (1, 1), (3, 7), (2, 8), (5, 9), (4, 31), (4, 32), (4, 33), (3, 130)]

masks = st.integers(0, 6).flatmap(
    lambda rows: st.integers(1, 70).flatmap(
        lambda columns: st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        ).map(lambda rows_: torch.tensor(rows_, dtype=torch.bool).reshape(rows, columns))
    )
)


def _packed(mask: torch.Tensor) -> PackedWeight:
    return PackedWeight(torch.ones(int(mask.sum())), mask_to_bits(mask), (mask.shape[0], mask.shape[1]))


def test_bits_are_least_significant_first() -> None:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    assert mask_to_bits(mask).tolist() == [[0b1001, 0b10]]


@given(masks)
@settings(max_examples=60, deadline=None)
def test_bits_hold_the_mask_and_nothing_else(mask: torch.Tensor) -> None:
    bits = mask_to_bits(mask)
    assert list(bits.shape) == [mask.shape[0], bitmask_bytes(mask.shape[1])]
    assert torch.equal(bits_to_mask(bits, mask.shape[1]), mask)
    assert not bits_to_mask(bits, bits.shape[1] * 8)[:, mask.shape[1] :].any()


@given(masks)
@settings(max_examples=60, deadline=None)
def test_words_hold_the_same_bits(mask: torch.Tensor) -> None:
    words = words_from_bits(mask_to_bits(mask))
    assert list(words.shape) == [mask.shape[0], bitmask_words(mask.shape[1])]
    assert torch.equal(bits_to_mask(words.view(torch.uint8), mask.shape[1]), mask)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_offsets_are_where_rows_begin(mask: torch.Tensor) -> None:
    expected = [0, *mask.sum(1).cumsum(0).tolist()]
    assert row_offsets(mask_to_bits(mask)).tolist() == expected


@pytest.mark.parametrize(("columns", "shared"), [(32, True), (64, True), (25, True), (24, False), (33, False)])
def test_whole_words_are_a_view(columns: int, shared: bool) -> None:
    bits = mask_to_bits(torch.ones(3, columns, dtype=torch.bool))
    assert (words_from_bits(bits).data_ptr() == bits.data_ptr()) is shared


def test_words_of_bits_that_are_a_slice() -> None:
    mask = torch.rand(4, 64) < 0.5
    wide = torch.zeros(4, 16, dtype=torch.uint8)
    wide[:, ::2] = mask_to_bits(mask)
    assert torch.equal(bits_to_mask(words_from_bits(wide[:, ::2]).view(torch.uint8), 64), mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_a_packed_weight_knows_its_size(shape: tuple[int, int], density: float) -> None:
    packed = _packed(torch.rand(shape) < density)
    packed.validate()
    assert packed.index().nnz == packed.nnz
    assert packed.nbytes == packed.values.nbytes + packed.bitmask.nbytes == packed_bytes(*shape, packed.nnz, 4)
    assert packed.density == packed.nnz / max(1, shape[0] * shape[1])


def test_the_index_is_built_once() -> None:
    packed = _packed(torch.ones(2, 5, dtype=torch.bool))
    assert packed.index() is packed.index()
    assert isinstance(packed.index(), RowIndex)


@pytest.mark.parametrize(
    ("values", "bitmask", "message"),
    [
        (torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.uint8), "1-D fp32, bf16, fp16 or fp64"),
        (torch.ones(2, dtype=torch.int16), torch.zeros(2, 1, dtype=torch.uint8), "torch.int16"),
        (torch.ones(2), torch.zeros(2, 1, dtype=torch.int32), r"uint8 \[2, 1\], got torch.int32"),
        (torch.ones(2), torch.zeros(2, 2, dtype=torch.uint8), r"a 2x8 weight is uint8 \[2, 1\], got .* \[2, 2\]"),
    ],
)
def test_tensors_that_are_no_packed_weight(values: torch.Tensor, bitmask: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        PackedWeight(values, bitmask, (2, 8))


def test_bits_that_contradict_the_values() -> None:
    packed = PackedWeight(torch.ones(3), torch.tensor([[0b11], [0b11]], dtype=torch.uint8), (2, 5))
    with pytest.raises(FormatError, match=r"layers\.0\.q: the bitmask counts 4 weights but 3 values"):
        packed.validate("layers.0.q")


def test_bits_beyond_the_last_column() -> None:
    packed = PackedWeight(torch.ones(1), torch.tensor([[1 << 5]], dtype=torch.uint8), (1, 5))
    with pytest.raises(FormatError, match="beyond column 5"):
        packed.validate()


def _int8(shape: tuple[int, int], groups: int) -> PackedWeight:
    rows, columns = shape
    mask = torch.rand(shape) < 0.5
    values = torch.randint(-127, 128, (int(mask.sum()),), dtype=torch.int8)
    return PackedWeight(values, mask_to_bits(mask), (rows, columns), torch.rand(rows, groups))


@pytest.mark.parametrize(("shape", "groups", "weights"), [((3, 130), 1, "int8"), ((3, 130), 3, "int8-group")])
def test_int8_values_and_their_scales_count(shape: tuple[int, int], groups: int, weights: Weights) -> None:
    packed = _int8(shape, groups)
    packed.validate()
    assert packed.weights == weights
    assert packed.scales is not None
    stored = packed.values.nbytes + packed.bitmask.nbytes + packed.scales.nbytes
    assert packed.nbytes == stored == packed_bytes(*shape, packed.nnz, 2, weights)
    assert packed_bytes(*shape, packed.nnz, 2) == 2 * packed.nnz + packed.bitmask.nbytes


@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (64, 1), (65, 2), (130, 3), (130, 1), (192, 3)])
def test_every_value_meets_the_scale_of_its_columns(columns: int, groups: int) -> None:
    packed = _int8((4, columns), groups)
    assert packed.scales is not None
    mask = bits_to_mask(packed.bitmask, columns)
    counts = scale_counts(packed.bitmask, groups)
    parts = mask.split(columns if groups == 1 else 64, 1)
    assert counts.tolist() == torch.stack([part.sum(1) for part in parts], 1).tolist()
    each = packed.scales.repeat_interleave(columns if groups == 1 else 64, 1)[:, :columns]
    for bits in (packed.bitmask, packed.index().words.view(torch.uint8)):  # padded to words or not
        assert torch.equal(dequantize(packed.values, packed.scales, bits), packed.values * each[mask])


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "int8 values need scales"),
        (torch.ones(2, 1, dtype=torch.bfloat16), r"are float32 \[2, 1\] or \[2, 2\], got torch.bfloat16 \[2, 1\]"),
        (torch.ones(2, 3), r"got torch.float32 \[2, 3\]"),
        (torch.ones(2), r"got torch.float32 \[2\]"),
    ],
)
def test_scales_that_do_not_fit(scales: torch.Tensor | None, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        PackedWeight(torch.ones(2, dtype=torch.int8), torch.zeros(2, 9, dtype=torch.uint8), (2, 70), scales)


def test_float_values_have_no_scales() -> None:
    with pytest.raises(FormatError, match=r"only int8 values have scales, and these are torch\.float32"):
        PackedWeight(torch.ones(2), torch.zeros(2, 1, dtype=torch.uint8), (2, 8), torch.ones(2, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_steps(bad: float) -> None:
    packed = _int8((3, 70), 2)
    assert packed.scales is not None
    packed.scales[1, 1] = bad
    with pytest.raises(FormatError, match=r"layers\.0\.q: scales must be finite and not negative"):
        packed.validate("layers.0.q")


def test_the_range_of_int8_values_is_symmetric() -> None:
    packed = _int8((3, 70), 1)
    packed.values[0] = -128
    with pytest.raises(FormatError, match="-128"):
        packed.validate()

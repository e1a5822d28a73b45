# SPDX-License-Identifier: Apache-2.0
"""int8 values: rounding, its undoing, and the operator's meaning against float64 and whole numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.errors import FormatError, KernelError, NonFiniteError
from mosaic_kernels.format import GROUP_COLUMNS, PackedWeight, bits_to_mask
from mosaic_kernels.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (None, GROUP_COLUMNS)
# (out, in): no row, one weight, off a word by one, one group, off a group by one, several and a short last one
SHAPES = [(0, 8), (1, 1), (5, 33), (7, 64), (4, 65), (9, 200), (3, 1031)]
EPS = torch.finfo(torch.float32).eps


def sparse(shape: tuple[int, int], density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * (torch.rand(shape) < density)).to(dtype)


def steps(packed: PackedWeight) -> Tensor:
    """The scale of every weight, ``float64 [out, in]``."""
    assert packed.scales is not None
    columns = packed.shape[1]
    width = columns if packed.scales.shape[1] == 1 else GROUP_COLUMNS
    return packed.scales.double().repeat_interleave(width, 1)[:, :columns]


def whole(packed: PackedWeight) -> Tensor:
    """The int8 values in their places, ``int64 [out, in]``."""
    mask = bits_to_mask(packed.bitmask, packed.shape[1])
    return torch.zeros(packed.shape, dtype=torch.int64).masked_scatter_(mask, packed.values.long())


def exact(packed: PackedWeight) -> Tensor:
    """The weight that the int8 form stands for, in float64."""
    return whole(packed) * steps(packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_quantize_rounds_to_the_nearest_step(
    dtype: torch.dtype, shape: tuple[int, int], group: int | None, density: float
) -> None:
    weight = sparse(shape, density, dtype)
    packed = mk.quantize(weight, group)
    packed.validate()
    assert packed.values.dtype == torch.int8
    assert packed.scales is not None
    assert list(packed.scales.shape) == [shape[0], 1 if group is None else -(-shape[1] // group)]
    assert packed.nnz == int(weight.count_nonzero())
    again = mk.unpack(packed)
    assert again.dtype == torch.float32
    # half a step, and the rounding of the quotient and of the product
    assert bool(((again.double() - weight.double()).abs() <= steps(packed) * (0.5 + 256 * EPS)).all())
    assert bool(((again.double() - exact(packed)).abs() <= exact(packed).abs() * EPS).all())


@pytest.mark.parametrize("group", GROUPS)
def test_scales_are_the_largest_weight_of_their_columns(group: int | None) -> None:
    weight = sparse((6, 150), 0.3)
    weight[2] = 0  # an empty row
    weight[3, 64:128] = 0  # an empty group
    weight[4, 149] = -50
    packed = mk.quantize(mk.pack(weight), group)
    assert packed.scales is not None
    for row in range(6):
        for i, part in enumerate(weight[row].split(group or 150)):
            assert packed.scales[row, i] == part.abs().max() / 127
    assert torch.equal(packed.bitmask, mk.pack(weight).bitmask)
    assert float(packed.scales[2].max()) == 0
    assert not bool(mk.unpack(packed)[2].any())


def test_halves_round_to_even_and_the_range_is_symmetric() -> None:
    weight = torch.tensor([[-127.0, 127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    packed = mk.quantize(weight)
    assert packed.values.tolist() == [-127, 127, 0, 2, 2, 0, -2]
    assert packed.nnz == 7  # a weight that rounds to 0 is still kept


def test_tiny_and_large_weights_stay_in_range() -> None:
    for size in (1e-45, 1e-40, 3e38):
        packed = mk.quantize(torch.tensor([[size, -size]]))
        packed.validate()
        assert bool(torch.isfinite(mk.unpack(packed)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", GROUPS)
def test_quantize_refuses_what_has_no_steps(bad: float, group: int | None) -> None:
    weight = sparse((4, 100), 0.5)
    weight[1, 70] = bad
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        mk.quantize(weight, group)


def test_quantize_refuses_other_arguments() -> None:
    with pytest.raises(KernelError, match="not per 32"):
        mk.quantize(torch.ones(2, 2), 32)
    with pytest.raises(KernelError, match="int8 already"):
        mk.quantize(mk.quantize(torch.ones(2, 2)))
    with pytest.raises(KernelError, match="fp32, bf16 or fp16"):
        mk.quantize(torch.ones(2, 2, dtype=torch.float64))
    short = PackedWeight(torch.ones(3), torch.tensor([[3], [3]], dtype=torch.uint8), (2, 2))
    with pytest.raises(FormatError, match="weights but"):
        mk.quantize(short)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_the_product_is_that_of_the_dequantised_weight(
    dtype: torch.dtype, shape: tuple[int, int], group: int | None, density: float
) -> None:
    packed = mk.quantize(sparse(shape, density), group)
    weight, bias = exact(packed), torch.randn(shape[0]).to(dtype)
    for leading in ((), (0,), (5,), (2, 3), (13,), (43,)):  # expanded once for all, tiles of 16, 32 and 8
        x = torch.randn(*leading, shape[1]).to(dtype)
        found, shifted = mk.sparse_linear(x, packed), mk.sparse_linear(x, packed, bias)
        assert found.dtype == shifted.dtype == dtype
        assert found.shape == (*leading, shape[0])
        # an fp32 sum of products of rounded weights, rounded once to the result's dtype
        limit = 2 * (torch.finfo(dtype).eps + math.sqrt(shape[1] + 1) * EPS)
        scale = x.double().abs() @ weight.abs().T
        assert float((found.double() - x.double() @ weight.T).norm()) <= limit * float(scale.norm())
        with_bias = x.double() @ weight.T + bias.double()
        assert float((shifted.double() - with_bias).norm()) <= limit * float((scale + bias.double().abs()).norm())


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [4, 43])
def test_rounded_activations_meet_weights_in_whole_numbers(
    shape: tuple[int, int], group: int | None, rows: int
) -> None:
    """Against an int64 computation, group by group.

    With a scale for each row only the scaling rounds. With one for each group a kernel may scale the sum of
    every lane of a vector and add up lanes and groups in fp32: signs may cancel only there.
    """
    packed = mk.quantize(sparse(shape, 0.6), group)
    assert packed.scales is not None
    x = torch.randn(rows, shape[1])
    x[1] = 0
    sizes = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(sizes > 0, (x / sizes).round(), 0).long()
    assert int(rounded.abs().max()) == 127
    width = shape[1] if packed.scales.shape[1] == 1 else GROUP_COLUMNS
    parts = [a @ w.T for a, w in zip(rounded.split(width, 1), whole(packed).split(width, 1), strict=True)]
    scaled = torch.stack([part * scale for part, scale in zip(parts, packed.scales.double().T, strict=True)])
    wanted, size, roundings = scaled.sum(0) * sizes.double(), scaled.abs().sum(0) * sizes.double(), len(parts) + 3
    if packed.scales.shape[1] > 1:
        size = rounded.abs().double() @ exact(packed).abs().T * sizes.double()
        roundings = len(parts) * GROUP_COLUMNS // 32 + 4 + 3  # words of a row, 16 lanes in four additions, the scaling
    found = mk.sparse_linear(x, packed, quantize_x=True)
    assert bool(((found.double() - wanted).abs() <= roundings * EPS * size).all())
    assert not bool(found[1].any())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [3, 40])
def test_whole_activations_are_not_rounded_at_all(group: int | None, rows: int) -> None:
    weight = torch.randint(-127, 128, (6, 500)).float()
    weight[:, ::64] = 127  # so every scale is 1
    x = torch.randint(-127, 128, (rows, 500)).float()
    x[:, 0] = -127
    found = mk.sparse_linear(x, mk.quantize(weight, group), quantize_x=True)
    assert torch.equal(found.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("columns", [2000, 140_000])
@pytest.mark.parametrize("quantize_x", [False, True])
def test_the_largest_sums_do_not_overflow(group: int | None, rows: int, columns: int, quantize_x: bool) -> None:
    packed = mk.quantize(torch.full((5, columns), 127.0).bfloat16(), group)
    x = torch.full((rows, columns), 2.0).bfloat16()
    found = mk.sparse_linear(x, packed, quantize_x=quantize_x)
    assert bool((found == torch.tensor(columns * 254.0).bfloat16()).all())


def test_halves_of_activations_round_to_even() -> None:
    rounded, sizes = reference.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0, 0, 0, 0, 0, 0]]))
    assert rounded.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert sizes.tolist() == [[1.0], [0.0]]


def test_a_row_that_is_not_finite_spoils_itself_alone() -> None:
    packed = mk.quantize(sparse((5, 80), 0.5))
    x = torch.randn(3, 80)
    expected = mk.sparse_linear(x, packed, quantize_x=True)
    for bad in (float("nan"), float("inf")):
        x[1, 7] = bad
        found = mk.sparse_linear(x, packed, quantize_x=True)
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_gradient_reaches_the_activations_only(quantize_x: bool, group: int | None) -> None:
    packed = mk.quantize(sparse((20, 130), 0.5), group)
    x, upstream = torch.randn(3, 130, requires_grad=True), torch.randn(3, 20)
    (found,) = torch.autograd.grad(mk.sparse_linear(x, packed, quantize_x=quantize_x), x, upstream)
    wanted = upstream.double() @ exact(packed)
    assert float((found.double() - wanted).norm()) <= 2 * EPS * (1 + math.sqrt(20)) * float(wanted.norm())
    assert packed.scales is not None
    trainable = PackedWeight(packed.values, packed.bitmask, packed.shape, packed.scales.clone().requires_grad_())
    with pytest.raises(KernelError, match="differentiable in its activations only"):
        mk.sparse_linear(x, trainable, quantize_x=quantize_x)


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_torchs_contract(quantize_x: bool, group: int | None, dtype: torch.dtype) -> None:
    packed = mk.quantize(sparse((12, 100), 0.5), group)
    index, x = packed.index(), torch.randn(3, 100).to(dtype).requires_grad_()
    torch.library.opcheck(
        torch.ops.mosaic.sparse_linear_int8,
        (x, packed.values, packed.scales, index.words, index.offsets, torch.randn(12).to(dtype), 100, quantize_x),
    )


def test_arguments_are_checked_at_the_border() -> None:
    packed = mk.quantize(sparse((4, 40), 0.5))
    with pytest.raises(KernelError, match="x has 39 features but this projection takes 40"):
        mk.sparse_linear(torch.randn(2, 39), packed)
    with pytest.raises(KernelError, match=r"x must be fp32, bf16 or fp16, got torch\.float64"):
        mk.sparse_linear(torch.randn(2, 40).double(), packed)
    with pytest.raises(KernelError, match=r"bias is torch\.float32 but x is torch\.bfloat16"):
        mk.sparse_linear(torch.randn(2, 40).bfloat16(), packed, torch.zeros(4))
    with pytest.raises(KernelError, match="quantize_x is for int8 values"):
        mk.sparse_linear(torch.randn(2, 40), mk.pack(sparse((4, 40), 0.5)), quantize_x=True)


def test_the_reference_takes_over_where_a_backend_has_no_kernel() -> None:
    packed, x = mk.quantize(sparse((4, 40), 0.5)), torch.randn(2, 40)
    with ops.use_backend("reference"):
        wanted = mk.sparse_linear(x, packed)
    found = mk.sparse_linear(x, packed)
    assert float((found - wanted).norm()) <= 2 * EPS * (1 + math.sqrt(40)) * float(wanted.norm())

# SPDX-License-Identifier: Apache-2.0
"""The native linear kernels that take more than one form of weight: int8, dense rows, several in one dispatch.

Every instruction set of this processor is held against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from test_ops import BEST, DTYPES, SHAPES, bound, relative_error, sparse
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import BackendError, KernelError
from mosaic_kernels.ops import cpu, reference

_LEVELS = ("scalar", "avx2", "avx512", "amx")
LEVELS = _LEVELS[: _LEVELS.index(BEST) + 1]
GROUPS = (None, 64)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C_cpu.set_isa(request.param)
    with ops.use_backend("cpu"):
        yield request.param
    _C_cpu.set_isa(BEST)


def group_of(x: Tensor, layers: list[mk.MosaicLinear]) -> list[Tensor]:
    parts = [layer.operands for layer in layers]
    return cpu.Group(parts, layers[0].in_features, layers[-1].quantize_activations)(x)


def int8(weight: Tensor, group: int | None) -> tuple[mk.PackedWeight, Tensor]:
    """The weight in int8, and the same weight exactly, in float64."""
    packed = mk.quantize(mk.pack(weight), group)
    return packed, mk.unpack(packed).double()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weights_times_x_as_it_is(
    level: str, shape: tuple[int, int, int], density: float, dtype: torch.dtype, group: int | None
) -> None:
    rows, columns, out = shape
    torch.manual_seed(rows + columns)
    packed, weight = int8(sparse(out, columns, density, dtype), group)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out).to(dtype)
    found = mk.sparse_linear(x, packed, bias)
    exact = x.double() @ weight.T + bias.double()
    # a sum of products is only as exact as its terms: the largest of them count where they cancel
    size = (x.double().abs() @ weight.abs().T + bias.double().abs()).norm().clamp_min(1e-300)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm() / size) <= bound(dtype, columns)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
def test_int8_weights_times_rounded_x(
    level: str, shape: tuple[int, int, int], density: float, group: int | None
) -> None:
    rows, columns, out = shape
    torch.manual_seed(columns)
    packed, weight = int8(sparse(out, columns, density, torch.float32), group)
    x = torch.randn(rows, columns)
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(x / step).double() * step.double()
    found = mk.sparse_linear(x, packed, quantize_x=True)
    size = (rounded.abs() @ weight.abs().T).norm().clamp_min(1e-300)
    assert float((found.double() - rounded @ weight.T).norm() / size) <= bound(torch.float32, columns)


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_sums_do_not_overflow(level: str, dtype: torch.dtype, quantize_x: bool) -> None:
    columns = 40_000  # all products of one sign and of the largest size
    packed = mk.quantize(mk.pack(torch.ones(3, columns)))
    found = mk.sparse_linear(
        torch.full((2, columns), -3.0, dtype=torch.float32).to(dtype), packed, quantize_x=quantize_x
    )
    if dtype is torch.float16:
        assert bool(found.isinf().all())
    else:  # equal terms round the same way every time, so that the errors of fp32 sums add up
        exact = torch.full((2, 3), -3.0 * columns, dtype=torch.float64)
        limit = torch.finfo(dtype).eps + columns * torch.finfo(torch.float32).eps
        assert relative_error(found, exact) <= limit


@pytest.mark.parametrize("peak", [30.0, 3000.0, 30000.0])
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_one_huge_activation_does_not_drown_the_others(level: str, rows: int, peak: float) -> None:
    weight = sparse(9, 200, 0.5, torch.bfloat16)
    weight[:, 0] = 0  # pruned: only the other columns count
    packed, exact = int8(weight, None)
    x = (torch.randn(rows, 200) * 0.4).bfloat16()
    x[:, 0] = peak
    found = mk.sparse_linear(x, packed)
    assert relative_error(found, x.double() @ exact.T) <= bound(torch.bfloat16, 200)


def test_millions_of_columns_do_not_overflow(level: str) -> None:
    columns = 2_200_000
    packed = mk.quantize(mk.pack(torch.ones(1, columns)))
    found = mk.sparse_linear(torch.ones(1, columns), packed, quantize_x=True)
    limit = torch.finfo(torch.float32).eps * columns if level not in ("avx512", "amx") else 1e-5
    assert float((found - columns).abs() / columns) <= limit


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_denormal_activations_keep_their_sign(level: str, dtype: torch.dtype, tiny: float) -> None:
    packed = mk.quantize(mk.pack(torch.full((1, 64), 1e30)))
    x = torch.full((1, 64), tiny).to(dtype)
    exact = float(x.double().sum() * 1e30)
    for quantize_x in (False, True):
        found = float(mk.sparse_linear(x, packed, quantize_x=quantize_x))
        assert 0 <= found <= 2 * exact


def test_biases_of_a_group_are_of_one_dtype() -> None:
    plain = mk.MosaicLinear.from_packed(mk.quantize(mk.pack(torch.eye(40))))
    half = mk.MosaicLinear.from_packed(mk.quantize(mk.pack(torch.eye(40))), torch.ones(40).bfloat16())
    single = mk.MosaicLinear.from_packed(mk.quantize(mk.pack(torch.eye(40))), torch.ones(40))
    x = torch.randn(1, 40).bfloat16()
    for layer, result in zip((plain, half), group_of(x, [plain, half]), strict=True):
        assert torch.equal(result, layer(x))
    with pytest.raises(KernelError, match="bias must be"):
        group_of(x, [half, single])
    with pytest.raises(KernelError, match="bias must be"):
        group_of(x, [plain, single])


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_x_that_is_not_finite_spoils_itself_alone(level: str, bad: float, quantize_x: bool) -> None:
    packed = mk.quantize(mk.pack(torch.ones(4, 70)))
    x = torch.ones(3, 70).bfloat16()
    x[1, 5] = bad
    found = mk.sparse_linear(x, packed, quantize_x=quantize_x)
    assert not bool(found[1].isfinite().any())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 40, 96])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_is_its_parts(level: str, dtype: torch.dtype, rows: int, threads: int) -> None:
    torch.manual_seed(rows)
    columns, x = 200, torch.randn(rows, 200).to(dtype)
    weights = [sparse(out, columns, 0.5, dtype, seed=out) for out in (64, 1, 37)]
    layers = [mk.MosaicLinear.from_packed(mk.pack(w), torch.randn(len(w)).to(dtype)) for w in weights]
    found = group_of(x, layers)
    for layer, result in zip(layers, found, strict=True):
        assert torch.equal(result, layer(x))


@pytest.mark.parametrize("quantize_x", [False, True])
def test_a_group_may_hold_a_weight_without_rows(level: str, quantize_x: bool) -> None:
    layers = [mk.MosaicLinear.from_packed(mk.quantize(mk.pack(torch.ones(out, 100)))) for out in (0, 3, 0, 2)]
    for layer in layers:
        layer.quantize_activations = quantize_x
    x = torch.randn(2, 100)
    for layer, result in zip(layers, group_of(x, layers), strict=True):
        assert torch.equal(result, layer(x))


@pytest.mark.parametrize("rows", [3, 96])
@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_int8_is_its_parts(level: str, group: int | None, quantize_x: bool, rows: int) -> None:
    x = torch.randn(rows, 100).bfloat16()
    layers = []
    for out in (8, 24):
        layer = mk.MosaicLinear.from_packed(mk.quantize(mk.pack(sparse(out, 100, 0.4, torch.bfloat16)), group))
        layer.quantize_activations = quantize_x
        layers.append(layer)
    for layer, result in zip(layers, group_of(x, layers), strict=True):
        assert torch.equal(result, layer(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("groups", [(64, None), (None, 64)])
def test_a_group_may_mix_scales(level: str, groups: tuple[int | None, ...], threads: int) -> None:
    # of 48 rows threads would take 32 and 16, which one of the two has kernels for
    x = torch.randn(48, 640)
    weights = [mk.quantize(mk.pack(sparse(64, 640, 0.5, torch.float32, seed=seed)), g) for seed, g in enumerate(groups)]
    layers = [mk.MosaicLinear.from_packed(weight) for weight in weights]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layer, result in zip(layers, group_of(x, layers), strict=True):
            assert torch.equal(result, layer(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (24, 0, 8)], ids=str)
def test_dense_rows(level: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, out = shape
    torch.manual_seed(columns)
    weight, bias = torch.randn(out, columns).to(dtype), torch.randn(out).to(dtype)
    x = torch.randn(rows, columns).to(dtype)
    if level == "scalar":
        with pytest.raises(BackendError, match="no kernel for dense weights"):
            cpu.dense_linear_raw(torch.randn(1, columns).to(dtype), weight, bias)
        return
    exact = x.double() @ weight.double().T + bias.double()
    size = (x.double().abs() @ weight.double().abs().T + bias.double().abs()).norm().clamp_min(1e-300)
    assert float((cpu.dense_linear_raw(x, weight, bias).double() - exact).norm() / size) <= bound(dtype, columns)


KINDS = ("float", "int8", "int8-group", "int8-rounded", "int8-group-rounded", "dense")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_of_rows(level: str, dtype: torch.dtype, kind: str) -> None:
    """1 to 9 and 16 rows of x by 1 to 14 of a weight: each size of a block, and what is left beside whole ones."""
    if kind == "dense" and level == "scalar":
        return
    rounded, group = "rounded" in kind, 64 if "group" in kind else None
    for out, columns, density in (
        (14, 257, 0.5),
        (13, 31, 1.0),
        (5, 70, 0.5),
        (3, 4200, 0.1),
        (2, 64, 0.0),
        (1, 8, 0.5),
    ):
        weight = sparse(out, columns, density, dtype, seed=out)
        weight[out // 2] = 0  # a row that keeps nothing
        x = torch.randn(16, columns).to(dtype)
        packed = mk.pack(weight)
        if "int8" in kind:
            packed = mk.quantize(packed, group)
            weight = mk.unpack(packed)
        # what whole numbers of 8 or 16 bits are off by is at most half a step of the row's largest
        steps = 127 if rounded else 32767 if "int8" in kind and dtype is torch.bfloat16 else math.inf
        for rows in (*range(1, 10), 16):
            some = x[:rows].contiguous()
            if kind == "dense":
                found = cpu.dense_linear_raw(some, weight, None)
            else:
                found = mk.sparse_linear(some, packed, quantize_x=rounded)
            exact, size = some.double() @ weight.double().T, some.double().abs() @ weight.double().abs().T
            half_a_step = some.double().abs().amax(1, keepdim=True) / steps / 2
            limit = bound(dtype, columns) * size + half_a_step * weight.double().abs().sum(1) * 1.001
            assert bool(((found.double() - exact).abs() <= limit + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 600])
def test_a_row_of_dense_products_has_the_same_bits_alone(level: str, dtype: torch.dtype, columns: int) -> None:
    if level == "scalar":
        return
    weight, x = torch.randn(29, columns).to(dtype), torch.randn(16, columns).to(dtype)
    alone = torch.cat([cpu.dense_linear_raw(row[None], weight, None) for row in x])
    for rows in range(1, 17):
        assert torch.equal(cpu.dense_linear_raw(x[:rows].contiguous(), weight, None), alone[:rows])


def test_parts_that_do_not_belong_together_are_refused() -> None:
    x = torch.randn(1, 40)
    first = mk.MosaicLinear.from_packed(mk.pack(torch.eye(40)))
    with pytest.raises(KernelError, match="x has 40 features but this projection takes 41"):
        group_of(x, [mk.MosaicLinear.from_packed(mk.pack(torch.eye(41))), first])
    with pytest.raises(KernelError, match=r"x is torch\.float32 but the packed values are torch\.bfloat16"):
        group_of(x, [first, mk.MosaicLinear.from_packed(mk.pack(torch.eye(40).bfloat16()))])
    rounded = mk.MosaicLinear.from_packed(mk.quantize(mk.pack(torch.eye(40))))
    rounded.quantize_activations = True
    with pytest.raises(KernelError, match="the same x, rounded alike"):
        group_of(x, [first, rounded])  # the first one's values cannot be rounded


def test_the_reference_agrees_with_the_kernel_on_rounded_activations() -> None:
    packed = mk.quantize(mk.pack(sparse(9, 130, 0.5, torch.float32)), 64)
    index, x = packed.index(), torch.randn(4, 130)
    arguments = (x, packed.values, packed.scales, index.words, index.offsets, None, 130, True)
    expected = reference.sparse_linear_int8(*arguments)  # type: ignore[arg-type]
    assert relative_error(cpu.sparse_linear_int8_raw(*arguments), expected.double()) <= bound(torch.float32, 130)  # type: ignore[arg-type]

# SPDX-License-Identifier: Apache-2.0
"""Products with many rows of x: every kernel at the edges of its tiles, and the layers where torch is slow.

The kernels of every instruction set of this processor are compared with float64. Operands end right before memory
that must not be read, so that a load past their end fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guarded import Guarded
from test_linear_group import LEVELS
from test_ops import BEST, DTYPES, bound, sparse
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, device, ops
from mosaic_kernels import dense as dense_module
from mosaic_kernels import linear as linear_module
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.ops import cpu, library

HALVES = [torch.bfloat16, torch.float16]
# Tiles have 8, 16 or 32 rows of x, and are used from 12, 24 or 64 rows on.
ROWS = (12, 17, 24, 25, 32, 33, 63, 64, 65, 71, 72, 73, 81, 96)
# (columns, out): one weight; no columns; one column more than a word (32) and than one or two pieces (256); half a
# group of 12 weight rows, a whole group, and one row more than each; more weight rows than a panel has (96)
SHAPES = [(1, 1), (0, 5), (33, 6), (257, 7), (300, 13), (513, 12), (64, 100)]


@pytest.fixture(params=[level for level in LEVELS if level != "scalar"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C_cpu.set_isa(request.param)
    with ops.use_backend("cpu"):
        yield request.param
    _C_cpu.set_isa(BEST)


def before_a_page(packed: mk.PackedWeight) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    index = packed.index()
    scales = None if packed.scales is None else Guarded(packed.scales).view()
    return Guarded(packed.values).view(), scales, Guarded(index.words).view(), Guarded(index.offsets).view()


def check(
    run: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, step: float = 0.0, rounded: bool = False
) -> None:
    """Compare ``run`` with float64 for each number of rows.

    From 64 rows on the result of a row must not depend on how many other rows there are.
    """
    columns, last = weight.shape[1], None
    for rows in reversed(ROWS):
        some = Guarded(x[:rows]).view()
        read = _rounded(some) if rounded else some.double()
        found, exact = run(some), read @ weight.double().T + bias.double()
        size = (read.abs() @ weight.double().abs().T).norm() + bias.double().norm()
        assert found.dtype is x.dtype
        assert float((found.double() - exact).norm()) <= (bound(x.dtype, columns) + step) * float(size)
        if last is not None and rows >= 64:
            assert torch.equal(found, last[:rows])
        last = found


def _rounded(x: Tensor) -> Tensor:
    """Each row rounded to int8, in steps of 1/127 of its largest element, as float64."""
    if not x.numel():
        return x.double()
    step = x.float().abs().amax(1, keepdim=True) / 127
    return torch.round(x.float() / step).double() * step.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed(level: str, shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    columns, out = shape
    torch.manual_seed(out)
    weight, x = sparse(out, columns, density, dtype), torch.randn(ROWS[-1], columns).to(dtype)
    weight[out // 2] = 0  # an empty row among others
    bias = torch.randn(out).to(dtype)
    values, _, *index = before_a_page(mk.pack(weight))
    check(lambda x: cpu.sparse_linear_raw(x, values, *index, bias, columns), x, weight, bias)


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(
    level: str, shape: tuple[int, int], density: float, dtype: torch.dtype, group: int | None, quantize_x: bool
) -> None:
    columns, out = shape
    torch.manual_seed(out)
    packed = mk.quantize(mk.pack(sparse(out, columns, density, dtype)), group)
    x, bias = torch.randn(ROWS[-1], columns).to(dtype), torch.randn(out).to(dtype)
    values, scales, *index = before_a_page(packed)
    assert scales is not None
    # x in bf16 may be rounded to 16-bit integers. The error is half a step, and a step is 1/32767 of the largest
    # element of a row, which is up to five times the average one
    step = 0.5 / 32767 * 5 if dtype is torch.bfloat16 and not quantize_x else 0.0
    check(
        lambda x: cpu.sparse_linear_int8_raw(x, values, scales, *index, bias, columns, quantize_x),
        x, mk.unpack(packed), bias, step, quantize_x,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(level: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    columns, out = shape
    torch.manual_seed(out)
    weight, bias = Guarded(torch.randn(out, columns).to(dtype)).view(), torch.randn(out).to(dtype)
    x = torch.randn(ROWS[-1], columns).to(dtype)
    check(lambda x: cpu.dense_linear_raw(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("out", [7, 700])
def test_whole_numbers_are_exact(level: str, out: int) -> None:
    """int8 weights times x rounded to int8: sums below 2^24 are exact for any number of rows."""
    columns = 1000
    weight = torch.randint(-127, 128, (out, columns)).float()
    weight[:, 0] = 127  # so that a step is 1
    x = torch.randint(-127, 128, (70, columns)).float()
    x[:, 0] = 127
    packed = mk.quantize(mk.pack(weight))
    found = mk.sparse_linear(x, packed, quantize_x=True)
    exact = x.double() @ weight.double().T
    assert bool((exact.abs() < 2**24).all())
    assert torch.equal(found.double(), exact)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that torch multiplies bf16 and fp16 slowly, and fail if ``F.linear`` is called with them."""
    if not cpu.DENSE_ROWS:
        pytest.skip("this processor has no kernel for dense weights")

    def answer(x: Tensor, dtype: torch.dtype | None = None) -> bool:
        return x.is_cpu and (dtype or x.dtype) in HALVES

    for module in (device, dense_module, linear_module, library):
        monkeypatch.setattr(module, "is_slow", answer)
    real = F.linear

    def only_fp32(x: Tensor, *rest: Any) -> Tensor:
        assert x.dtype is torch.float32
        return real(x, *rest)

    monkeypatch.setattr(F, "linear", only_fp32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 32, 33, 100])
def test_no_dense_product_is_left_to_a_slow_torch(slow: None, rows: int, dtype: torch.dtype) -> None:
    layer = DenseLinear(70, 33).to(dtype).requires_grad_(False)
    x = torch.randn(rows, 70).to(dtype)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    for found in (layer(x), torch.compile(layer, fullgraph=True, backend="eager")(x)):
        assert float((found.double() - exact).norm() / exact.norm()) <= bound(dtype, 70)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_not_left_to_a_slow_torch(slow: None, dtype: torch.dtype) -> None:
    dense = nn.Linear(70, 33).to(dtype)
    layer = DenseLinear(70, 33).to(dtype)
    layer.load_state_dict(dense.state_dict())
    x, upstream = torch.randn(40, 70).to(dtype).requires_grad_(), torch.randn(40, 33).to(dtype)
    layer(x).backward(upstream)
    assert x.grad is not None
    assert layer.weight.grad is not None
    for found, exact in (
        (x.grad, upstream.double() @ dense.weight.detach().double()),
        (layer.weight.grad, upstream.double().T @ x.detach().double()),
        (layer.bias.grad, upstream.double().sum(0)),
    ):
        assert found is not None
        assert found.dtype is dtype
        assert float((found.double() - exact).norm() / exact.norm()) <= bound(dtype, 70)


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_packed_layers_are_computed_in_fp32(slow: None, dtype: torch.dtype, weights: Any) -> None:
    layer = mk.MosaicLinear.from_linear(nn.Linear(70, 33).to(dtype).requires_grad_(False), weights=weights)
    x, upstream = torch.randn(40, 70).to(dtype).requires_grad_(), torch.randn(40, 33).to(dtype)
    layer(x).backward(upstream)
    assert x.grad is not None
    weight = layer.to_dense(dtype).weight
    assert torch.equal(x.grad, (upstream.float() @ weight.float()).to(dtype))


def test_a_dense_copy_is_not_used_where_torch_is_slow(slow: None) -> None:
    layer = mk.MosaicLinear.from_linear(nn.Linear(70, 33).bfloat16().requires_grad_(False))
    x = torch.randn(100, 70).bfloat16()
    expected = layer(x)
    layer.keep_dense_for_prefill()
    assert torch.equal(layer(x), expected)


def test_a_fast_torch_keeps_its_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_module, "is_slow", lambda x: False)
    calls: list[int] = []
    real = cpu.dense_linear_raw
    monkeypatch.setattr(cpu, "dense_linear_raw", lambda *given: calls.append(len(given[0])) or real(*given))
    layer = DenseLinear(70, 33).bfloat16().requires_grad_(False)
    for rows in (1, DenseLinear.MAX_ROWS, DenseLinear.MAX_ROWS + 1):
        layer(torch.randn(rows, 70).bfloat16())
    assert calls == ([1, DenseLinear.MAX_ROWS] if cpu.DENSE_ROWS else [])

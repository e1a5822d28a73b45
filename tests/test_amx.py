# SPDX-License-Identifier: Apache-2.0
"""AMX kernels: every edge of a tile, both shapes of a panel, integers that nearly overflow, forked processes."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import KernelError
from mosaic_kernels.ops import cpu

Product = Callable[[Tensor], Tensor]
KINDS = ("packed", "dense", "int8", "int8-group", "int8 rounded", "int8-group rounded")
ROWS = (8, 12, 15, 16, 17, 24, 25, 32, 33, 40, 41, 57, 64, 65)
EPS = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    before = _C_cpu.isa()
    try:
        _C_cpu.set_isa("amx")
    except KernelError:
        pytest.skip("this processor has no AMX, or the system does not let this process use them")
    with ops.use_backend("cpu"):
        yield
    _C_cpu.set_isa(before)


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def made(kind: str, out: int, columns: int, density: float = 0.5) -> tuple[Product, Tensor, Tensor]:
    """A function that multiplies by a weight of that kind, and the exact weight and bias in float64."""
    weight = (torch.randn(out, columns) * (torch.rand(out, columns) < density)).bfloat16()
    bias = torch.randn(out).bfloat16()
    if kind == "dense":
        return lambda x: cpu.dense_linear_raw(x, weight, bias), weight.double(), bias.double()
    packed = mk.pack(weight)
    if kind != "packed":
        packed = mk.quantize(packed, 64 if "group" in kind else None)
    rounded = kind.endswith("rounded")
    product = lambda x: mk.sparse_linear(x, packed, bias, quantize_x=rounded)  # noqa: E731
    return product, mk.unpack(packed).double(), bias.double()


def exact_x(kind: str, x: Tensor) -> Tensor:
    """``x`` as the kernel of that kind reads it (rounded to int8 or not), in float64."""
    if not kind.endswith("rounded"):
        return x.double()
    step = x.float().abs().amax(1, keepdim=True) / 127
    return torch.round(x.float() / step).double() * step.double()


def require_near(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """The bound: eps of bf16 for rounding results (and weights with a scale per 64 columns), eps of fp32 for sums."""
    exact, size = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
    limit = 2 * (EPS[0] + math.sqrt(weight.shape[1]) * EPS[1])
    assert float((found.double() - exact).norm()) <= limit * float(size.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 31, 33, 64, 65, 130])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 33, 49])
def test_every_edge_of_a_tile(kind: str, out: int, columns: int) -> None:
    torch.manual_seed(out + columns)
    product, weight, bias = made(kind, out, columns)
    x = torch.randn(ROWS[-1], columns).bfloat16()
    together = product(x)
    require_near(together, exact_x(kind, x), weight, bias)
    for rows in ROWS:
        if "int8" in kind and rows < 12:
            continue  # AVX-512 multiplies these, and its last bits differ
        assert torch.equal(product(x[:rows].contiguous()), together[:rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_weights_that_are_empty_or_full(kind: str, density: float) -> None:
    product, weight, bias = made(kind, 37, 200, density)
    x = torch.randn(20, 200).bfloat16()
    require_near(product(x), exact_x(kind, x), weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_both_shapes_of_a_panel_and_any_number_of_threads_agree(kind: str, use_threads: Callable[[int], None]) -> None:
    # 1100 rows of 1100 columns are 2.4 MB (int8: 1.2 MB), above the 1 MB of a small x; 1100 rows are two batches of 512
    # and a rest
    product, weight, bias = made(kind, 301, 1100)
    x = torch.randn(1100, 1100).bfloat16()
    use_threads(1)
    together = product(x)
    require_near(together, exact_x(kind, x), weight, bias)
    for threads in (1, 2, 3):
        use_threads(threads)
        assert torch.equal(product(x), together)
        for rows in (16, 70, 530):
            assert torch.equal(product(x[:rows].contiguous()), together[:rows])


@pytest.mark.parametrize("columns", [1 << 16, (1 << 16) + 1])
def test_whole_numbers_do_not_overflow(columns: int) -> None:
    packed = mk.quantize(mk.pack(torch.ones(3, columns)))
    found = mk.sparse_linear(torch.full((16, columns), -3.0), packed, quantize_x=True)
    # the integer sum is exact; only its conversion to fp32, three scales and their products are rounded
    assert float((found / (-3.0 * columns) - 1).abs().max()) <= 8 * EPS[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_x_that_is_not_finite_spoils_itself_alone(kind: str, bad: float) -> None:
    product, _, _ = made(kind, 20, 70, density=1.0)
    x = torch.randn(40, 70).bfloat16()
    good = product(x)
    x[21, 5] = bad
    found = product(x)
    assert not bool(found[21].isfinite().any())
    others = [n for n in range(40) if n != 21]
    assert torch.equal(found[others], good[others])


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_a_weight_that_is_not_finite_spoils_its_row_alone(kind: str) -> None:
    weight = torch.ones(20, 70).bfloat16()
    weight[3, 7] = float("inf")
    x = torch.randn(40, 70).bfloat16()
    x[:, 7] = x[:, 7].abs() + 1
    found = cpu.dense_linear_raw(x, weight, None) if kind == "dense" else mk.sparse_linear(x, mk.pack(weight))
    assert bool((found[:, 3] == float("inf")).all())
    assert bool(found[:, [n for n in range(20) if n != 3]].isfinite().all())


@pytest.mark.parametrize("tiny", [1e-40, 1e-37])
def test_denormal_activations_keep_their_sign(tiny: float) -> None:
    # AMX, like the vector kernels, treats denormal numbers as zero
    packed = mk.pack(torch.full((4, 64), 1e30).bfloat16())
    x = torch.full((16, 64), tiny).bfloat16()
    exact = float(x[0].double().sum() * packed.values[0].double())
    found = mk.sparse_linear(x, packed)
    assert bool(((found >= 0) & (found <= 2 * exact)).all())
    if tiny > torch.finfo(torch.float32).tiny:
        assert float((found.double() / exact - 1).abs().max()) <= EPS[0]


def test_a_forked_child_may_use_tiles() -> None:
    product, _, _ = made("packed", 64, 256)
    x = torch.randn(40, 256).bfloat16()
    expected = product(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock must end the child, and with it the test
        os._exit(0 if torch.equal(product(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0

# SPDX-License-Identifier: Apache-2.0
"""Every operator on every backend that runs here, against float64 and against the reference.

Bounds are derived: a sum of n products in fp32, rounded once to the result's dtype, is off by at most
``eps(dtype) + sqrt(n) eps(fp32)`` in relative Frobenius norm up to a small constant.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import BackendError, FormatError, KernelError, NonFiniteError, UsageError
from mosaic_kernels.format import PackedWeight
from mosaic_kernels.ops import cuda, reference, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEVELS = ("scalar", "avx2", "avx512", "amx")
BEST = _C_cpu.isa()
BACKENDS = ("reference", *(f"cpu-{level}" for level in _LEVELS[: _LEVELS.index(BEST) + 1]))

# (rows, in, out): nothing, one feature, off a word by one, several words, off a vector by one, more rows than
# any register block, and enough rows for the dense path.
SHAPES = [
    (0, 33, 5),
    (1, 1, 1),
    (1, 31, 7),
    (1, 33, 9),
    (1, 8191, 6),
    (2, 64, 17),
    (3, 257, 4),
    (7, 100, 33),
    (16, 8193, 5),
    (37, 96, 40),
    (130, 65, 19),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, level = request.param.partition("-")
    if level:
        _C_cpu.set_isa(level)
    with ops.use_backend(name):
        yield request.param
    _C_cpu.set_isa(BEST)


def sparse(out: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    return (weight * (torch.rand(out, columns, generator=generator) < density)).to(dtype)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def bound(dtype: torch.dtype, terms: int) -> float:
    return 2 * (torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_sparse_linear_is_the_dense_product(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], density: float
) -> None:
    rows, columns, out = shape
    weight, x = sparse(out, columns, density, dtype), torch.randn(rows, columns).to(dtype)
    bias = torch.randn(out).to(dtype)
    exact = x.double() @ weight.double().T
    packed = mk.pack(weight)
    found, with_bias = mk.sparse_linear(x, packed), mk.sparse_linear(x, packed, bias)
    assert found.dtype == dtype
    assert found.shape == (rows, out)
    if rows:
        # The exact product can cancel to less than its terms: what rounds are the terms.
        scale = float((x.double().abs() @ weight.double().abs().T).norm())
        assert float((found.double() - exact).norm()) <= bound(dtype, columns) * scale
        shifted = exact + bias.double()
        limit = bound(dtype, columns) * (scale + float(bias.double().norm()) * math.sqrt(rows))
        assert float((with_bias.double() - shifted).norm()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear_takes_any_layout_and_leading_shape(backend: str, dtype: torch.dtype) -> None:
    weight = sparse(24, 70, 0.4, dtype)
    packed = mk.pack(weight)
    base = torch.randn(3, 140, 5).to(dtype)
    for x in (base[:, ::2, :].transpose(1, 2), base[0, :70, 0], torch.randn(2, 1, 4, 70).to(dtype)):
        assert x.shape[-1] == 70
        found = mk.sparse_linear(x, packed)
        assert found.shape == (*x.shape[:-1], 24)
        assert torch.equal(found, mk.sparse_linear(x.contiguous(), packed))
        scale = float((x.double().abs() @ weight.double().abs().T).norm())
        assert float((found.double() - x.double() @ weight.double().T).norm()) <= bound(dtype, 70) * scale


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_two_runs_are_byte_equal_and_rows_do_not_meet(backend: str, rows: int) -> None:
    packed = mk.pack(sparse(300, 1000, 0.5, torch.bfloat16))
    x = torch.randn(rows, 1000).bfloat16()
    first = mk.sparse_linear(x, packed)
    assert torch.equal(first, mk.sparse_linear(x, packed))
    shuffled = torch.randperm(rows)
    assert relative_error(mk.sparse_linear(x[shuffled], packed), first[shuffled].double()) <= bound(
        torch.bfloat16, 1000
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 140), density=st.floats(0, 1), seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES), level=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_unpack_undoes_pack(rows: int, columns: int, density: float, seed: int, dtype: torch.dtype, level: str) -> None:
    weight = sparse(rows, columns, density, dtype, seed)
    name, _, isa = level.partition("-")
    if isa:
        _C_cpu.set_isa(isa)
    try:
        with ops.use_backend(name):
            packed = mk.pack(weight)
            packed.validate()
            assert packed.nnz == int((weight != 0).sum())
            assert torch.equal(mk.unpack(packed), weight)
        values, bits = reference.pack(weight)
        assert torch.equal(packed.values, values)
        assert torch.equal(packed.bitmask, bits)
    finally:
        _C_cpu.set_isa(BEST)


def test_pack_takes_the_weight_of_a_layer_that_trains() -> None:
    linear = torch.nn.Linear(8, 4, bias=False)
    packed = mk.pack(linear.weight)
    assert not packed.values.requires_grad
    assert torch.equal(mk.unpack(packed), linear.weight)
    x = torch.randn(2, 8, requires_grad=True)
    mk.sparse_linear(x, packed).sum().backward()
    assert x.grad is not None


def test_pack_of_awkward_inputs(backend: str) -> None:
    weight = sparse(6, 50, 0.5, torch.float32)
    assert torch.equal(mk.unpack(mk.pack(weight.T)), weight.T)  # not contiguous
    signed = torch.tensor([[-0.0, 1.0, float("nan")]])
    packed = mk.pack(signed)
    assert packed.nnz == 2  # a negative zero is a zero, NaN is a value
    assert torch.isnan(packed.values[1])
    for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(KernelError, match="weight must be"):
            mk.pack(bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 257), (3, 4096)])
def test_outlier_stats_count_like_the_reference(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).pow(3).to(dtype)
    norms = torch.rand(shape[1]) + 0.1
    total, counts = ops.outlier_stats(weight, norms, (1.0, 3.0, 5.0, 10.0))
    scores = weight.float().abs() * norms
    exact = float(scores.double().sum())
    assert abs(total - exact) <= 1e-12 * exact
    # Counts are exact, but for a score that lies within rounding of the threshold.
    for alpha, count in zip((1.0, 3.0, 5.0, 10.0), counts, strict=True):
        threshold, slack = alpha * exact / scores.numel(), 4 * torch.finfo(torch.float32).eps
        low, high = int((scores > threshold * (1 + slack)).sum()), int((scores > threshold * (1 - slack)).sum())
        assert low <= count <= high
    assert ops.outlier_stats(weight, norms, ()) == (total, [])


def test_outlier_stats_of_nothing_and_bad_arguments(backend: str) -> None:
    assert ops.outlier_stats(torch.zeros(4, 8), torch.ones(8), (5.0,)) == (0.0, [0])
    with pytest.raises(KernelError, match=r"column_norms must be \[8\]"):
        ops.outlier_stats(torch.zeros(4, 8), torch.ones(7), (5.0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (130, 67), (2, 3, 33)])
def test_column_square_sums(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    exact = x.double().flatten(0, -2).square().sum(0)
    found = ops.column_square_sums(x)
    assert found.dtype == torch.float64
    # Each square may be taken in fp32; their sum is in double.
    assert bool((found - exact).abs().le(2 * torch.finfo(torch.float32).eps * exact).all())


def by_sorting(scores: list[float], keep: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    return [i in set(order) for i in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 70), level=st.sampled_from(BACKENDS))
def test_select_keeps_exactly_the_best_ties_by_index(data: st.DataObject, rows: int, columns: int, level: str) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-40, 3e38])  # few values: many ties
    flat = data.draw(st.lists(few, min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(flat).view(rows, columns)
    keep = data.draw(st.integers(0, rows * columns))
    per_row = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    name, _, isa = level.partition("-")
    if isa:
        _C_cpu.set_isa(isa)
    try:
        with ops.use_backend(name):
            assert ops.select(scores, keep).flatten().tolist() == by_sorting(flat, keep)
            mask = ops.select(scores, torch.tensor(per_row), "row")
        for row, count in enumerate(per_row):
            assert mask[row].tolist() == by_sorting(scores[row].tolist(), count)
    finally:
        _C_cpu.set_isa(BEST)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (0, 3), (3, 3), (7, 8), (5, 40)])
def test_select_in_groups(backend: str, n: int, m: int) -> None:
    scores = torch.randn(9, 3 * m)
    mask = ops.select(scores, (n, m), "group")
    for got, group in zip(mask.view(-1, m), scores.view(-1, m), strict=True):
        assert got.tolist() == by_sorting(group.tolist(), n)


@pytest.mark.parametrize("size", [(64, 4096), (1, 100_003)])
def test_select_of_many(backend: str, size: tuple[int, int]) -> None:
    scores = torch.randn(size).abs()
    for keep in (0, 1, scores.numel() // 3, scores.numel() - 1, scores.numel()):
        mask = ops.select(scores, keep)
        assert int(mask.sum()) == keep
        if 0 < keep < scores.numel():
            assert float(scores[mask].min()) >= float(scores[~mask].max())


def test_select_refuses(backend: str) -> None:
    scores = torch.ones(2, 6)
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            ops.select(torch.tensor([[1.0, value]]), 1)
    with pytest.raises(KernelError, match=r"\[0, 12\]"):
        ops.select(scores, 13)
    with pytest.raises(KernelError, match="takes 2 counts"):
        ops.select(scores, torch.tensor([1, 2, 3]), "row")
    with pytest.raises(KernelError, match="not a multiple"):
        ops.select(scores, (2, 4), "group")
    with pytest.raises(KernelError, match="scope"):
        ops.select(scores, 1, "column")
    for strange in (2**70, -(2**70), "half", None, [[1, 2], [3]]):
        with pytest.raises(KernelError, match="whole numbers of 64 bits"):
            ops.select(scores, strange)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (5, 33), (64, 128)])
def test_obs_block_follows_the_reference(backend: str, rows: int, block: int) -> None:
    weight, keep = torch.randn(rows, block), torch.rand(rows, block) < 0.4
    spread = torch.randn(block, 2 * block)
    factor = torch.linalg.cholesky(
        torch.linalg.inv((spread @ spread.T / block + torch.eye(block)).double()), upper=True
    )
    got, errors, mask = ops.obs_block(weight, factor.float(), keep)
    exact, exact_errors, _ = reference.obs_block(weight.double(), factor.double(), keep, 0, 0)
    assert torch.equal(mask, keep)
    assert not bool(got[~keep].any())
    # An update passes through at most `block` multiply-adds.
    assert relative_error(got, exact) <= bound(torch.float32, block)
    assert relative_error(errors, exact_errors) <= bound(torch.float32, block)


def test_obs_block_chooses_groups_when_it_reaches_them(backend: str) -> None:
    weight, factor = torch.randn(7, 64), torch.linalg.cholesky(torch.eye(64) * 0.7 + 0.3, upper=True)
    got, errors, mask = ops.obs_block(weight, factor, n=2, m=4)
    exact, exact_errors, exact_mask = reference.obs_block(weight, factor, torch.ones(7, 64, dtype=torch.bool), 2, 4)
    assert torch.equal(mask, exact_mask)
    assert bool(mask.view(7, 16, 4).sum(2).eq(2).all())
    assert relative_error(got, exact.double()) <= bound(torch.float32, 64)
    assert relative_error(errors, exact_errors.double()) <= bound(torch.float32, 64)
    with pytest.raises(KernelError, match="either"):
        ops.obs_block(weight, factor)


def test_arguments_are_checked_at_the_border(backend: str) -> None:
    packed = mk.pack(sparse(4, 40, 0.5, torch.float32))
    with pytest.raises(KernelError, match="x has 39 features but this projection takes 40"):
        mk.sparse_linear(torch.randn(2, 39), packed)
    with pytest.raises(KernelError, match=r"x is torch.bfloat16 but the packed values are torch.float32"):
        mk.sparse_linear(torch.randn(2, 40).bfloat16(), packed)
    with pytest.raises(KernelError, match=r"bias must be \[4\]"):
        mk.sparse_linear(torch.randn(2, 40), packed, torch.zeros(5))
    short = PackedWeight(packed.values[:-1], packed.bitmask, packed.shape)
    with pytest.raises(FormatError, match="weights but"):
        mk.unpack(short)
    with pytest.raises(FormatError, match="weights but"):
        mk.sparse_linear(torch.randn(1, 40), short)


def test_gradient_reaches_the_activations_only() -> None:
    weight = sparse(20, 45, 0.5, torch.float32)
    packed = mk.pack(weight)
    x = torch.randn(3, 45, requires_grad=True)
    seed = torch.randn(3, 20)
    (found,) = torch.autograd.grad(mk.sparse_linear(x, packed), x, seed)
    assert relative_error(found, seed.double() @ weight.double()) <= bound(torch.float32, 20)
    trainable = PackedWeight(packed.values.clone().requires_grad_(), packed.bitmask, packed.shape)
    with pytest.raises(KernelError, match="differentiable in its activations only"):
        mk.sparse_linear(torch.randn(1, 45), trainable)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own since torch 2.14
def test_operators_keep_torchs_contract() -> None:
    weight = sparse(12, 50, 0.5, torch.float32)
    packed = mk.pack(weight)
    index = packed.index()
    linear = (torch.randn(3, 50, requires_grad=True), packed.values, index.words, index.offsets, torch.randn(12), 50)
    o = torch.ops.mosaic
    torch.library.opcheck(o.sparse_linear, linear)
    torch.library.opcheck(o.dense_linear, (torch.randn(3, 50), weight, torch.randn(12)))
    torch.library.opcheck(o.unpack, (packed.values, packed.bitmask, 50))
    torch.library.opcheck(o.pack, (weight,))
    torch.library.opcheck(o.outlier_stats, (weight, torch.ones(50), [3.0, 5.0]))
    torch.library.opcheck(o.column_square_sums, (torch.randn(2, 3, 50),))
    torch.library.opcheck(o.select, (torch.rand(4, 8), torch.tensor([5]), "matrix"))
    torch.library.opcheck(o.obs_block, (torch.randn(4, 8), torch.eye(8), torch.ones(4, 8, dtype=torch.bool), 0, 0))


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    packed = mk.pack(sparse(4, 40, 0.5, torch.float32))
    for name, why_not in (("cuda", cuda.why_not()), ("triton", triton.why_not())):
        with ops.use_backend(name):
            if why_not is None:
                continue  # it can run here; its own tests cover it
            with pytest.raises(BackendError, match=f"'{name}' was forced but cannot run"):
                mk.sparse_linear(torch.randn(1, 40), packed)
    with pytest.raises(UsageError, match="not a backend"), ops.use_backend("tpu"):
        pass


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_forces_a_backend() -> None:
    code = "import torch, mosaic_kernels as mk; print(mk.pack(torch.eye(3)).nnz)"
    assert in_a_fresh_process(code, MOSAIC_BACKEND="reference").stdout.strip() == "3"
    refused = in_a_fresh_process(code, MOSAIC_BACKEND="tpu")
    assert refused.returncode
    assert "is not a backend" in refused.stderr
    if cuda.why_not() is not None:
        refused = in_a_fresh_process(code, MOSAIC_BACKEND="cuda")
        assert refused.returncode
        assert "was forced but cannot run" in refused.stderr

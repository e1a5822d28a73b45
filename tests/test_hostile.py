# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels on sizes and contents that nobody sends on purpose: the reference's result or a documented error.

Inputs lie in ordinary memory or end at a page that may not be touched; under AddressSanitizer (``.ci/sanitize``)
both ends of the ordinary ones are guarded too.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from guarded import Guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import FormatError, KernelError, NonFiniteError
from mosaic_kernels.ops import cpu, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEST = _C_cpu.isa()
_LEVELS = ("scalar", "avx2", "avx512", "amx")
LEVELS = _LEVELS[: _LEVELS.index(BEST) + 1]

# none, one, and around a byte, a vector, a word, a block of the kernels, a warp's 32 words
WIDTHS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1025)
CONTENTS: dict[str, tuple[float, ...]] = {
    "zeros": (0.0,),
    "negative zeros": (0.0, -0.0),
    "ones": (1.0,),
    "ties": (1.0, -1.0, 0.0, -0.0, 2.0, 2.0),
    "tiny": (0.0, 1e-45, -1e-40, 1e-38, 6e-8, 1.0),
    "huge": (3.3e38, -3.3e38, 65504.0, 1.0, 0.0),
    "not finite": (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0),
}
FINITE = tuple(kind for kind in CONTENTS if kind != "not finite")
MODEST = ("zeros", "negative zeros", "ones", "ties", "tiny", "random")  # whose products overflow in no dtype

rows_ = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 9, 12, 13))
some_rows = rows_.filter(bool)
batches = st.sampled_from((0, 1, 2, 5, 8, 9, 26))
widths = st.sampled_from(WIDTHS) | st.integers(1, 300)
dtypes = st.sampled_from(DTYPES)
# One level serves all examples of a test, and under a sanitizer drawing them takes longer than hypothesis likes.
thorough = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C_cpu.set_isa(request.param)
    with ops.use_backend("cpu"):
        yield request.param
    _C_cpu.set_isa(BEST)


@st.composite
def tensors(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype, kinds: tuple[str, ...]) -> Tensor:
    """``[rows, columns]`` of one kind of content, in ordinary memory or before a forbidden page."""
    kind, generator = draw(st.sampled_from(kinds)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if kind == "random":
        dense = torch.randn(rows, columns, generator=generator)
        filled = dense * (torch.rand(rows, columns, generator=generator) < draw(st.floats(0, 1)))
    else:
        values = torch.tensor(CONTENTS[kind])
        filled = values[torch.randint(len(values), (rows, columns), generator=generator)]
    filled = filled.to(dtype)
    return Guarded(filled).view() if draw(st.booleans()) else filled


def as_bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN is itself and -0 is not 0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.equal(as_bits(found), as_bits(expected))


def near(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, step: float = 0.0) -> bool:
    """Whether ``found`` is ``F.linear`` but for rounding, x's to whole numbers of ``step`` times its largest included.

    Where NaN and Inf are not among the terms they must not show.
    """
    clean = x.isfinite().all(1)[:, None] & weight.isfinite().all(1)
    wide, weights = x.double().nan_to_num(0, 0, 0), weight.double().nan_to_num(0, 0, 0)
    exact, terms = wide @ weights.T, wide.abs() @ weights.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    # half a step, and as quotients are rounded before they are whole a little more
    steps = 0.51 * step * wide.abs().amax(1, keepdim=True) if step and x.shape[1] else torch.zeros(len(x), 1)
    single, own = torch.finfo(torch.float32), torch.finfo(x.dtype)
    # vdpbf16ps takes and makes no denormals: what is below the smallest normal number may be lost in each term.
    lost = (x.shape[1] + 2) * single.tiny * 4 + own.tiny
    limit = 2 * (own.eps + (x.shape[1] + 1) * single.eps) * terms + steps * weights.abs().sum(1) + lost
    return found.shape == exact.shape and bool(((found.double() - exact).abs() <= limit)[clean].all())


@thorough
@given(data=st.data(), rows=rows_, columns=widths, dtype=dtypes)
def test_unpack_undoes_pack(level: str, data: st.DataObject, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = data.draw(tensors(rows, columns, dtype, (*CONTENTS, "random")))
    packed = mk.pack(weight)
    values, bits = reference.pack(weight)
    assert same(packed.values, values)
    assert torch.equal(packed.bitmask, bits)
    assert same(mk.unpack(packed), torch.where(weight != 0, weight, torch.zeros((), dtype=dtype)))


@thorough
@given(data=st.data(), rows=rows_, columns=widths, dtype=dtypes)
def test_bits_that_do_not_fit_are_refused(
    level: str, data: st.DataObject, rows: int, columns: int, dtype: torch.dtype
) -> None:
    packed = mk.pack(data.draw(tensors(rows, columns, dtype, ("zeros", "ones", "random"))))
    bits = packed.bitmask.clone()
    for _ in range(data.draw(st.integers(0, 3)) if bits.numel() else 0):  # also beyond the last column
        place = data.draw(st.integers(0, bits.numel() * 8 - 1))
        bits.view(-1)[place // 8] ^= 1 << place % 8
    count = max(0, packed.nnz + data.draw(st.integers(-2, 2)))
    values = Guarded(torch.ones(count, dtype=dtype)).view()
    corrupt = mk.PackedWeight(values, Guarded(bits).view(), packed.shape)
    beyond = columns % 8 > 0 and rows > 0 and bool((bits[:, -1] >> columns % 8).any())
    fits = not beyond and int(corrupt.index().offsets[-1]) == count
    x = torch.ones(1, columns, dtype=dtype)
    if fits:
        assert same(mk.unpack(corrupt), reference.unpack(values, bits, columns))
        assert mk.sparse_linear(x, corrupt).shape == (1, rows)
        return
    for refused in (lambda: mk.unpack(corrupt), lambda: mk.sparse_linear(x, corrupt)):
        with pytest.raises(FormatError, match=r"bits beyond column|the bitmask counts"):
            refused()
    with pytest.raises(KernelError, match=r"beyond the last column|another number of weights"):
        torch.ops.mosaic.unpack(corrupt.values, corrupt.bitmask, columns)


@thorough
@given(data=st.data(), rows=rows_, columns=widths, excess=st.sampled_from([-1, 1, 1000]))
def test_offsets_that_do_not_fit_are_refused(
    level: str, data: st.DataObject, rows: int, columns: int, excess: int
) -> None:
    packed = mk.pack(data.draw(tensors(rows, columns, torch.float32, ("ones", "random"))))
    index = packed.index()
    offsets = index.offsets.clone()
    offsets[-1] += excess
    with pytest.raises(KernelError, match="offsets end at another number"):
        cpu.sparse_linear_raw(torch.ones(1, columns), packed.values, index.words, offsets, None, columns)


@thorough
@given(data=st.data(), tokens=batches, rows=rows_, columns=widths, dtype=dtypes)
def test_sparse_linear(
    level: str, data: st.DataObject, tokens: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = data.draw(tensors(rows, columns, dtype, (*MODEST, "not finite")))
    x = data.draw(tensors(tokens, columns, dtype, (*MODEST, "not finite")))
    bias = data.draw(st.none() | tensors(1, rows, dtype, MODEST).map(lambda t: t[0]))
    assert near(mk.sparse_linear(x, mk.pack(weight), bias), x, weight, bias)


def before_a_page(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else Guarded(t).view() for t in tensors]


@thorough
@given(
    data=st.data(), tokens=batches, rows=some_rows, columns=widths, dtype=dtypes,
    group=st.sampled_from((None, 64)), quantize_x=st.booleans(),
)  # fmt: skip
def test_int8_linear_alone_and_in_a_group(
    level: str, data: st.DataObject, tokens: int, rows: int, columns: int, dtype: torch.dtype, group: int | None,
    quantize_x: bool,
) -> None:  # fmt: skip
    biased = data.draw(st.booleans())
    parts, weights = [], []
    for out in (rows, data.draw(some_rows)):
        packed = mk.quantize(mk.pack(data.draw(tensors(out, columns, dtype, MODEST))), group)
        bias = data.draw(tensors(1, out, dtype, MODEST))[0] if biased else None
        index = packed.index()
        parts.append(before_a_page(packed.values, packed.scales, index.words, index.offsets, bias))
        weights.append(mk.unpack(packed))
    x = Guarded(data.draw(tensors(tokens, columns, dtype, (*MODEST, "not finite")))).view()
    together = cpu.Group(parts, columns, quantize_x)(x)
    for (*part, bias), weight, result in zip(parts, weights, together, strict=True):
        alone = cpu.sparse_linear_int8_raw(x, *part, bias, columns, quantize_x)
        assert torch.equal(alone.nan_to_num(7), result.nan_to_num(7))
        # bf16 may be multiplied as whole numbers of 16 bits, which are finer than its own
        assert near(alone, x, weight, bias, 1 / 127 if quantize_x else 1 / 32767 if dtype is torch.bfloat16 else 0)


@thorough
@given(data=st.data(), tokens=batches, rows=rows_, columns=widths, dtype=dtypes)
def test_dense_rows(level: str, data: st.DataObject, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = Guarded(data.draw(tensors(rows, columns, dtype, (*MODEST, "not finite")))).view()
    x = Guarded(data.draw(tensors(tokens, columns, dtype, (*MODEST, "not finite")))).view()
    bias = data.draw(st.none() | tensors(1, rows, dtype, MODEST).map(lambda t: Guarded(t[0]).view()))
    if level != "scalar":
        assert near(cpu.dense_linear_raw(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear_of_strided_parts(level: str, dtype: torch.dtype) -> None:
    weight, x = torch.randn(6, 64).to(dtype), torch.randn(2, 64).to(dtype)
    packed = mk.pack(weight)
    every_other = torch.stack([packed.values, packed.values * 7], 1)[:, 0]
    at_an_odd_byte = torch.cat([packed.bitmask.new_zeros(1), packed.bitmask.flatten()])[1:].view(6, 8)
    for strange in (replace(packed, values=every_other), replace(packed, bitmask=at_an_odd_byte)):
        assert same(mk.unpack(strange), weight)
        for bias in (torch.randn(12).to(dtype)[::2], torch.ones(1, dtype=dtype).expand(6)):
            assert not bias.is_contiguous()
            assert same(mk.sparse_linear(x, strange, bias), mk.sparse_linear(x, packed, bias.clone()))


@thorough
@given(data=st.data(), rows=rows_, columns=widths)
def test_select_of_counts(level: str, data: st.DataObject, rows: int, columns: int) -> None:
    scores = data.draw(tensors(rows, columns, torch.float32, (*FINITE, "random")))
    size = rows * columns
    for keep in (0, size, min(1, size), max(0, size - 1), data.draw(st.integers(0, size))):
        assert torch.equal(ops.select(scores, keep), reference.select(scores, torch.tensor([keep]), "matrix"))
    one = data.draw(st.integers(0, columns))
    each = torch.tensor(data.draw(st.lists(st.sampled_from((0, columns, one)), min_size=rows, max_size=rows)))
    for counts in (each.long(), torch.full((rows,), one)):
        assert torch.equal(ops.select(scores, counts, "row"), reference.select(scores, counts, "row"))
    for scope, limit in (("matrix", size), ("row", columns)):
        for keep in (-1, limit + 1, -(2**63), 2**63 - 1) if rows else ():
            with pytest.raises(KernelError, match="counts must lie in"):
                ops.select(scores, keep, scope)


@thorough
@given(
    data=st.data(), rows=rows_, groups=st.integers(0, 5), m=st.integers(1, 17) | st.sampled_from((32, 63, 64, 65, 128))
)
def test_select_in_groups(level: str, data: st.DataObject, rows: int, groups: int, m: int) -> None:
    scores = data.draw(tensors(rows, groups * m, torch.float32, (*FINITE, "random")))
    for n in {0, 1, m - 1, m, data.draw(st.integers(0, m))}:
        expected = reference.select(scores, torch.tensor([n, m]), "group")
        assert torch.equal(ops.select(scores, (n, m), "group"), expected)
    for n, size in ((m + 1, m), (-1, m), (0, 0), (0, -m)):
        with pytest.raises(KernelError, match="cannot keep"):
            ops.select(scores, (n, size), "group")


@thorough
@given(data=st.data(), rows=st.integers(1, 5), columns=st.sampled_from(WIDTHS[1:]), keep=st.sampled_from((0, 1)))
def test_scores_that_are_not_finite_are_refused(
    level: str, data: st.DataObject, rows: int, columns: int, keep: int
) -> None:
    scores = torch.rand(rows, columns)
    place = data.draw(st.integers(0, scores.numel() - 1))
    scores.view(-1)[place] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    for kept, scope in ((keep, "matrix"), (keep, "row"), ((keep, columns), "group"), ((keep, 1), "group")):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            ops.select(Guarded(scores).view(), kept, scope)


@thorough
@given(data=st.data(), rows=rows_, columns=widths, dtype=dtypes)
def test_statistics(level: str, data: st.DataObject, rows: int, columns: int, dtype: torch.dtype) -> None:
    kinds = (*CONTENTS, "random")
    weight = data.draw(tensors(rows, columns, dtype, kinds))
    norms = data.draw(tensors(1, columns, torch.float32, kinds))[0].abs()
    alphas = data.draw(st.lists(st.sampled_from((0.0, 1.0, 5.0, 1e300)), max_size=64))
    total, counts = ops.outlier_stats(weight, norms, alphas)
    expected, expected_counts = reference.outlier_stats(weight, norms, alphas)
    assert total == pytest.approx(float(expected), rel=1e-12, nan_ok=True)
    # Another order of summing moves the threshold: only a score this close to it may change sides.
    scores, slack = weight.float().abs() * norms, 4 * torch.finfo(torch.float32).eps
    for alpha, count, other in zip(alphas, counts, expected_counts.tolist(), strict=True):
        threshold = alpha * float(expected) / max(1, scores.numel())
        near = (scores.double() - threshold).abs() <= slack * threshold
        assert abs(count - other) <= int(near.sum())
    with pytest.raises(KernelError, match="at most 64 alphas"):
        ops.outlier_stats(weight, norms, [1.0] * 65)
    sums, squares = ops.column_square_sums(weight), reference.column_square_sums(weight)
    assert torch.allclose(sums, squares, rtol=1e-12, atol=0, equal_nan=True)


@thorough
@given(data=st.data(), rows=rows_, groups=st.integers(0, 9), m=st.sampled_from((1, 2, 3, 4, 8, 16, 33)))
def test_obs_block_of_identity(level: str, data: st.DataObject, rows: int, groups: int, m: int) -> None:
    """An identity factor moves no weight, so the reference's result is exact, ties included."""
    weight = data.draw(tensors(rows, groups * m, torch.float32, ("zeros", "negative zeros", "ones", "ties", "random")))
    identity = Guarded(torch.eye(groups * m)).view()
    for n in {0, 1, m}:
        got, errors, mask = ops.obs_block(weight, identity, n=n, m=m)
        exact, exact_errors, exact_mask = reference.obs_block(weight, identity, torch.ones_like(mask), n, m)
        assert torch.equal(mask, exact_mask)
        assert torch.equal(got, exact)
        assert torch.equal(errors, exact_errors)
    keep = Guarded(torch.rand(weight.shape) < 0.5).view()
    for found, expected in zip(
        ops.obs_block(weight, identity, keep), reference.obs_block(weight, identity, keep, 0, 0), strict=True
    ):
        assert torch.equal(found, expected)
    if weight.numel():
        weight[-1, data.draw(st.integers(0, groups * m - 1))] = float("nan")
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            ops.obs_block(weight, identity, n=1, m=m)
    with pytest.raises(KernelError, match="cannot keep"):
        ops.obs_block(weight, identity, n=m + 1, m=m)


def test_empty_results_need_no_memory_of_a_former_call(level: str) -> None:
    """A new thread has no scratch memory yet, and none of size zero was taken for being out of memory."""
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(ops.outlier_stats, torch.ones(2, 2), torch.ones(2), ()).result() == (4.0, [])
    with ThreadPoolExecutor(1) as fresh:
        nothing = torch.zeros(2, 0), torch.zeros(0, 0), torch.zeros(2, 0, dtype=torch.bool)
        assert fresh.submit(ops.obs_block, *nothing).result()[0].shape == (2, 0)
    with ThreadPoolExecutor(1) as fresh:
        product = fresh.submit(mk.sparse_linear, torch.zeros(2, 0), mk.pack(torch.zeros(3, 0))).result()
        assert product.tolist() == [[0.0] * 3] * 2

# SPDX-License-Identifier: Apache-2.0
"""Scoring, selecting and packing in one go: the same mask, bit for bit, as from stored scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from guarded import Guarded
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.errors import KernelError, NonFiniteError
from mosaic_kernels.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("scalar", "avx2", "avx512", "amx")
BEST = _C_cpu.isa()

# A single weight; off a word and a vector by one; longer than a piece (1024) and several rows of that; enough
# for several slices (131072 scores) of which none begins with a row; many narrow rows.
SHAPES = [(1, 1), (5, 33), (3, 4097), (2, 9000), (41, 9001), (3000, 7)]


@pytest.fixture(params=LEVELS[: LEVELS.index(BEST) + 1])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C_cpu.set_isa(request.param)
    yield request.param
    _C_cpu.set_isa(BEST)


def product(weight: Tensor, norms: Tensor) -> Tensor:
    return weight.float().abs() * norms


def mask_by_reference(weight: Tensor, norms: Tensor, keep: Any, scope: str) -> Tensor:
    return reference.score_select(weight, norms, torch.as_tensor(keep).reshape(-1), scope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_is_that_of_stored_scores(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, norms = torch.randn(shape).to(dtype), torch.rand(shape[1]) + 0.1
    scores, count = product(weight, norms), weight.numel()
    for keep in {0, 1, count // 3, count - 1, count}:
        mask = ops.score_select(weight, norms, keep)
        assert torch.equal(mask, ops.select(scores, keep))
        assert int(mask.sum()) == keep
    per_row = torch.randint(0, shape[1] + 1, (shape[0],))
    mask = ops.score_select(weight, norms, per_row, "row")
    assert torch.equal(mask, mask_by_reference(weight, norms, per_row, "row"))
    assert torch.equal(mask.sum(1), per_row)


@pytest.mark.parametrize("columns", [4, 4100, 6000])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1), (3, 5), (20, 50), (60, 100)])
def test_groups_are_whole_in_every_piece(level: str, columns: int, n: int, m: int) -> None:
    columns = -(-columns // m) * m
    weight, norms = torch.randn(33, columns).bfloat16(), torch.rand(columns)
    mask = ops.score_select(weight, norms, (n, m), "group")
    assert torch.equal(mask, mask_by_reference(weight, norms, (n, m), "group"))
    assert bool(mask.view(-1, m).sum(1).eq(n).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_ties_are_kept_in_the_order_of_their_index(level: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_kernels.ops.threads._FORCED_THREADS", threads)
    weight = torch.randint(-2, 3, (300, 1000)).bfloat16()  # three scores, so that every slice holds ties
    norms = torch.ones(1000)
    for keep in (1, 100_000, 130_001, 250_000, 299_999):
        assert torch.equal(ops.score_select(weight, norms, keep), mask_by_reference(weight, norms, keep, "matrix"))
    zeros = torch.zeros(300, 1000)
    assert int(ops.score_select(zeros, norms, 123_456).flatten()[:123_456].sum()) == 123_456


def test_a_sample_that_misleads_costs_time_alone(level: str) -> None:
    flat = torch.linspace(0.1, 9.0, 400_000)
    rows = torch.rand(400, 1000) * 2.0 ** (torch.arange(400) % 40).unsqueeze(1)
    few = torch.zeros(400, 1000)
    few[7, 100:130] = torch.rand(30)  # no run of the sample need meet them
    for weight in (flat.view(400, 1000), flat.flip(0).view(400, 1000), rows, few, -few):
        for keep in (7, 25, 1000, 200_000, 399_970, 399_995):
            assert torch.equal(ops.select(weight, keep), reference.select(weight, torch.tensor([keep]), "matrix"))


SLICE, ROOM = 1 << 17, 1 << 14  # of 1024x4096 scores: what a thread takes, and what it keeps at hand around the cut


@pytest.mark.parametrize("excess", [-20, -15, -5, -1, 0, 1, 16])
def test_a_slice_may_have_as_many_scores_near_the_cut_as_there_is_room_for(level: str, excess: int) -> None:
    random = torch.Generator().manual_seed(0)
    scores, near = torch.randn(1024, 4096, generator=random), ROOM + excess
    first = scores.view(-1)[:SLICE]
    first.copy_(torch.tensor([-100.0, 100.0]).repeat(SLICE // 2))
    order, values = torch.randperm(SLICE, generator=random), torch.linspace(-0.01, 0.01, near)
    first[order[:near]] = values[torch.randperm(near, generator=random)]
    ranked = scores.view(-1).sort(descending=True).values
    for keep in (2_089_152, 2_094_152, 2_097_152, 2_100_152, 2_105_152):
        assert ranked[keep] != ranked[keep - 1]  # so that the reference is a comparison
        assert torch.equal(ops.select(scores, keep), scores >= ranked[keep - 1]), keep


def test_layouts_and_norms_of_any_dtype(level: str) -> None:
    weight, norms = torch.randn(60, 40).bfloat16(), torch.rand(60)
    expected = mask_by_reference(weight.T.contiguous(), norms, 700, "matrix")
    assert torch.equal(ops.score_select(weight.T, norms, 700), expected)
    assert torch.equal(ops.score_select(weight.T, norms.double(), 700), expected)


def test_what_is_not_finite_or_does_not_fit_is_refused(level: str) -> None:
    weight, norms = torch.ones(2, 6), torch.ones(6)
    for scope, keep in (("matrix", 3), ("row", 2), ("group", (1, 2)), ("matrix", 0)):
        for bad in (float("nan"), float("inf"), 3e38):  # the last one overflows when it is multiplied
            broken = weight.clone()
            broken[1, 5] = bad
            with pytest.raises(NonFiniteError, match="NaN or Inf"):
                ops.score_select(broken, norms * 2, keep, scope)
    with pytest.raises(KernelError, match=r"column_norms must be \[6\]"):
        ops.score_select(weight, torch.ones(5), 3)
    with pytest.raises(KernelError, match=r"\[0, 12\]"):
        ops.score_select(weight, norms, 13)
    with pytest.raises(KernelError, match="weight must be 2-D"):
        ops.score_select(weight.double(), norms, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 515), (0, 7)], ids=str)
def test_packing_with_a_mask_is_packing_what_it_leaves(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape) * (torch.rand(shape) < 0.7)).to(dtype)  # zeros of its own stay packed away
    for keep in (torch.rand(shape) < 0.4, torch.zeros(shape).bool(), torch.ones(shape).bool()):
        packed, expected = mk.pack(weight, keep), mk.pack(torch.where(keep, weight, 0))
        assert torch.equal(packed.values, expected.values)
        assert torch.equal(packed.bitmask, expected.bitmask)
        with ops.use_backend("reference"):
            assert torch.equal(mk.pack(weight, keep).values, expected.values)
    strided = (torch.rand(shape[::-1]) < 0.5).T
    assert torch.equal(mk.unpack(mk.pack(weight, strided)), torch.where(strided, weight, 0))


def same_as_in_steps(weight: Tensor, norms: Tensor, keep: Any, scope: str) -> bool:
    found = ops.score_pack(weight, norms, keep, scope)
    expected = mk.pack(weight, ops.score_select(weight, norms, keep, scope))
    found.validate()
    return torch.equal(found.values, expected.values) and torch.equal(found.bitmask, expected.bitmask)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 7), (7, 0), (700, 600)], ids=str)
def test_bits_at_once_are_those_of_the_mask(
    level: str, dtype: torch.dtype, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosaic_kernels.ops.threads._FORCED_THREADS", threads)
    weight = (torch.randn(shape) * (torch.rand(shape) < 0.8)).to(dtype)
    weight = Guarded(weight).view()  # zeros that are kept are packed away, and nothing past the end is read
    norms, count = Guarded(torch.rand(shape[1]).round(decimals=1)).view(), weight.numel()  # norms of zero, too
    for keep in {0, min(1, count), count // 3, max(0, count - 1), count}:
        assert same_as_in_steps(weight, norms, keep, "matrix")
    assert same_as_in_steps(weight, norms, torch.randint(0, shape[1] + 1, (shape[0],)), "row")
    assert same_as_in_steps(weight, norms, (0, shape[1]) if shape[1] else (1, 2), "group")
    if count < 10_000:  # whose sorts take long
        with ops.use_backend("reference"):
            assert same_as_in_steps(weight, norms, count // 2, "matrix")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1), (3, 5), (20, 50), (60, 100)])
def test_bits_of_groups_at_once(level: str, n: int, m: int) -> None:
    weight, norms = torch.randn(33, 41 * m).bfloat16(), torch.rand(41 * m)
    assert same_as_in_steps(weight, norms, (n, m), "group")
    assert same_as_in_steps(weight[:, : 2 * m].T, norms[:33], 7, "matrix")


def test_ties_of_bits_at_once(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_kernels.ops.threads._FORCED_THREADS", 3)
    weight = torch.randint(-2, 3, (300, 1001)).bfloat16()
    for keep in (1, 100_000, 250_000, 300_299):
        assert same_as_in_steps(weight, torch.ones(1001), keep, "matrix")


def test_bits_at_once_refuse_what_masks_do(level: str) -> None:
    weight = torch.ones(2, 6)
    weight[1, 5] = float("nan")
    for scope, keep in (("matrix", 3), ("row", 2), ("group", (1, 2)), ("matrix", 0)):
        with pytest.raises(NonFiniteError, match="score_pack: scores hold NaN or Inf"), ops.use_backend("cpu"):
            ops.score_pack(weight, torch.ones(6), keep, scope)
    with pytest.raises(KernelError, match=r"\[0, 12\]"):
        ops.score_pack(weight, torch.ones(6), 13)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    for keep in (torch.ones(2, 3).bool(), torch.ones(3, 2)):
        with pytest.raises(KernelError, match=r"keep must be bool \[3, 2\]"):
            mk.pack(torch.ones(3, 2), keep)


def test_the_operators_keep_torchs_contract() -> None:
    weight = torch.randn(4, 8)
    torch.library.opcheck(torch.ops.mosaic.score_select, (weight, torch.rand(8), torch.tensor([5]), "matrix"))
    torch.library.opcheck(torch.ops.mosaic.score_pack, (weight, torch.rand(8), torch.tensor([5]), "matrix"))
    torch.library.opcheck(torch.ops.mosaic.pack, (weight, weight > 0))


def test_another_default_device_changes_nothing() -> None:
    weight, norms, x = torch.randn(16, 40), torch.rand(40), torch.randn(3, 40)

    def found() -> tuple[list[Tensor], object]:
        mask = ops.score_select(weight, norms, torch.tensor(300, device="cpu"), "matrix")
        return [mask, ops.column_square_sums(x)], ops.outlier_stats(weight, norms, [3.0, 5.0])

    wanted = found()
    with torch.device("meta"):
        again = found()
    assert all(torch.equal(one, other) for one, other in zip(wanted[0], again[0], strict=True))
    assert str(wanted[1]) == str(again[1])

# SPDX-License-Identifier: Apache-2.0
"""Attention of one token: softmax over keys of any length, in pieces that nobody sees in the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from decoding import attend
from guarded import Guarded

from mosaic_kernels import _C_cpu
from mosaic_kernels.errors import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 256  # tokens


@pytest.fixture(params=["scalar", "avx2", "avx512", "amx"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has."""
    before = _C_cpu.isa()
    try:
        _C_cpu.set_isa(request.param)
    except KernelError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C_cpu.set_isa(before)


def random(
    heads: int, key_heads: int, dim: int, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(heads * dim + tokens)
    shapes = ((heads, dim), (key_heads, tokens, dim), (key_heads, tokens, dim))
    query, keys, values = (torch.randn(*shape, generator=rng).to(dtype) for shape in shapes)
    return query, keys, values


def reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64."""
    share = query.shape[0] // keys.shape[0]
    keys, values = (each.double().repeat_interleave(share, 0) for each in (keys, values))
    scores = torch.einsum("hd,htd->ht", query.double(), keys) * query.shape[1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values)


def check(found: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
    """One rounding to the dtype, and sums over dim and tokens in fp32."""
    wanted = reference(query, keys, values, mask)
    sums = query.shape[1] ** 0.5 + keys.shape[1] ** 0.5
    exact = torch.finfo(torch.float32).eps
    bound = exact * sums + (torch.finfo(query.dtype).eps / 2 if query.dtype is not torch.float32 else 0)
    assert float((found.double() - wanted).norm() / wanted.norm()) <= bound


# Registers hold 4 to 16 numbers, and are filled for 1 to 8 heads at once; the last of 20 is none of a whole number.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(32, 4), (3, 3), (7, 1), (20, 1), (12, 2)], ids=str)
def test_softmax_of_scores_times_values(level: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for dim in (2, 10, 20, 34, 64, 80, 96, 100, 128, 256):
        for tokens in (1, 7, 16, 17, 33, 64, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 40):
            case = tuple(Guarded(each).view() for each in random(*heads, dim, tokens, dtype))
            check(attend(*case), *case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(level: str, dtype: torch.dtype) -> None:
    query, keys, values = random(8, 2, 80, 4 * PIECE + 9, dtype)
    every = torch.ones(keys.shape[1], dtype=torch.bool)
    holes = torch.rand(every.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    piece, last, start = every.clone(), every.clone(), every.clone()
    piece[PIECE : 2 * PIECE] = False
    start[: PIECE + 3] = False  # padding on the left
    last[40:] = False  # a static cache that is nearly empty
    one = ~every
    one[3 * PIECE + 1] = True
    for mask in (every, holes, piece, start, last, holes & piece & start, one):
        keys_seen = keys.masked_fill(~mask[:, None], torch.nan)  # what is not attended to may be anything
        check(attend(query, keys_seen, values, mask), query, keys, values, mask)


def test_nothing_is_attended_to(level: str) -> None:
    for tokens in (1, 30, 3 * PIECE):
        query, keys, values = random(4, 2, 64, tokens)
        assert torch.equal(attend(query, keys, values, torch.zeros(tokens, dtype=torch.bool)), torch.zeros(4, 64))
        assert torch.equal(attend(query.abs(), torch.full_like(keys, -torch.inf), values), torch.zeros(4, 64))


def test_one_piece_takes_all(level: str) -> None:
    query, keys, values = random(4, 2, 64, 4 * PIECE)
    for token in (0, PIECE + 70, 4 * PIECE - 1):
        keys_far = keys.clone()
        keys_far[0, token] = query[:2].sum(0) * 300  # scores of some thousand
        check(attend(query, keys_far, values), query, keys_far, values)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_passes_on_to_its_heads_alone(level: str, wrong: float) -> None:
    for dtype in DTYPES:
        query, keys, values = random(6, 3, 64, 2 * PIECE + 20, dtype)
        wanted = attend(query, keys, values)
        for token in (0, PIECE + 5, 2 * PIECE + 19):
            keys_wrong, values_wrong = keys.clone(), values.clone()
            keys_wrong[1, token, 7] = wrong * torch.sign(query[2, 7])  # a score of +inf, or none
            found = attend(query, keys_wrong, values)
            assert found[2].isnan().all()
            assert torch.equal(found[[0, 1, 4, 5]], wanted[[0, 1, 4, 5]])
            values_wrong[2, token, 9] = wrong
            found = attend(query, keys, values_wrong)
            assert not found[4:, 9].isfinite().any()
            found[4:, 9] = wanted[4:, 9]
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_by_any_number_of_workers(dtype: torch.dtype) -> None:
    for heads, tokens in (((8, 1), 5 * PIECE + 3), ((12, 3), 700), ((4, 4), 300)):
        case = random(*heads, 128, tokens, dtype)
        wanted = attend(*case, threads=1)
        check(wanted, *case)
        for threads in (2, 3, 7):
            assert torch.equal(attend(*case, threads=threads), wanted)


def test_caches_of_any_strides_and_results_that_fit_exactly(level: str) -> None:
    query, keys, values = random(6, 2, 20, PIECE + 30)
    by_token = keys.transpose(0, 1).contiguous().transpose(0, 1)
    longer = torch.full((2, 2 * PIECE + 90, 50), torch.nan)
    longer[:, : PIECE + 30, 3:23] = values
    within = longer[:, : PIECE + 30, 3:23]
    assert torch.equal(attend(query, by_token, within), attend(query, keys, values))
    room = torch.full((8, 20), 7.0)
    out = room[1:7]
    _C_cpu.attend(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), 0, out.data_ptr(), 6, 2, 20, PIECE + 30,
        (*keys.stride()[:2], *values.stride()[:2]), 20**-0.5, 0, 1,
    )  # fmt: skip
    assert torch.equal(out, attend(query, keys, values))
    assert bool((room[[0, 7]] == 7).all())


def test_sizes_that_do_not_fit_are_told() -> None:
    for shape, problem in (((5, 2, 8, 3), "multiple of key heads"), ((4, 2, 7, 3), "even"), ((4, 2, 8, 0), "a token")):
        with pytest.raises(KernelError, match=problem):
            attend(*random(*shape))

# SPDX-License-Identifier: Apache-2.0
"""What only the native CPU module can get wrong: memory past the end, threads, forks, instruction sets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from guarded import Guarded
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu
from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import RowIndex, bitmask_bytes
from mosaic_kernels.ops import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BEST = _C_cpu.isa()
_LEVELS = ("scalar", "avx2", "avx512", "amx")
LEVELS = _LEVELS[: _LEVELS.index(BEST) + 1]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C_cpu.set_isa(request.param)
    yield request.param
    _C_cpu.set_isa(BEST)


def turned_from(level: str, dtype: torch.dtype) -> int:
    """The rows of x from which on a level adds up in another order than for fewer."""
    return {"avx2": 64, "avx512": 24, "amx": 8 if dtype is torch.bfloat16 else 24}.get(level, 1 << 30)


def sparse(out: int, columns: int, density: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(out, columns) * (torch.rand(out, columns) < density)).to(dtype)


def linear(x: Tensor, weight: Tensor, threads: int) -> Tensor:
    """``sparse_linear`` on so many threads, whatever torch is set to."""
    packed = mk.pack(weight)
    index = RowIndex.from_bitmask(packed.bitmask)
    out = x.new_full((x.shape[0], weight.shape[0]), float("nan"))
    addresses = [t.data_ptr() for t in (x, packed.values, index.words, index.offsets)]
    sizes = (x.shape[0], weight.shape[1], weight.shape[0], packed.nnz, CODES[x.dtype], threads)
    _C_cpu.sparse_linear(*addresses, 0, out.data_ptr(), *sizes)
    return out


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same for a dense weight, on one thread."""
    out = x.new_full((x.shape[0], weight.shape[0]), float("nan"))
    sizes = (x.shape[0], weight.shape[1], weight.shape[0], 0, CODES[x.dtype], 1)
    _C_cpu.sparse_linear(x.data_ptr(), weight.data_ptr(), 0, 0, 0, out.data_ptr(), *sizes)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(level: str, dtype: torch.dtype) -> None:
    # 700 x 600 is enough work to be shared out; 1 to 9 are every register block, 40 rows expand panels
    weight, x = sparse(700, 600, 0.5, dtype), torch.randn(40, 600).to(dtype)
    alone = torch.cat([linear(row[None], weight, 1) for row in x])
    assert bool(alone.isfinite().all())
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 40):
        if rows >= turned_from(level, dtype):
            continue  # see below
        for threads in (1, 2, 5):
            assert torch.equal(linear(x[:rows].contiguous(), weight, threads), alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "columns"), [(701, 600), (13, 1), (5, 2000), (48, 64)])
def test_a_row_of_many_has_the_same_bits_whatever_stands_beside_it(
    level: str, dtype: torch.dtype, out: int, columns: int
) -> None:
    # tiles of 32, 16 and 8 rows of x, groups of 12, 8, 6 and 4 weight rows, and what is left of each; threads take
    # weights or, from 64 rows on and with few outputs, rows
    weight, x = sparse(out, columns, 0.5, dtype), torch.randn(295, columns).to(dtype)
    together = linear(x, weight, 1)
    exact = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(together, exact, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-3)
    # positive terms do not cancel: what a sum of many of them loses shows
    positive = linear(x.abs(), weight.abs(), 1)
    exact = x.double().abs() @ weight.double().abs().T
    assert bool(((positive.double() - exact).abs() <= (torch.finfo(dtype).eps + 2e-6) * exact).all())
    for rows in (8, 9, 16, 17, 24, 25, 32, 33, 41, 57, 64, 65, 71, 96, 128, 295):
        if rows < (24 if level == "scalar" else turned_from(level, dtype)):
            continue
        for threads in (1, 2, 3, 5):
            assert torch.equal(linear(x[:rows].contiguous(), weight, threads), together[:rows])


@pytest.mark.parametrize("rows", [1, 40])
def test_no_threads_are_the_caller_alone(level: str, rows: int) -> None:
    weight, x = sparse(700, 600, 0.5, torch.float32), torch.randn(rows, 600)
    for threads in (0, -1):
        assert torch.equal(linear(x, weight, threads), linear(x, weight, 1))


@pytest.mark.parametrize("shape", [(1, 2**32 + 1), (2**16 + 1, 2**16), (2**62, 4)])
@pytest.mark.parametrize("scope", [0, 1, 2])
def test_more_scores_than_are_counted_are_refused_unseen(shape: tuple[int, int], scope: int) -> None:
    with pytest.raises(KernelError, match="more than 2\\^32 scores"):
        _C_cpu.select(0, 0, 0, *shape, scope, 1)


def test_several_threads_may_call_at_once() -> None:
    weight, x = sparse(600, 800, 0.5, torch.bfloat16), torch.randn(4, 800).bfloat16()
    expected = linear(x, weight, 1)
    with ThreadPoolExecutor(6) as callers:
        results = list(callers.map(lambda i: linear(x, weight, 1 + i % 4), range(200)))
    assert all(torch.equal(found, expected) for found in results)


def test_offsets_that_contradict_the_values_are_refused() -> None:
    packed = mk.pack(sparse(4, 40, 0.5, torch.float32))
    index = packed.index()
    with pytest.raises(KernelError, match="offsets end at another number"):
        cpu.sparse_linear_raw(torch.randn(1, 40), packed.values[:-1], index.words, index.offsets, None, 40)


def test_levels_are_named_and_must_exist() -> None:
    assert _C_cpu.isa() == BEST
    with pytest.raises(KernelError, match="the levels are"):
        _C_cpu.set_isa("sse9")
    assert _C_cpu.isa() == BEST
    if BEST != "scalar":
        assert BEST in _C_cpu.features()


def in_a_fresh_process(function: str, **environment: str) -> None:
    """Run a function of this file where a crash ends that process alone."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_native; test_native.{function}()"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_is_read_or_written_past_its_end() -> None:
    in_a_fresh_process("use_memory_that_ends_at_a_forbidden_page")


def test_a_forked_child_computes_on_threads_of_its_own() -> None:
    in_a_fresh_process("fork_after_the_pool_has_started")


def test_the_number_of_threads_can_be_set() -> None:
    code = "from mosaic_kernels.ops import cpu; print(cpu.threads())"
    done, refused = (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "MOSAIC_NUM_THREADS": value}, capture_output=True,
            text=True, check=False,
        )
        for value in ("3", "0")
    )  # fmt: skip
    assert done.stdout == "3\n"
    assert "MOSAIC_NUM_THREADS='0' is not a positive number" in refused.stderr


def use_memory_that_ends_at_a_forbidden_page() -> None:
    for name in LEVELS:
        _C_cpu.set_isa(name)
        for dtype in DTYPES:
            for columns in (1, 7, 31, 32, 33, 63, 64, 100, 512, 515):
                for density in (0.02, 0.5, 1.0):
                    check_guarded_round_trip(sparse(9, columns, density, dtype))


def check_guarded_round_trip(weight: Tensor) -> None:
    (out, columns), code = weight.shape, CODES[weight.dtype]
    dense, bits = Guarded(weight), Guarded(torch.zeros(out, bitmask_bytes(columns), dtype=torch.uint8))
    offsets = Guarded(torch.zeros(out + 1, dtype=torch.int64))
    _C_cpu.pack_bits(dense.address, 0, bits.address, offsets.address, out, columns, code, 1)
    nnz = int(offsets.read()[-1])
    assert nnz == int((weight != 0).sum())
    values, stride = Guarded(weight.new_zeros(nnz)), bitmask_bytes(columns)
    rest = (bits.address, stride, offsets.address, out, columns, nnz, code, 1)
    _C_cpu.pack_values(dense.address, values.address, *rest)
    assert torch.equal(values.read(), weight[weight != 0])
    unpacked = Guarded(torch.full_like(weight, 7))
    _C_cpu.unpack(unpacked.address, values.address, *rest)
    assert torch.equal(unpacked.read(), weight)
    words = Guarded(RowIndex.from_bitmask(bits.read()).words)
    for rows in (1, 3, 8, 17, 24, 25, 35, 41):  # from 24 on, or 8, panels, with tiles of 32, 16 and 8
        x, bias = Guarded(torch.randn(rows, columns).to(weight.dtype)), Guarded(weight.new_zeros(out))
        result = Guarded(weight.new_zeros(rows, out))
        _C_cpu.sparse_linear(
            x.address, values.address, words.address, offsets.address, bias.address, result.address, rows, columns,
            out, nnz, code, 1,
        )  # fmt: skip
        assert torch.equal(result.read(), linear(x.like, weight, 1))
        if _C_cpu.isa() != "scalar":
            _C_cpu.sparse_linear(
                x.address, dense.address, 0, 0, bias.address, result.address, rows, columns, out, 0, code, 1
            )
            assert torch.equal(result.read(), dense_linear(x.like, weight))
    scores = Guarded(weight.float())
    mask, keep = Guarded(torch.zeros(out, columns, dtype=torch.bool)), Guarded(torch.tensor([3]))
    _C_cpu.select(scores.address, keep.address, mask.address, out, columns, 0, 1)
    assert int(mask.read().sum()) == 3
    norms, total, counts = (
        Guarded(torch.ones(columns)),
        Guarded(torch.zeros(1).double()),
        Guarded(torch.zeros(1).long()),
    )
    alphas = Guarded(torch.tensor([2.0], dtype=torch.float64))
    _C_cpu.outlier_stats(
        dense.address, norms.address, alphas.address, total.address, counts.address, out, columns, 1, code, 1
    )
    assert total.read() > 0 or nnz == 0
    sums = Guarded(torch.zeros(columns).double())
    _C_cpu.column_square_sums(dense.address, sums.address, out, columns, code, 1)
    assert torch.allclose(sums.read(), weight.double().square().sum(0))


def fork_after_the_pool_has_started() -> None:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    weight, x = sparse(2000, 1000, 0.5, torch.bfloat16), torch.randn(3, 1000).bfloat16()
    expected = linear(x, weight, 3)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a deadlock must end the child, and with it the test
            os._exit(0 if torch.equal(linear(x, weight, 3), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(linear(x, weight, 3), expected)

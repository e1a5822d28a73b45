# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU itself: right kernels are right in every order, wrong ones are caught (csrc/simt/probes.cu)."""

from __future__ import annotations

import pytest
import torch
from guarded import Guarded
from simt import CODES, Gpu
from torch import Tensor

SEEDS = range(24)
WORDS = torch.arange(1024, dtype=torch.int32)


def run(gpu: Gpu, name: str, variant: int, seed: int, given: Tensor, out: Tensor) -> Tensor | str:
    """What the probe wrote, or what went wrong."""
    gpu.seed(seed)
    memory = Guarded(out)
    return gpu.probe(name, variant, Guarded(given), memory) or memory.read()


def neighbours(gpu: Gpu, variant: int) -> list[bool]:
    lanes = torch.arange(64, dtype=torch.int32)
    found = (run(gpu, "neighbour", variant, seed, WORDS, torch.zeros_like(lanes)) for seed in SEEDS)
    return [torch.equal(lanes ^ 1, f) for f in found if isinstance(f, Tensor)]


def copies(gpu: Gpu, variant: int) -> list[bool | str]:
    """Of every seed, whether what was copied is what was read, or what went wrong."""
    found = (run(gpu, "copy", variant, seed, WORDS[:256], torch.zeros(256, dtype=torch.int32)) for seed in SEEDS)
    return [f if isinstance(f, str) else torch.equal(f, WORDS[:256]) for f in found]


def test_a_missing_syncwarp_shows(gpu: Gpu) -> None:
    assert neighbours(gpu, 0) == [True] * len(SEEDS)
    assert False in neighbours(gpu, 1)


def test_a_copy_is_there_after_its_barrier_and_not_before(gpu: Gpu) -> None:
    assert copies(gpu, 0) == [True] * len(SEEDS)
    assert set(copies(gpu, 4)) == {True, False}  # nobody waits: some orders are lucky


def test_the_wrong_parity_returns_at_once_or_never(gpu: Gpu) -> None:
    found = copies(gpu, 1)
    assert False in found
    assert any("deadlock" in str(f) for f in found)  # the copy came first, and with it another phase
    assert True not in found


# What is missing at a barrier of 64 arrivals (sm_80), or of one with 1024 bytes.
@pytest.mark.parametrize(
    ("variant", "parity", "on_80", "on_90"),
    [
        (2, 1, "in phase 1: 64 of 64 arrivals and 0 bytes", "in phase 1: 1 of 1 arrivals and 0 bytes"),
        (3, 0, "in phase 0: 1 of 64 arrivals and 0 bytes", "in phase 0: 0 of 1 arrivals and -16 bytes"),
    ],
    ids=["a phase nobody ends", "too little announced"],
)
def test_a_deadlock_says_who_waits_for_what(gpu: Gpu, variant: int, parity: int, on_80: str, on_90: str) -> None:
    where = f"block (0, 0, 0) at mbarrier at 1024, parity {parity}"
    missing = on_80 if gpu.arch == 80 else on_90
    assert copies(gpu, variant) == [f"deadlock:\n  {where} ({missing} missing): threads 0-63"] * len(SEEDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_on_matrices_that_ldmatrix_loads(gpu: Gpu, dtype: torch.dtype) -> None:
    left, right = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    found = run(gpu, "matmul", CODES[dtype], 0, torch.cat([left, right]), torch.zeros(16, 8))
    assert isinstance(found, Tensor)
    exact, scale = left.double() @ right.double().T, left.double().abs() @ right.double().abs().T
    assert bool(((found.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * scale).all())


def test_blocks_and_threads_interleave(gpu: Gpu) -> None:
    atomic = [run(gpu, "count", 0, seed, WORDS, torch.zeros(1, dtype=torch.int32)) for seed in SEEDS]
    assert all(int(found) == 512 for found in atomic if isinstance(found, Tensor))
    racing = [run(gpu, "count", 1, seed, WORDS, torch.zeros(1, dtype=torch.int32)) for seed in SEEDS]
    assert len({int(found) for found in racing if isinstance(found, Tensor)}) > len(SEEDS) / 2


def test_a_seed_is_one_order(gpu: Gpu) -> None:
    first, second = (run(gpu, "count", 1, 5, WORDS, torch.zeros(1, dtype=torch.int32)) for _ in range(2))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert int(first) == int(second)


FORBIDDEN = [
    (0, "4 bytes at 4096 of shared memory, which has 4096"),
    (1, "is not a multiple of 4"),
    (2, "while other threads of the warp wait at"),
    (3, "thread 7"),  # left although the mask names it: "does not run" or "ends while others wait for it"
    (4, "deadlock:\n  block (0, 0, 0) at bar.sync 0, 64: threads 0-31"),
    (5, "more arrivals at the mbarrier at 1024 than the 1 it counts"),
    (6, "there is no mbarrier at 1024"),
    (7, "is not a multiple of 16"),
    (8, "to which another is in flight"),
    (9, "of its asynchronous copies or arrivals"),
    (10, "memory fault"),
    (11, "while others wait with"),
    (12, "at mbarrier at 1024, parity 0 (in phase 0: 1 of 2 arrivals and 0 bytes missing): threads 0-63"),
    (13, "the mbarrier at 1024 was overwritten"),
    (14, "stored without a fence"),
    (15, "a shift by too much"),
    (16, "misaligned pointer"),
]
ONLY_BULK = (5, 14)


@pytest.mark.parametrize(("variant", "message"), FORBIDDEN, ids=lambda value: str(value)[:30])
def test_what_cuda_forbids_ends_the_launch(gpu: Gpu, variant: int, message: str) -> None:
    if gpu.arch < 90 and variant in ONLY_BULK:
        return
    found = [run(gpu, "forbidden", variant, seed, WORDS, torch.zeros(64, dtype=torch.int32)) for seed in SEEDS]
    assert any(isinstance(f, str) and message in f for f in found), found
    assert all(isinstance(f, str) for f in found) or variant in (8, 9)  # these copies may land in time


def test_a_failed_launch_leaves_nothing_behind(gpu: Gpu) -> None:
    for _ in range(100):
        assert "deadlock" in str(run(gpu, "forbidden", 12, 0, WORDS, torch.zeros(64, dtype=torch.int32)))
    assert neighbours(gpu, 0) == [True] * len(SEEDS)

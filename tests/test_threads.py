# SPDX-License-Identifier: Apache-2.0
"""The kernels on torch's OpenMP threads and on threads of our own, from several callers, and after a fork."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mosaic_kernels.format import PackedWeight, RowIndex
from mosaic_kernels.int8 import quantize
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops import threads as thread_count

TORCHS = 2  # a kernel that may use exactly as many threads as torch has runs on torch's
OTHERS = (3, 4, 8, 64)  # a pool of our own, also where it is much larger than the machine


class Work:
    """Inputs for every kernel, of a size that each of them shares out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        thread_count._FORCED_THREADS = 1  # no kernel has started threads before the scenario does
        self.weight = (torch.randn(700, 600) * (torch.rand(700, 600) < 0.5)).bfloat16()
        self.x, self.bias = torch.randn(40, 600).bfloat16(), torch.randn(700).bfloat16()
        self.scores, self.norms = self.weight.float().abs(), torch.rand(600)
        self.values, self.bits = cpu.KERNELS["pack"](self.weight)
        self.index = RowIndex.from_bitmask(self.bits)
        self.int8 = quantize(PackedWeight(self.values, self.bits, (700, 600)), 64)
        self.block, self.keep = torch.randn(250, 96), torch.rand(250, 96) < 0.5
        self.large = self.scores > 1
        self.state = (self.scores, self.scores, self.scores * 2, self.scores * 3, torch.rand(700, 1))
        self.factor = torch.eye(96) + 0.01 * torch.rand(96, 96).triu()

    def run(self, threads: int) -> list[bytes]:
        """What every kernel finds, as bytes: torch's own operators may hang in a forked child."""
        thread_count._FORCED_THREADS = threads
        run, index = cpu.KERNELS, self.index
        found: list[Tensor] = []
        for rows in (1, 7, 40):
            x = self.x[:rows]
            found.append(run["sparse_linear"](x, self.values, index.words, index.offsets, self.bias, 600))
            found += cpu.Group([(self.values, None, index.words, index.offsets, self.bias)] * 2, 600)(x)
            if cpu.DENSE_ROWS:
                found.append(run["dense_linear"](x, self.weight, self.bias))
            for quantize_x in (False, True):
                int8 = (self.int8.values, self.int8.scales, index.words, index.offsets, self.bias)
                found.append(run["sparse_linear_int8"](x, *int8, 600, quantize_x))
                found += cpu.Group([int8] * 2, 600, quantize_x)(x)
        found += run["pack"](self.weight)
        found.append(run["unpack"](self.values, self.bits, 600))
        found += run["outlier_stats"](self.weight, self.norms, (1.0, 3.0))
        found.append(run["column_square_sums"](self.x))
        found.append(run["select"](self.scores, torch.tensor([140_001]), "matrix"))
        found.append(run["select"](self.scores, torch.full((700,), 77), "row"))
        found.append(run["select"](self.scores, torch.tensor([2, 4]), "group"))
        found.append(run["score_select"](self.weight, self.norms, torch.tensor([140_001]), "matrix"))
        found.append(run["score_select"](self.weight, self.norms, torch.full((700,), 77), "row"))
        found.append(run["score_select"](self.weight, self.norms, torch.tensor([2, 4]), "group"))
        for keep, scope in ((torch.tensor([140_001]), "matrix"), (torch.full((700,), 77), "row")):
            found += run["score_pack"](self.weight, self.norms, keep, scope)
        found += run["score_pack"](self.weight, self.norms, torch.tensor([2, 4]), "group")
        dual, solution, residual, direction, energy = (copied(tensor) for tensor in self.state)
        found += [run["admm_step"](dual, self.large, self.scores, 0.5), dual]
        run["cg_step"](solution, residual, direction, energy, self.scores, self.large)
        found += [solution, residual, direction, energy]
        found += run["obs_block"](self.block, self.factor, self.keep, 0, 0)
        return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in found]


def copied(tensor: Tensor) -> Tensor:
    """A copy that is made without torch's threads."""
    return torch.from_numpy(tensor.numpy().copy())


def from_four_callers(work: Work, threads: int, expected: list[bytes]) -> None:
    with ThreadPoolExecutor(4) as callers:
        assert all(found == expected for found in callers.map(lambda _: work.run(threads), range(12)))


def in_a_child(work: Work, threads: int, expected: list[bytes]) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock must end the child, and with it the test
        status = 1
        try:
            assert work.run(threads) == expected
            from_four_callers(work, threads, expected)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@dataclass
class Answers(Dataset[bool]):
    """Whether a worker process finds what its parent found."""

    work: Work
    threads: int
    expected: list[bytes]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> bool:
        return self.work.run(self.threads) == self.expected


def openmp_and_our_own_pool() -> None:
    work = Work()
    expected = work.run(1)
    torch.set_num_threads(TORCHS)
    for threads in (TORCHS, *OTHERS, TORCHS):
        assert work.run(threads) == expected, threads


def our_own_pool() -> None:
    work = Work()
    expected = work.run(1)
    torch.set_num_threads(1)
    for threads in OTHERS:
        assert work.run(threads) == expected, threads
        from_four_callers(work, threads, expected)


def openmp_from_four_callers() -> None:
    work = Work()
    expected = work.run(1)
    from_four_callers(work, TORCHS, expected)  # each caller has OpenMP threads of its own


def openmp_before_a_fork() -> None:
    work = Work()
    expected = work.run(1)
    torch.set_num_threads(TORCHS)
    torch.randn(1 << 20).exp()
    in_a_child(work, TORCHS, expected)  # the first kernel on several threads is the child's
    for _ in range(3):
        assert work.run(TORCHS) == expected
        in_a_child(work, TORCHS, expected)
        in_a_child(work, 3, expected)


def our_own_pool_before_a_fork() -> None:
    work = Work()
    expected = work.run(1)
    torch.set_num_threads(1)
    for _ in range(3):
        assert work.run(3) == expected
        in_a_child(work, 3, expected)


def openmp_before_forked_workers() -> None:
    work = Work()
    expected = work.run(1)
    torch.set_num_threads(TORCHS)
    assert work.run(TORCHS) == expected
    for threads in (1, TORCHS, 3):  # torch gives its workers one thread
        answers = Answers(work, threads, expected)
        loader = DataLoader(answers, batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert [bool(answer) for answer in loader] == [True] * len(answers)


@pytest.mark.parametrize(
    "scenario",
    [
        openmp_and_our_own_pool,
        our_own_pool,
        openmp_from_four_callers,
        openmp_before_a_fork,
        our_own_pool_before_a_fork,
        openmp_before_forked_workers,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_in_a_process_of_its_own(scenario) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, scenario.__name__],
        env={**os.environ, "OMP_NUM_THREADS": str(TORCHS)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Another OpenMP runtime, which computes on the caller and counts.
OTHER_RUNTIME = """
static int calls;
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) { ++calls; body(data); }
int omp_get_max_threads(void) { return 2; }
int other_calls(void) { return calls; }
"""

TWO_RUNTIMES = """
import ctypes, sys
if sys.argv[2] == "before":
    other = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import torch
import mosaic_kernels as mk
if sys.argv[2] == "after":
    other = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.set_num_threads(2)
packed, x, calls = mk.pack(torch.ones(2000, 1000)), torch.randn(4, 1000), [other.other_calls()]
torch.randn(1 << 20).exp()
calls.append(other.other_calls())
assert torch.allclose(mk.sparse_linear(x, packed), x.sum(1, keepdim=True).expand(4, 2000), atol=1e-3)
calls.append(other.other_calls())
print(calls[1] > calls[0], calls[2] > calls[1])
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("order", ["before", "after"])
def test_of_two_openmp_runtimes_the_one_torch_calls(order: str, tmp_path: Path) -> None:
    """The loader binds torch to a runtime that was loaded for all before it: then the kernels run there, too."""
    library = tmp_path / "libother.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"], input=OTHER_RUNTIME, text=True, check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNTIMES, library, order], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    torch_does, kernels_do = done.stdout.split()
    assert kernels_do == torch_does


if __name__ == "__main__":
    globals()[sys.argv[1]]()

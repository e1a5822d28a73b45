# SPDX-License-Identifier: Apache-2.0
"""Pruning on a GPU: tensors stay there, and the host reads a few numbers of each projection.

Without a GPU, the stations run on one that is made up (``fake_cuda``); with one, a whole run is compared with the
CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, on_fake_cuda
from small_models import random_model

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.reader import check_finite
from mosaic_kernels.config import PruneConfig
from mosaic_kernels.evaluate.perplexity import perplexity
from mosaic_kernels.models import PROJECTIONS, ModelAdapter
from mosaic_kernels.ops import reference
from mosaic_kernels.prune import search as searching
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import embed
from mosaic_kernels.prune.composite import make_plan
from mosaic_kernels.prune.gram import HALF, InputStatistics, add_product
from mosaic_kernels.prune.importance import rank
from mosaic_kernels.prune.sensitivity import measure
from mosaic_kernels.prune.share import choose_share
from mosaic_kernels.prune.solvers import Target, choose_solver, solve
from mosaic_kernels.prune.structured import refit, sweep
from mosaic_kernels.prune.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = [
    ("admm", "fast"),
    ("admm", "default"),
    ("sparsegpt", "default"),
    ("wanda", "default"),
    ("magnitude", "default"),
]
# A solve reads: is each factor positive definite, is the result finite.
FLAGS_PER_SOLVE = 2


@pytest.fixture
def weights() -> Any:
    """A model's weights, made before tensors lose their numbers."""
    return random_model("qwen2", dtype=torch.bfloat16, num_hidden_layers=1)


@pytest.fixture
def gpu(weights: Any) -> Iterator[FakeCuda]:
    with fake_cuda() as fake:
        on_fake_cuda(weights)
        yield fake


def observed(features: int = 64, *, with_gram: bool = True) -> InputStatistics:
    found = InputStatistics(features, torch.device("cuda"), with_gram=with_gram)
    found.add(torch.empty(2, 300, features, dtype=torch.bfloat16, device="cuda"))
    return found.finish("x")


def tokens(sequences: int = 24) -> torch.Tensor:
    return torch.randint(96, (sequences, 32))


# --- the made-up GPU itself ---


def test_the_fake_refuses_what_a_gpu_would(gpu: FakeCuda) -> None:
    x = torch.empty(9, 9, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(9)
    with pytest.raises(RuntimeError, match="same device"):
        x @ torch.ones(9, 9)
    with pytest.raises(AssertionError, match="indexed by one on cpu"):
        x[torch.arange(3)]
    for much in (x.cpu, x.tolist, lambda: x.to("cpu")):
        with pytest.raises(AssertionError, match="reads 81 numbers"):
            much()
    gpu.reads.clear()
    assert bool((x > 0).all())
    assert x[0, 0].item() == 0.5
    assert x.sum(0).tolist() == [0.5] * 9
    x.sum(0).cpu()
    assert gpu.reads == ["__bool__", "item", "tolist", "copy"]
    assert x[1:3, None, ..., -1].shape == (2, 1)
    assert x[x[0] > 0].shape == (4, 9)


# --- the stations ---


@pytest.mark.parametrize("with_gram", [True, False])
def test_statistics_read_one_flag(gpu: FakeCuda, with_gram: bool) -> None:
    observed(with_gram=with_gram)
    assert gpu.reads == ["__bool__"]


@pytest.mark.parametrize(("solver", "quality"), [*SOLVERS, ("admm", "best")])
@pytest.mark.parametrize(
    "target", [Target(700), Target(700, per_row=True), Target(1024, (2, 4)), Target(1100, (2, 4))], ids=str
)
def test_a_solve_reads_flags_alone(gpu: FakeCuda, solver: str, quality: str, target: Target) -> None:
    found, weight = observed(), torch.empty(32, 64, dtype=torch.bfloat16, device="cuda")
    gpu.reads.clear()
    solved = solve(choose_solver(solver, quality), weight, found, target, "w")
    assert solved.is_cuda
    assert set(gpu.reads) == {"__bool__"}
    factors = 6 if quality == "best" else 1
    assert len(gpu.reads) <= 1 + factors


@pytest.mark.parametrize(("unit", "level"), [(1, 40), (4, 12)])
def test_units_are_swept_without_bringing_losses_over(gpu: FakeCuda, unit: int, level: int) -> None:
    gram, weight = observed().mean_gram, torch.empty(32, 64, device="cuda")
    gpu.reads.clear()
    found = sweep(weight, gram, unit, [level // 2, level], "w")
    assert gpu.reads.count("tolist") == gpu.reads.count("__bool__") == 1  # all losses at the end; one factor
    assert len(gpu.reads) <= 2 + len(found.removed)  # how many go in a batch
    gpu.reads.clear()
    refit(weight, gram, found.kept[level].repeat_interleave(unit), "w")
    assert gpu.reads == ["nonzero", "__bool__"]


@pytest.mark.parametrize(("solver", "quality"), SOLVERS)
@pytest.mark.parametrize(
    ("units", "group"), [(Units(), None), (Units(), (2, 4)), (Units(groups=1, channels=20), None)], ids=str
)
def test_a_block_is_pruned_where_it_is(
    gpu: FakeCuda, weights: Any, solver: str, quality: str, units: Units, group: tuple[int, int] | None
) -> None:
    adapter = ModelAdapter.of(weights)
    block, chosen = adapter.blocks[0], choose_solver(solver, quality)
    batches = [*embed(adapter, tokens(20)), *embed(adapter, tokens(4), held_out=True)]
    batches = [replace(batch, dense=batch.hidden) for batch in batches]
    zeros = {block.full_name(name): block.projection(name).weight.numel() // 2 for name in PROJECTIONS}
    if units.groups:
        zeros = dict.fromkeys(zeros, 100)
    gpu.reads.clear()
    after = prune_block(block, batches, chosen, units, zeros, group, block.copy() if chosen.two_streams else None)
    assert all(batch.hidden.is_cuda for batch in after)
    assert all(block.projection(name).weight.is_cuda for name in PROJECTIONS)
    # four inputs, seven solves, and beside the dense model two small sums of each projection to choose its target
    limit = 4 * 3 + 7 * (FLAGS_PER_SOLVE + (2 if chosen.two_streams else 0))
    if units.groups:
        limit += 2 * (32 + 10)  # two sweeps of up to 32 batches, their refits, the rows that are left
    assert len(gpu.reads) <= limit


def test_ranking_and_probing_read_sums(gpu: FakeCuda, weights: Any) -> None:
    adapter = ModelAdapter.of(weights)
    projections = 7 * len(adapter.blocks)
    gpu.reads.clear()
    ranks = rank(adapter, embed(adapter, tokens()), [3.0, 5.0], model="m", calibration="c")
    assert len(gpu.reads) <= 4 * len(adapter.blocks) + projections * 4  # a sum and its counts, of itself and the block
    gpu.reads.clear()
    found = measure(adapter, tokens(), choose_solver("admm", "fast"), zeros=True, units=True)
    solves, sweeps = 3 * projections, 2 * len(adapter.blocks)
    assert len(gpu.reads) <= solves * (FLAGS_PER_SOLVE + 1) + projections * 2 + sweeps * (40 + 6 * 3)
    config = PruneConfig(sparsity=0.5)
    ranks = replace(ranks, sensitivity=found)
    settled = choose_share(adapter, ranks, config, tokens())
    plan = make_plan(adapter, ranks, replace(settled, structured_share=0.0))
    once = searching.Evolution(generations=1, offspring=2, rounds=((32, 1),))
    assert searching.search(adapter, plan, tokens(), 0, once).removed == plan.removed


def test_the_model_is_checked_and_judged_by_single_numbers(gpu: FakeCuda, weights: Any) -> None:
    check_finite(weights)
    assert set(gpu.reads) == {"__bool__"}
    gpu.reads.clear()
    assert perplexity(weights, torch.randint(96, (320,)), 32).nll > 0
    assert gpu.reads == ["__float__"] * 2  # batches of eight windows


@pytest.mark.parametrize("op", ["outlier_stats", "column_square_sums", "select", "score_select", "obs_block", "pack"])
def test_the_reference_reads_at_most_one_number(gpu: FakeCuda, op: str) -> None:
    weight = torch.empty(32, 64, device="cuda")
    norms, factor, keep = torch.empty(64, device="cuda"), torch.empty(64, 64, device="cuda"), weight > 0
    calls: dict[str, list[tuple[Any, ...]]] = {
        "outlier_stats": [(weight, norms, [1.0, 2.0, 3.0])],
        "column_square_sums": [(weight,)],
        "select": [(weight, torch.tensor([9]), "matrix"), (weight, torch.tensor([2, 4]), "group")],
        "score_select": [(weight, norms, torch.full((32,), 3), "row")],
        "obs_block": [(weight, factor, keep, 0, 0), (weight, factor, keep, 2, 4)],
        "pack": [(weight,)],
    }
    for arguments in calls[op]:
        gpu.reads.clear()
        made = getattr(reference, op)(*arguments)
        assert all(tensor.is_cuda for tensor in (made if isinstance(made, tuple) else (made,)))
        assert len(gpu.reads) <= 1


# --- tensor cores ---


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_of_half_precision_are_exact_in_fp32(dtype: torch.dtype) -> None:
    """So a Gram from the tensor cores differs from one in fp32 by the order of its sums alone."""
    a, b = torch.randn(2, 100_000).to(dtype)
    assert torch.equal((a.float() * b.float()).double(), a.double() * b.double())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_a_gram_of_the_gpu(dtype: torch.dtype) -> None:
    rows = torch.randn(5000, 1500).to(dtype).cuda()  # two strips, the second one narrow
    found = InputStatistics(1500, rows.device, with_gram=True)
    found.add(rows)
    gram = found.finish("x").gram
    assert gram is not None
    exact = rows.double()
    # a sum of n exact products is off by at most n roundings; tensor cores may cut instead of rounding: twice that
    bound = 2 * (len(rows) + 1) * 2.0**-24 * (exact.abs().T @ exact.abs())
    assert bool(((gram.double() - exact.T @ exact).abs() <= bound).all())
    total = torch.zeros(7, 1500, device="cuda")
    add_product(total, rows[:, :7], rows)
    assert bool(((total - gram[:7]).abs() <= bound[:7]).all())


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("solver", ["admm", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("category", ["unstructured", "structured", "composite"])
def test_a_run_on_the_gpu_is_a_run_on_the_cpu(
    tiny_llama: Path, calibration_text: Path, validation_text: Path, solver: str, category: str, tmp_path: Path
) -> None:
    reports = [
        mk.prune(
            tiny_llama, output_dir=tmp_path / device, device=device, sparsity=0.6, solver=solver, category=category,
            policy="uniform", calibration=calibration_text, samples=32, seqlen=128, eval_text=validation_text,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    cpu, cuda = reports
    counts = [{n: (p["shape"], p["nnz"]) for n, p in report["projections"].items()} for report in reports]
    assert counts[0] == counts[1]
    losses = [math.log(report["perplexity"]["pruned"] / report["perplexity"]["dense"]) for report in reports]
    assert abs(losses[0] - losses[1]) <= 0.25 * losses[0]  # seeds differ by a few percent
    assert cuda["peak_memory_bytes"]["device"] > 0
    assert cpu["removed_parameters"] == cuda["removed_parameters"]

# SPDX-License-Identifier: Apache-2.0
"""The dense model beside the pruned one: targets are least squares, and make a block's output better."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import random_model

from mosaic_kernels.errors import MosaicError
from mosaic_kernels.models import PROJECTIONS, Block, ModelAdapter
from mosaic_kernels.prune import walk
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.pair import PairStatistics, collect_pair, dense_target
from mosaic_kernels.prune.solvers import SOLVERS
from mosaic_kernels.prune.units import Units
from mosaic_kernels.prune.walk import Walk

pytestmark = pytest.mark.usefixtures("one_thread")


def two_streams(sequences: int = 64) -> tuple[ModelAdapter, list[Batch]]:
    adapter = ModelAdapter.of(random_model())
    tokens = torch.randint(96, (sequences, 32), generator=torch.Generator().manual_seed(5))
    return adapter, [replace(batch, dense=batch.hidden) for batch in embed(adapter, tokens)]


def walks(block: Block, dense: Block, batches: list[Batch]) -> tuple[Walk, Walk]:
    return Walk(block, batches, [b.hidden for b in batches]), Walk(dense, batches, [b.dense for b in batches])


def test_where_nothing_was_pruned_the_target_is_the_weight() -> None:
    adapter, batches = two_streams()
    block = adapter.blocks[0]
    for stage, name in ((0, "self_attn.q_proj"), (1, "self_attn.o_proj"), (3, "mlp.down_proj")):
        both = walks(block, block.copy(), batches)
        for side in both if stage == 3 else ():
            side.add(1)
        found = collect_pair(*both, stage)
        assert torch.equal(found.cross, found.gram)
        if found.drift is not None:
            assert not bool(found.drift.any())
        weight = block.projection(name).weight.detach()
        target = dense_target(weight, weight, found, name)
        # one solve in fp32: eps times the condition number of what is solved
        gram = found.mean_gram.double()
        damped = gram + found.damping * torch.diag(gram.diagonal())
        limit = torch.finfo(torch.float32).eps * float(torch.linalg.cond(damped))
        assert float((target - weight).norm() / weight.norm()) <= limit


def test_the_target_minimises_the_distance_to_the_dense_output() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4000, 12, generator=generator)
    x = dense @ torch.randn(12, 12, generator=generator) + 0.3 * torch.randn(4000, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    found = PairStatistics(12, 12, None, x.device)
    found.add_pair(x, dense, None)
    found.finish("x")
    target = dense_target(weight, weight, found, "w")

    def distance(candidate: torch.Tensor) -> float:
        return float((dense.double() @ weight.double().T - x.double() @ candidate.double().T).square().mean())

    best = distance(torch.linalg.lstsq(x.double(), dense.double() @ weight.double().T).solution.T)
    assert best <= distance(target) < 0.2 * distance(weight) + best


@pytest.mark.parametrize("units", [Units(), Units(groups=1, channels=16)])
def test_a_pruned_model_comes_nearer_to_the_dense_one(units: Units) -> None:
    def distance(*, side_by_side: bool) -> float:
        adapter, batches = two_streams()
        sizes = {name: 0 for name in adapter.sizes()}
        for block in adapter.blocks:
            dense = block.copy()
            if not any(units.__dict__.values()):
                sizes = {name: size * 6 // 10 for name, size in adapter.sizes().items()}
            before = batches
            prune_block(block, batches, SOLVERS["admm"], units, sizes, None, dense if side_by_side else None)
            batches = advance(block, before, dense)
        return sum(float((batch.hidden - batch.dense).square().sum()) for batch in batches if batch.dense is not None)

    assert distance(side_by_side=True) < distance(side_by_side=False)


def test_narrowed_projections_take_their_rows_of_the_dense_weight() -> None:
    """With no zeros and dead removed units, a block whose inputs did not change keeps its output."""
    adapter, batches = two_streams()
    block: Block = adapter.blocks[0]
    with torch.no_grad():
        block.projection("mlp.down_proj").weight[:, 3:11] = 0
    dense = block.copy()
    before = [batch.hidden for batch in advance(block, batches)]
    prune_block(block, batches, SOLVERS["admm"], Units(channels=8), dict.fromkeys(adapter.sizes(), 0), None, dense)
    after = [batch.hidden for batch in advance(block, batches)]
    error = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    assert error <= 1e-4 * sum(float(b.square().sum()) for b in before)


def test_the_dense_side_must_have_been_kept() -> None:
    adapter, batches = two_streams(2)
    with pytest.raises(MosaicError, match="dense model's activations"):
        prune_block(
            adapter.blocks[0], [replace(b, dense=None) for b in batches], SOLVERS["admm"], Units(),
            dict.fromkeys(adapter.sizes(), 0), None, adapter.blocks[0].copy(),
        )  # fmt: skip


def test_both_streams_come_back_and_were_run_once() -> None:
    """Every projection of the dense block runs once per batch, those of the pruned one too."""
    adapter, batches = two_streams()
    block = adapter.blocks[0]
    dense = block.copy()
    runs: list[str] = []
    for side, owner in (("dense", dense), ("pruned", block)):
        for name in PROJECTIONS:
            owner.projection(name).register_forward_hook(lambda *_, key=f"{side} {name}": runs.append(key))
    sizes = {name: size // 2 for name, size in adapter.sizes().items()}
    moved = prune_block(block, batches, SOLVERS["admm"], Units(), sizes, None, dense)
    assert sorted(runs) == sorted(f"{side} {n}" for side in ("dense", "pruned") for n in PROJECTIONS for _ in batches)
    for ours, wanted in zip(moved, advance(block, batches, dense), strict=True):
        assert torch.equal(ours.hidden, wanted.hidden)
        assert ours.dense is not None
        assert wanted.dense is not None
        assert torch.equal(ours.dense, wanted.dense)


def test_inputs_that_do_not_fit_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batches = two_streams(8)
    twin, _ = two_streams(8)
    sizes = {name: size // 2 for name, size in adapter.sizes().items()}
    kept = prune_block(adapter.blocks[0], batches, SOLVERS["sparsegpt"], Units(), sizes, None)
    monkeypatch.setattr(walk, "KEPT_BYTES", {})
    again = prune_block(twin.blocks[0], batches, SOLVERS["sparsegpt"], Units(), sizes, None)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(kept, again, strict=True))


def held_out_target(noise: float, drift: float) -> tuple[torch.Tensor, torch.Tensor, PairStatistics]:
    """A target from 40 tokens for 32 features, judged on 400 others; ``drift`` is a multiple of the dense output."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 32, generator=generator)
    mix = torch.eye(32) + noise * torch.randn(32, 32, generator=generator)
    found = PairStatistics(32, 32, 5, weight.device)
    for count, add in ((40, found.add_pair), (400, found.hold_out)):
        x = torch.randn(count, 32, generator=generator)
        add(x, x @ mix, drift * x @ mix @ weight.T)
    return weight, dense_target(weight, weight, found.finish("x"), "w"), found


def distance_held_out(found: PairStatistics, weight: torch.Tensor, candidate: torch.Tensor) -> float:
    ((x, dense, drift),) = found.held_out
    assert drift is not None
    return float((dense @ weight.T + drift - x @ candidate.T).square().sum())


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_held_out_tokens_accept_no_target_that_harms(noise: float, drift: float) -> None:
    weight, target, found = held_out_target(noise, drift)
    assert distance_held_out(found, weight, target) <= 1.0001 * distance_held_out(found, weight, weight)


def test_a_target_made_of_noise_is_refused() -> None:
    """The dense side has nothing to do with the pruned one in the sums, and all in what judges."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 32, generator=generator)
    found = PairStatistics(32, 32, None, weight.device)
    found.add_pair(torch.randn(40, 32, generator=generator), torch.randn(40, 32, generator=generator), None)
    x = torch.randn(4000, 32, generator=generator)
    found.hold_out(x, x, None)
    assert float((dense_target(weight, weight, found.finish("x"), "w") - weight).norm() / weight.norm()) < 0.02

# SPDX-License-Identifier: Apache-2.0
"""The dense model beside the pruned one: targets are least squares, and make a block's output better."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import random_model

from mosaic_kernels.errors import MosaicError
from mosaic_kernels.models import Block, ModelAdapter
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.pair import PairStatistics, collect_pair, dense_target
from mosaic_kernels.prune.solvers import SOLVERS
from mosaic_kernels.prune.structured import Units

pytestmark = pytest.mark.usefixtures("one_thread")


def two_streams(sequences: int = 64) -> tuple[ModelAdapter, list[Batch]]:
    adapter = ModelAdapter.of(random_model())
    tokens = torch.randint(96, (sequences, 32), generator=torch.Generator().manual_seed(5))
    return adapter, [replace(batch, dense=batch.hidden) for batch in embed(adapter, tokens)]


def test_where_nothing_was_pruned_the_target_is_the_weight() -> None:
    adapter, batches = two_streams()
    block = adapter.blocks[0]
    for stage, name in ((0, "self_attn.q_proj"), (1, "self_attn.o_proj"), (3, "mlp.down_proj")):
        found = collect_pair(block, block.copy(), batches, stage)
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
            prune_block(block, batches, SOLVERS["admm"], units, sizes, None, dense if side_by_side else None)
            batches = advance(block, batches, dense)
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
        collect_pair(adapter.blocks[0], adapter.blocks[0], [replace(b, dense=None) for b in batches], 0)

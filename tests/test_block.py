# SPDX-License-Identifier: Apache-2.0
"""One block: exact counts, and every solver sees the inputs that its kind is meant to see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import KINDS, random_model
from test_gram import gram_error_bound

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.models import PROJECTIONS, STAGES, Block, ModelAdapter
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers import SOLVERS, Target
from mosaic_kernels.prune.units import Units
from mosaic_kernels.prune.walk import Walk, collect

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = (("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.float16))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
UNITS = (Units(), Units(groups=1), Units(channels=8), Units(groups=1, channels=16))


def prepared(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Block, list[Batch]]:
    adapter = ModelAdapter.of(random_model(kind, dtype=dtype, **settings))
    tokens = torch.randint(96, (6, 32), generator=torch.Generator().manual_seed(2))
    return adapter.blocks[0], embed(adapter, tokens)


def after(block: Block, units: Units) -> dict[str, int]:
    """Sizes of the projections once these units are gone."""
    kv = units.groups * block.head_dim
    q = kv * block.query_heads // block.key_value_heads
    rows = dict(zip(PROJECTIONS, (q, kv, kv, 0, units.channels, units.channels, 0), strict=True))
    columns = dict(zip(PROJECTIONS, (0, 0, 0, q, 0, 0, units.channels), strict=True))
    shapes = {name: block.projection(name).weight.shape for name in PROJECTIONS}
    return {name: (o - rows[name]) * (i - columns[name]) for name, (o, i) in shapes.items()}


def zeros_of(block: Block, sizes: dict[str, int], sparsity: float) -> dict[str, int]:
    return {block.full_name(name): round(sparsity * n) + i for i, (name, n) in enumerate(sizes.items())}


def counted(block: Block) -> dict[str, int]:
    return {block.full_name(name): int((block.projection(name).weight == 0).sum()) for name in PROJECTIONS}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_counts_are_exact(solver: str, units: Units, kind: str, dtype: torch.dtype) -> None:
    block, batches = prepared(kind, dtype)
    sizes = after(block, units)
    zeros = zeros_of(block, sizes, 0.5)
    prune_block(block, batches, SOLVERS[solver], units, zeros, None)
    assert counted(block) == zeros
    assert {name: block.projection(name).weight.numel() for name in PROJECTIONS} == sizes
    assert bool(torch.isfinite(advance(block, batches)[0].hidden).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pattern_holds(solver: str) -> None:
    block, batches = prepared()
    zeros = {block.full_name(name): n // 2 for name, n in after(block, Units()).items()}
    prune_block(block, batches, SOLVERS[solver], Units(), zeros, (2, 4))
    for name in PROJECTIONS:
        weight = block.projection(name).weight
        assert bool(((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_lose_equally_many(solver: str) -> None:
    block, batches = prepared()
    zeros = zeros_of(block, after(block, Units()), 0.5)
    prune_block(block, batches, SOLVERS[solver], Units(), zeros, None, per_row=True)
    assert counted(block) == zeros
    for name in PROJECTIONS:
        per_row = (block.projection(name).weight == 0).sum(1)
        assert int(per_row.max() - per_row.min()) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("untouched", [("mlp.down_proj",), QKV, PROJECTIONS])
def test_zeros_the_model_came_with_do_not_add_up(solver: str, untouched: tuple[str, ...]) -> None:
    block, batches = prepared()
    with torch.no_grad():
        for name in PROJECTIONS:
            block.projection(name).weight[1, :5] = 0
    zeros = zeros_of(block, after(block, Units()), 0.3)
    for name in untouched:
        zeros[block.full_name(name)] = 0
    prune_block(block, batches, SOLVERS[solver], Units(), {**zeros, "another block's": 1}, None)
    assert counted(block) == zeros


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_remove_changes_nothing(solver: str) -> None:
    block, batches = prepared()
    with torch.no_grad():
        block.projection("mlp.up_proj").weight[0, 0] = 0
    before = {name: block.projection(name).weight.clone() for name in PROJECTIONS}
    prune_block(block, batches, SOLVERS[solver], Units(), dict.fromkeys(counted(block), 0), None)
    assert all(torch.equal(block.projection(name).weight, before[name]) for name in PROJECTIONS)


class Spy:
    """A solver that zeroes the first columns and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def __call__(
        self, weight: torch.Tensor, statistics: InputStatistics, target: Target, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert statistics.gram is not None
        self.seen[name] = statistics.gram.clone()
        keep = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, torch.arange(target.remove), False)
        return weight, keep.view_as(weight.T).T


def inputs(block: Block, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """What every projection of the block as it is now receives."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in PROJECTIONS}

    def observer(name: str) -> Any:
        return lambda _, args: seen[name].append(args[0].detach().flatten(0, 1))

    handles = [block.projection(name).register_forward_pre_hook(observer(name)) for name in PROJECTIONS]
    advance(block, batches)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def require_gram(found: torch.Tensor, x: torch.Tensor) -> None:
    assert bool(((found.double() - x.double().T @ x.double()).abs() <= gram_error_bound(x)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [Units(), Units(groups=1, channels=8)])
def test_a_sequential_solver_sees_what_pruned_stages_make(kind: str, units: Units) -> None:
    """o sees the attention of the pruned q, k, v; gate and up what the pruned attention adds; down all of it."""
    block, batches = prepared(kind)
    dense = inputs(block, batches)
    spy = Spy()
    zeros = zeros_of(block, after(block, units), 0.4)
    prune_block(block, batches, replace(SOLVERS["sparsegpt"], run=spy), units, zeros, None)
    # Hooks of the finished block see the same: what is behind a stage does not change its input.
    pruned = inputs(block, batches)
    for name in PROJECTIONS:
        require_gram(spy.seen[block.full_name(name)], pruned[name])
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert dense[name].shape != pruned[name].shape or not torch.equal(dense[name], pruned[name])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("units", [Units(), Units(groups=1, channels=8)])
def test_the_batches_that_come_back_have_been_through_the_pruned_block(solver: str, units: Units) -> None:
    block, batches = prepared("qwen2")
    moved = prune_block(block, batches, SOLVERS[solver], units, zeros_of(block, after(block, units), 0.4), None)
    for ours, wanted in zip(moved, advance(block, batches), strict=True):
        assert torch.equal(ours.hidden, wanted.hidden)


@pytest.mark.parametrize("solver", SOLVERS)
def test_overflow_is_named(solver: str) -> None:
    block, batches = prepared(dtype=torch.float16)
    with torch.no_grad():
        block.projection("mlp.up_proj").weight.fill_(6e4)
    zeros = zeros_of(block, after(block, Units()), 0.4)
    with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp"):
        prune_block(block, batches, SOLVERS[solver], Units(), zeros, None)


def test_stages_cover_every_projection_once() -> None:
    assert sorted(name for stage in STAGES for name in stage) == sorted(set(PROJECTIONS))


def test_fast_skips_tokens_only_where_there_are_plenty() -> None:
    block, batches = prepared()  # 192 tokens for 64 and 40 features
    walk = Walk(block, batches, [batch.hidden for batch in batches])
    assert collect(walk, 0, with_gram=True, every=2).tokens == 192
    narrow, many = prepared(hidden_size=4, num_attention_heads=2, num_key_value_heads=2, head_dim=2)
    found = collect(Walk(narrow, many, [batch.hidden for batch in many]), 0, with_gram=True, every=2)
    assert found.tokens == 96

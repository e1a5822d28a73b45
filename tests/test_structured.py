# SPDX-License-Identifier: Apache-2.0
"""Whole heads and channels: the cheapest ones go, the consumer is refitted, shapes and biases follow."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small_models import KINDS, random_model

from mosaic_kernels.models import STAGES, Block, ModelAdapter
from mosaic_kernels.prune import structured
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.gram import InputStatistics, jacobi_ridge
from mosaic_kernels.prune.structured import (
    DAMPING,
    refit,
    remove_channels,
    remove_groups,
    select_units,
)
from mosaic_kernels.prune.units import BlockShape, plan_evenly
from mosaic_kernels.prune.walk import Walk, collect

pytestmark = pytest.mark.usefixtures("one_thread")

U = 2.0**-24
OUTPUT, DOWN = 1, 3  # stages


def problem(rows: int, columns: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A consumer and the mean Gram of correlated inputs with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.6 @ basis
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def observed(block: Block, batches: list[Batch], stage: int) -> InputStatistics:
    """Statistics of what this stage of the block as it is now reads."""
    walk = Walk(block, batches, [batch.hidden for batch in batches])
    if stage > OUTPUT:
        walk.add(OUTPUT)
    return collect(walk, stage, with_gram=True)


def damped(gram: torch.Tensor) -> torch.Tensor:
    """H + lambda D, in float64: the quadratic form in which losses are measured."""
    return gram.double() + DAMPING * torch.diag(jacobi_ridge(gram)).double()


def refit_loss(weight: torch.Tensor, quadratic: torch.Tensor, gone: list[int]) -> float:
    """``min over W' of tr((W - W') A (W - W')ᵀ)`` with W' zero in the columns ``gone``, by solving for W'."""
    kept = [j for j in range(weight.shape[1]) if j not in gone]
    weight = weight.double()
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(quadratic[kept][:, kept], quadratic[kept] @ weight.T).T
    difference = weight - best
    return float((difference @ quadratic * difference).sum())


def features(units: list[int], unit: int) -> list[int]:
    return [u * unit + i for u in units for i in range(unit)]


def removed(kept: torch.Tensor) -> list[int]:
    return (~kept).nonzero().flatten().tolist()


@pytest.mark.parametrize(("columns", "unit"), [(9, 1), (12, 3), (8, 4), (2, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_unit_with_the_least_exact_loss_goes(columns: int, unit: int, seed: int) -> None:
    weight, gram = problem(5, columns, seed=seed)
    quadratic, units = damped(gram), columns // unit
    (gone,) = removed(select_units(weight, gram, unit, 1, "w"))
    losses = [refit_loss(weight, quadratic, features([u], unit)) for u in range(units)]
    assert gone == min(range(units), key=losses.__getitem__)


@pytest.mark.parametrize(("columns", "unit", "count"), [(9, 1, 5), (12, 3, 3), (20, 4, 3), (16, 1, 15)])
@pytest.mark.parametrize("seed", range(4))
def test_one_at_a_time_is_greedy_by_exact_loss(columns: int, unit: int, count: int, seed: int) -> None:
    """Up to 32 units the sweep takes one by one; each is the one whose removal leaves the least refit loss."""
    weight, gram = problem(5, columns, seed=seed)
    quadratic, units = damped(gram), columns // unit
    gone: list[int] = []
    for _ in range(count):
        rest = [u for u in range(units) if u not in gone]
        gone.append(min(rest, key=lambda u: refit_loss(weight, quadratic, features([*gone, u], unit))))
    assert removed(select_units(weight, gram, unit, count, "w")) == sorted(gone)


def test_a_sweep_is_near_the_best_of_all_subsets() -> None:
    """Greedy is not optimal, but never far off: within a tenth of the best of all 924 halves."""
    for seed in range(4):
        weight, gram = problem(5, 12, seed=seed)
        quadratic = damped(gram)
        best = min(refit_loss(weight, quadratic, list(gone)) for gone in itertools.combinations(range(12), 6))
        found = refit_loss(weight, quadratic, removed(select_units(weight, gram, 1, 6, "w")))
        assert best <= found <= 1.1 * best


def twins(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every feature has a near copy: cheap to lose one, dear to lose both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, columns, generator=generator)
    x[:, 1::2] = x[:, ::2] + 0.05 * torch.randn(2000, columns // 2, generator=generator)
    return torch.randn(32, columns, generator=generator), x.T @ x / 2000


@pytest.mark.parametrize("case", ["spectrum", "twins"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_batches_lose_nothing_against_one_at_a_time(case: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 256
    weight, gram = twins(columns) if case == "twins" else problem(32, columns, 1000)
    quadratic, count = damped(gram), int(share * columns)
    batched = refit_loss(weight, quadratic, removed(select_units(weight, gram, 1, count, "w")))
    monkeypatch.setattr(structured, "SWEEP_STEPS", columns)
    single = refit_loss(weight, quadratic, removed(select_units(weight, gram, 1, count, "w")))
    assert count > 32 or batched == single
    assert batched <= 1.01 * single  # "nothing measurable": quality differs by 3 % from seed to seed


def test_batches_lose_nothing_on_a_trained_model(
    tiny_llama: Path, calibration_text: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mosaic_kernels.checkpoint.reader import load_model
    from mosaic_kernels.prune.calibration import calibrate

    model, _ = load_model(tiny_llama, dtype="float32")
    adapter = ModelAdapter.of(model)
    tokens = calibrate(str(calibration_text), tokenizer, 4096, samples=32, seqlen=64, seed=0).tokens
    block = adapter.blocks[0]
    gram = observed(block, embed(adapter, tokens), DOWN).mean_gram
    weight = block.projection("mlp.down_proj").weight.detach()
    batched = removed(select_units(weight, gram, 1, 352, "w"))
    monkeypatch.setattr(structured, "SWEEP_STEPS", 704)
    single = removed(select_units(weight, gram, 1, 352, "w"))
    quadratic = damped(gram)
    assert refit_loss(weight, quadratic, batched) <= 1.01 * refit_loss(weight, quadratic, single)


@pytest.mark.parametrize("unit", [1, 3])
def test_dead_units_go_first(unit: int) -> None:
    weight, gram = problem(5, 24)
    dead = [1, 4, 5]
    gram[features(dead, unit)] = 0
    gram[:, features(dead, unit)] = 0
    weight[:, features(dead, unit)] = 10.0
    assert removed(select_units(weight, gram, unit, 3, "w")) == dead


def test_a_singular_gram_is_no_obstacle() -> None:
    weight = torch.randn(4, 64)
    for x in (torch.randn(1, 64), torch.zeros(3, 64), torch.randn(40, 32).repeat(1, 2)):
        gram = x.T @ x / len(x)
        kept = select_units(weight, gram, 1, 40, "w")
        assert int(kept.sum()) == 24
        assert bool(torch.isfinite(refit(weight, gram, kept, "w")).all())


@pytest.mark.parametrize(("rows", "columns", "kept"), [(5, 12, 7), (1, 3, 1), (7, 30, 29), (4, 6, 6)])
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_refit_is_least_squares(rows: int, columns: int, kept: int, tokens: int) -> None:
    """``[X_K; sqrt(lambda D)] W'ᵀ = [X Wᵀ; sqrt(lambda D) W_Kᵀ]`` by float64 QR."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(tokens, columns, generator=generator) * torch.logspace(-1, 1, columns)
    weight, mask = torch.randn(rows, columns, generator=generator), torch.zeros(columns, dtype=torch.bool)
    mask[torch.randperm(columns, generator=generator)[:kept]] = True
    gram = x.T @ x / tokens
    found = refit(weight, gram, mask, "w").double()

    inner = gram[mask][:, mask]
    root = (DAMPING * jacobi_ridge(inner)).double().sqrt()
    scaled = x.double() / tokens**0.5
    left = torch.cat([scaled[:, mask], torch.diag(root)])
    right = torch.cat([scaled @ weight.double().T, root.unsqueeze(1) * weight.double()[:, mask].T])
    wanted = torch.linalg.lstsq(left, right, driver="gelsd").solution.T

    # Cholesky solves a system within 8 n u of ours; scaling by the diagonal does not change that (Higham,
    # Accuracy and Stability, section 10.1), so the condition that counts is that of the scaled matrix. The
    # Gram and the right-hand side carry another (tokens + columns) u of what they sum up.
    diagonal = torch.diag(1 / (inner.double().diagonal() + root.square()).sqrt())
    system = diagonal @ (inner.double() + torch.diag(root.square())) @ diagonal
    condition = float(torch.linalg.cond(system))
    norm = diagonal.inverse()
    size = max(float((wanted @ norm).norm()), float((weight.double() * gram.double().diagonal().sqrt()).norm()))
    bound = (8 * kept + 2 * (tokens + columns)) * U * condition * size
    assert float(((found - wanted) @ norm).norm()) <= bound


@pytest.mark.parametrize("tokens", [1, 10, 300])
@pytest.mark.parametrize("seed", range(3))
def test_refit_is_never_worse_than_none(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, 40, generator=generator), torch.randn(6, 40, generator=generator)
    kept = torch.rand(40, generator=generator) < 0.6
    gram = x.T @ x / tokens
    dense = x.double() @ weight.double().T

    def error(new: torch.Tensor) -> float:
        return float((x[:, kept].double() @ new.double().T - dense).square().sum() / dense.square().sum())

    # at the minimum, loss + ridge is at most that of W_K, whose ridge is zero; beside that, fp32 rounding
    assert error(refit(weight, gram, kept, "w")) <= error(weight[:, kept]) + 40 * tokens * U


def test_refit_with_everything_kept_changes_nothing() -> None:
    weight, gram = problem(5, 20)
    found = refit(weight, gram, torch.ones(20, dtype=torch.bool), "w")
    condition = float(torch.linalg.cond(damped(gram)))
    assert float((found - weight).norm()) <= 8 * 20 * U * condition * float(weight.norm())


def first_block(kind: str = "llama", **settings: object) -> tuple[ModelAdapter, Block]:
    adapter = ModelAdapter.of(random_model(kind, **settings))
    return adapter, adapter.blocks[0]


def calibration() -> torch.Tensor:
    return torch.randint(96, (8, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "heads", "groups"), [("llama", 4, 4), ("llama", 4, 2), ("qwen2", 6, 2), ("qwen3", 4, 1)]
)
def test_the_group_with_the_least_exact_loss_goes(kind: str, heads: int, groups: int) -> None:
    """MHA, GQA with two and three queries per group; one group alone stays."""
    adapter, block = first_block(kind, num_attention_heads=heads, num_key_value_heads=groups)
    batches = embed(adapter, calibration())
    statistics = observed(block, batches, OUTPUT)
    before = {name: block.projection(name) for names in STAGES for name in names}
    weight = before["self_attn.o_proj"].weight.detach()
    if groups == 1:
        assert plan_evenly([BlockShape.of(block)], adapter.prunable_parameters // 2, 8, at_most=True)[0].groups == 0
        return
    width = heads // groups * 16
    quadratic = damped(statistics.mean_gram)
    losses = [refit_loss(weight, quadratic, features([g], width)) for g in range(groups)]
    gone = min(range(groups), key=losses.__getitem__)
    remove_groups(block, statistics, 1)

    def rows(per_group: int) -> torch.Tensor:
        return torch.tensor([g != gone for g in range(groups)]).repeat_interleave(per_group)

    for name, per_group in (("q_proj", width), ("k_proj", 16), ("v_proj", 16)):
        old, new = before[f"self_attn.{name}"], block.projection(f"self_attn.{name}")
        assert torch.equal(new.weight, old.weight[rows(per_group)])
        assert new.out_features == len(new.weight)
        assert (new.bias is None) == (old.bias is None)
        if old.bias is not None:
            assert torch.equal(new.bias, old.bias[rows(per_group)])
    new = block.projection("self_attn.o_proj")
    assert torch.equal(new.weight, refit(weight, statistics.mean_gram, rows(width), "o"))
    assert (block.query_heads, block.key_value_heads) == (heads - heads // groups, groups - 1)
    assert block.module.self_attn.num_key_value_groups == heads // groups


@pytest.mark.parametrize("kind", KINDS)
def test_channels_go_from_all_three_projections(kind: str) -> None:
    adapter, block = first_block(kind)
    statistics = observed(block, embed(adapter, calibration()), DOWN)
    gate, up, down = (block.projection(f"mlp.{name}_proj").weight.detach() for name in ("gate", "up", "down"))
    kept = select_units(down, statistics.mean_gram, 1, 16, "w")
    remove_channels(block, statistics, 16)
    assert torch.equal(block.projection("mlp.gate_proj").weight, gate[kept])
    assert torch.equal(block.projection("mlp.up_proj").weight, up[kept])
    assert torch.equal(block.projection("mlp.down_proj").weight, refit(down, statistics.mean_gram, kept, "w"))
    assert block.channels == 24


def exactness(weight: torch.Tensor, gram: torch.Tensor) -> tuple[float, float]:
    """``‖W D^½‖ ‖Â‖^½``, the scale of outputs, and the relative error that solving for W itself may leave in them.

    Cholesky solves a system within 8 n u of ours and the right-hand side is as good. With the system scaled to
    a unit diagonal, Â, that leaves ‖Δ Â‖ <= 16 n u ‖W D^½‖ ‖Â‖, and so tr(Δ Â Δᵀ)^½ <= ‖Δ Â‖ / λmin^½.
    """
    quadratic = damped(gram)
    root = quadratic.diagonal().sqrt()
    eigenvalues = torch.linalg.eigvalsh(quadratic / root / root.unsqueeze(1))
    size = float((weight.double() * root).norm() * eigenvalues[-1].sqrt())
    return size, 16 * len(gram) * U * float((eigenvalues[-1] / eigenvalues[0]).sqrt())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_dead_units_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    adapter, block = first_block(kind, dtype=dtype, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with torch.no_grad():  # group 2 says nothing, nor do channels 5 to 12
        value = block.projection("self_attn.v_proj")
        value.weight[16:24] = 0
        if value.bias is not None:
            value.bias[16:24] = 0
        block.projection("mlp.up_proj").weight[5:13] = 0
    batches = embed(adapter, calibration())
    dense = advance(block, batches)[0].hidden.double()
    old = {name: block.projection(name).weight.detach().clone() for names in STAGES for name in names}
    removals = (
        ("self_attn.o_proj", OUTPUT, lambda found: remove_groups(block, found, 1), range(32, 48)),
        ("mlp.down_proj", DOWN, lambda found: remove_channels(block, found, 8), range(5, 13)),
    )
    for name, stage, remove, dead in removals:
        found = observed(block, batches, stage)
        kept = torch.tensor([j not in dead for j in range(old[name].shape[1])])
        remove(found)
        size, error = exactness(old[name], found.mean_gram)
        difference = (block.projection(name).weight.double() - old[name][:, kept].double()).detach()
        lost = float((difference @ found.mean_gram[kept][:, kept].double() * difference).sum()) ** 0.5
        assert lost <= (error + torch.finfo(dtype).eps / 2) * size  # solved, then rounded to dtype
        with torch.no_grad():
            block.projection(name).weight.copy_(old[name][:, kept])
    for name, first, last in (("self_attn.k_proj", 16, 24), ("mlp.gate_proj", 5, 13)):
        assert torch.equal(block.projection(name).weight, torch.cat([old[name][:first], old[name][last:]]))
    # With the old values in the consumers, sums only leave out zeros: another order of the same n terms at most,
    # beside the dozen roundings to dtype on the way through the block.
    pruned = advance(block, batches)[0].hidden.double()
    assert float((pruned - dense).norm() / dense.norm()) <= 64 * 2 * U + 12 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_forward_agree_after_removal(kind: str) -> None:
    adapter, block = first_block(kind, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    attention = block.module.self_attn
    attention.num_heads, attention.num_key_value_heads = 8, 4  # transformers before 4.48 reads these
    batches = embed(adapter, calibration())
    remove_groups(block, observed(block, batches, OUTPUT), 3)
    remove_channels(block, observed(block, batches, DOWN), 39)
    assert (block.query_heads, block.key_value_heads, block.channels) == (2, 1, 1)
    assert (attention.num_heads, attention.num_key_value_heads, attention.num_key_value_groups) == (2, 1, 2)
    assert bool(torch.isfinite(advance(block, batches)[0].hidden).all())
    for names in STAGES:
        for name in names:
            layer = block.projection(name)
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            assert not layer.training


def test_frozen_weights_stay_frozen() -> None:
    adapter, block = first_block("qwen2")
    adapter.model.requires_grad_(False)
    batches = embed(adapter, calibration())
    remove_groups(block, observed(block, batches, OUTPUT), 1)
    remove_channels(block, observed(block, batches, DOWN), 8)
    assert not any(parameter.requires_grad for parameter in block.module.parameters())


def test_block_shape_counts_what_leaves() -> None:
    for heads, groups in ((4, 4), (4, 2), (6, 2)):
        adapter, block = first_block("qwen2", num_attention_heads=heads, num_key_value_heads=groups)
        shape = BlockShape.of(block)
        batches = embed(adapter, calibration())
        before = adapter.prunable_parameters
        remove_groups(block, observed(block, batches, OUTPUT), 1)
        middle = adapter.prunable_parameters
        remove_channels(block, observed(block, batches, DOWN), 5)
        assert before - middle == shape.group_parameters
        assert middle - adapter.prunable_parameters == 5 * shape.channel_parameters


def test_a_bias_takes_the_mean_of_what_is_removed() -> None:
    """With biases in the consumers the output's error is less than without, and its mean is the dense one's."""
    adapter, block = first_block("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        block.projection("mlp.up_proj").bias.fill_(0.5)  # channels with a mean
        block.projection("mlp.gate_proj").bias.fill_(1.0)
    batches = embed(adapter, calibration())
    dense = block.copy()
    found = observed(block, batches, DOWN)
    wanted = advance(dense, batches)[0].hidden

    def error(changed: Block) -> float:
        return float((advance(changed, batches)[0].hidden - wanted).square().sum())

    remove_channels(block, found, 16)
    with_bias = error(block)
    difference = (advance(block, batches)[0].hidden - wanted).mean((0, 1))
    scale = wanted.abs().mean()
    assert float(difference.abs().max()) < 1e-4 * float(scale)
    plain = dense.copy()
    layer = plain.projection("mlp.down_proj")
    bias, layer.bias = layer.bias, None
    remove_channels(plain, found, 16)
    plain.projection("mlp.down_proj").bias = bias
    assert with_bias < error(plain)

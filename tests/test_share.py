# SPDX-License-Identifier: Apache-2.0
"""The structured share: tried, judged, and left as it was where the user names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_model

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import share
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.sensitivity import measure
from mosaic_kernels.prune.share import PARTS, choose_share
from mosaic_kernels.prune.solvers import choose_solver

pytestmark = pytest.mark.usefixtures("one_thread")


def problem() -> tuple[ModelAdapter, Ranks, torch.Tensor]:
    adapter = ModelAdapter.of(random_model(intermediate_size=64))
    tokens = torch.randint(96, (12, 32), generator=torch.Generator().manual_seed(1))
    found = measure(adapter, tokens, choose_solver("admm", "fast"), zeros=True, units=True)
    projections = {name: {5.0: 0.1} for name in adapter.sizes()}
    return adapter, Ranks("m", "c", 1, projections, {b.prefix: {5.0: 0.1} for b in adapter.blocks}, found), tokens


def test_the_model_is_left_as_it_was_and_a_candidate_is_chosen() -> None:
    adapter, ranks, tokens = problem()
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    config = PruneConfig(sparsity=0.6)
    assert config.chooses_share
    chosen = choose_share(adapter, ranks, config, tokens)
    assert chosen.structured_share in [part * 0.6 for part in PARTS]
    assert not chosen.chooses_share
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())


@pytest.mark.parametrize(("costs", "part"), [((1, 1.2, 1.6), 1), ((1, 1.1, 1.2), 2), ((1, 1.6, 3), 0), ((2, 1, 9), 1)])
def test_the_largest_share_that_costs_little_more_is_taken(
    costs: tuple[float, ...], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, ranks, tokens = problem()
    left = list(costs)
    monkeypatch.setattr(share, "divergence", lambda *_: left.pop(0))
    chosen = choose_share(adapter, ranks, PruneConfig(sparsity=0.6), tokens)
    assert chosen.structured_share == PARTS[part] * 0.6


@pytest.mark.parametrize(
    "options",
    [
        {"structured_share": 0.2},
        {"category": "unstructured"},
        {"policy": "pod"},
        {"pattern": "2:4"},
        {"quality": "fast"},
    ],
)
def test_nothing_is_tried_where_nothing_is_open(options: dict[str, Any]) -> None:
    assert not PruneConfig(sparsity=0.6, **options).chooses_share


def test_few_sequences_suffice() -> None:
    adapter, ranks, tokens = problem()
    assert choose_share(adapter, ranks, PruneConfig(sparsity=0.5), tokens[:1]).structured_share is not None


def test_a_harder_structured_share_diverges_more_on_a_trained_model(tiny_llama: Path) -> None:
    """What is judged is real: nearly all structured is far worse than hardly any."""
    from transformers import AutoModelForCausalLM

    adapter = ModelAdapter.of(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval())
    tokens = torch.randint(2, 4096, (6, 64), generator=torch.Generator().manual_seed(1))
    found = measure(adapter, tokens, choose_solver("admm", "fast"), zeros=True, units=True)
    ranks = Ranks("m", "c", 1, {n: {5.0: 0.1} for n in adapter.sizes()}, {}, found)
    seen: list[float] = []
    inner = share.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share, "PARTS", (0.05, 0.95))
        patch.setattr(share, "divergence", lambda a, b: seen.append(inner(a, b)) or seen[-1])
        choose_share(adapter, ranks, PruneConfig(sparsity=0.6), tokens)
    assert 0 < seen[0] < seen[1]

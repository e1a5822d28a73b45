# SPDX-License-Identifier: Apache-2.0
"""Capture: block by block equals the model's own forward pass, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import KINDS, random_model
from test_gram import gram_error_bound

from mosaic_kernels.models import STAGES, ModelAdapter
from mosaic_kernels.prune import capture
from mosaic_kernels.prune.capture import advance, collect_and_advance, embed

pytestmark = pytest.mark.usefixtures("one_thread")

# Every architecture as it is, and those with a window that is shorter than the sequences; in the
# second one only some blocks have it, so masks differ from block to block.
MODELS = {
    **{kind: (kind, {}) for kind in KINDS},
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "eager": ("llama", {"attn_implementation": "eager"}),
}


def adapter_of(name: str, dtype: torch.dtype = torch.float32) -> ModelAdapter:
    kind, settings = MODELS[name]
    return ModelAdapter.of(random_model(kind, dtype=dtype, **settings))


def tokens(sequences: int = 5, seqlen: int = 16) -> torch.Tensor:
    return torch.randint(96, (sequences, seqlen), generator=torch.Generator().manual_seed(1))


@contextmanager
def inputs_of(modules: dict[str, Any]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What forward pre-hooks of our own see."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def observer(name: str) -> Any:
        def observe(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append(args[0] if args else kwargs["hidden_states"])

        return observe

    handles = [module.register_forward_pre_hook(observer(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences of 16 tokens: a batch of three, then one of two."""
    monkeypatch.setattr(capture, "TOKENS_PER_BATCH", 48)


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_is_the_models_own_forward(name: str, three_at_once: None) -> None:
    adapter = adapter_of(name)
    watched = {str(block.index): block.module for block in adapter.blocks} | {"norm": adapter.model.model.norm}
    with torch.no_grad(), inputs_of(watched) as seen:
        for part in tokens().split(3):
            adapter.model(input_ids=part, use_cache=False)
    batches = embed(adapter, tokens())
    assert [len(batch.hidden) for batch in batches] == [3, 2]
    for block in adapter.blocks:
        for batch, wanted in zip(batches, seen[str(block.index)], strict=True):
            assert torch.equal(batch.hidden, wanted)
        batches = advance(block, batches)
    for batch, wanted in zip(batches, seen["norm"], strict=True):
        assert torch.equal(batch.hidden, wanted)


def test_windows_reach_only_the_blocks_that_have_them() -> None:
    adapter = adapter_of("qwen2-window")
    assert adapter.model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    arguments = embed(adapter, tokens())[0].arguments
    masks = [found["attention_mask"] for found in arguments]
    assert torch.equal(masks[1], masks[2])
    assert masks[0] is None or not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("name", MODELS)
def test_gram_is_that_of_the_real_inputs(name: str, three_at_once: None) -> None:
    adapter = adapter_of(name)
    block = adapter.blocks[1]
    batches = advance(adapter.blocks[0], embed(adapter, tokens()))
    firsts = {str(stage): block.projection(names[0]) for stage, names in enumerate(STAGES)}
    with inputs_of(firsts) as seen:
        after = advance(block, batches)
    found, moved = collect_and_advance(block, batches, with_gram=True)
    also, _ = collect_and_advance(block, batches, with_gram=False)
    for stage, statistics in found.items():
        x = torch.cat([part.flatten(0, 1) for part in seen[str(stage)]])
        assert statistics.tokens == len(x) == 80
        assert statistics.gram is not None
        exact = x.double().T @ x.double()
        assert bool(((statistics.gram.double() - exact).abs() <= gram_error_bound(x)).all())
        wanted = exact.diagonal().sqrt()
        error = (also[stage].column_norms.double() - wanted).abs()
        assert bool((error <= (len(x) + 3) * 2.0**-24 * wanted).all())
    for batch, wanted in zip(moved, after, strict=True):
        assert torch.equal(batch.hidden, wanted.hidden)


def test_projections_of_a_stage_share_their_input() -> None:
    """One Gram serves q, k, v and one serves gate, up: their inputs are the same tensor."""
    for kind in KINDS:
        adapter = adapter_of(kind)
        block = adapter.blocks[0]
        for names in STAGES:
            with inputs_of({name: block.projection(name) for name in names}) as seen:
                advance(block, embed(adapter, tokens()))
            assert all(torch.equal(a, b) for name in names for a, b in zip(seen[names[0]], seen[name], strict=True))


def require_untouched(adapter: ModelAdapter) -> None:
    for block in adapter.blocks:
        assert "forward" not in vars(block.module)
        for module in block.module.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks


def test_nothing_stays_behind() -> None:
    adapter = adapter_of("llama")
    batches = embed(adapter, tokens())
    collect_and_advance(adapter.blocks[0], batches, with_gram=True)
    require_untouched(adapter)


def test_nothing_stays_behind_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("llama")
    batches = embed(adapter, tokens())

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(adapter.model.model.norm, "forward", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            embed(adapter, tokens())
    require_untouched(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(adapter.blocks[0].projection("mlp.up_proj"), "forward", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            collect_and_advance(adapter.blocks[0], batches, with_gram=True)
    require_untouched(adapter)


def test_a_forward_that_somebody_wrapped_comes_back() -> None:
    """accelerate, for one, sets ``forward`` on the instance."""
    adapter = adapter_of("llama")
    module = adapter.blocks[1].module
    calls: list[int] = []
    inner = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    module.forward = wrapped  # type: ignore[method-assign]
    batches = embed(adapter, tokens())
    assert module.forward is wrapped
    assert not calls
    advance(adapter.blocks[1], batches)
    assert calls == [1]


def test_a_single_token() -> None:
    adapter = adapter_of("qwen3")
    (batch,) = embed(adapter, tokens(1, 1))
    statistics = collect_and_advance(adapter.blocks[0], [batch], with_gram=True)[0][2]
    assert statistics.tokens == 1
    assert statistics.gram is not None
    assert int(torch.linalg.matrix_rank(statistics.gram)) == 1

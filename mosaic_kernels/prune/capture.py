# SPDX-License-Identifier: Apache-2.0
"""Calibration activations, block by block, with the keyword arguments the model itself passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels.models import STAGES, Block, ModelAdapter
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.timing import timed

TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Batch:
    """Some calibration sequences on their way through the model.

    Attributes:
        hidden: ``[sequences, seqlen, hidden_size]``, the input of the next block.
        arguments: for every block, the keyword arguments the model called it with.
        dense: the same for the dense model, where both run side by side.
        held_out: kept out of all statistics, to judge by.
    """

    hidden: Tensor
    arguments: tuple[dict[str, Any], ...]
    dense: Tensor | None = None
    held_out: bool = False


class Stop(Exception):
    """Ends a forward pass once what is wanted of it was seen."""


@torch.no_grad()
def embed(adapter: ModelAdapter, tokens: Tensor, *, held_out: bool = False) -> list[Batch]:
    """Run the model up to its first block.

    Every block is replaced for the moment by one that notes its keyword arguments and returns its
    input, so one cheap forward pass of the model tells what each block really receives (masks of
    sliding-window layers, position embeddings), whatever the transformers version.

    Args:
        tokens: ``int64 [sequences, seqlen]``.
    """
    device = next(adapter.model.parameters()).device
    per_batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    batches = []
    for start in range(0, len(tokens), per_batch):
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        with _recording(adapter, seen):
            body: Any = getattr(adapter.model, "base_model", adapter.model)
            body(input_ids=tokens[start : start + per_batch].to(device), use_cache=False)
        batches.append(Batch(seen[0][0], tuple(arguments for _, arguments in seen), held_out=held_out))
    return batches


@contextmanager
def _recording(adapter: ModelAdapter, seen: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise TypeError(f"a decoder block got {len(args)} positional arguments beside its hidden states")
        seen.append((hidden_states, kwargs))
        return hidden_states

    before = [vars(block.module).get("forward") for block in adapter.blocks]  # set where somebody else wraps it
    for block in adapter.blocks:
        block.module.forward = recorder  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, wrapper in zip(adapter.blocks, before, strict=True):
            if wrapper is None:
                del block.module.forward
            else:
                block.module.forward = wrapper  # type: ignore[method-assign]


@timed("forward")
def forward(block: Block, batch: Batch, hidden: Tensor) -> Tensor:
    """``hidden`` after ``block``, called as the model calls it."""
    output = block.module(hidden, **batch.arguments[block.index])
    after: Tensor = output[0] if isinstance(output, tuple) else output
    return after


@torch.no_grad()
def advance(block: Block, batches: Iterable[Batch], dense: Block | None = None) -> list[Batch]:
    """The batches after ``block``, as it is now; their dense side after ``dense``."""
    return [
        replace(
            batch,
            hidden=forward(block, batch, batch.hidden),
            dense=None if dense is None or batch.dense is None else forward(dense, batch, batch.dense),
        )
        for batch in batches
    ]


@torch.no_grad()
def predict(adapter: ModelAdapter, hidden: Tensor) -> Tensor:
    """Logits of what the last block made: final norm and output head."""
    model: Any = adapter.model
    logits: Tensor = model.get_output_embeddings()(adapter.final_norm(hidden))
    return logits


def predictions(adapter: ModelAdapter, blocks: Iterable[Block], batches: list[Batch]) -> list[Tensor]:
    """Logits of every batch after it went through ``blocks``, the model's own or stand-ins for them."""
    for block in blocks:
        batches = advance(block, batches)
    return [predict(adapter, batch.hidden) for batch in batches]


@torch.no_grad()
def collect_and_advance(
    block: Block, batches: Iterable[Batch], *, with_gram: bool
) -> tuple[dict[int, InputStatistics], list[Batch]]:
    """Statistics of every stage's input (indices into ``STAGES``) and the batches after the block, in one pass.

    Raises:
        NonFiniteError: an input is NaN or infinite.
    """
    statistics: dict[int, InputStatistics] = {}
    handles = []
    for stage, names in enumerate(STAGES):
        layer = block.projection(names[0])
        statistics[stage] = InputStatistics(layer.in_features, layer.weight.device, with_gram=with_gram)
        handles.append(layer.register_forward_pre_hook(_observer(statistics[stage])))
    try:
        outputs = advance(block, batches)
    finally:
        for handle in handles:
            handle.remove()
    return {stage: found.finish(block.full_name(STAGES[stage][0])) for stage, found in statistics.items()}, outputs


def _observer(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, args: statistics.add(args[0])

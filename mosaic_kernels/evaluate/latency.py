# SPDX-License-Identifier: Apache-2.0
"""How fast a model reads and writes, and how many bytes its weights take."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels import compat
from mosaic_kernels.errors import UsageError
from mosaic_kernels.format import bitmask_bytes, bitmask_words
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.progress import station

DEFAULT_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Latency:
    """Speed and size of a model.

    Attributes:
        decode_tokens_per_s: new tokens in a second, one at a time, greedy.
        prefill_tokens_per_s: prompt tokens in a second.
        weight_bytes: see :func:`weight_bytes`.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    weight_bytes: int


def latency(model: Any, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 5) -> Latency:
    """Speed of one model: see :func:`latencies`."""
    return latencies([model], prompt_tokens, new_tokens, repeats)[0]


@torch.no_grad()
def latencies(
    models: Sequence[Any], prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 5, *, seed: int = 0
) -> list[Latency]:
    """Median speed of each model over ``repeats`` runs, after one that warms up.

    The models take turns, so that the drift of a shared machine meets all of them alike. Every run reads
    the same random prompt and then writes exactly ``new_tokens``, whatever they are. The loop is the
    model's own forward passes with its cache; ``generate`` would add its bookkeeping to every token.

    Args:
        models: Hugging Face causal language models; their training mode is restored.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to write.
        repeats: runs that count.
        seed: of the prompt.

    Raises:
        UsageError: a count is below 1.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if count < 1:
            raise UsageError(f"{name} must be at least 1, got {count}")
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    ids = [prompt.to(model.get_input_embeddings().weight.device) for model in models]
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        rounds: list[list[tuple[float, float]]] = []
        with station("latency", (repeats + 1) * len(models), "run", numbered=True) as here:
            for _ in range(repeats + 1):
                rounds.append([])
                for model, i in zip(models, ids, strict=True):
                    rounds[-1].append(_run(model, i, new_tokens))
                    here.advance()  # between what is measured
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
    return [
        Latency(
            decode_tokens_per_s=new_tokens / statistics.median(decode for _, decode in seconds),
            prefill_tokens_per_s=prompt_tokens / statistics.median(prefill for prefill, _ in seconds),
            weight_bytes=weight_bytes(model),
        )
        for model, *seconds in zip(models, *rounds[1:], strict=True)
    ]


def prompt_length(model: Any, asked: int | None, new_tokens: int) -> int:
    """The number of prompt tokens: ``asked``, else 128 or as many as leave room for ``new_tokens``.

    Raises:
        UsageError: prompt and new tokens together are more than the model has positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return DEFAULT_PROMPT_TOKENS if asked is None else asked
    count = min(DEFAULT_PROMPT_TOKENS, limit - new_tokens) if asked is None else asked
    if count < 1 or count + new_tokens > limit:
        raise UsageError(
            f"--prompt-tokens {max(1, count)} and --new-tokens {new_tokens} are more than the {limit} positions this "
            "model has: lower one of them"
        )
    return count


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights take in memory: each parameter once (tied ones too), and what kernels derive.

    The derived part is each :class:`MosaicLinear`'s row offsets, and its bitmask padded to words where
    the stored one is no whole number of them.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, MosaicLinear):
            total += 8 * (module.out_features + 1)
            if bitmask_bytes(module.in_features) % 4:
                total += 4 * bitmask_words(module.in_features) * module.out_features
    return total


def _run(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    # only the last position's logits are wanted, as in generate; not every architecture can be asked so
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = _now(ids)
    out = model(input_ids=ids, use_cache=True, **last_only)
    token = out.logits[:, -1:].argmax(-1)
    read = _now(ids)
    for _ in range(new_tokens):
        out = model(input_ids=token, use_cache=True, **compat.with_cache(model, compat.cache_of(out)))
        token = out.logits[:, -1:].argmax(-1)
    return read - started, _now(ids) - read


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()

# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import CalibrationError, NonFiniteError, UsageError
from mosaic_kernels.progress import station
from mosaic_kernels.text import windows

# Logits of a vocabulary of 128k at 2048 tokens are 1 GiB in fp32: so many are made at once, and so
# many of those turned to fp32 at once.
_LOGITS_AT_ONCE = 1 << 28
_FP32_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Perplexity:
    """A model's perplexity.

    Attributes:
        perplexity: ``exp(nll)``.
        tokens: predicted tokens, ``seqlen - 1`` in each window.
        nll: mean negative log-likelihood of these tokens, in nats.
        seconds: time it took.
    """

    perplexity: float
    tokens: int
    nll: float
    seconds: float


@torch.no_grad()  # not inference_mode: an index that a layer builds now must serve a later backward pass
def perplexity(model: Any, tokens: Tensor, seqlen: int, batch_size: int = 8, name: str = "evaluate") -> Perplexity:
    """Perplexity in windows of ``seqlen`` tokens that do not overlap, the field's convention.

    Args:
        model: a Hugging Face causal language model; its training mode is restored.
        tokens: ``int64 [tokens]``; the rest beyond whole windows is left out.
        seqlen: tokens in a window, the first of which is not predicted.
        name: the name of this step in the progress shown.
        batch_size: windows at once, fewer where their logits would take too much memory.

    Raises:
        CalibrationError: too few tokens for one window, or ids the model does not know.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    started = time.perf_counter()
    parts = windows(tokens, seqlen)
    embedding = model.get_input_embeddings()
    if int(parts.max()) >= embedding.num_embeddings:
        raise CalibrationError(
            f"the tokenizer made id {int(parts.max())} but the model knows {embedding.num_embeddings} tokens: "
            "it belongs to another model"
        )
    at_once = max(1, min(batch_size, _LOGITS_AT_ONCE // (seqlen * embedding.num_embeddings)))
    training, total = model.training, 0.0
    model.eval()
    try:
        with station(name, parts.numel(), "token") as here:
            for first in range(0, len(parts), at_once):
                batch = parts[first : first + at_once].to(embedding.weight.device)
                nll = _nll_sum(model(input_ids=batch, use_cache=False).logits, batch)
                if not math.isfinite(nll):
                    raise NonFiniteError(
                        f"the model's logits are NaN or Inf in windows {first} to {first + len(batch) - 1} of the "
                        "text; check the weights, or evaluate in float32"
                    )
                total += nll
                here.advance(batch.numel())
    finally:
        model.train(training)
    count = len(parts) * (seqlen - 1)
    mean = total / count
    value = math.exp(min(mean, 700))  # beyond, a double overflows and JSON has no word for infinity
    return Perplexity(value, count, mean, time.perf_counter() - started)


def _nll_sum(logits: Tensor, batch: Tensor) -> float:
    rows, targets = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten().to(logits.device)
    step = max(1, _FP32_AT_ONCE // logits.shape[-1])
    losses = [
        F.cross_entropy(rows[i : i + step].float(), targets[i : i + step], reduction="none").sum(dtype=torch.float64)
        for i in range(0, len(rows), step)
    ]
    return float(torch.stack(losses).sum())

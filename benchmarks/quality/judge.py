# SPDX-License-Identifier: Apache-2.0
"""The judge: held-out windows, and paired bootstrap intervals over windows and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2000
COVERAGE = 0.95
AT_ONCE = 8  # windows in one forward pass


@torch.no_grad()
def window_nll(model: Any, windows: Tensor) -> Array:
    """Mean negative log-likelihood of every window's tokens but the first, nats, ``[windows]``.

    Args:
        windows: ``int64 [windows, seqlen]``.
    """
    found = []
    for batch in windows.to(model.device).split(AT_ONCE):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        found.append(losses.view(len(batch), -1).mean(1, dtype=torch.float64))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def divergence(dense: Any, pruned: Any, windows: Tensor) -> float:
    """Mean KL(dense ‖ pruned) per token, nats."""
    total = 0.0
    for batch in windows.to(dense.device).split(AT_ONCE):
        p, q = (F.log_softmax(m(input_ids=batch, use_cache=False).logits.float(), -1) for m in (dense, pruned))
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total / windows.numel()


def nonzeros(model: Any) -> int:
    """Weights of the decoder blocks' projections that are not zero, counted one by one in their dense form."""
    layers = (layer for _, _, layer in ModelAdapter.of(model).projections())
    return sum(
        int((layer.to_dense() if isinstance(layer, MosaicLinear) else layer).weight.count_nonzero()) for layer in layers
    )


class Bootstrap:
    """Resampled seeds and windows, the same ones for every method, so that comparisons stay paired.

    A resample draws windows and seeds with replacement; a method's value in it is the median over the
    drawn seeds of its mean over the drawn windows.
    """

    def __init__(self, seeds: int, windows: int, resamples: int = RESAMPLES) -> None:
        random = np.random.default_rng(0)
        self.counts = random.multinomial(windows, np.full(windows, 1 / windows), size=resamples)
        self.drawn = random.integers(seeds, size=(resamples, seeds))

    def medians(self, values: Array) -> Array:
        """``values [seeds, windows]`` -> the median of every resample, ``[resamples]``."""
        means = self.counts @ values.T / values.shape[1]
        return np.asarray(np.median(np.take_along_axis(means, self.drawn, axis=1), axis=1))


def median(values: Array) -> float:
    """Median over seeds of the mean over windows, of ``[seeds, windows]``."""
    return float(np.median(values.mean(axis=1)))


def interval(resampled: Array) -> Interval:
    """The central 95 % of resampled values."""
    low, high = np.quantile(resampled, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def compare(ours: Array, baselines: Sequence[Array], how: Callable[..., Any]) -> tuple[float, Interval]:
    """``how(ours, the better baseline)`` of the medians, and its paired interval.

    The better baseline is chosen anew in every resample, so that its choice is part of the uncertainty.

    Args:
        ours: excess NLL, ``[seeds, windows]``.
        baselines: the same of each baseline, on the same seeds and windows.
        how: for example ``numpy.divide`` or ``numpy.subtract``.
    """
    bootstrap = Bootstrap(*ours.shape)
    best = np.minimum.reduce([bootstrap.medians(values) for values in baselines])
    value = float(how(median(ours), min(median(values) for values in baselines)))
    return value, interval(how(bootstrap.medians(ours), best))

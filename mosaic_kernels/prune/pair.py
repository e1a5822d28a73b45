# SPDX-License-Identifier: Apache-2.0
"""The dense and the pruned model side by side: what a projection should make of the inputs it now gets.

The pruned projection sees inputs X̃ that the pruning before it has changed. Asking it for the dense
output, ``min ‖W X - W' X̃‖²``, is the ordinary pruning problem with another weight in the place of W;
what writes back to the residual stream can also return the drift of that stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels.errors import MosaicError, NonFiniteError
from mosaic_kernels.models import STAGES, Block
from mosaic_kernels.prune.capture import Batch, Stop, forward
from mosaic_kernels.prune.gram import InputStatistics, damped_cholesky, jacobi_ridge

# How far the target goes from the given weight to the dense output's: all the way fits noise where
# tokens are few (measured on examples/tiny-llama at 70 %: .5, .8 and 1 are the same, 0 is 30 % worse).
TRUST = 0.8
TRUST_FEW_TOKENS = 0.5
TOKENS_PER_FEATURE_TO_TRUST = 32
# Share of the residual stream's drift that the projections which write to it return.
DRIFT_SHARE = 0.8

WRITES_RESIDUAL = (1, 3)  # the stages of o_proj and down_proj


class PairStatistics(InputStatistics):
    """Statistics of a projection's inputs in the pruned model, with the dense model's beside them.

    Attributes:
        cross: sum of ``x_dense x̃ᵀ``, ``float32 [dense features, features]``.
        drift: sum of ``(h_dense - h̃) x̃ᵀ`` with h the residual stream the projection adds to,
            ``float32 [hidden, features]``; ``None`` where it adds to none.
    """

    def __init__(self, dense_features: int, features: int, hidden: int | None, device: torch.device) -> None:
        super().__init__(features, device, with_gram=True)
        self.cross = torch.zeros(dense_features, features, device=device)
        self.drift = None if hidden is None else torch.zeros(hidden, features, device=device)

    def add_pair(self, x: Tensor, dense: Tensor, drift: Tensor | None) -> None:
        """Count the same tokens of both models in."""
        self.add(x)
        rows = x.flatten(0, -2).float()
        self.cross.addmm_(dense.flatten(0, -2).float().T, rows)
        if self.drift is not None and drift is not None:
            self.drift.addmm_(drift.flatten(0, -2).T, rows)

    def finish(self, name: str) -> PairStatistics:
        """Check the sums of both models; see :meth:`InputStatistics.finish`."""
        super().finish(name)
        if not all(bool(torch.isfinite(sums).all()) for sums in (self.cross, self.drift) if sums is not None):
            raise NonFiniteError(
                f"the dense model's activations at {name} are NaN or infinite: it overflows on this text; "
                "check its weights, or run with --dtype float32"
            )
        return self


@torch.no_grad()
def collect_pair(block: Block, dense: Block, batches: Sequence[Batch], stage: int) -> PairStatistics:
    """Statistics of one stage's input in both models.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    name = STAGES[stage][0]
    layer, other = block.projection(name), dense.projection(name)
    hidden = layer.out_features if stage in WRITES_RESIDUAL else None
    found = PairStatistics(other.in_features, layer.in_features, hidden, layer.weight.device)
    for batch in batches:
        x, residual = _tap(block, batch, batch.hidden, stage)
        x_dense, residual_dense = _tap(dense, batch, _dense_side(batch), stage)
        drift = None if hidden is None else residual_dense.float() - residual.float()
        found.add_pair(x, x_dense, drift)
    found.finish(block.full_name(name))
    return found


def _dense_side(batch: Batch) -> Tensor:
    if batch.dense is None:
        raise MosaicError("the dense model's activations are needed beside the pruned one's but were not kept")
    return batch.dense


def _tap(block: Block, batch: Batch, hidden: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """The input of a stage, and the residual stream its output is added to."""
    seen: dict[str, Tensor] = {"residual": hidden}
    with (
        _hooked(block.projection(STAGES[stage][0]), seen, "x", stop=True),
        _hooked(block.after_attention, seen, "residual", stop=False),
        suppress(Stop),
    ):
        forward(block, batch, hidden)
    return seen["x"], seen["residual"]


@contextmanager
def _hooked(module: nn.Module, seen: dict[str, Tensor], key: str, *, stop: bool) -> Iterator[None]:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[key] = args[0].detach()
        if stop:
            raise Stop

    handle = module.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def dense_target(weight: Tensor, base: Tensor, found: PairStatistics, name: str) -> Tensor:
    """The weight that would make the dense output of the pruned model's inputs, in least squares.

    Args:
        weight: the dense projection, ``[out, dense features]`` fp32.
        base: what stands there now, ``[out, features]`` fp32: the dense weight, or its refit on fewer features.
        found: statistics of this projection's inputs.

    Returns:
        ``[out, features]`` fp32.
    """
    gram, tokens = found.mean_gram, max(1, found.tokens)
    ridge, damping = jacobi_ridge(gram), found.damping
    factor = damped_cholesky(gram, ridge, damping, name)
    trust = TRUST if tokens >= TOKENS_PER_FEATURE_TO_TRUST * gram.shape[0] else TRUST_FEW_TOKENS
    wanted = weight @ (found.cross / tokens) + damping * base * ridge
    target = (1 - trust) * base + trust * torch.cholesky_solve(wanted.T, factor).T
    if found.drift is not None:
        target += DRIFT_SHARE * torch.cholesky_solve((found.drift / tokens).T, factor).T
    return target

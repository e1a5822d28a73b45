# SPDX-License-Identifier: Apache-2.0
"""One model's way through one block, stage by stage: every projection runs once, after it was pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels.models import STAGES, Block
from mosaic_kernels.prune.capture import Batch, Stop, forward
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.ranks import ALONE, Team
from mosaic_kernels.prune.timing import timed

# Inputs of a stage are kept from its statistics to its product as long as they fit; beyond, the half of
# the block before them runs again. 7B at 128 x 2048 tokens: 2 GiB before o_proj, 5.5 before down_proj, in
# each of two streams; hosts must do with less, since a solve may take 5 GiB beside.
KEPT_BYTES = {"cpu": 1 << 29, "cuda": 8 << 30}

ENOUGH_TOKENS_PER_FEATURE = 32

ATTENTION_OUT, FFN_IN, FFN_OUT = 1, 2, 3
WRITES_RESIDUAL = (ATTENTION_OUT, FFN_OUT)  # the stages of o_proj and down_proj


class Walk:
    """Hidden states between two stages of a block.

    Attributes:
        residual: of every batch, the residual stream that the current half of the block reads and adds to.
    """

    def __init__(self, block: Block, batches: Sequence[Batch], hidden: Sequence[Tensor]) -> None:
        self.block, self.batches, self.residual = block, batches, list(hidden)
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._past_attention = False

    @timed("forward")
    @torch.no_grad()
    def input(self, stage: int, index: int) -> Tensor:
        """What the projections of a stage read in batch ``index``, ``[sequences, seqlen, features]``."""
        assert (stage >= FFN_IN) == self._past_attention, "a walk goes through a block once, from front to back"
        found = self._kept.get((stage, index))
        if found is None:
            found = self._run(stage, index)
            kept = sum(x.nbytes for x in self._kept.values()) + found.nbytes
            if stage in WRITES_RESIDUAL and kept <= KEPT_BYTES.get(found.device.type, 0):
                self._kept[stage, index] = found
        return found

    def _run(self, stage: int, index: int) -> Tensor:
        block, hidden = self.block, self.residual[index]
        if stage < FFN_IN:
            return _seen(block.projection(STAGES[stage][0]), lambda: forward(block, self.batches[index], hidden))
        x: Tensor = block.after_attention(hidden)
        return x if stage == FFN_IN else _seen(block.projection(STAGES[stage][0]), lambda: block.ffn(x))

    def forget(self) -> None:
        """Drop kept inputs: a projection before them has changed."""
        self._kept.clear()

    @timed("forward")
    @torch.no_grad()
    def add(self, stage: int) -> None:
        """Add what ``o_proj`` or ``down_proj`` makes to the residual stream, which goes on to the next half."""
        layer = self.block.projection(STAGES[stage][0])
        for index, hidden in enumerate(self.residual):
            self.residual[index] = hidden + layer(self.input(stage, index))
            self._kept.pop((stage, index), None)
        self._past_attention = True


@torch.no_grad()
def collect(walk: Walk, stage: int, *, with_gram: bool, every: int = 1, team: Team = ALONE) -> InputStatistics:
    """Statistics of one stage's input, from one token in ``every`` if that leaves enough for each feature.

    Args:
        team: the processes whose sequences count.

    Raises:
        NonFiniteError: an input is NaN or infinite.
    """
    layer = walk.block.projection(STAGES[stage][0])
    found = InputStatistics(layer.in_features, layer.weight.device, with_gram=with_gram)
    tokens = team.total(sum(batch.hidden.shape[:2].numel() for batch in walk.batches if not batch.held_out))
    every = every if tokens >= ENOUGH_TOKENS_PER_FEATURE * layer.in_features else 1
    for index, batch in enumerate(walk.batches):
        if not batch.held_out:
            found.add(walk.input(stage, index).flatten(0, -2)[::every])
    return found.finish(walk.block.full_name(STAGES[stage][0]), team)


def _seen(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of ``module`` while ``run`` runs, which ends there."""
    seen: list[Tensor] = []
    with _stopping(module, seen), suppress(Stop):
        run()
    return seen[0]


@contextmanager
def _stopping(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())
        raise Stop

    handle = module.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()

# SPDX-License-Identifier: Apache-2.0
"""Local reconstruction: the kept weights of half a block, tuned until the half adds what the dense one adds.

The solvers fit every projection alone, as a linear map. Here all projections of the attention half
(q, k, v, o) or of the FFN half (gate, up, down) move together, through softmax and activation, by
gradient descent on ``‖f_dense(x_dense) + drift - f(x̃)‖² / ‖f_dense(x_dense)‖²``, where f is what the
half adds to the residual stream and the drift is that of the stream itself, as in ``pair.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mosaic_kernels.errors import MosaicError
from mosaic_kernels.models import STAGES
from mosaic_kernels.progress import Station, station
from mosaic_kernels.prune.capture import Stop
from mosaic_kernels.prune.pair import DRIFT_SHARE
from mosaic_kernels.prune.solvers import keep_all
from mosaic_kernels.prune.timing import timed
from mosaic_kernels.prune.walk import ATTENTION_OUT, WRITES_RESIDUAL, Walk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """How a half is tuned.

    Attributes:
        epochs: passes over the calibration batches.
        rate: the first learning rate, in units of each projection's root mean square; it falls as a cosine.
        tokens: in one step, rounded down to whole sequences, at least one.
        drift_share: how much of the residual stream's drift the half is to return.
        seed: of the order of the steps.
    """

    # Excess NLL of examples/tiny-llama at 70 %, uniform, 128 x 256 calibration tokens: .067 without; 4 epochs at
    # rate .01 .059, .03 .055 (8 epochs .054), .06 .057; steps of half as many tokens the same; all of
    # the drift .056 (one run each).
    epochs: int = 4
    rate: float = 0.03
    tokens: int = 2048
    drift_share: float = DRIFT_SHARE
    seed: int = 0


@dataclass(frozen=True)
class _Part:
    """Some sequences: the residual stream before the half, the block's arguments, what the half should add."""

    hidden: Tensor
    arguments: dict[str, Any]
    target: Tensor


@timed("tune")
def reconstruct(walk: Walk, beside: Walk, stage: int, tuning: Tuning | None = None) -> bool:
    """Tune the kept weights of the half of ``walk.block`` that ends with ``stage``, in place.

    Zeros stay zero and other weights stay other than zero, in the checkpoint's dtype. Sequences that are
    held out judge: the best epoch is taken, and where none beats the weights as they were, these stay.
    Where no batch is held out, the last sequence judges. Memory beyond the walks': the targets (as much
    as the residual stream), four fp32 copies of the half's weights, activations of one step.

    Args:
        walk: the pruned model, before the half's output was added; forget its kept inputs afterwards.
        beside: the dense model, at the same place.
        stage: ``ATTENTION_OUT`` or ``FFN_OUT``.

    Returns:
        Whether the weights have changed.
    """
    tuning = Tuning() if tuning is None else tuning
    half = _Half(walk, stage)
    parts, judges, power = _parts(walk, beside, stage, tuning)
    name = walk.block.full_name(STAGES[stage][0].partition(".")[0])
    if not parts:
        logger.info("%s: not reconstructed, one calibration sequence cannot be judged by another", name)
        return False
    before = half.error(half.weights, judges)
    with station("recover", tuning.epochs * len(parts), "step", detail=True) as here:
        found, after = _tune(half, parts, judges, tuning, before, here)
    fate = "put back" if found is None else "taken"
    logger.info("%s: error %.4f, %.4f after reconstruction: %s", name, before / power, after / power, fate)
    if found is None:
        return False
    with torch.no_grad():
        for key, weight in found.items():
            half.module.get_parameter(key).copy_(weight)
    return True


class _Half:
    """What half a block adds to the residual stream, as a function of its weights.

    Attributes:
        module: the decoder block.
        weights: the projections' weights as they stand in it, by name, without gradient.
        stored: the dtypes that new weights are rounded to.
    """

    def __init__(self, walk: Walk, stage: int) -> None:
        if stage not in WRITES_RESIDUAL:
            raise MosaicError(f"no half of a block ends with stage {stage}")
        self.module, self.stage, self._block = walk.block.module, stage, walk.block
        names = [f"{name}.weight" for part in STAGES[stage - 1 : stage + 1] for name in part]
        self.weights = {name: self.module.get_parameter(name).detach() for name in names}
        self.stored = {name: walk.block.stored_dtype(name.removesuffix(".weight")) for name in names}

    def output(self, weights: dict[str, Tensor], part: _Part) -> Tensor:
        """``[sequences, seqlen, hidden]``, with gradients where the weights have them."""
        if self.stage != ATTENTION_OUT:
            with torch.no_grad():
                x = self._block.after_attention(part.hidden)
            inside = {name.partition(".")[2]: weight for name, weight in weights.items()}
            made: Tensor = functional_call(self._block.ffn, inside, (x,))
            return made
        seen: list[Tensor] = []

        def note(_: nn.Module, __: object, output: Tensor) -> None:
            seen.append(output)
            raise Stop

        handle = self._block.projection(STAGES[ATTENTION_OUT][0]).register_forward_hook(note)
        try:
            with suppress(Stop):
                functional_call(self.module, weights, (part.hidden,), part.arguments)
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def error(self, weights: dict[str, Tensor], parts: Sequence[_Part]) -> float:
        """Mean squared distance to the targets."""
        count = sum(part.target.numel() for part in parts)
        sums = [(part.target - self.output(weights, part).float()).square().sum(dtype=torch.float64) for part in parts]
        return float(torch.stack(sums).sum()) / count


def _tune(
    half: _Half, parts: Sequence[_Part], judges: Sequence[_Part], tuning: Tuning, before: float, here: Station
) -> tuple[dict[str, Tensor] | None, float]:
    """Weights of the best epoch and their error; without weights, the best error that was not good enough."""
    keep = {name: weight != 0 for name, weight in half.weights.items()}
    masters = {name: weight.float().clone().requires_grad_() for name, weight in half.weights.items()}
    rates = [tuning.rate * _rms(masters[name].detach(), keep[name]) for name in masters]
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "lr": rate} for weight, rate in zip(masters.values(), rates, strict=True)],
        betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    order = torch.Generator().manual_seed(tuning.seed + half.stage)
    best, lowest, step, steps = None, math.inf, 0, tuning.epochs * len(parts)
    for _ in range(tuning.epochs):
        for index in torch.randperm(len(parts), generator=order).tolist():
            share = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            _step(half, masters, keep, parts[index], optimizer)
            step += 1
            here.advance()
        rounded = {name: _rounded(masters[name], keep[name], half.stored[name]) for name in masters}
        error = half.error({name: weight.to(half.weights[name].dtype) for name, weight in rounded.items()}, judges)
        if error < lowest:  # never true of NaN
            lowest = error
            best = rounded if error < before else None
    return best, lowest


def _step(
    half: _Half, masters: dict[str, Tensor], keep: dict[str, Tensor], part: _Part, optimizer: torch.optim.Optimizer
) -> None:
    with torch.enable_grad():
        made = half.output({name: weight.to(half.weights[name].dtype) for name, weight in masters.items()}, part)
        # Adam does not mind the scale of a loss but fp16 does: as a sum over the square root of the count,
        # neither the gradients of single outputs nor those of weights leave its range.
        loss = (part.target - made.float()).square().sum() / math.sqrt(made.numel())
        gradients = torch.autograd.grad(loss, list(masters.values()))
    if not bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()):
        return
    for (name, weight), gradient in zip(masters.items(), gradients, strict=True):
        weight.grad = gradient * keep[name]
    optimizer.step()


def _rms(weight: Tensor, keep: Tensor) -> float:
    return float((weight.square().sum(dtype=torch.float64) / keep.sum().clamp_min(1)).sqrt())


@torch.no_grad()
def _rounded(weight: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(keep, keep_all(weight, dtype), torch.zeros((), dtype=dtype, device=weight.device))


@torch.no_grad()
def _parts(walk: Walk, beside: Walk, stage: int, tuning: Tuning) -> tuple[list[_Part], list[_Part], float]:
    """Steps to train on, sequences to judge by, and the mean square of the dense half's output."""
    layer = beside.block.projection(STAGES[stage][0])
    parts: list[_Part] = []
    judges: list[_Part] = []
    powers, count = [], 0
    judged = any(batch.held_out for batch in walk.batches)
    for index, batch in enumerate(walk.batches):
        made = layer(beside.input(stage, index))
        hidden = walk.residual[index]
        drift = beside.residual[index].float() - hidden.float()
        powers.append(made.float().square().sum(dtype=torch.float64))
        count += made.numel()
        target = (made.float() + tuning.drift_share * drift).to(made.dtype)
        arguments = batch.arguments[walk.block.index]
        whole = len(hidden) if judged or index < len(walk.batches) - 1 else len(hidden) - 1
        at_once = max(1, tuning.tokens // hidden.shape[1])
        for first in [*range(0, whole, at_once), *range(whole, len(hidden))]:
            rows = slice(first, min(first + at_once, whole) if first < whole else None)
            part = _Part(hidden[rows], _rows(arguments, rows, len(hidden)), target[rows])
            (judges if batch.held_out or first >= whole else parts).append(part)
    power = sum(torch.stack(powers).tolist())
    return parts, judges, max(power / count, torch.finfo(torch.float32).tiny)


def _rows(value: Any, rows: slice, sequences: int) -> Any:
    """Arguments of a block for some sequences: tensors with one entry for each sequence lose the others'."""
    if isinstance(value, dict):
        return {key: _rows(item, rows, sequences) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(item, rows, sequences) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == sequences > 1:
        return value[rows]
    return value

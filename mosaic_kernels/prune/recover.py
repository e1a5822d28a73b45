# SPDX-License-Identifier: Apache-2.0
"""Masked LoRA: a low-rank update of the kept weights of a whole pruned model, trained with PEFT and merged.

``W + alpha / rank · (B A) ∘ M`` with ``M = (W != 0)``: the update is dense only where weights are kept, so
it merges without a new non-zero and the model stays as sparse as it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.progress import Station, station
from mosaic_kernels.prune.capture import Batch, predict
from mosaic_kernels.prune.masked_lora import lora_layer
from mosaic_kernels.prune.timing import timed

logger = logging.getLogger(__name__)

HELD_OUT = 16  # one sequence in so many, from the end, judges
CHECKS = 10  # so often in a run; the best state is taken
WARM_UP = 0.05  # share of the steps in which the learning rate rises

# Dense logits of some sequences, ``[n, seqlen, vocabulary]``, by their places in ``tokens``, ``int64 [n]``.
Teacher = Callable[[Tensor], Tensor]


@timed("tune")
def recover_lora(
    model: Any,
    tokens: Tensor,
    *,
    teacher: Teacher | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    steps: int = 300,
    rate: float = 3e-3,
    tokens_per_step: int = 1024,
    seed: int = 0,
    stored: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:
    """Train a masked low-rank update of every prunable projection and merge it, in place.

    The loss is ``KL(dense ‖ pruned)`` over all tokens where there is a teacher, else next-token cross
    entropy. The last sixteenth of the sequences is not trained on: the state with the lowest loss there is
    merged, or none if the loss has not fallen. Only the kept weights of projections change.

    Args:
        model: a pruned causal language model with dense projections (before packing); its class, parameter
            names, gradient flags and training mode are the same afterwards.
        tokens: ``int64 [sequences, seqlen]``, at least two sequences.
        teacher: dense logits by places in ``tokens``: ``cached.__getitem__`` of cached logits
            ``[sequences, seqlen, vocabulary]``, or :func:`dense_teacher`.
        rank, alpha: of the update, which is scaled by ``alpha / rank``.
        steps: of AdamW, with a learning rate that rises for a twentieth and then falls from ``rate`` as a cosine.
        tokens_per_step: rounded down to whole sequences, at least one.
        seed: of the first ``A`` and of the order of the sequences.
        stored: dtypes to round merged weights to, by the full name of the parameter; by default the dtype it has.

    Returns:
        ``accepted``, ``loss`` (``"kl"`` or ``"cross-entropy"``), its values on held-out sequences ``before`` and
        ``after`` (``None`` where never finite) in nats per token, ``trained_parameters``, ``seconds``, and the options.

    Raises:
        EnvironmentError_: PEFT is not installed.
        UsageError: an option is out of range, or the projections are packed.
        CalibrationError: fewer than two sequences.
    """
    # Excess NLL of examples/tiny-llama at 70 %, uniform, 128 x 256 tokens, KL: .067 without; 20 steps of 2048 tokens
    # at rate .001 .065, 150 of 1024 at .003 .056; the same with cross entropy .072, though it fell on held-out
    # calibration text: it learns that text, so give a teacher where there is one (one run each).
    started = time.perf_counter()
    _check(tokens, rank, steps, rate)
    adapter = ModelAdapter.of(model).storing(stored or {})
    run = _Run(model, tokens, teacher, max(1, tokens_per_step // tokens.shape[1]), seed)
    with _restored(model), _adapted(adapter, rank, alpha, seed) as layers:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = run.judge()
        with station("recover", steps, "step") as here:
            after = run.train(trained, steps, rate, before, here)
        accepted = after < before
        for layer in layers if accepted else ():
            layer.merge()
    kind = "cross-entropy" if teacher is None else "kl"
    logger.info("masked LoRA: held-out %s %.4f, then %.4f%s", kind, before, after, "" if accepted else ": discarded")
    return {
        "accepted": accepted, "loss": kind, "before": before, "after": after if math.isfinite(after) else None,
        "rank": rank, "alpha": alpha, "steps": steps, "rate": rate,
        "trained_parameters": sum(parameter.numel() for parameter in trained), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def dense_teacher(adapter: ModelAdapter, batches: Sequence[Batch]) -> Teacher:
    """The dense model's logits, from its activations after the last block.

    The final norm and the output head are not pruned, so they serve both models; nothing but these activations
    need be kept of the dense one.

    Args:
        batches: after the last block, with their dense side, in the order of the tokens.
    """
    dense = [hidden for batch in batches if batch.dense is not None for hidden in batch.dense]
    return lambda places: predict(adapter, torch.stack([dense[place] for place in places.tolist()]))


class _Run:
    """Sequences to train on and to judge by."""

    def __init__(self, model: Any, tokens: Tensor, teacher: Teacher | None, at_once: int, seed: int) -> None:
        self.model = model
        self.tokens, self.teacher, self.at_once = tokens, teacher, at_once
        self.device = model.get_input_embeddings().weight.device
        self.training = len(tokens) - max(1, len(tokens) // HELD_OUT)
        self.order = torch.Generator().manual_seed(seed)

    def loss(self, places: Tensor) -> Tensor:
        """Mean loss of some sequences, in nats per token."""
        inputs = self.tokens[places].to(self.device)
        logits = self.model(input_ids=inputs, use_cache=False).logits
        if self.teacher is None:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())
        with torch.no_grad():
            wanted = self.teacher(places).to(self.device).flatten(0, 1).float().log_softmax(-1)
        made = logits.flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(made, wanted, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def judge(self) -> float:
        """The loss on held-out sequences."""
        places = torch.arange(self.training, len(self.tokens))
        losses = [self.loss(part).double() * len(part) for part in torch.split(places, self.at_once)]
        return float(sum(torch.stack(losses).tolist())) / len(places)

    def train(self, parameters: Sequence[nn.Parameter], steps: int, rate: float, before: float, here: Station) -> float:
        """Train, and leave the best state behind; returns its loss on held-out sequences."""
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.dtype == torch.float16)
        best, lowest = None, math.inf
        batches = self._batches()
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = rate * _rate_factor(step, steps)
            with torch.enable_grad():
                torch.autograd.backward(scaler.scale(self.loss(next(batches))))
            scaler.unscale_(optimizer)
            if math.isfinite(float(nn.utils.clip_grad_norm_(parameters, 1.0))):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == steps or step * CHECKS // steps > (step - 1) * CHECKS // steps:
                found = self.judge()
                if found < lowest:
                    lowest = found
                    best = [parameter.detach().clone() for parameter in parameters] if found < before else None
            here.advance()
        if best is not None:
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
        return lowest

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield from torch.split(torch.randperm(self.training, generator=self.order), self.at_once)


def _rate_factor(step: int, steps: int) -> float:
    """Of the learning rate at a step, counted from 1."""
    rise = max(1, round(WARM_UP * steps))
    if step <= rise:
        return step / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise + 1))


def _check(tokens: Tensor, rank: int, steps: int, rate: float) -> None:
    for name, value in (("rank", rank), ("steps", steps)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"rate must be positive, got {rate}")
    if tokens.dim() != 2 or len(tokens) < 2:
        raise CalibrationError(f"recovery needs at least two sequences, one to judge by; got {list(tokens.shape)}")


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; gradient flags and every module's mode as they were afterwards."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, flag in flags.items():
            model.get_parameter(name).requires_grad_(flag)
        for name, mode in modes.items():
            model.get_submodule(name).training = mode


@contextlib.contextmanager
def _adapted(adapter: ModelAdapter, rank: int, alpha: float, seed: int) -> Iterator[list[Any]]:
    """The masked LoRA layers that stand in the places of the projections, which are as they were afterwards."""
    if any(isinstance(layer, MosaicLinear) for _, _, layer in adapter.projections()):
        raise UsageError("masked LoRA trains dense weights: call model.dequantize() first")
    masked = lora_layer()
    from peft import LoraConfig, get_peft_model

    names = [block.full_name(name) for block, name, _ in adapter.projections()]
    stored = [block.stored_dtype(name) for block, name, _ in adapter.projections()]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    config._register_custom_module({nn.Linear: masked})
    model: Any = adapter.model
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config)
    try:
        layers = [model.get_submodule(name) for name in names]
        for layer, dtype in zip(layers, stored, strict=True):
            layer.stored = dtype
        yield layers
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)  # PEFT before 0.19 leaves it behind

# SPDX-License-Identifier: Apache-2.0
"""Structured removal: whole KV groups and FFN channels, chosen and repaired at their consumer.

A *unit* is a run of neighbouring input features of the consumer: one column of ``down_proj`` for an
FFN channel; for a KV group the columns of ``o_proj`` that its query heads write.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaic_kernels.errors import MosaicError, NonFiniteError
from mosaic_kernels.models import Block
from mosaic_kernels.prune.gram import InputStatistics, centred, damped_cholesky, jacobi_ridge
from mosaic_kernels.prune.timing import timed

DAMPING = 0.01
SWEEP_STEPS = 32  # selection loses nothing measurable against one unit at a time (tests/test_structured.py)


@dataclass(frozen=True)
class Sweep:
    """What removing units one batch after the other costs.

    Attributes:
        removed: units gone after each batch, rising.
        losses: least-squares loss of the consumer by then, ``min over W' of tr((W - W') A (W - W')ᵀ)`` with A
            the damped Gram; each batch adds its exact loss given those before it, so the last is the loss of all.
        kept: ``bool [units]``, ``True`` where kept, at each level that was asked for.
    """

    removed: list[int]
    losses: list[float]
    kept: dict[int, Tensor]


def select_units(weight: Tensor, gram: Tensor, unit: int, remove: int, name: str) -> Tensor:
    """The units to keep once ``remove`` of them are gone, ``bool [units]``; see :func:`sweep`."""
    return sweep(weight, gram, unit, [remove], name).kept[remove]


@timed("solve")
def sweep(weight: Tensor, gram: Tensor, unit: int, levels: Sequence[int], name: str) -> Sweep:
    """Remove the units whose loss the remaining inputs can make up for best, and note every level on the way.

    Sweeps units out in batches by the exact least-squares loss ``tr(W_u (C_uu)^-1 W_uᵀ)``, with C the
    damped inverse Gram, and updates W and C by the Schur complement after each batch.

    Args:
        weight: the consumer, ``[out, units * unit]`` fp32.
        gram: mean Gram of its inputs, ``[units * unit, units * unit]`` fp32.
        unit: neighbouring features of one unit.
        levels: numbers of units to have removed, in rising order.

    Raises:
        MosaicError: the losses are not finite.
    """
    units = weight.shape[1] // unit
    kept = torch.ones(units, dtype=torch.bool, device=weight.device)
    inverse = torch.cholesky_inverse(damped_cholesky(gram, jacobi_ridge(gram), DAMPING, name))
    weight = weight.clone()
    batch = max(1, -(-levels[-1] // SWEEP_STEPS))
    removed: list[int] = []
    batch_losses: list[Tensor] = []
    at_level, count = {0: kept.clone()}, 0
    for level in levels:
        while count < level:
            losses = _unit_losses(weight, inverse, unit).masked_fill(~kept, torch.inf)
            gone = _cheapest(weight, inverse, losses, unit, min(batch, level - count), left=units - count)
            kept.index_fill_(0, gone, False)
            columns = _columns(gone, unit)
            lost = weight[:, columns]
            solved, _ = torch.linalg.solve_ex(inverse[columns][:, columns], torch.cat([inverse[columns], lost.T], 1))
            count += gone.numel()
            removed.append(count)
            batch_losses.append((lost.T * solved[:, len(inverse) :]).sum())
            weight -= lost @ solved[:, : len(inverse)]
            inverse -= inverse[:, columns] @ solved[:, : len(inverse)]
            # What is gone stays exactly gone; a unit block on the diagonal keeps later losses finite.
            weight.index_fill_(1, columns, 0)
            inverse.index_fill_(0, columns, 0).index_fill_(1, columns, 0)
            inverse.diagonal().index_fill_(0, columns, 1)
        at_level[level] = kept.clone()
    found = torch.stack(batch_losses).tolist() if batch_losses else []
    if not all(map(math.isfinite, found)):
        raise MosaicError(f"{name}: what its units are worth cannot be told from these inputs; use more --samples")
    return Sweep(removed, list(itertools.accumulate(found)), at_level)


def _unit_losses(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """Loss of removing each unit alone, ``[units]``."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // unit
    blocks = inverse.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    columns = weight.T.reshape(units, unit, -1)
    losses: Tensor = (columns * torch.linalg.solve_ex(blocks, columns).result).sum((1, 2))
    return losses


def _cheapest(weight: Tensor, inverse: Tensor, losses: Tensor, unit: int, count: int, *, left: int) -> Tensor:
    """Indices of at most ``count`` of ``left`` units, at least one, that may go in one batch.

    Units that stand in for each other are cheap alone and dear together. So twice as many candidates
    are put in the order of their loss, and the loss of each *given that the ones before it are gone*
    comes from one Cholesky factor, ``C_SS = L Lᵀ``: it is the squared norm of its rows in ``L⁻¹ W_Sᵀ``.
    Whoever is now dearer than the last candidate was alone waits for a later batch. How many go is the one
    number of a batch that the host waits for.
    """
    if count == 1:
        return losses.argmin(0, keepdim=True)
    order = losses.argsort(stable=True)[: min(2 * count, left)]
    columns = _columns(order, unit)
    factor, info = torch.linalg.cholesky_ex(inverse[columns][:, columns])
    given = torch.linalg.solve_triangular(factor, weight[:, columns].T, upper=False).square().sum(1)
    fits = (given.view(-1, unit).sum(1) <= losses[order[-1:]]) & (info == 0)
    fits[0] = True
    return order[fits][:count]


def _columns(units: Tensor, unit: int) -> Tensor:
    """The features of these units."""
    return (units.unsqueeze(1) * unit + torch.arange(unit, device=units.device)).flatten()


@timed("solve")
def refit(weight: Tensor, gram: Tensor, kept: Tensor, name: str) -> Tensor:
    """Least-squares consumer on the kept features: ``argmin ‖W X - W' X_K‖²``, damped towards ``W_K``.

    Args:
        weight: ``[out, features]`` fp32.
        gram: ``[features, features]`` fp32.
        kept: ``bool [features]``.

    Returns:
        ``[out, kept features]`` fp32.
    """
    places = kept.nonzero().flatten()  # once: with a mask, every index waits for its count
    seen = gram[:, places]
    inner = seen[places]
    ridge = jacobi_ridge(inner)
    factor = damped_cholesky(inner, ridge, DAMPING, name)
    target = weight @ seen + DAMPING * weight[:, places] * ridge
    return torch.cholesky_solve(target.T, factor).T


def remove_channels(
    block: Block, statistics: InputStatistics, count: int, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Remove ``count`` FFN channels of ``block`` and refit ``down_proj``.

    Args:
        statistics: of the input of ``down_proj``.
        weight: ``[hidden, channels]`` fp32, whose output the refit comes close to; by default the layer's own.

    Returns:
        For each projection that makes the channels, its rows that are left, ``bool [out_features]``.
    """
    return _remove(block, "mlp.down_proj", {"mlp.gate_proj": 1, "mlp.up_proj": 1}, statistics, 1, count, weight)


def remove_groups(
    block: Block, statistics: InputStatistics, count: int, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Remove ``count`` KV groups of ``block`` and refit ``o_proj``; see :func:`remove_channels`."""
    queries = block.query_heads // block.key_value_heads * block.head_dim
    producers = {
        "self_attn.q_proj": queries,
        "self_attn.k_proj": block.head_dim,
        "self_attn.v_proj": block.head_dim,
    }
    rows = _remove(block, "self_attn.o_proj", producers, statistics, queries, count, weight)
    block.refresh_heads()
    return rows


def _remove(
    block: Block,
    consumer: str,
    producers: dict[str, int],
    statistics: InputStatistics,
    unit: int,
    count: int,
    weight: Tensor | None,
) -> dict[str, Tensor]:
    layer, name = block.projection(consumer), block.full_name(consumer)
    weight = layer.weight.detach().float() if weight is None else weight
    # A bias can stand in for the mean of what is removed, so only what varies about it need be refitted.
    gram, mean = (statistics.mean_gram, None) if layer.bias is None else centred(statistics)
    kept = select_units(weight, gram, unit, count, name)
    features = kept.repeat_interleave(unit)
    refitted = refit(weight, gram, features, name)
    bias = None
    if layer.bias is not None and mean is not None:
        made = layer.bias.detach().float() + weight @ mean - refitted @ mean[features]
        bias = block.rounded(consumer, made, "bias")
    refitted = block.rounded(consumer, refitted)
    if not bool(torch.isfinite(refitted).all()):
        stored = block.stored_dtype(consumer)
        raise NonFiniteError(f"{name}: the refitted weights overflow {stored}; run with --dtype float32")
    block.replace(consumer, like(layer, refitted, bias))
    rows = {producer: kept.repeat_interleave(width) for producer, width in producers.items()}
    for producer, left in rows.items():
        old = block.projection(producer)
        bias = None if old.bias is None else old.bias.detach()[left]
        block.replace(producer, like(old, old.weight.detach()[left], bias))
    return rows


def like(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this weight and bias that otherwise is as ``layer``."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=layer.weight.requires_grad)
    return new.train(layer.training)

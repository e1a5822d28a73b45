# SPDX-License-Identifier: Apache-2.0
"""Every operator in plain torch: the specification, the oracle of the tests, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.format import GROUP_COLUMNS, bits_to_mask, dequantize, mask_to_bits
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap

TINY = 1e-30  # what a step divides by at least, in cg_step


def sparse_linear(
    x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    return F.linear(x, unpack(values, words.view(torch.uint8), in_features), bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def sparse_linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    words: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    in_features: int,
    quantize_x: bool,
) -> Tensor:
    bits = words.view(torch.uint8)
    if quantize_x:
        rounded, steps = quantize_rows(x)
        columns = in_features if scales.shape[1] == 1 else GROUP_COLUMNS
        weight = unpack(values.double(), bits, in_features)  # exact for whole numbers up to 2^53
        groups = zip(torch.split(rounded.double(), columns, -1), torch.split(weight, columns, 1), strict=True)
        sums = (F.linear(*group).float() * scale for group, scale in zip(groups, scales.unbind(1), strict=True))
        out = steps * sum(sums, start=torch.zeros_like(steps))
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.linear(x.to(wide), unpack(dequantize(values, scales, bits), bits, in_features).to(wide))
    return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 to 127 in fp32 (a row with NaN or Inf: NaN), and the size of each row's steps."""
    steps = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.where(steps == 0, 0, x.float() / steps).round().clamp(-127, 127), steps


def tile_linear(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    largest_step: int,
) -> Tensor:
    return F.linear(x, expand_tiles(tiles, offsets, out_features, in_features), bias)


def expand_tiles(tiles: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    return TileBitmap(tiles, offsets, (rows, columns), 0, 0).to_dense()


def pack_tiles(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packed = TileBitmap.from_dense(weight, keep)
    return packed.tiles, packed.offsets


def two_of_four_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return F.linear(x, expand_two_of_four(tiles, out_features, in_features, x.dtype), bias)


def expand_two_of_four(tiles: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return TwoOfFour(tiles, (rows, columns), dtype).to_dense()


def pack_two_of_four(weight: Tensor, keep: Tensor | None = None) -> Tensor:
    return TwoOfFour.from_dense(weight, keep).tiles


def pack(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mask = weight != 0 if keep is None else (weight != 0) & keep
    return weight[mask], mask_to_bits(mask)


def unpack(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    mask = bits_to_mask(bitmask, in_features)
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def outlier_stats(weight: Tensor, column_norms: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    scores = weight.float().abs() * column_norms.float()
    total = scores.sum(dtype=torch.float64)
    thresholds = torch.tensor(alphas, dtype=torch.float64, device=weight.device) * (total / max(1, scores.numel()))
    counts = [(scores > t.float()).sum() for t in thresholds]
    return total, torch.stack(counts) if counts else thresholds.long()


def column_square_sums(x: Tensor) -> Tensor:
    return x.flatten(0, -2).double().square().sum(0)


def _require_finite(finite: Tensor, op: str) -> None:
    if not bool(finite):  # the one flag that the host reads
        raise NonFiniteError(f"{op}: scores hold NaN or Inf; check the weight and its calibration statistics")


def select(scores: Tensor, keep: Tensor, scope: str) -> Tensor:
    _require_finite(torch.isfinite(scores).all(), "select")
    shape = scores.shape
    if scope == "matrix":
        scores, counts = scores.reshape(1, -1), keep
    elif scope == "group":
        scores, counts = scores.reshape(-1, int(keep[1])), keep[:1]
    else:
        counts = keep
    return _best(scores, counts.to(scores.device).unsqueeze(1)).reshape(shape)


def _best(scores: Tensor, counts: Tensor | int) -> Tensor:
    """The ``counts`` largest of each row, the first ones where they are equal."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < counts


def score_select(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> Tensor:
    return select(weight.float().abs() * column_norms.float(), keep, scope)


def score_pack(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    return pack(weight, score_select(weight, column_norms, keep, scope))


def obs_block(weight: Tensor, factor: Tensor, keep: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, keep, errors = weight.clone(), keep.clone(), torch.empty_like(weight)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for j in range(weight.shape[1]):
        if m and j % m == 0:  # N:M chooses its mask when the sweep reaches the group
            scores = (weight[:, j : j + m] / factor.diagonal()[j : j + m]).square()
            finite &= torch.isfinite(scores).all()
            keep[:, j : j + m] = _best(scores, n)
        error = torch.where(keep[:, j], 0, weight[:, j]) / factor[j, j]
        weight[:, j:] -= error.unsqueeze(1) * factor[j, j:]
        weight[:, j] *= keep[:, j]
        errors[:, j] = error
    if m:
        _require_finite(finite, "obs_block")
    return weight, errors, keep


def admm_step(proposal: Tensor, keep: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    target = gradient + penalty * torch.where(keep, proposal, -proposal)
    proposal.masked_fill_(keep, 0)  # the dual
    return target


def cg_step(solution: Tensor, residual: Tensor, direction: Tensor, energy: Tensor, image: Tensor, keep: Tensor) -> None:
    image, before = image * keep, energy.clamp_min(TINY)
    step = energy / (direction * image).sum(1, keepdim=True).clamp_min(TINY)
    solution += step * direction
    residual -= step * image
    energy.copy_(residual.square().sum(1, keepdim=True))
    direction.mul_(energy / before).add_(residual)

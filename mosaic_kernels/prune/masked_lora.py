# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layer with its update masked by the zeros of the weight it stands on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels import compat
from mosaic_kernels.errors import EnvironmentError_, MosaicError, NonFiniteError
from mosaic_kernels.prune.solvers import keep_all


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, stored: torch.dtype | None = None) -> Tensor:
    """``W + scale (B A) ∘ (W != 0)``, computed in fp32 and rounded; no kept weight becomes zero.

    Args:
        weight: ``[out, in]``, any floating dtype, which the result has too.
        a, b: ``[rank, in]`` and ``[out, rank]`` fp32.
        stored: the dtype to round to; by default the dtype of ``weight``.
    """
    keep = weight != 0
    merged = keep_all(weight.float() + scale * (b @ a), stored or weight.dtype).to(weight.dtype)
    return torch.where(keep, merged, torch.zeros_like(merged))


class _MaskedProduct(torch.autograd.Function):
    """``x`` times the merged weight, which is made again in the backward pass: no layer keeps its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
        stored: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.stored = scale, stored
        return F.linear(x, merged_weight(weight, a, b, scale, stored), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, a, b = ctx.saved_tensors
        of_x = gradient @ merged_weight(weight, a, b, ctx.scale, ctx.stored) if ctx.needs_input_grad[0] else None
        update = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float() * (weight != 0) * ctx.scale
        return of_x, None, None, b.T @ update, update @ a.T, None, None


def lora_layer() -> type:
    """The class to register for ``nn.Linear`` in a ``LoraConfig``.

    Raises:
        EnvironmentError_: PEFT is not installed.
    """
    try:
        layer = compat.lora_linear()
    except ImportError as error:
        raise EnvironmentError_(f"masked LoRA needs PEFT ({error}): pip install 'mosaic-kernels[peft]'") from None

    class MaskedLinear(layer):  # type: ignore[misc, valid-type]
        """Runs with the weight it merges to, bit for bit; one adapter, without dropout.

        Attributes:
            stored: the dtype that the merged weight is rounded to; ``None``: the dtype of the base layer.
        """

        stored: torch.dtype | None = None

        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            base = self.get_base_layer()
            plain = self.disable_adapters or self.merged
            apply: Any = _MaskedProduct.apply
            made: Tensor = base(x) if plain else apply(x, base.weight, base.bias, *self._factors(), self.stored)
            return made

        def get_delta_weight(self, adapter: str) -> Tensor:
            weight: Tensor = self.get_base_layer().weight
            a, b, scale = self._factors(adapter)
            return scale * (b @ a) * (weight != 0)

        @torch.no_grad()
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Put the merged weight into the base layer.

            Raises:
                NonFiniteError: a merged weight overflows its dtype.
                MosaicError: the merged weight has another count of non-zeros.
            """
            weight = self.get_base_layer().weight
            merged = merged_weight(weight, *self._factors(), self.stored)
            if not bool(torch.isfinite(merged).all()):
                raise NonFiniteError(
                    f"a merged LoRA update overflows {self.stored or weight.dtype}; train with a lower rate"
                )
            if int(merged.count_nonzero()) != int(weight.count_nonzero()):
                raise MosaicError("a merged LoRA update has changed the count of non-zero weights")
            weight.copy_(merged)
            self.merged_adapters.extend(self.active_adapters)

        def unmerge(self) -> None:
            raise MosaicError("a merged masked update was rounded: it cannot be taken back")

        def _factors(self, adapter: str | None = None) -> tuple[Tensor, Tensor, float]:
            name = self.active_adapters[0] if adapter is None else adapter
            return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    return MaskedLinear

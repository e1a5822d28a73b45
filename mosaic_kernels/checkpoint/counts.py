# SPDX-License-Identifier: Apache-2.0
"""Makes the parameter counts of transformers and PEFT count the kept weights of a packed model."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from mosaic_kernels import compat
from mosaic_kernels.linear import MosaicLinear


def spare_elements(model: nn.Module) -> int:
    """The number of parameter elements that are no weights: bits, scales and the padding of GPU tiles."""
    spare = 0
    for layer in model.modules():
        if isinstance(layer, MosaicLinear):
            held = layer._parameters
            weights = {name: each.numel() for name, each in held.items() if each is not None and name != "bias"}
            spare += sum(weights.values()) - layer.nnz
    return spare


def count_weights_of_models() -> None:
    """Let transformers' ``num_parameters`` count kept weights. Further calls do nothing."""
    kind: Any = compat.counting_class()
    method = kind.num_parameters
    if hasattr(method, "counts_weights"):
        return

    @functools.wraps(method)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found: int = method(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return found if only_trainable else found - spare_elements(self)

    num_parameters.counts_weights = True  # type: ignore[attr-defined]
    kind.num_parameters = num_parameters


def count_weights_of_adapted_models() -> None:
    """Let PEFT's ``get_nb_trainable_parameters`` count kept weights. Further calls do nothing."""
    kind: Any = compat.adapted_model_class()
    method = kind.get_nb_trainable_parameters
    if hasattr(method, "counts_weights"):
        return

    @functools.wraps(method)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trained, found = method(self)
        return trained, found - spare_elements(self)

    get_nb_trainable_parameters.counts_weights = True  # type: ignore[attr-defined]
    kind.get_nb_trainable_parameters = get_nb_trainable_parameters

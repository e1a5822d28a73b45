# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input run in one dispatch: query, key and value; gate and up."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for


class Siblings:
    """The layers that share an input.

    The first one to be called computes all and keeps the others' results until they ask with the same
    tensor, unchanged. Without gradients, on the CPU, outside ``torch.compile``; elsewhere every layer runs
    alone.
    """

    def __init__(self, layers: Sequence[MosaicLinear]) -> None:
        self.layers = tuple(layers)
        self.quantize_x = layers[0].quantize_activations
        # replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[weakref.ref[Tensor], int, dict[int, Tensor]] | None = None

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` where it has to run alone."""
        if not x.is_cpu or is_recorded(x) or x.is_inference() or layer.quantize_activations is not self.quantize_x:
            return None
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[1] == x._version:
            found = kept[2].pop(id(layer), None)
            if found is not None:
                return found
        if kernel_for("sparse_linear", x) is not cpu.sparse_linear_raw or any(e.bitmask.is_meta for e in self.layers):
            return None  # another backend is forced; or weights that wait on disk come one layer at a time
        parts = [each.operands for each in self.layers]
        results = cpu.sparse_linear_group_raw(x, parts, layer.in_features, self.quantize_x)
        others = {id(each): result for each, result in zip(self.layers, results, strict=True)}
        own = others.pop(id(layer))
        self._kept = (weakref.ref(x), x._version, others)
        return own

    def part(self) -> None:
        """Let every layer run alone again."""
        for layer in self.layers:
            layer.siblings = None


def join(layers: Iterable[nn.Module]) -> None:
    """Let those of ``layers`` that are packed alike run together; all must read the same input."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    alike = {(layer.in_features, layer.scales is None, layer.quantize_activations) for layer in packed}
    if len(packed) > 1 and len(alike) == 1:
        siblings = Siblings(packed)
        for layer in packed:
            layer.siblings = siblings

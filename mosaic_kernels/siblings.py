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
        # both replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[weakref.ref[Tensor], int, dict[MosaicLinear, Tensor]] | None = None
        self._group: tuple[list[int], cpu.Group, list[object]] | None = None

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` where it has to run alone."""
        if is_recorded(x) or layer.quantize_activations is not self.quantize_x:
            return None
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[1] == x._version:
            found = kept[2].pop(layer, None)
            if found is not None:
                return found
        if not x.is_cpu or x.is_inference() or kernel_for("sparse_linear", x) is not cpu.sparse_linear_raw:
            return None
        group = self._current_group()
        if group is None:
            return None
        others = dict(zip(self.layers, group(x), strict=True))
        own = others.pop(layer)
        self._kept = (weakref.ref(x), x._version, others)
        return own

    def _current_group(self) -> cpu.Group | None:
        """The dispatch of the layers as they are; anew where a weight, a bias or an index was replaced."""
        key: list[int] = []
        for layer in self.layers:
            held = layer._parameters
            weight, bias = held["weight"], held.get("bias")
            assert weight is not None  # for the type checker
            key += (id(layer._index), weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        if self._group is None or self._group[0] != key:
            if not all(layer.bitmask.is_cpu for layer in self.layers):
                return None  # weights that wait on disk come one layer at a time
            operands = [layer.operands for layer in self.layers]
            group = cpu.Group(operands, self.layers[0].in_features, self.quantize_x)
            indices: list[object] = [layer._index for layer in self.layers]  # held, so that no other gets its id
            key[::3] = map(id, indices)  # the operands may have made them
            self._group = (key, group, indices)
        return self._group[1]

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

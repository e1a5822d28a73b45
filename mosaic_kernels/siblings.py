# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input run in one dispatch: query, key and value; gate and up."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for

# a layer, its index, and its parameters by name with their addresses
_Member = tuple[MosaicLinear, object, list[tuple[str, Tensor, int]]]


class Siblings:
    """The layers that share an input.

    The first one to be called computes all and keeps the others' results until they ask with the same
    tensor, unchanged (as far as torch can tell: not through numpy or ``.data``). Without gradients, on the
    CPU, outside ``torch.compile`` and ``torch.inference_mode``; elsewhere every layer runs alone. Where
    results are not asked for three times in a row, the layers part.
    """

    PATIENCE = 3

    def __init__(self, layers: Sequence[MosaicLinear]) -> None:
        self.layers = tuple(layers)
        self.quantize_x = layers[0].quantize_activations
        # all replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[weakref.ref[Tensor], int, dict[MosaicLinear, tuple[Tensor, int]]] | None = None
        self._group: tuple[cpu.Group, list[_Member]] | None = None
        self._unclaimed = 0

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` where it has to run alone."""
        if is_recorded(x) or layer.quantize_activations is not self.quantize_x:
            return None
        if not x.is_cpu or x.is_inference() or kernel_for("sparse_linear", x) is not cpu.sparse_linear_raw:
            return None
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[1] == x._version:
            found = kept[2].pop(layer, None)
            if found is not None and found[1] == _version(layer):
                return found[0]
        self._unclaimed = self._unclaimed + 1 if kept is not None and kept[2] else 0
        if self._unclaimed == self.PATIENCE:
            self.part()
            return None
        group = self._current_group()
        if group is None:
            return None
        results = zip(self.layers, group(x), strict=True)
        others = {each: (result, _version(each)) for each, result in results}
        own, _ = others.pop(layer)
        self._kept = (weakref.ref(x), x._version, others)
        return own

    def _current_group(self) -> cpu.Group | None:
        """The dispatch of the layers as they are; anew where a parameter or an index was replaced."""
        if self._group is None or not all(map(_is_current, self._group[1])):
            if not all(layer.bitmask.is_cpu for layer in self.layers):
                return None  # weights that wait on disk come one layer at a time
            operands = [layer.operands for layer in self.layers]  # this may make indices anew
            group = cpu.Group(operands, self.layers[0].in_features, self.quantize_x)
            self._group = group, [_member(layer) for layer in self.layers]
        return self._group[0]

    def part(self) -> None:
        """Let every layer run alone again."""
        for layer in self.layers:
            layer.siblings = None


def _member(layer: MosaicLinear) -> _Member:
    held = layer._parameters.items()
    return layer, layer._index, [(name, found, found.data_ptr()) for name, found in held if found is not None]


def _is_current(member: _Member) -> bool:
    """Whether a layer has the index and the parameters, at the places in memory, that it had."""
    layer, index, parameters = member
    if layer._index is not index:
        return False
    held = layer._parameters
    for name, parameter, address in parameters:
        if held.get(name) is not parameter or parameter.data_ptr() != address:
            return False
    return True


def _version(layer: MosaicLinear) -> int:
    """What changes where the values of a layer are written to."""
    values = layer._parameters["weight"]
    assert values is not None  # for the type checker
    return values._version


def join(layers: Iterable[nn.Module]) -> None:
    """Let those of ``layers`` that are packed alike run together; all must read the same input."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    for layer in packed:
        if layer.siblings is not None:
            layer.siblings.part()
    alike = {(layer.in_features, layer.scales is None, layer.quantize_activations) for layer in packed}
    if len(packed) > 1 and len(alike) == 1:
        siblings = Siblings(packed)
        for layer in packed:
            layer.siblings = siblings

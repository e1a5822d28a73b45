# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input run in one dispatch: query, key and value; gate and up.

Threads meet once, and an input that int8 values round is rounded once: query, key and value of 2048 features take
3 to 6 % less time than alone; of 256 features 3 us more, which is Python's part (two threads, one row; Zen 4, Nov
2026). It is no operator: a graph of ``torch.compile``, where the first of several calls would have to return what
the others do, holds every layer alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cpu, tensor_cores
from mosaic_kernels.ops.select import is_recorded, kernel_for

_Result = tuple[Tensor, nn.Parameter, int]  # with the values that made it, and their version
# What a group was made of: layers with their indices, and parameters in their layers, with their addresses.
_Indices = list[tuple[MosaicLinear, object]]
_Places = list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, int]]


class _Input:
    """An input, to be known again.

    It is the same tensor and torch counted no change of it (numpy and ``.data`` change it uncounted). In
    ``torch.inference_mode`` nothing is counted, so that an object tells nothing: there, an input with the same
    bytes is as good as the same one. To copy and to compare them takes less than a hundredth of the product.
    """

    __slots__ = ("bytes", "inference_mode", "kind", "tensor", "version")

    def __init__(self, x: Tensor) -> None:
        self.inference_mode = torch.is_inference_mode_enabled()  # whose results are no good outside it
        self.bytes: bytes | None = None
        if x.is_inference():
            self.kind, self.bytes = (x.shape, x.dtype), cpu.bytes_of(x)
        else:
            self.tensor, self.version = weakref.ref(x), x._version

    def is_again(self, x: Tensor) -> bool:
        if torch.is_inference_mode_enabled() is not self.inference_mode:
            return False
        if self.bytes is None:
            return self.tensor() is x and x._version == self.version
        return x.is_inference() and (x.shape, x.dtype) == self.kind and cpu.holds(x, self.bytes)


class Siblings:
    """The layers that share an input.

    The first one to be called computes all and keeps the others' results until they ask with the same input
    (see :class:`_Input`). Without gradients, outside ``torch.compile``, on a GPU outside inference mode and for
    weights in tiles; elsewhere every layer runs alone. Where results are not asked for three times in a row, the
    layers part.
    """

    PATIENCE = 3

    def __init__(self, layers: Sequence[MosaicLinear]) -> None:
        self.layers = tuple(layers)
        self.quantize_x = layers[0].quantize_activations
        # all replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[_Input, dict[MosaicLinear, _Result]] | None = None
        self._group: tuple[cpu.Group | tensor_cores.Group, _Indices, _Places] | None = None
        self._unclaimed = 0

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` where it has to run alone."""
        if is_recorded(x) or layer.quantize_activations is not self.quantize_x:
            return None
        if not _runs_together(x):
            return None
        kept = self._kept
        if kept is not None and kept[0].is_again(x):
            found = kept[1].pop(layer, None)
            if not kept[1]:
                self._kept = None
            if found is not None and _is_valid(found, layer):
                return found[0]
        self._unclaimed = self._unclaimed + 1 if kept is not None and kept[1] else 0
        if self._unclaimed == self.PATIENCE:
            self.part()
            return None
        group = self._current_group()
        if group is None:
            return None
        others = {}
        for each, result in zip(self.layers, group(x), strict=True):
            weight = each._parameters["weight"]
            assert weight is not None  # for the type checker
            others[each] = result, weight, weight._version
        own = others.pop(layer)[0]
        self._kept = _Input(x), others
        return own

    def _current_group(self) -> cpu.Group | tensor_cores.Group | None:
        """The dispatch of the layers as they are; anew where a parameter or an index was replaced."""
        if self._group is None or not _are_current(*self._group[1:]):
            if any(layer.weight.is_inference() for layer in self.layers):
                return None  # whether these change between the calls, nobody knows
            group = self._made_group()
            if group is None:
                return None
            places: _Places = []
            for layer in self.layers:
                held = layer._parameters
                places += [(held, name, found, found.data_ptr()) for name, found in held.items() if found is not None]
            self._group = group, [(layer, layer._index) for layer in self.layers], places
        return self._group[0]

    def _made_group(self) -> cpu.Group | tensor_cores.Group | None:
        forms = [(layer.arranged, layer.bias) for layer in self.layers]
        tiles = [(form, bias) for form, bias in forms if form is not None]
        if len(tiles) == len(forms) <= 4 and len({(type(form), form.tiles.device) for form, _ in tiles}) == 1:
            return tensor_cores.Group(tiles)
        if tiles or not all(layer.bitmask.is_cpu for layer in self.layers):
            return None  # of several forms; or weights that wait on disk and come one layer at a time
        operands = [layer.operands for layer in self.layers]  # this may make indices anew
        return cpu.Group(operands, self.layers[0].in_features, self.quantize_x)

    def part(self) -> None:
        """Let every layer run alone again."""
        for layer in self.layers:
            layer.siblings = None


def _runs_together(x: Tensor) -> bool:
    """Whether the device of ``x`` has kernels for several weights, and an input can be known again there."""
    if x.is_cpu:
        return kernel_for("sparse_linear", x) is cpu.sparse_linear_raw
    if not x.is_cuda or x.is_inference() or kernel_for("tile_linear", x) is not tensor_cores.tile_linear:
        return False  # to compare bytes would be to wait for the device
    return x.shape[:-1].numel() <= max(tensor_cores.rows_of(x.get_device()))


def _are_current(indices: _Indices, places: _Places) -> bool:
    """Whether layers have the indices and the parameters, at the places in memory, that they had."""
    for layer, index in indices:
        if layer._index is not index:
            return False
    for held, name, parameter, place in places:
        if held.get(name) is not parameter or parameter.data_ptr() != place:
            return False
    return True


def _is_valid(found: _Result, layer: MosaicLinear) -> bool:
    """Whether the values of a layer are what they were, and were not written to."""
    _, weight, version = found
    return layer._parameters["weight"] is weight and weight._version == version


def join(layers: Iterable[nn.Module]) -> None:
    """Let those of ``layers`` that are packed alike run together; all must read the same input."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    for layer in packed:
        if layer.siblings is not None:
            layer.siblings.part()
    alike = {(layer.in_features, layer.packed.weights, layer.quantize_activations) for layer in packed}
    if len(packed) > 1 and len(alike) == 1:
        siblings = Siblings(packed)
        for layer in packed:
            layer.siblings = siblings

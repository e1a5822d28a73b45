# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input run in one dispatch: query, key and value; gate and up.

Threads meet once, and an input that int8 values round is rounded once: query, key and value of 2048 features take
3 to 6 % less time than alone; of 256 features 3 us more, which is Python's part (two threads, one row; Zen 4, Nov
2026). It is no operator: a graph of ``torch.compile``, where the first of several calls would have to return what
the others do, holds every layer alone.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mosaic_kernels.format import VALUE_DTYPES
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cpu, tensor_cores
from mosaic_kernels.ops.select import is_recorded, kernel_for

_Held = dict[str, nn.Parameter | None]


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


class _Source:
    """What a layer's results come from: its parameters, where they are in memory, and its index."""

    __slots__ = ("held", "index", "known")

    def __init__(self, layer: MosaicLinear) -> None:
        self.held: _Held = layer._parameters
        found = {name: each for name, each in self.held.items() if each is not None}
        addresses = struct.pack(f"{len(found)}Q", *(each.data_ptr() for each in found.values()))
        self.known = tuple(found), tuple(found.values()), addresses
        self.index: object = None  # of the canonical form alone

    def is_of(self, layer: MosaicLinear) -> bool:
        """Whether ``layer`` still has these parameters at the same places, and this index."""
        held = layer._parameters
        return held is self.held and layer._index is self.index and cpu.unchanged(held, *self.known)

    def versions(self) -> list[int]:
        """How often torch saw each parameter written to."""
        return [each._version for each in self.known[1]]


_Kernels = cpu.Group | tensor_cores.Group
_Result = tuple[Tensor, _Source, list[int]]  # with what made it, and the versions of that


class Siblings:
    """The layers that share an input.

    The first one to be called computes all and keeps the others' results until they ask with the same input
    (see :class:`_Input`). Without gradients, outside ``torch.compile``, on a GPU outside inference mode and for
    weights in tiles; elsewhere every layer runs alone. Where results are not asked for three times in a row, the
    layers part. It holds no layer: a model that is deleted is freed at once.
    """

    PATIENCE = 3

    def __init__(self, layers: Sequence[MosaicLinear]) -> None:
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self.in_features, self.quantize_x = layers[0].in_features, layers[0].quantize_activations
        # all replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[_Input, dict[int, _Result]] | None = None
        self._group: tuple[_Kernels, list[_Source]] | None = None
        self._unclaimed = 0

    @property
    def layers(self) -> list[MosaicLinear]:
        """The layers that still exist."""
        return [layer for each in self._layers if (layer := each()) is not None]

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` where it has to run alone."""
        if is_recorded(x) or layer.quantize_activations is not self.quantize_x:
            return None
        if not _runs_together(x):
            return None
        layers = self.layers
        if len(layers) < len(self._layers):
            return None
        place = next(i for i, each in enumerate(layers) if each is layer)
        kept = self._kept
        if kept is not None and kept[0].is_again(x):
            found = kept[1].pop(place, None)
            if not kept[1]:
                self._kept = None
            if found is not None and found[1].is_of(layer) and found[1].versions() == found[2]:
                return found[0]
        self._unclaimed = self._unclaimed + 1 if kept is not None and kept[1] else 0
        if self._unclaimed == self.PATIENCE:
            self.part()
            return None
        group = self._current_group(layers)
        if group is None:
            return None
        run, sources = group
        versions = [source.versions() for source in sources]
        results = dict(enumerate(zip(run(x), sources, versions, strict=True)))
        own = results.pop(place)[0]
        self._kept = _Input(x), results
        return own

    def _current_group(self, layers: list[MosaicLinear]) -> tuple[_Kernels, list[_Source]] | None:
        """The dispatch of the layers as they are; anew where a parameter or an index was replaced."""
        found = self._group
        if found is not None and all(map(_Source.is_of, found[1], layers)):
            return found
        if any(layer.weight.is_inference() for layer in layers):
            return None  # whether these change between the calls, nobody knows
        sources = [_Source(layer) for layer in layers]
        group = self._made_group(layers, sources)
        if group is None:
            return None
        self._group = group, sources
        return group, sources

    def _made_group(self, layers: list[MosaicLinear], sources: list[_Source]) -> _Kernels | None:
        forms = [(layer._form(source.held), source) for layer, source in zip(layers, sources, strict=True)]
        tiles = [(form[0], source.held.get("bias")) for form, source in forms if form is not None]
        if len(tiles) == len(forms) <= 4 and len({(type(form), form.tiles.device) for form, _ in tiles}) == 1:
            return tensor_cores.Group(tiles)
        if tiles or not all(layer.bitmask.is_cpu for layer in layers):
            return None  # of several forms; or weights that wait on disk and come one layer at a time
        operands = []
        for layer, source in zip(layers, sources, strict=True):
            operands.append(layer.operands_of(source.held))  # this may make indices anew
            source.index = layer._index
        return cpu.Group(operands, self.in_features, self.quantize_x)

    def forget(self) -> None:
        """Let go of results and of weights, one of which was replaced."""
        self._kept = self._group = None

    def part(self) -> None:
        """Let every layer run alone again."""
        for layer in self.layers:
            layer.siblings = None


def _runs_together(x: Tensor) -> bool:
    """Whether the device of ``x`` has kernels for several weights, and an input can be known again there."""
    if x.dtype not in VALUE_DTYPES:
        return False
    if x.is_cpu:
        return kernel_for("sparse_linear", x) is cpu.sparse_linear_raw
    if not x.is_cuda or x.is_inference() or kernel_for("tile_linear", x) is not tensor_cores.tile_linear:
        return False  # to compare bytes would be to wait for the device
    return x.shape[:-1].numel() <= max(tensor_cores.rows_of(x.get_device()))


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

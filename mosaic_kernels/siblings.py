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

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cpu, tensor_cores
from mosaic_kernels.ops.select import is_seen, kernel_for

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


class _Sources:
    """The layers of a dispatch, their parameters with addresses, and their indices. Keeps no layer alive."""

    __slots__ = ("biases", "known", "of")

    def __init__(self, layers: Sequence[MosaicLinear], states: Sequence[_Held]) -> None:
        self.of = [(weakref.ref(layer), held, layer._index) for layer, held in zip(layers, states, strict=True)]
        places = [(held, name, each) for held in states for name, each in held.items() if each is not None]
        holders, names, tensors = zip(*places, strict=True)
        addresses = struct.pack(f"{len(places)}Q", *(each.data_ptr() for each in tensors))
        self.known = holders, names, tensors, addresses
        self.biases = [bias for held in states if (bias := held.get("bias")) is not None]

    def are_current(self) -> bool:
        """True if the layers still have the same indices and parameters, at the same addresses."""
        for which, held, index in self.of:
            layer = which()
            if layer is None or layer._parameters is not held or layer._index is not index:
                return False
        return cpu.unchanged(*self.known)


_Kernels = cpu.Group | tensor_cores.Group
# For one layer: the result, the parameters it was computed with, and their versions.
_Result = tuple[Tensor, _Held, nn.Parameter | None, int, nn.Parameter | None, int]


def _is_valid(found: _Result, held: _Held) -> bool:
    """True if the parameters of a layer were neither replaced nor written to since."""
    _, before, weight, version, bias, bias_version = found
    if held is not before or held["weight"] is not weight or held.get("bias") is not bias:
        return False
    if bias is not None and (bias._version != bias_version or (bias.requires_grad and torch.is_grad_enabled())):
        return False
    return weight is not None and weight._version == version


class Siblings:
    """The layers that share an input.

    The first layer that is called computes the results of all and keeps those of the others until they are called with
    the same input (see :class:`_Input`). This happens without gradients and outside ``torch.compile``; on a GPU also
    only outside inference mode and for weights in tiles. Otherwise every layer runs alone. If kept results are not used
    three times in a row, the layers run alone from then on. This class keeps no layer alive.
    """

    PATIENCE = 3

    def __init__(self, layers: Sequence[MosaicLinear]) -> None:
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self.in_features, self.quantize_x = layers[0].in_features, layers[0].quantize_activations
        # all replaced as a whole, so that threads that share a model never mix their results
        self._kept: tuple[_Input, dict[int, _Result]] | None = None  # by the layer's id()
        self._group: tuple[_Kernels, _Sources] | None = None
        self._unclaimed = 0

    @property
    def layers(self) -> list[MosaicLinear]:
        """The layers that still exist."""
        return [layer for each in self._layers if (layer := each()) is not None]

    def forward(self, layer: MosaicLinear, x: Tensor) -> Tensor | None:
        """The result of ``layer``, or ``None`` if it must run alone. Dynamo must not trace this method."""
        if is_seen(x) or layer.quantize_activations is not self.quantize_x or not _runs_together(x):
            return None
        kept = self._kept
        if kept is not None and kept[0].is_again(x):
            found = kept[1].pop(id(layer), None)
            if not kept[1]:
                self._kept = None
            if found is not None and _is_valid(found, layer._parameters):
                return found[0]
        self._unclaimed = self._unclaimed + 1 if kept is not None and kept[1] else 0
        if self._unclaimed == self.PATIENCE:
            self.part()
            return None
        group = None if x.dtype is torch.float64 else self._current_group()
        if group is None:
            return None
        run, sources = group
        if sources.biases and torch.is_grad_enabled() and any(bias.requires_grad for bias in sources.biases):
            return None
        own, others = None, {}
        for result, (which, held, _) in zip(run(x), sources.of, strict=True):
            each = which()
            if each is layer:
                own = result
            else:
                weight, bias = held["weight"], held.get("bias")
                version = weight._version  # type: ignore[union-attr]
                others[id(each)] = result, held, weight, version, bias, 0 if bias is None else bias._version
        self._kept = _Input(x), others
        return own

    def _current_group(self) -> tuple[_Kernels, _Sources] | None:
        """The dispatch of the layers as they are; anew where a parameter or an index was replaced."""
        found = self._group
        if found is not None and found[1].are_current():
            return found
        layers = self.layers
        states = [layer._parameters for layer in layers]
        if len(layers) < len(self._layers) or any(layer.weight.is_inference() for layer in layers):
            return None  # inference tensors have no version, so changes between calls cannot be seen
        group = self._made_group(layers, states)
        if group is None:
            return None
        self._group = made = group, _Sources(layers, states)
        return made

    def _made_group(self, layers: list[MosaicLinear], states: list[_Held]) -> _Kernels | None:
        forms = [(layer._form(held), held.get("bias")) for layer, held in zip(layers, states, strict=True)]
        tiles = [(form[0], bias) for form, bias in forms if form is not None]
        if len(tiles) == len(forms) <= 4 and len({(type(form), form.tiles.device) for form, _ in tiles}) == 1:
            return tensor_cores.Group(tiles)
        if tiles or not all(layer.bitmask.is_cpu for layer in layers):
            return None  # of several forms; or weights that wait on disk and come one layer at a time
        operands = [layer.operands_of(held) for layer, held in zip(layers, states, strict=True)]  # may build indices
        return cpu.Group(operands, self.in_features, self.quantize_x)

    def forget(self) -> None:
        """Drop kept results and weights, because a weight was replaced."""
        self._kept = self._group = None

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


def join(layers: Iterable[nn.Module]) -> None:
    """Let those of ``layers`` that are packed alike run together; all must read the same input."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    for layer in packed:
        if layer.siblings is not None:
            layer.siblings.part()
    alike = {(layer.in_features, layer.weights, layer.quantize_activations) for layer in packed}
    if len(packed) > 1 and len(alike) == 1:
        siblings = Siblings(packed)
        for layer in packed:
            layer.siblings = siblings

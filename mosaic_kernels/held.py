# SPDX-License-Identifier: Apache-2.0
"""How a packed layer holds its parameters: in one dictionary, which is replaced as a whole and never written to.

A call looks up the dictionary once. So the call reads either the old tensors or the new ones, and keeps them alive
until it ends, even if other threads load, cast or assign weights meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from mosaic_kernels.arrangement import Arrangement
from mosaic_kernels.errors import FormatError, UsageError
from mosaic_kernels.format import HELD_DTYPES, PackedWeight, RowIndex, bitmask_bytes
from mosaic_kernels.ops.prepared import PreparedCall

if TYPE_CHECKING:
    from mosaic_kernels.siblings import Siblings

Held = dict[str, nn.Parameter | None]  # a layer's parameters, by name; never written to, but replaced as a whole
# A dense weight, and its sources: the values, the bits, and torch's version counter of the values.
Dense = tuple[Tensor, ref[Tensor], ref[Tensor], int | None]
_PARAMETERS = ("weight", "bitmask", "scales", "bias")


class HoldsParameters(nn.Linear):
    """The part of :class:`~mosaic_kernels.linear.MosaicLinear` that replaces, moves, loads and copies parameters."""

    bitmask: nn.Parameter
    scales: nn.Parameter | None
    # the index and the bitmask it was built from, in a tuple: a bare Parameter would register as a second one
    _index: tuple[nn.Parameter, RowIndex] | None
    # a tuple like _index, with the parameter `weight` and the nnz
    _arranged: tuple[nn.Parameter, Arrangement, int] | None
    _prepared: PreparedCall | None  # the call for the current parameters and one dtype of the input
    _dense: Dense | None  # beside the packed weight, see keep_dense_for_prefill
    siblings: Siblings | None

    def arrange(self) -> None:
        """Hold the weight as the kernels of its device read it fastest."""
        raise NotImplementedError

    def keep_dense_for_prefill(self, keep: bool = True) -> None:
        """Hold the dense weight too."""
        raise NotImplementedError

    def _validate(self, name: str = "MosaicLinear", held: Held | None = None) -> tuple[nn.Parameter, RowIndex]:
        raise NotImplementedError

    def _form(self, held: Held) -> tuple[Arrangement, int] | None:
        """The form other than the canonical one in which ``held`` has the weight, and its nnz."""
        weight, found = held["weight"], self._arranged
        if found is not None and found[0] is weight:
            return found[1:]
        # another thread may have replaced both since `held` was read; the parameter holds its form, too
        return getattr(weight, "arrangement", None)

    def _packed(self, held: Held) -> PackedWeight:
        found = self._form(held)
        if found is not None:
            return found[0].to_packed()
        scales, bitmask = held.get("scales"), held["bitmask"]
        assert bitmask is not None  # for the type checker
        shape = self.out_features, self.in_features
        scales = None if scales is None else scales.detach()  # type: ignore[assignment]
        return PackedWeight(weight_of(held).detach(), bitmask.detach(), shape, scales)

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_parameters")
        if held is None or name not in _PARAMETERS or "bitmask" not in held or (value is None and name not in held):
            super().__setattr__(name, value)
            return
        if isinstance(value, Tensor):
            self._require_fit(name, value)
        elif value is None and name != "bias":
            raise UsageError(f"a packed layer needs its {name}: to replace the weight, load a state_dict")
        other = self._other(self._canonical_parameters())
        nn.Module.__setattr__(other, name, value)  # refuses values that are no parameters
        self._take(other._parameters)  # perhaps moved here for one pass only, which does not pay for another form

    def _require_fit(self, name: str, value: Tensor) -> None:
        """Refuse a parameter of another shape, with which the layer could neither run nor be saved."""
        if name == "weight":
            wanted = [weight_of(self._canonical_parameters()).numel()]
        elif name == "bitmask":
            wanted = [self.out_features, bitmask_bytes(self.in_features)]
        else:
            wanted = [self.out_features] if name == "bias" else list(getattr(self.scales, "shape", [0]))
        if list(value.shape) != wanted:
            raise UsageError(
                f"the {name} of this packed {self.out_features}x{self.in_features} layer has shape {wanted}, and "
                f"{list(value.shape)} was assigned: load a state_dict, or make a new layer with from_linear"
            )

    def _other(self, held: Held) -> Self:
        """A copy of this layer with other parameters. It is made ready first; then this layer adopts its state."""
        other = object.__new__(type(self))
        forgotten = {"_index": None, "_arranged": None, "_prepared": None, "_dense": None, "siblings": None}
        other.__dict__.update({**self.__dict__, **forgotten, "_parameters": dict(held)})
        return other

    def _adopt(self, other: Self) -> None:
        """Take over the state of ``other`` in one step: running calls keep the old one, later calls find the new one.

        Values derived from the parameters are set first; they are used only with the parameters they were made from.
        """
        if self._dense is not None and not other.bitmask.is_meta and other.weight.dtype in HELD_DTYPES:
            other.keep_dense_for_prefill()
        other.arrange()
        for name in ("_arranged", "_index", "_dense"):
            self.__dict__[name] = other.__dict__[name]
        self._take(other._parameters)

    def _take(self, held: Held) -> None:
        for name in held:  # a missing bias or scale was an ordinary attribute, None
            self.__dict__.pop(name, None)
        self.__dict__["_parameters"] = held
        self.__dict__["_prepared"] = None
        if self.siblings is not None:
            self.siblings.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        had_index = self._index is not None or self.arranged is not None
        other = self._other({})
        for name, parameter in self._canonical_parameters().items():
            other._parameters[name] = None if parameter is None else _applied(fn, name, parameter)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        readable = other.weight.dtype in HELD_DTYPES and not other.bitmask.is_meta
        if had_index and readable:  # not after to_empty(), whose bits are garbage
            other._validate()
        self._adopt(other)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        canonical = self._canonical_parameters()
        other = self if canonical is self._parameters else self._other(canonical)
        nn.Module._save_to_state_dict(other, destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _canonical_parameters(self) -> Held:
        held = self._parameters
        if self._form(held) is None:
            return held
        packed = self._packed(held)
        return {**held, "weight": frozen(packed.values), "bitmask": frozen(packed.bitmask)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors, held = rest[-1], self._canonical_parameters()
        old, weight = weight_of(held), state_dict.get(prefix + "weight")
        if weight is not None and (weight.dtype == torch.int8) is not (old.dtype == torch.int8):
            errors.append(f"{prefix}weight: values are {weight.dtype}, and those of this layer {old.dtype}")
            return  # an ordinary copy would cast them
        other, before = self._other(held), len(errors)
        for name, parameter in held.items():  # new tensors, because calls may be reading the old ones
            if parameter is not None and not parameter.requires_grad and prefix + name in state_dict:
                # another pattern has another nnz: take its size, so that the ordinary copy fits
                shape = weight.shape if name == "weight" and weight is not None and weight.dim() == 1 else None
                other._parameters[name] = frozen(torch.empty_like(parameter) if shape is None else old.new_empty(shape))
        nn.Module._load_from_state_dict(other, state_dict, prefix, *rest)
        if len(errors) > before:
            return
        if not other.bitmask.is_meta:  # now rather than in forward(), which may run inside a compiled graph
            try:
                other._validate(prefix.removesuffix(".") or "MosaicLinear")
            except FormatError as error:
                errors.append(str(error))
                return
        self._adopt(other)

    def __getstate__(self) -> dict[str, Any]:
        # prepared calls hold addresses, and siblings are other layers: neither fits a copy
        own = {"_parameters": self._canonical_parameters(), "_index": None, "_arranged": None, "_prepared": None}
        return {**self.__dict__, **own, "_dense": self._dense is not None, "siblings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        keeps_dense = state["_dense"] is not False
        super().__setstate__({**state, "_dense": None})  # type: ignore[no-untyped-call]
        self.arrange()
        if keeps_dense:
            self.keep_dense_for_prefill()


def weight_of(held: Held) -> nn.Parameter:
    found = held["weight"]
    assert found is not None  # for the type checker
    return found


def source_of(held: Held) -> tuple[ref[Tensor], ref[Tensor], int | None]:
    weight, bitmask = held["weight"], held["bitmask"]
    assert weight is not None  # for the type checker
    assert bitmask is not None
    return ref(weight), ref(bitmask), None if weight.is_inference() else weight._version


def is_of(dense: Dense, held: Held) -> bool:
    """True if a dense weight was made from these parameters and they have not changed since."""
    _, weight, bitmask, version = dense
    values = weight_of(held)
    return weight() is values and bitmask() is held["bitmask"] and version in (None, values._version)


def _applied(fn: Any, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """The result of ``.to()`` and the like for a parameter. A trained one stays the same object, for its optimizer."""
    with torch.no_grad():
        # seen as integers, scales move between devices but are not cast with float tensors
        found = fn(parameter.view(torch.int32)).view(torch.float32) if name == "scales" else fn(parameter)
        if found is parameter:
            return parameter  # type: ignore[no-any-return]
        if parameter.requires_grad and torch._has_compatible_shallow_copy_type(parameter, found):
            parameter.data = found
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad)
            return parameter
    return nn.Parameter(found.detach(), parameter.requires_grad)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

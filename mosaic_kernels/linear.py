# SPDX-License-Identifier: Apache-2.0
"""``MosaicLinear``: a linear layer that stores and multiplies only its non-zero weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from mosaic_kernels import ops
from mosaic_kernels.arrangement import Arrangement, arrange, tensors_of
from mosaic_kernels.config import Weights
from mosaic_kernels.device import is_slow
from mosaic_kernels.errors import FormatError, UsageError
from mosaic_kernels.format import PackedWeight, RowIndex, bitmask_bytes, scale_groups, weights_group
from mosaic_kernels.int8 import quantize
from mosaic_kernels.ops.cpu import Operands
from mosaic_kernels.ops.prepared import PreparedCall, prepare
from mosaic_kernels.ops.select import fast_sparse_linear, fast_sparse_linear_int8, fast_tile_linear

if TYPE_CHECKING:
    from mosaic_kernels.siblings import Siblings


class MosaicLinear(nn.Linear):
    """Drop-in replacement of ``nn.Linear`` for a weight with zeros.

    Equivalent to ``F.linear(x, unpack(packed), bias)``. The weight is frozen: gradients reach the
    input, never the packed values. A cast (``.to(dtype)``) changes float values and the bias; int8 values
    and their scales stay as they are, and the output has the input's dtype.

    Where its device reads another form faster (bf16 and fp16 on a GPU: :mod:`mosaic_kernels.tiles`), the layer
    holds that one instead of the canonical one, in the same two parameters; ``state_dict``, ``packed``, copies
    and pickles are always canonical.

    Attributes:
        weight: kept values in row-major order, ``[nnz]``, fp32, bf16, fp16 or int8.
        bitmask: ``uint8 [out_features, ceil(in_features / 8)]``, least significant bit first.
        scales: of int8 values, ``float32 [out_features, groups]``, see :mod:`mosaic_kernels.format`; else ``None``.
        bias: ``[out_features]`` or ``None``.
        quantize_activations: with int8 values, round each row of the input to int8 as well.

    Args:
        nnz: kept weights to make room for.
        dtype: of float values, and of the bias.
        weights: ``float``, ``int8`` (a scale for each row) or ``int8-group`` (for each 64 columns of it).

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> dense = torch.nn.Linear(64, 32).requires_grad_(False)
        >>> _ = dense.weight[dense.weight.abs() < 0.06] = 0
        >>> layer = mk.MosaicLinear.from_linear(dense)
        >>> x = torch.randn(2, 64)
        >>> torch.allclose(layer(x), dense(x), atol=1e-5)
        True
    """

    DECODE_ROWS = 64  # an input of more rows takes the dense weight, where that is kept

    bitmask: nn.Parameter
    scales: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nnz: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights: Weights = "float",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.quantize_activations = False
        self.weight = _frozen(torch.zeros(nnz, device=device, dtype=dtype if weights == "float" else torch.int8))
        self.scales = None  # an ordinary attribute while it is None: a parameter takes 10 times as long to look up
        if weights != "float":
            groups = scale_groups(in_features, weights_group(weights))
            self.scales = _frozen(torch.zeros(out_features, groups, device=device, dtype=torch.float32))
        self.bitmask = _frozen(torch.zeros(out_features, bitmask_bytes(in_features), device=device, dtype=torch.uint8))
        self.bias = _frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None  # type: ignore[assignment]
        # with the bitmask it was built from, in a tuple: a bare Parameter would register as a second one
        self._index: tuple[nn.Parameter, RowIndex] | None = None
        # as _index, with the parameter `weight`; and the nnz
        self._arranged: tuple[nn.Parameter, Arrangement, int] | None = None
        self._prepared: PreparedCall | None = None  # of the parameters and a dtype of the input
        self._dense: Tensor | None = None  # beside the packed weight, see keep_dense_for_prefill
        self.siblings: Siblings | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: Weights = "float") -> Self:
        """Pack the zeros of ``linear`` away; device, dtype and bias are kept.

        Args:
            linear: the dense layer.
            weights: ``float`` keeps the values bit for bit; ``int8`` and ``int8-group`` round them, see
                :func:`~mosaic_kernels.int8.quantize`.

        Raises:
            KernelError: the layer's weight is not 2-D fp32, bf16 or fp16.
            NonFiniteError: weights to round are NaN or infinite.
            UsageError: ``weights`` is none of these.
        """
        if weights not in get_args(Weights):
            raise UsageError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
        with torch.no_grad():
            packed = ops.pack(linear.weight.detach())
            if weights != "float":
                packed = quantize(packed, weights_group(weights))
            layer = cls.from_packed(packed, linear.bias)
        layer.arrange()
        layer.train(linear.training)
        return layer

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> Self:
        """A layer over an already packed weight; nothing is copied.

        Raises:
            FormatError: bits, values, scales and shape contradict each other.
        """
        packed.validate()
        rows, columns = packed.shape
        layer = cls(columns, rows, bias=False, device="meta", weights=packed.weights)
        layer.weight, layer.bitmask = _frozen(packed.values), _frozen(packed.bitmask)
        layer.scales = None if packed.scales is None else _frozen(packed.scales)
        layer.bias = None if bias is None else _frozen(bias.detach())  # type: ignore[assignment]
        layer._index = (layer.bitmask, packed.index())
        return layer

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.weight.numel() if self.arranged is None or self._arranged is None else self._arranged[2]

    @property
    def density(self) -> float:
        """Share of kept weights, 0 to 1."""
        return self.nnz / max(1, self.in_features * self.out_features)

    @property
    def arranged(self) -> Arrangement | None:
        """The form that is held instead of the canonical one, if any."""
        found = self._arranged
        return found[1] if found is not None and found[0] is self._parameters["weight"] else None

    @property
    def packed(self) -> PackedWeight:
        """The weight in canonical form, sharing this layer's memory where it holds that form."""
        if self.arranged is not None:
            return self.arranged.to_packed()
        scales = None if self.scales is None else self.scales.detach()
        return PackedWeight(self.weight.detach(), self.bitmask.detach(), (self.out_features, self.in_features), scales)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the same function.

        Args:
            dtype: of its weight and bias where the values are int8, which do not say; left out, that of the
                bias, and without one fp32. Float values keep theirs.
        """
        weight = self._dense_weight()
        if self.scales is not None:
            weight = weight.to(dtype or (weight if self.bias is None else self.bias).dtype)
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = _frozen(weight)
        dense.bias = None if self.bias is None else _frozen(self.bias.detach().to(weight.dtype, copy=True))
        return dense.train(self.training)

    def build_index(self, name: str = "MosaicLinear") -> None:
        """Derive what the kernels need from the canonical parameters; called after these were replaced.

        Raises:
            FormatError: bits, values, scales and shape contradict each other (``name`` is in the message).
        """
        self._validate(name)
        self.arrange()

    def _validate(self, name: str = "MosaicLinear") -> tuple[nn.Parameter, RowIndex]:
        packed = self.packed
        packed.validate(name)
        self._index, self._prepared = (self.bitmask, packed.index()), None
        return self._index

    def arrange(self) -> None:
        """Hold the weight as the kernels of its device read it fastest."""
        found = None if self.arranged is not None or self.bitmask.is_meta else arrange(self.packed)
        if found is not None:
            nnz = self.nnz
            self.weight, self.bitmask = map(_frozen, tensors_of(found))
            self._index, self._arranged = None, (self.weight, found, nnz)

    def _hold_canonical(self) -> None:
        """Undo :meth:`arrange`."""
        if self.arranged is not None:
            packed = self.packed
            self._arranged = None
            self.weight, self.bitmask = _frozen(packed.values), _frozen(packed.bitmask)

    def keep_dense_for_prefill(self, keep: bool = True) -> None:
        """Hold the dense weight too, for inputs of many rows: the speed of a dense layer there, and its memory.

        Not of int8 values, which do not say what dtype their dense weight would have. On a CPU whose products of the
        weight's dtype are slow (:func:`~mosaic_kernels.device.has_fast_products`) the packed kernels are faster and
        run all the same.
        """
        self._dense = self._dense_weight() if keep and self.scales is None else None

    def _dense_weight(self) -> Tensor:
        return ops.unpack(self.packed) if self.arranged is None else self.arranged.to_dense()

    @property
    def operands(self) -> Operands:
        """What a kernel reads: values, scales, words, offsets and bias."""
        held = self._parameters  # attribute access to a parameter costs as much as the rest of a call
        found = self._index
        if found is None or found[0] is not held["bitmask"]:
            found = self._validate()  # moved in for one pass, perhaps: not worth another form
        return held["weight"], held.get("scales"), found[1].words, found[1].offsets, held.get("bias")  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        if self.siblings is not None:
            found = self.siblings.forward(self, input)
            if found is not None:
                return found
        dense, arranged = self._dense, self._arranged
        if dense is not None and input.shape[:-1].numel() > self.DECODE_ROWS and not is_slow(input):
            return F.linear(input, dense, self._parameters.get("bias"))
        if arranged is not None and arranged[0] is self._parameters["weight"]:
            return fast_tile_linear(input, arranged[1], self._parameters.get("bias"))
        if is_dynamo_compiling():  # it takes operators, and must not trace what looks at addresses
            return self._multiply(input)
        prepared = self._prepared
        if prepared is not None:
            found = prepared(input, self._parameters, self.quantize_activations)
            if found is not None:
                return found
        result = self._multiply(input)
        again = prepare(input, self.operands, self.bitmask, self.in_features, self.quantize_activations)
        self._prepared = again or prepared  # which a call that has to be recorded leaves as it is
        return result

    def _multiply(self, x: Tensor) -> Tensor:
        values, scales, words, offsets, bias = self.operands
        if scales is None:
            return fast_sparse_linear(x, values, words, offsets, bias, self.in_features)
        return fast_sparse_linear_int8(
            x, values, scales, words, offsets, bias, self.in_features, self.quantize_activations
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.3f}"
        ) + ("" if self.scales is None else f", weights={self.packed.weights}")

    def reset_parameters(self) -> None:
        """Nothing to initialise: the values come from a checkpoint or a dense layer."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        had_index, keeps_dense = self._index is not None or self.arranged is not None, self._dense is not None
        self._hold_canonical()
        self._index = self._prepared = self._dense = None
        if self.scales is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        else:  # moves between devices, but casts of float tensors pass by integers
            self.scales = _frozen(self.scales.view(torch.int32))
            try:
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            finally:
                self.scales = _frozen(self.scales.view(torch.float32))
        if had_index and not self.bitmask.is_meta:  # not after to_empty(), whose bits are garbage
            self.build_index()
            self.keep_dense_for_prefill(keeps_dense)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        held = self._parameters
        self._parameters = self._canonical_parameters()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = held

    def _canonical_parameters(self) -> dict[str, nn.Parameter | None]:
        if self.arranged is None:
            return self._parameters
        packed = self.packed
        return {**self._parameters, "weight": _frozen(packed.values), "bitmask": _frozen(packed.bitmask)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._hold_canonical()
        weight = state_dict.get(prefix + "weight")
        if weight is not None and (weight.dtype == torch.int8) is not (self.weight.dtype == torch.int8):
            rest[-1].append(f"{prefix}weight: values are {weight.dtype}, and those of this layer {self.weight.dtype}")
            return  # an ordinary copy would cast them
        if weight is not None and weight.dim() == 1 and weight.shape != self.weight.shape:
            # another pattern has another nnz: take its size, so that the ordinary copy fits
            self.weight = _frozen(self.weight.new_empty(weight.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._index = self._prepared = None
        if not self.bitmask.is_meta:  # now rather than in forward(), which may run inside a compiled graph
            try:
                self.build_index(prefix.removesuffix("."))
                self.keep_dense_for_prefill(self._dense is not None)
            except FormatError as error:
                rest[-1].append(str(error))

    def __getstate__(self) -> dict[str, Any]:
        # what holds addresses, and siblings: a copy has others
        own = {"_parameters": self._canonical_parameters(), "_index": None, "_arranged": None, "_prepared": None}
        return {**self.__dict__, **own, "siblings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.arrange()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

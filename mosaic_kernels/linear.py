# SPDX-License-Identifier: Apache-2.0
"""``MosaicLinear``: a linear layer that stores and multiplies only its non-zero weights."""

from __future__ import annotations

from typing import Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from mosaic_kernels import ops
from mosaic_kernels.arrangement import Arrangement, arrange, tensors_of
from mosaic_kernels.config import Weights
from mosaic_kernels.device import is_slow
from mosaic_kernels.errors import UsageError
from mosaic_kernels.format import (
    HELD_DTYPES,
    PackedWeight,
    RowIndex,
    bitmask_bytes,
    kind_of_values,
    scale_groups,
    weights_group,
)
from mosaic_kernels.held import Held, HoldsParameters, frozen, is_of, source_of, weight_of
from mosaic_kernels.int8 import quantize
from mosaic_kernels.ops.cpu import Operands
from mosaic_kernels.ops.prepared import is_trained, prepare
from mosaic_kernels.ops.select import fast_sparse_linear, fast_sparse_linear_int8, fast_tile_linear

_is_exporting = torch.compiler.is_exporting


class MosaicLinear(HoldsParameters):
    """Drop-in replacement of ``nn.Linear`` for a weight with zeros.

    Equivalent to ``F.linear(x, unpack(packed), bias)``. The weight is frozen: gradients reach the
    input and the bias, never the packed values. A cast (``.to(dtype)``) changes float values and the bias; int8 values
    and their scales stay as they are, and the output has the input's dtype. Under ``torch.autocast`` the layer casts
    as ``nn.Linear`` does.

    Where its device reads another form faster (bf16 and fp16 on a GPU: :mod:`mosaic_kernels.tiles`), the layer
    holds that one instead of the canonical one, in the same two parameters; ``state_dict``, ``packed``, copies
    and pickles are always canonical.

    Threads may call the layer while another one loads, casts or replaces its weight: a call uses all of the old
    tensors or all of the new ones. Loading makes new tensors, so capture CUDA graphs again afterwards.

    Attributes:
        weight: kept values in row-major order, ``[nnz]``, fp32, bf16, fp16 or int8.
        bitmask: ``uint8 [out_features, ceil(in_features / 8)]``, least significant bit first.
        scales: for int8 values, ``float32 [out_features, groups]``, see :mod:`mosaic_kernels.format`; else ``None``.
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
        self._index = self._arranged = self._prepared = self._dense = self.siblings = None
        self.weight = frozen(torch.zeros(nnz, device=device, dtype=dtype if weights == "float" else torch.int8))
        self.scales = None  # an ordinary attribute while it is None: a parameter takes 10 times as long to look up
        if weights != "float":
            groups = scale_groups(in_features, weights_group(weights))
            self.scales = frozen(torch.zeros(out_features, groups, device=device, dtype=torch.float32))
        self.bitmask = frozen(torch.zeros(out_features, bitmask_bytes(in_features), device=device, dtype=torch.uint8))
        self.bias = frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None  # type: ignore[assignment]

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
        held = {"weight": packed.values, "scales": packed.scales, "bitmask": packed.bitmask, "bias": bias}
        layer._parameters = {name: frozen(tensor) for name, tensor in held.items() if tensor is not None}
        if bias is not None:
            del layer.__dict__["bias"]
        layer._index = (layer.bitmask, packed.index())
        return layer

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        held = self._parameters
        found = self._form(held)
        return weight_of(held).numel() if found is None else found[1]

    @property
    def weights(self) -> Weights:
        """What the kept values are: ``float``, ``int8`` or ``int8-group``."""
        return kind_of_values(self._parameters.get("scales"))

    @property
    def density(self) -> float:
        """Share of kept weights, 0 to 1."""
        return self.nnz / max(1, self.in_features * self.out_features)

    @property
    def arranged(self) -> Arrangement | None:
        """The form that is held instead of the canonical one, if any."""
        found = self._form(self._parameters)
        return None if found is None else found[0]

    @property
    def packed(self) -> PackedWeight:
        """The weight in canonical form, sharing this layer's memory where it holds that form."""
        return self._packed(self._parameters)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the same function.

        Args:
            dtype: of its weight and bias where the values are int8, which do not say; left out, that of the
                bias, and without one fp32. Float values keep theirs.
        """
        held = self._parameters
        bias, weight = held.get("bias"), self._dense_weight(held)
        if held.get("scales") is not None:
            weight = weight.to(dtype or (weight.dtype if bias is None else bias.dtype))
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = frozen(weight)
        dense.bias = None if bias is None else frozen(bias.detach().to(weight.dtype, copy=True))  # type: ignore[assignment]
        return dense.train(self.training)

    def build_index(self, name: str = "MosaicLinear") -> None:
        """Derive what the kernels need from the canonical parameters; called after these were replaced.

        Raises:
            FormatError: bits, values, scales and shape contradict each other (``name`` is in the message).
        """
        self._validate(name)
        self.arrange()

    def _validate(self, name: str = "MosaicLinear", held: Held | None = None) -> tuple[nn.Parameter, RowIndex]:
        held = self._parameters if held is None else held
        packed = self._packed(held)
        packed.validate(name)
        found = held["bitmask"], packed.index()
        self._index, self._prepared = found, None  # type: ignore[assignment]
        return found  # type: ignore[return-value]

    def arrange(self) -> None:
        """Hold the weight as the kernels of its device read it fastest."""
        held = self._parameters
        bitmask = held["bitmask"]
        assert bitmask is not None  # for the type checker
        if bitmask.is_meta or weight_of(held).dtype not in HELD_DTYPES or self._form(held) is not None:
            return
        packed = self._packed(held)
        found = arrange(packed)
        if found is not None:
            weight, tiles = map(frozen, tensors_of(found))
            weight.arrangement = found, packed.nnz  # type: ignore[attr-defined]
            self._arranged = weight, found, packed.nnz
            self._take({**held, "weight": weight, "bitmask": tiles})
            self._index = None

    def keep_dense_for_prefill(self, keep: bool = True) -> None:
        """Hold the dense weight too, for inputs of many rows: the speed of a dense layer there, and its memory.

        Not of int8 values, which do not say what dtype their dense weight would have. On a CPU whose products of the
        weight's dtype are slow (:func:`~mosaic_kernels.device.has_fast_products`) the packed kernels are faster and
        run all the same.
        """
        held = self._parameters
        made = keep and held.get("scales") is None
        self._dense = (self._dense_weight(held), *source_of(held)) if made else None

    def _dense_weight(self, held: Held) -> Tensor:
        found = self._form(held)
        return ops.unpack(self._packed(held)) if found is None else found[0].to_dense()

    @property
    def operands(self) -> Operands:
        """What a kernel reads: values, scales, words, offsets and bias."""
        return self.operands_of(self._parameters)

    def operands_of(self, held: Held) -> Operands:
        """The :attr:`operands` of one state of the layer's parameters.

        Raises:
            FormatError: they contradict each other.
        """
        weight, bitmask, found = held["weight"], held["bitmask"], self._index
        # while a graph is exported, the parameters are stand-ins, which no index was made from
        if found is None or (found[0] is not bitmask and not (_is_exporting() and type(bitmask) is not nn.Parameter)):
            found = self._validate(held=held)  # perhaps here for one pass only, which does not pay for another form
        return weight, held.get("scales"), found[1].words, found[1].offsets, held.get("bias")  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        compiling = is_dynamo_compiling()  # dynamo takes operators and must not trace code that reads addresses
        siblings = self.siblings
        if siblings is not None and not compiling:
            found = siblings.forward(self, input)
            if found is not None:
                return found
        held = self._parameters  # attribute access to a parameter costs as much as the rest of a call
        dense = self._dense
        if dense is not None and input.shape[:-1].numel() > self.DECODE_ROWS and not _is_slow(input):
            if compiling or is_of(dense, held):
                return F.linear(input, dense[0], held.get("bias"))
            self.keep_dense_for_prefill()  # it was made from another weight
        arranged = self._arranged
        if arranged is not None and arranged[0] is held["weight"] and not is_trained(held):
            return fast_tile_linear(input, arranged[1], held.get("bias"))
        if compiling:
            return self._multiply(input, held)
        prepared, rounded = self._prepared, self.quantize_activations
        if prepared is not None:
            found = prepared(input, held, rounded)
            if found is not None:
                return found
        result = self._multiply(input, held)
        if self._form(held) is None:
            bitmask = held["bitmask"]
            assert bitmask is not None  # for the type checker
            again = prepare(input, self.operands_of(held), bitmask, self.in_features, rounded)
            self._prepared = again or prepared  # a call that must be recorded does not change it
        return result

    def _multiply(self, x: Tensor, held: Held) -> Tensor:
        bias = held.get("bias")
        if bias is not None and is_trained(held):
            out = self._multiply(x, {**held, "bias": None})
            return out + bias.to(out.dtype)
        if not is_dynamo_compiling():
            found = self._form(held)
            if found is not None:
                return fast_tile_linear(x, found[0], bias)
            if torch.onnx.is_in_onnx_export():
                raise UsageError("ONNX has no packed weights: call model.dequantize() or layer.to_dense() first")
        values, scales, words, offsets, _ = self.operands_of(held)
        if scales is None:
            return fast_sparse_linear(x, values, words, offsets, bias, self.in_features)
        return fast_sparse_linear_int8(
            x, values, scales, words, offsets, bias, self.in_features, self.quantize_activations
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.3f}"
        ) + ("" if self.scales is None else f", weights={self.weights}")

    def reset_parameters(self) -> None:
        """Nothing to initialise: the values come from a checkpoint or a dense layer."""


def _is_slow(x: Tensor) -> bool:
    """Whether torch multiplies ``x`` slowly, in the dtype to which autocast casts it."""
    device = x.device.type
    return is_slow(x, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

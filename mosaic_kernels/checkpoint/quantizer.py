# SPDX-License-Identifier: Apache-2.0
"""How transformers loads and saves a mosaic checkpoint: the two classes it registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mosaic_kernels import compat
from mosaic_kernels.checkpoint.files import Header, tensor_headers
from mosaic_kernels.checkpoint.layout import apply_layout, describe, is_uniform, packed_weights, stock_shapes
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError, ModelLoadError, UsageError
from mosaic_kernels.format import FORMAT_VERSION, GROUP_COLUMNS, weights_group
from mosaic_kernels.inference import prepare_inference
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter


class MosaicConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a mosaic checkpoint.

    Attributes:
        version: of the format.
        format: ``bitmask`` (packed projections) or ``dense`` (zeros are stored; only shapes differ).
        projections: full name -> ``{"shape": [out, in], "nnz": n}``, with ``"packed": false`` where
            packing would not save bytes.
        heads: block -> ``{"query": q, "key_value": k}``.
        provenance: how the model was made.
        weights: ``{"dtype": "int8", "group": g}`` where packed values are int8, with a scale for each row
            (``null``) or for every 64 columns of it; there is no such key where they are float.

    Raises:
        FormatError: the version, or something it says, is not known to this release.
    """

    METHOD = "mosaic"
    FORMATS = ("bitmask", "dense")

    def __init__(
        self,
        projections: Mapping[str, Any] | None = None,
        heads: Mapping[str, Any] | None = None,
        *,
        version: int = FORMAT_VERSION,
        format: str = "bitmask",
        provenance: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise FormatError(
                f"this checkpoint has mosaic format version {version!r} and this release reads version "
                f"{FORMAT_VERSION}; update mosaic-kernels"
            )
        if format not in self.FORMATS:
            raise FormatError(f"unknown mosaic format {format!r}; this release reads {' and '.join(self.FORMATS)}")
        self.quant_method = self.METHOD
        self.version, self.format = version, format
        self.projections, self.heads = dict(projections or {}), dict(heads or {})
        self.provenance = dict(provenance or {})
        if weights is not None:
            if weights not in [{"dtype": "int8", "group": group} for group in (None, GROUP_COLUMNS)]:
                raise FormatError(
                    f"unknown packed values {weights!r}: this release reads float ones and int8 with a scale for each "
                    f"row or {GROUP_COLUMNS} columns; update mosaic-kernels"
                )
            self.weights = dict(weights)

    @property
    def packed_weights(self) -> Weights:
        """What the packed values are."""
        if not hasattr(self, "weights"):
            return "float"
        return "int8" if self.weights["group"] is None else "int8-group"

    def lay_out(self, adapter: ModelAdapter) -> None:
        """Give a model on the meta device the layers and shapes described here.

        Raises:
            FormatError: the description contradicts the model or itself.
        """
        packed = self.format == "bitmask"
        apply_layout(adapter, self.projections, self.heads, packed=packed, weights=self.packed_weights)

    @classmethod
    def of(cls, adapter: ModelAdapter, *, format: str = "bitmask", provenance: Mapping[str, Any] | None = None) -> Any:
        """The description of a model as it stands."""
        projections, heads = describe(adapter)
        kind = packed_weights(adapter)
        int8 = {"dtype": "int8", "group": weights_group(kind)} if kind != "float" and format == "bitmask" else None
        return cls(projections, heads, format=format, provenance=provenance, weights=int8)


class MosaicQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts :class:`MosaicLinear` where packed weights go, before transformers fills them in."""

    quantization_config: Any

    def validate_environment(self, *args: Any, **options: Any) -> None:
        if not self.pre_quantized:
            raise UsageError("this model holds no mosaic weights: make them with `python -m mosaic_kernels.prune`")

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        self.quantization_config.lay_out(ModelAdapter.of(model))
        for module in model.modules():
            if isinstance(module, MosaicLinear):  # or else, where it stays on disk, it is filled with normal numbers
                compat.keep_as_loaded(module)
        files = options.get("checkpoint_files")
        if files:
            _require_tensors(model, tensor_headers(files))
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, MosaicLinear):
                module.requires_grad_(False)  # transformers makes every floating point tensor trainable
                if not module.bitmask.is_meta:  # offloaded to disk: comes with the first forward pass
                    module.build_index(name)
        return prepare_inference(model, attention=False)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Bring the description up to date before saving; ``None``: the model's own tensors are written."""
        if compat.has_adapter(model):  # only the adapter is written
            return None, {}
        old = self.quantization_config
        new = MosaicConfig.of(ModelAdapter.of(model), format=old.format, provenance=old.provenance)
        self.quantization_config = model.config.quantization_config = new
        if hasattr(model.config, "auto_map"):  # names a file that save_pretrained does not copy
            del model.config.auto_map
        return None, {}

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make a packed model dense, in place; ``model.dequantize()`` calls this.

        Every packed projection becomes an ordinary ``nn.Linear`` with its zeros. Its weight requires a gradient if the
        embeddings do.

        Args:
            dtype: of the whole model afterwards; by default the dtype it computes in now.
        """
        return super().dequantize(model, dtype=dtype or ModelAdapter.of(model).dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a saved config holds the name of the dtype
            dtype = getattr(torch, dtype)
        adapter = ModelAdapter.of(model)
        trains = model.get_input_embeddings().weight.requires_grad
        for block, name, layer in adapter.projections():
            if isinstance(layer, MosaicLinear):
                block.replace(name, layer.to_dense(adapter.dtype).requires_grad_(trains))
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Forget the format after ``dequantize``, but keep the shapes where the stock config has no words for them."""
        adapter = ModelAdapter.of(model)
        if is_uniform(adapter):
            super().remove_quantization_config(model)
            for key, value in stock_shapes(adapter).items():
                setattr(model.config, key, value)
        else:
            config = MosaicConfig.of(adapter, format="dense", provenance=self.quantization_config.provenance)
            self.quantization_config = model.config.quantization_config = config
            model.is_quantized = False  # allows casts and training; the config is kept for the shapes alone

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """``True`` lets transformers' Trainer train adapters; packed weights themselves stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# Of these a cast makes nonsense; floats are cast to what the model computes in.
_WHOLE_NUMBERS = {torch.int8: "I8", torch.uint8: "U8"}


def _require_tensors(model: Any, headers: Mapping[str, Header]) -> None:
    """Refuse files that lack a tensor of the model or hold another: transformers would make it up, or cast it."""
    wanted = model.state_dict()
    tied = compat.tied_weights(model)
    tied = {**tied, **{source: target for target, source in tied.items()}}
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if name not in headers:
            continue
        if headers[name].shape != shape:
            raise FormatError(
                f"{name}: the file holds shape {list(headers[name].shape)} but the config asks for {list(shape)}"
            )
        stored, asked = headers[name].dtype, _WHOLE_NUMBERS.get(tensor.dtype)
        if (stored if stored in _WHOLE_NUMBERS.values() else None) != asked:
            raise FormatError(f"{name}: the file holds {stored} values but the config asks for {asked or 'floats'}")
    missing = [name for name in wanted if name not in headers and tied.get(name) not in headers]
    if missing:
        raise ModelLoadError(f"the weight files lack {_some(missing)}: copy or download the model again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


compat.register_format(MosaicConfig.METHOD, MosaicConfig, MosaicQuantizer)

# SPDX-License-Identifier: Apache-2.0
"""How transformers loads and saves a mosaic checkpoint: the two classes it registers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mosaic_kernels import compat
from mosaic_kernels.checkpoint import autoload, checksums
from mosaic_kernels.checkpoint.files import Header
from mosaic_kernels.checkpoint.layout import apply_layout, describe, is_uniform, packed_weights, stock_shapes
from mosaic_kernels.checkpoint.loading import check_directory, check_files, check_loaded
from mosaic_kernels.checkpoint.schema import FORMATS, check_description
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import UnsupportedModelError, UsageError
from mosaic_kernels.format import FORMAT_VERSION, weights_group
from mosaic_kernels.inference import prepare_inference
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.wrappers import has_adapter_layers


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
            (``null``) or for every 64 columns of it; the key is absent if they are float.
        checksums: SHA-256 digests, see :mod:`mosaic_kernels.checkpoint.checksums`; the key is absent in
            checkpoints of older releases.
        verify: compare the bytes of all tensors with the checksums while loading. Pass it to ``from_pretrained``, as
            ``verify=True`` or as ``quantization_config=MosaicConfig(verify=True)``; it is never saved.

    Raises:
        FormatError: this release does not know the version or a value; the message names the key.
    """

    METHOD = autoload.METHOD
    FORMATS = FORMATS

    def __init__(
        self,
        projections: Mapping[str, Any] | None = None,
        heads: Mapping[str, Any] | None = None,
        *,
        version: int = FORMAT_VERSION,
        format: str = "bitmask",
        provenance: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        checksums: Mapping[str, Any] | None = None,
        verify: bool = False,
        **unknown: Any,
    ) -> None:
        tables = {"projections": projections, "heads": heads, "provenance": provenance, "checksums": checksums}
        check_description({"version": version, "format": format, "weights": weights, **tables})
        self.quant_method = self.METHOD
        self.version, self.format = version, format
        self.projections, self.heads = dict(projections or {}), dict(heads or {})
        self.provenance = dict(provenance or {})
        if weights is not None:
            self.weights = dict(weights)
        if checksums:
            self.checksums = dict(checksums)
        self.verify = verify is True

    @property
    def packed_weights(self) -> Weights:
        """What the packed values are."""
        if not hasattr(self, "weights"):
            return "float"
        return "int8" if self.weights["group"] is None else "int8-group"

    def to_dict(self) -> dict[str, Any]:
        """The table that ``config.json`` holds."""
        return {key: copy.deepcopy(value) for key, value in self.__dict__.items() if key != "verify"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Settings that a configuration passed to ``from_pretrained`` overrides; the checkpoint decides all others."""
        return {"verify": self.verify}

    def lay_out(self, adapter: ModelAdapter) -> None:
        """Give a model on the meta device the layers and shapes described here.

        Raises:
            FormatError: the description contradicts the model or itself.
        """
        packed = self.format == "bitmask"
        apply_layout(adapter, self.projections, self.heads, packed=packed, weights=self.packed_weights)
        _name_shapes(adapter)

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        *,
        format: str = "bitmask",
        provenance: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The description of a model as it stands.

        Args:
            tensors: the tensors of the weight files, for the checksums; without them there are no checksums.
        """
        projections, heads = describe(adapter)
        kind = packed_weights(adapter)
        int8 = {"dtype": "int8", "group": weights_group(kind)} if kind != "float" and format == "bitmask" else None
        sums = None if tensors is None else checksums.of_tensors(tensors)
        return cls(projections, heads, format=format, provenance=provenance, weights=int8, checksums=sums)


class MosaicQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts :class:`MosaicLinear` where packed weights go, before transformers fills them in."""

    quantization_config: Any
    _headers: Mapping[str, Header] | None = None

    def validate_environment(self, *args: Any, **options: Any) -> None:
        if not self.pre_quantized:
            raise UsageError("this model holds no mosaic weights: make them with `python -m mosaic_kernels.prune`")

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the files before transformers opens them. Some releases call this method, others the next one."""
        check_directory(config, self._checksums)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        check_directory(config, self._checksums)
        return config

    @classmethod
    def attach(cls, adapter: ModelAdapter) -> None:
        """Make a model that was packed in memory save and dequantize as a loaded one does."""
        model: Any = adapter.model
        model.config.quantization_config = MosaicConfig.of(adapter)
        model.hf_quantizer = cls(model.config.quantization_config, pre_quantized=True)
        model.is_quantized, model.quantization_method = _has_packed_layers(model), MosaicConfig.METHOD
        _name_shapes(adapter)

    @property
    def _checksums(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(self.quantization_config, "checksums", {})
        return found

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        self.quantization_config.lay_out(ModelAdapter.of(model, any_head=True))
        for module in model.modules():
            if isinstance(module, MosaicLinear):  # or else, where it stays on disk, it is filled with normal numbers
                compat.keep_as_loaded(module)
        verify = self.quantization_config.verify or getattr(model.config, "verify", False) is True
        self.quantization_config.verify = model.config.verify = False
        files = [Path(file) for file in options.get("checkpoint_files") or ()]
        if files:
            self._headers = check_files(model, files, self._checksums, verify=verify)
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        check_loaded(model, self._headers or {})
        for name, module in model.named_modules():
            if isinstance(module, MosaicLinear):
                module.requires_grad_(False)  # transformers makes every floating point tensor trainable
                if not module.bitmask.is_meta:  # offloaded to disk: comes with the first forward pass
                    module.build_index(name)
        model.is_quantized = _has_packed_layers(model)  # or else a Trainer refuses dense weights, too
        return prepare_inference(model, attention=False)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Bring the description up to date before saving; ``None``: the model's own tensors are written."""
        if compat.has_adapter(model):  # only the adapter is written
            return None, {}
        old, adapter = self.quantization_config, _adapter_of(model)
        tensors = compat.saved_tensors(model)
        new = MosaicConfig.of(adapter, format=old.format, provenance=old.provenance, tensors=tensors)
        self.quantization_config = model.config.quantization_config = new
        _name_shapes(adapter)
        return None, {}

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make a packed model dense, in place; ``model.dequantize()`` calls this.

        Every packed projection becomes an ordinary ``nn.Linear`` with its zeros. Its weight requires a gradient if the
        embeddings do.

        Args:
            dtype: of the whole model afterwards; by default the dtype it computes in now.
        """
        return super().dequantize(model, dtype=dtype or _adapter_of(model).dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a saved config holds the name of the dtype
            dtype = getattr(torch, dtype)
        adapter = ModelAdapter.of(model, any_head=True)
        if offloaded := next((name for name, each in model.named_parameters() if each.is_meta), None):
            raise UsageError(
                f"{offloaded} is offloaded (accelerate put it on disk or in CPU memory), and all weights are needed: "
                "load the model without device_map and offload_folder, then call dequantize()"
            )
        trains = model.get_input_embeddings().weight.requires_grad
        for block, name, layer in adapter.projections():
            if isinstance(layer, MosaicLinear):
                block.replace(name, layer.to_dense(adapter.dtype).requires_grad_(trains))
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Forget the format after ``dequantize``, but keep the shapes where the stock config has no words for them."""
        adapter = ModelAdapter.of(model, any_head=True)
        if is_uniform(adapter):
            super().remove_quantization_config(model)
            autoload.forget(model.config)
            _name_shapes(adapter)
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


def _adapter_of(model: Any) -> ModelAdapter:
    try:
        return ModelAdapter.of(model, any_head=True)
    except UnsupportedModelError as error:
        if has_adapter_layers(model):
            raise UsageError(
                "the model carries an adapter (PEFT, such as LoRA): call unload() of the PeftModel first, or save the "
                "PeftModel itself"
            ) from error
        raise


def _has_packed_layers(model: Any) -> bool:
    return any(isinstance(module, MosaicLinear) for module in model.modules())


def _name_shapes(adapter: ModelAdapter) -> None:
    for key, value in stock_shapes(adapter).items():
        setattr(adapter.model.config, key, value)


def _lay_out_empty(model: Any) -> None:
    """Give a model that ``from_config`` made without weights the layers of its mosaic configuration.

    ``accelerate.load_checkpoint_and_dispatch`` can then fill it. A model that has (random) weights stays as it is.
    """
    found: Any = getattr(model.config, "quantization_config", None)
    if autoload.is_mosaic(model.config) and all(parameter.is_meta for parameter in model.parameters()):
        description = MosaicConfig.from_dict(found) if isinstance(found, dict) else found
        description.lay_out(ModelAdapter.of(model, any_head=True))


def complete_models() -> None:
    """Make transformers lay out empty models with packed layers, and cast packed models."""
    compat.let_cast(autoload.is_mosaic)
    compat.after_from_config(_lay_out_empty)


compat.register_format(MosaicConfig.METHOD, MosaicConfig, MosaicQuantizer)
compat.take_loading_attributes(MosaicConfig)

# SPDX-License-Identifier: Apache-2.0
"""Pack a pruned model and write it as a Hugging Face directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mosaic_kernels import compat, ops
from mosaic_kernels.checkpoint import autoload
from mosaic_kernels.checkpoint.beside import clean_json, copy_licences, remove_code, save_tokenizer
from mosaic_kernels.checkpoint.card import model_card
from mosaic_kernels.checkpoint.checksums import seal_config
from mosaic_kernels.checkpoint.directory import OutputDirectory, require_space, write_errors
from mosaic_kernels.checkpoint.files import GENERATION_FILE
from mosaic_kernels.checkpoint.foreign import foreign_links
from mosaic_kernels.checkpoint.generation import plain_config, valid_generation
from mosaic_kernels.checkpoint.layout import is_uniform, stock_shapes
from mosaic_kernels.checkpoint.progress import no_bars_of_transformers
from mosaic_kernels.checkpoint.public import public_name
from mosaic_kernels.config import Weights
from mosaic_kernels.format import packed_bytes, weights_group
from mosaic_kernels.inference import prepare_inference
from mosaic_kernels.int8 import quantize
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import Block, ModelAdapter
from mosaic_kernels.paths import local_path
from mosaic_kernels.progress import station

logger = logging.getLogger(__name__)

__all__ = ["OutputDirectory", "pack_model", "write_checkpoint"]

_PROVENANCE = ("sparsity", "category", "policy", "solver", "seed")


def pack_model(adapter: ModelAdapter, weights: Weights = "float") -> None:
    """Replace, in place, every projection that packing makes smaller by a :class:`MosaicLinear`.

    In ``float``, a projection without zeros, or with fewer than its bitmask costs (1/16 in bf16, 1/32 in
    fp32), stays dense; as ``int8`` one without zeros takes 9 bits a weight. Float values that are packed
    already become int8 where that is asked for. Sizes are compared in the dtype in which a projection is stored,
    even while the model computes in another. The model's ``config.quantization_config`` then describes
    it, so that ``save_pretrained`` writes a checkpoint that loads again.

    Raises:
        NonFiniteError: weights to round are NaN or infinite.
    """
    from mosaic_kernels.checkpoint.quantizer import MosaicQuantizer

    with station("pack", len(adapter.sizes()), "projection") as here:
        for block, name, layer in adapter.projections():
            _pack_projection(block, name, layer, weights)
            here.advance()
    model: Any = adapter.model
    prepare_inference(model, attention=False)
    MosaicQuantizer.attach(adapter)


def _pack_projection(block: Block, name: str, layer: nn.Linear, weights: Weights) -> None:
    if isinstance(layer, MosaicLinear) and (weights == "float" or layer.scales is not None):
        return
    packed = layer.packed if isinstance(layer, MosaicLinear) else ops.pack(layer.weight.detach())
    if weights != "float":
        packed = quantize(packed, weights_group(weights))
    itemsize = block.stored_dtype(name).itemsize
    held = packed_bytes(*packed.shape, packed.nnz, itemsize, weights)
    if isinstance(layer, MosaicLinear) or held < layer.weight.numel() * itemsize:
        block.replace(name, MosaicLinear.from_packed(packed, layer.bias).train(layer.training))


def write_checkpoint(
    adapter: ModelAdapter,
    directory: Path,
    *,
    tokenizer: Any,
    report: Mapping[str, Any],
    original_shapes: Mapping[str, tuple[int, int]],
    source: str,
    format: Literal["mosaic", "dense"],
    max_shard_size: str = "5GB",
) -> None:
    """Write a model, packed or not, with everything that belongs beside it; the model stays as it is.

    Args:
        adapter: the pruned model.
        directory: where to write, usually :attr:`OutputDirectory.staging`.
        tokenizer: of the model, or ``None``.
        report: the content of ``mosaic_report.json``.
        original_shapes: shape of each projection before pruning, for the model card.
        source: directory or hub id of the model before pruning.
        format: ``dense`` stores zeros, and int8 values as what they stand for, in the model's dtype; it loads with
            plain transformers where all blocks have one shape.
        max_shard_size: of one weight file, as in ``save_pretrained``.

    Raises:
        EnvironmentError_: the disk is full.
    """
    from mosaic_kernels.checkpoint.quantizer import MosaicConfig

    model: Any = adapter.model
    tensors = _dense_tensors(adapter) if format == "dense" else None
    plain = format == "dense" and is_uniform(adapter)
    provenance = _provenance(report, source)
    settings: dict[str, Any] = stock_shapes(adapter)
    if not plain:
        kind, written = "bitmask" if format == "mosaic" else "dense", compat.saved_tensors(model, tensors)
        described = MosaicConfig.of(adapter, format=kind, provenance=provenance, tensors=written)
        settings["quantization_config"] = described
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        require_space(directory, sum(t.nbytes for t in (tensors or dict(model.named_parameters())).values()))
        with station("write"), _saved_as(model, settings), no_bars_of_transformers():
            model.save_pretrained(directory, state_dict=tensors, max_shard_size=max_shard_size)
        _tell_growth(directory, local_path(source))
        remove_code(directory)
        clean_json(directory / "config.json", {} if plain else {"auto_map": dict(autoload.AUTO_MAP)})
        seal_config(directory / "config.json")
        clean_json(directory / GENERATION_FILE)
        if foreign_links(local_path(source), [GENERATION_FILE]):  # the run has said so at its start
            (directory / GENERATION_FILE).unlink(missing_ok=True)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory, local_path(source))
        copy_licences(local_path(source), directory)
        card = model_card(report, original_shapes, source, plain=plain)
        (directory / "README.md").write_text(card, encoding="utf-8")
        (directory / "mosaic_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _tell_growth(directory: Path, source: Path) -> None:
    """Warn if the result is larger than the source, as when a packed source is saved with fewer zeros."""
    now, before = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
        for folder in (directory, source)
    )
    if before and now > 1.01 * before:
        logger.warning("the result takes %s bytes, more than the %s of its source", f"{now:,}", f"{before:,}")


def _provenance(report: Mapping[str, Any], source: str) -> dict[str, Any]:
    package = report.get("versions", {}).get("mosaic-kernels")
    known = {key: report[key] for key in _PROVENANCE if key in report}
    return {"package": "mosaic-kernels", "version": package, "source": public_name(source), **known}


def _dense_tensors(adapter: ModelAdapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = adapter.model.state_dict()
    for block, name, layer in adapter.projections():
        if isinstance(layer, MosaicLinear):
            full_name = block.full_name(name)
            del tensors[f"{full_name}.bitmask"]
            tensors.pop(f"{full_name}.scales", None)
            tensors[f"{full_name}.weight"] = layer.to_dense(adapter.dtype).weight.detach()
    return tensors


@contextmanager
def _saved_as(model: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let ``save_pretrained`` write these settings, and put the model back as it was."""
    config, generation, quantizer = model.config, model.generation_config, getattr(model, "hf_quantizer", None)
    try:
        model.config = plain_config(config)
        for key, value in settings.items():
            setattr(model.config, key, value)
        model.generation_config = valid_generation(generation)
        model.hf_quantizer = None  # it would describe the model anew
        yield
    finally:
        model.config, model.generation_config = config, generation
        model.hf_quantizer = quantizer
        if quantizer is None:
            del model.hf_quantizer

# SPDX-License-Identifier: Apache-2.0
"""Chooses the dtype a model computes in: fp32 if the processor is slow in the dtype of the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mosaic_kernels.config import ComputeDtype
from mosaic_kernels.device import name_of, products
from mosaic_kernels.errors import UsageError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computing:
    """The dtype that a model computes in, and the reason.

    Attributes:
        dtype: of its weights and activations while it computes.
        why: the reason in a few words, for the log and the report.
    """

    dtype: torch.dtype
    why: str

    @property
    def name(self) -> str:
        """``float32`` and so on."""
        return name_of(self.dtype)


def settle_compute_dtype(asked: ComputeDtype, stored: torch.dtype, device: torch.device) -> Computing:
    """Choose the dtype to compute in.

    Args:
        asked: the name of a dtype, or ``auto``: ``stored``, but fp32 on a CPU that multiplies ``stored`` more slowly.
        stored: the dtype of the weights.
        device: the device that computes.

    Raises:
        UsageError: the dtype that was asked for cannot hold the weights.
    """
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        if dtype is not stored and not (dtype is torch.float32 and stored.itemsize < dtype.itemsize):
            raise UsageError(
                f"--compute-dtype {asked} cannot hold {name_of(stored)} weights: use float32, or --dtype {asked} "
                "to store them in it as well"
            )
        return Computing(dtype, "asked for")
    if device.type != "cpu" or stored.itemsize != 2:
        return Computing(stored, "the stored dtype")
    found = products(stored)
    if found.fast:
        return Computing(stored, "the stored dtype, which this processor multiplies fast")
    name = name_of(stored)
    speed = f"{name} products measured {found.ratio:.2g}x float32's speed"
    lacks = found.instructions is False
    return Computing(torch.float32, f"this processor has no {name} instructions ({speed})" if lacks else speed)


def settle_evaluation_dtype(asked: ComputeDtype, adapter: ModelAdapter) -> Computing:
    """Choose the dtype to evaluate a model in.

    With ``auto``, a model with packed layers keeps its dtype: these layers do not use torch's products.

    Raises:
        UsageError: the dtype that was asked for cannot hold the weights.
    """
    if asked == "auto" and any(isinstance(layer, MosaicLinear) for _, _, layer in adapter.projections()):
        return Computing(adapter.dtype, "the stored dtype, which packed layers take")
    return settle_compute_dtype(asked, adapter.dtype, next(adapter.model.parameters()).device)


@contextmanager
def computing_in(adapter: ModelAdapter, chosen: Computing) -> Iterator[ModelAdapter]:
    """Hold a model's weights in ``chosen.dtype`` inside, and in their own dtypes again afterwards.

    A wider dtype holds every value exactly, so unchanged weights come back bit for bit. The blocks of the adapter
    that is yielded know the stored dtypes. Code that writes new weights must round them to these
    (:meth:`~mosaic_kernels.models.Block.rounded`); then the cast back changes no weight.

    Yields:
        The adapter of the cast model; ``adapter`` itself if the model has the chosen dtype already.
    """
    if chosen.dtype is adapter.dtype:
        yield adapter
        return
    model, stored = adapter.model, name_of(adapter.dtype)
    before = sum(parameter.nbytes for parameter in model.parameters())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    try:
        _cast(model, {name: chosen.dtype for name, dtype in (dtypes | buffers).items() if dtype.itemsize == 2})
        after = sum(parameter.nbytes for parameter in model.parameters())
        logger.info(
            "computing in %s: %s; the checkpoint stays %s (meanwhile weights take %.0f MiB instead of %.0f)",
            chosen.name, chosen.why, stored, after / 2**20, before / 2**20,
        )  # fmt: skip
        yield adapter.storing(dtypes)
    finally:
        _cast(model, dtypes | buffers)


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast parameters and buffers, in place, to the dtypes given by name; integers and meta tensors stay as they are.

    Parameters remain the same objects, so tied ones stay tied.
    """
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, MosaicLinear):  # it holds more than parameters, and casts all of it itself
            for name in ("weight", "bias"):  # int8 values are never cast, but their bias is
                if (wanted := dtypes.get(dot + name)) is not None and wanted.is_floating_point:
                    module.to(wanted)
                    break
            continue
        for name, parameter in module.named_parameters(recurse=False):
            wanted = dtypes.get(dot + name, parameter.dtype)
            if parameter.is_floating_point() and not parameter.is_meta and wanted is not parameter.dtype:
                parameter.data = parameter.data.to(wanted)
        for name, buffer in module.named_buffers(recurse=False):
            wanted = dtypes.get(dot + name, buffer.dtype)
            if buffer.is_floating_point() and not buffer.is_meta and wanted is not buffer.dtype:
                setattr(module, name, buffer.to(wanted))

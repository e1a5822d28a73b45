# SPDX-License-Identifier: Apache-2.0
"""Tells how every block and layer of a model runs, and why not faster: ``mk.explain(model)``.

The answers come from the code that decides at every call (:func:`mosaic_kernels.decode.why_not`,
:func:`mosaic_kernels.dense.why_not`, :func:`mosaic_kernels.ops.select.running`). They hold for the standard
call: one token of one sequence with a cache and without gradients, as ``generate`` decodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mosaic_kernels import decode, dense
from mosaic_kernels.errors import MosaicError, UsageError
from mosaic_kernels.explanation import BlockWay, Explanation, LayerWay, because
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import PROJECTIONS, SUPPORTED_MODEL_TYPES
from mosaic_kernels.ops import cpu, isa
from mosaic_kernels.ops.select import running, why_not_ours

logger = logging.getLogger(__name__)

_MANY_ROWS = 256  # of a prompt


@torch.no_grad()
def explain(model: nn.Module) -> Explanation:
    """Tell how every block and layer of ``model`` runs, and why not faster.

    It does not change or run the model.

    Args:
        model: a Hugging Face causal language model, dense or pruned, or any other module with linear layers.

    Returns:
        An explanation: ``str()`` of it is a table, ``summary`` is one line, and ``as_dict()`` is for JSON.

    Raises:
        UsageError: ``model`` is no module, but for example its path.

    Example:
        >>> import torch, mosaic_kernels as mk
        >>> found = mk.explain(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        >>> [(layer.name, layer.kind, layer.kernel) for layer in found.layers]
        [('0', 'torch', 'torch')]
    """
    if not isinstance(model, nn.Module):
        hint = f": load it, or run `python -m mosaic_kernels.info {model}`" if isinstance(model, (str, Path)) else ""
        raise UsageError(f"explain() takes a model, not a {type(model).__name__}{hint}")
    dtype = _activations(model)
    blocks = tuple(
        BlockWay(name, (reason := _why_not_native(model, block, dtype)) is None, reason, _taken(block))
        for name, block in _blocks(model)
    )
    native = tuple(f"{block.name}." for block in blocks if block.native)
    layers = tuple(
        _layer_way(name, module, dtype, name.startswith(native))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return Explanation(blocks, layers, tuple(_notes(model, bool(blocks), dtype)), _head(model))


_told: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@torch.no_grad()
def warn_if_slow(model: nn.Module) -> None:
    """Warn once of a model on a CPU whose blocks or packed layers cannot run the fast way, with the reason.

    Only :func:`explain` shows reasons that may be gone at the next token, such as training mode and hooks.
    """
    dtype = _activations(model)
    blocks = [(block, _block_row(block, dtype)) for _, block in _blocks(model)]
    if not all(x.is_cpu for _, x in blocks):
        return
    try:
        running("sparse_linear", torch.device("cpu"))  # warns if the native module is missing
    except MosaicError:  # a forced backend cannot run: the first call raises this error
        return
    if cpu.why_not() is not None:
        return
    found = []
    reasons = [reason for block, x in blocks if (reason := decode.why_never(block, x))]
    if reasons:
        found.append(f"{len(reasons)} of {len(blocks)} blocks take no token natively{because(reasons)}")
    packed = [_packed_kernel(layer, dtype) for layer in model.modules() if isinstance(layer, MosaicLinear)]
    slow = [reason for kernel, reason in packed if kernel in ("reference", "none")]
    if slow:
        found.append(
            f"{len(slow)} of {len(packed)} packed layers are not multiplied by this CPU's kernels{because(slow)}"
        )
    message = "; ".join(found)
    if message and _told.get(model) != message:
        _told[model] = message
        logger.warning("this model is slower than it could be: %s. mk.explain(model) says more", message)


def _activations(model: nn.Module) -> torch.dtype | None:
    """The dtype of a language model's activations; ``None`` for other modules, whose layers each have their own."""
    embeddings = _embeddings(model, "get_input_embeddings")
    return None if embeddings is None else embeddings.weight.dtype


def _embeddings(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _head(model: nn.Module) -> str | None:
    head = _embeddings(model, "get_output_embeddings")
    return next((name for name, module in model.named_modules() if module is head), None)


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The decoder blocks with their names, even where some or their layers were replaced by modules of another kind."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(map(_is_block, module)):
            yield from ((f"{name}.{place}", block) for place, block in enumerate(module))
            return


def _is_block(module: nn.Module) -> bool:
    try:
        return all(module.get_submodule(name) is not None for name in (*PROJECTIONS, "input_layernorm"))
    except AttributeError:
        return False


def _taken(block: nn.Module) -> int:
    return int(getattr(block, "native_tokens", 0))


def _row(weight: Tensor, dtype: torch.dtype | None, features: int | None = None) -> Tensor:
    """One row of activations on the device of ``weight``; on the CPU if ``weight`` is not in memory."""
    place = "cpu" if weight.is_meta else weight.device
    return torch.zeros(1, 1, features or weight.shape[-1], dtype=dtype or weight.dtype, device=place)


def _block_row(block: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """One row of activations for a block, which may have lost its norm or the norm its weight."""
    weight = getattr(getattr(block, "input_layernorm", None), "weight", None)
    if weight is None:
        weight = next((each for each in block.parameters() if each.is_floating_point()), torch.empty(1))
    return _row(weight, dtype)


def _why_not_native(model: Any, block: Any, dtype: torch.dtype | None) -> str | None:
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None or block._compiled_call_impl is not None:
        return "torch.compile traces transformers' modules"
    for flag in ("output_hidden_states", "output_attentions"):
        if getattr(model.config, flag, False):
            return f"config.{flag} is on: transformers records what blocks do"
    x = _block_row(block, dtype)
    try:
        return decode.why_not(block, x, _rotation(model, block, x))
    except MosaicError as error:
        return str(error)


def _rotation(model: nn.Module, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding that the model makes for the first token."""
    for module in model.modules():
        rotary = getattr(module, "rotary_emb", None)
        if isinstance(rotary, nn.Module) and not any(buffer.is_meta for buffer in rotary.buffers()):
            cosine, sine = rotary.forward(x, torch.zeros(1, 1, dtype=torch.int64, device=x.device))
            return cosine, sine
    empty = x.new_zeros(1, 1, 1)  # another reason is found first
    return empty, empty


def _layer_way(name: str, layer: nn.Linear, dtype: torch.dtype | None, in_native_block: bool) -> LayerWay:
    if isinstance(layer, MosaicLinear):
        values = _NAMES.get(layer.weight.dtype, str(layer.weight.dtype)) if layer.scales is None else _int8(layer)
        kernel, reason = _packed_kernel(layer, dtype)
        return LayerWay(name, "packed", kernel, values, layer.density, reason)
    values = _NAMES.get(layer.weight.dtype, str(layer.weight.dtype))
    kind = type(layer)
    x = _row(layer.weight, dtype, layer.in_features)
    reason = None if in_native_block else dense.why_not(layer, x)
    if layer.weight.is_meta:
        reason = _OFFLOADED
    if kind is dense.DenseLinear and reason is None:
        return LayerWay(name, "dense", isa.level(), values, 1.0, _lower_level())
    if not x.is_cpu:  # where torch's own product is the fast one
        reason = None
    elif kind is nn.Linear and reason is None:
        reason = decode.NOT_PREPARED
    elif kind not in (nn.Linear, dense.DenseLinear):
        reason = f"a {kind.__qualname__} of {kind.__module__} is none of ours"
    return LayerWay(name, "torch", "torch", values, 1.0, reason)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OFFLOADED = "offloaded: its weight is brought into memory at every call"


def _int8(layer: MosaicLinear) -> str:
    assert layer.scales is not None  # for the type checker
    kind = "int8" if layer.scales.shape[1] == 1 else "int8-group"
    return f"{kind}, x rounded" if layer.quantize_activations else kind


def _packed_kernel(layer: MosaicLinear, dtype: torch.dtype | None) -> tuple[str, str | None]:
    """The kernel that multiplies one row by a packed weight, and why it is not a faster one."""
    arranged, device = layer.arranged, layer.bitmask.device
    if device.type == "meta":
        return "none", _OFFLOADED
    op = "sparse_linear" if layer.scales is None else "sparse_linear_int8"
    if arranged is not None:
        op = "tile_linear" if hasattr(arranged, "offsets") else "two_of_four_linear"
    try:
        backend = running(op, device)
    except MosaicError as error:
        return "none", str(error)
    if backend != "cpu":
        return backend, why_not_ours(op, device) if backend == "reference" else None
    held = [layer.bias] if layer.scales is not None else [layer.weight, layer.bias]
    if dtype is not None and any(each is not None and each.dtype is not dtype for each in held):
        return "none", f"a call fails: the activations are {dtype}, and the values or the bias are not"
    return isa.level(), _lower_level()


def _lower_level() -> str | None:
    level, best = isa.level(), cpu.BEST_ISA
    return None if level == best else f"this processor has {best}, and MOSAIC_ISA or set_isa keeps kernels to {level}"


def _notes(model: Any, has_blocks: bool, dtype: torch.dtype | None) -> Iterator[str]:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if has_blocks:
        yield "a native token is one token of one sequence, with a cache and without gradients, as generate() decodes"
        yield "prompts, batches, beams and torch.compile run transformers' modules with the layers above"
    elif kind is not None and kind not in SUPPORTED_MODEL_TYPES:
        yield f"blocks of '{kind}' run transformers' modules: native ones are {', '.join(SUPPORTED_MODEL_TYPES)}"
    elif kind is not None and any(isinstance(module, nn.ModuleList) for module in model.modules()):
        yield f"no decoder block as of a '{kind}' was found: all were replaced or wrapped, and none runs natively"
    layers = [module for module in model.modules() if type(module) is dense.DenseLinear]
    reasons = [_dense_prompt(layer, dtype) for layer in layers if not layer.weight.is_meta]
    if any(reasons):
        count = f"{len(reasons)} dense layer{'s' if len(reasons) > 1 else ''}"
        yield f"of a prompt of {_MANY_ROWS} tokens torch multiplies {count}{because(reasons)}"


def _dense_prompt(layer: nn.Linear, dtype: torch.dtype | None) -> str | None:
    return dense.why_not(layer, _row(layer.weight, dtype, layer.in_features).expand(1, _MANY_ROWS, -1))

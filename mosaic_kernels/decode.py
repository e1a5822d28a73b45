# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks that take one token in two native calls.

Between two of our kernels transformers runs some 60 small operators a block (norms, rotation, attention,
activation), which for one token cost what they do nearly all in Python and dispatch. A block of this module does
what they do natively (``csrc/cpu/block.cpp``), with transformers' cache updated in between, whenever one token of
one sequence is decoded on a CPU; it is the block it was made of for every other input, and where
hooks, gradients, a compiler or another attention implementation want to see what happens inside.

In turns with transformers' modules a token of a 1.1B model at 50 % took 51 ms instead of 65 (medians of six runs,
two threads, Zen 4, Nov 2026); what a token costs outside our kernels is in ``benchmarks/bench_generate.py``.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mosaic_kernels import attention, compat
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import VALUE_DTYPES
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import PROJECTIONS, SUPPORTED_MODEL_TYPES, ModelAdapter
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for

_ATTENTIONS = ("sdpa", attention.NAME)

logger = logging.getLogger(__name__)


class _Contents:
    """What dictionaries hold by some names, ``None`` where there is no such name; of tensors also where they are."""

    def __init__(self, found: Iterable[tuple[dict[str, Any], str]]) -> None:
        holders, names = zip(*found, strict=True)
        objects = tuple(holder.get(name) for holder, name in zip(holders, names, strict=True))
        # a layer reads a bitmask once, for its index
        at = [name != "bitmask" and isinstance(each, Tensor) for name, each in zip(names, objects, strict=True)]
        places = [cpu.address(each) if is_read else 0 for is_read, each in zip(at, objects, strict=True)]
        self._asked = holders, names, objects, struct.pack(f"{len(places)}Q", *places)

    def are_there(self) -> bool:
        return cpu.unchanged(*self._asked)


@dataclass(frozen=True)
class _Token:
    """A block as the native calls know it, for inputs of one dtype.

    Attributes:
        native: the calls; they read the parameters' memory by address.
        hidden, query_heads, key_heads, head_dim: its sizes.
        made_of: modules, parameters, numbers and the kind of attention.
        methods: that modules have no ``forward`` but their class's.
        hooks: of modules, by when they are called: before and after.
    """

    native: Any
    dtype: torch.dtype
    hidden: int
    query_heads: int
    key_heads: int
    head_dim: int
    made_of: _Contents
    methods: _Contents
    hooks: tuple[Sequence[Mapping[int, Any]], Sequence[Mapping[int, Any]]]

    def is_watched(self) -> bool:
        """Whether somebody wants to see what goes in or out of a module."""
        before, after = self.hooks
        if any(before) or _global_forward_hooks or _global_forward_pre_hooks:
            return True
        if any(after) and not all(compat.captures_nothing(hook) for hooks in after for hook in hooks.values()):
            return True
        return not self.methods.are_there()

    def takes(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> bool:
        if x.shape[-1] != self.hidden:
            return False
        return all(each.dtype is self.dtype and each.shape == (1, 1, self.head_dim) for each in rotation)

    def run(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        update: Callable[[Tensor, Tensor], Any],
    ) -> Tensor:
        """``x`` after the block.

        Args:
            x: ``[1, 1, hidden]``.
            rotation: cosines and sines, ``[1, 1, head_dim]``.
            mask: bool ``[1, 1, 1, tokens]``, true where a token is attended to; ``None``: to all.
            update: adds a key and a value ``[1, heads, 1, head_dim]`` to all before, and returns all.
        """
        threads, x = cpu.threads(), x.contiguous()
        cosine, sine = (each.contiguous() for each in rotation)
        query = x.new_empty(self.query_heads, self.head_dim)
        key, value = (x.new_empty(1, self.key_heads, 1, self.head_dim) for _ in range(2))
        self.native.input(
            x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(),
            threads,
        )  # fmt: skip
        keys, values = (_readable(found, self.dtype) for found in update(key, value))
        shape = keys.shape
        if values.shape != shape or shape != (1, self.key_heads, tokens := shape[2], self.head_dim):
            raise KernelError(
                f"the cache returned keys {list(shape)} and values {list(values.shape)} "
                f"for {list(key.shape)}: a block with {self.key_heads} key heads cannot read these"
            )
        if mask is not None and mask.shape[-1] != tokens:
            raise KernelError(f"the mask is of {mask.shape[-1]} tokens, and the cache returned {tokens}")
        out = torch.empty_like(x)
        strides = (keys.stride(1), keys.stride(2), values.stride(1), values.stride(2))
        self.native.output(
            x.data_ptr(), query.data_ptr(), keys.data_ptr(), values.data_ptr(), cpu.address(mask),
            tokens, strides, out.data_ptr(), threads,
        )  # fmt: skip
        return out


def _readable(cached: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values of a cache, which may hold them in another form."""
    if cached.dtype is not dtype:
        cached = cached.to(dtype)
    return cached if cached.stride(-1) == 1 else cached.contiguous()


def _made_for(block: Any, x: Tensor) -> _Token | None:
    """``None`` where some part of ``block`` is none that the native calls know."""
    attn, mlp = block.self_attn, block.mlp
    norms = [block.input_layernorm, block.post_attention_layernorm]
    if getattr(attn, "q_norm", None) is not None:
        norms += [attn.q_norm, attn.k_norm]
    home = type(block).__bases__[0].__module__
    for part in (attn, mlp, *norms):
        if type(part).__module__ != home or type(part).forward.__module__ != home:
            return None  # somebody's own
    if not compat.is_silu(mlp.act_fn):
        return None
    setting = compat.attention_setting(attn.config)
    if setting is None:
        return None  # whether it changes, nobody would see
    layers = [block.get_submodule(name) for name in PROJECTIONS]
    if not all(_is_readable(layer, x.dtype) for layer in layers) or not _fit(layers, norms, attn.head_dim, x):
        return None
    tensors = [layer.operands if isinstance(layer, MosaicLinear) else None for layer in layers]
    unused = 4 - len(norms)
    native = cpu.prepared_block(
        x.dtype,
        [_addresses(layer, found) for layer, found in zip(layers, tensors, strict=True)],
        [cpu.address(norm.weight) for norm in norms] + [0] * unused,
        [getattr(norm, compat.NORM_EPSILON) for norm in norms] + [0.0] * unused,
        attn.head_dim, attn.scaling,
    )  # fmt: skip
    parents = (block, attn, mlp)
    parts = [part for parent in parents for part in parent._modules.values()]
    made_of = [(parent._modules, name) for parent in parents for name in parent._modules]
    made_of += [(module._parameters, name) for module in (*layers, *norms) for name in module._parameters]
    made_of += [(part.__dict__, name) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    packed = [layer.__dict__ for layer in layers if isinstance(layer, MosaicLinear)]
    made_of += [(state, name) for state in packed for name in ("_index", "quantize_activations")]
    made_of += [(norm.__dict__, compat.NORM_EPSILON) for norm in norms]
    made_of += [(attn.__dict__, "scaling"), (attn.__dict__, "config"), setting]
    hooks = [part._forward_pre_hooks for part in parts], [part._forward_hooks for part in parts]
    query_heads, key_heads = (layer.out_features // attn.head_dim for layer in layers[:2])
    return _Token(
        native, x.dtype, x.shape[-1], query_heads, key_heads, attn.head_dim,
        _Contents(made_of), _Contents([(part.__dict__, "forward") for part in parts]), hooks,
    )  # fmt: skip


def _fit(layers: list[Any], norms: list[Any], head_dim: int, x: Tensor) -> bool:
    """Whether sizes are a decoder block's and norms those of ``x``."""
    hidden = x.shape[-1]
    query, key, value, output, gate, up, down = ((layer.in_features, layer.out_features) for layer in layers)
    fit = query[0] == key[0] == value[0] == gate[0] == up[0] == output[1] == down[1] == hidden
    fit = fit and key[1] == value[1] > 0 and output[0] == query[1] > 0 and gate[1] == up[1] == down[0] > 0
    fit = fit and head_dim % 2 == key[1] % head_dim == query[1] % key[1] == 0
    for norm, size in zip(norms, (hidden, hidden, head_dim, head_dim), strict=False):
        weight = getattr(norm, "weight", None)
        if not hasattr(norm, compat.NORM_EPSILON) or weight is None or weight.shape != (size,):
            return False
        if weight.dtype is not x.dtype or not weight.is_cpu or not weight.is_contiguous():
            return False
    return fit and all(_alike(layers[first:last]) for first, last in ((0, 3), (4, 6)))


def _alike(layers: list[Any]) -> bool:
    """Whether layers round their common input alike, and read it in the same order."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    kinds = {(layer.packed.weights, layer.quantize_activations) for layer in packed}
    return len(kinds | {("float", False)} if len(packed) < len(layers) else kinds) == 1


def _is_readable(layer: Any, dtype: torch.dtype) -> bool:
    """Whether native code may read a layer for an input of ``dtype``."""
    if type(layer) is DenseLinear:
        kinds = {dtype} if cpu.DENSE_ROWS else set()
    elif type(layer) is MosaicLinear:
        kinds = {dtype, torch.int8} if layer.scales is not None else {dtype}
    else:
        return False
    if any(not held.is_cpu or not held.is_contiguous() for held in layer._parameters.values() if held is not None):
        return False
    return layer.weight.dtype in kinds and (layer.bias is None or layer.bias.dtype is dtype)


def _addresses(layer: Any, operands: cpu.Operands | None) -> tuple[int, ...]:
    """What :func:`~mosaic_kernels.ops.cpu.prepared_block` takes of a layer."""
    values, scales, words, offsets, bias = operands or (layer.weight, None, None, None, layer.bias)
    return (
        cpu.address(values), cpu.address(words), cpu.address(offsets), cpu.address(bias), layer.in_features,
        layer.out_features, 0 if words is None else values.numel(), cpu.address(scales),
        0 if scales is None else scales.shape[1], int(getattr(layer, "quantize_activations", False)),
    )  # fmt: skip


def _token_of(block: Any, x: Tensor, rotation: tuple[Tensor, Tensor], options: dict[str, Any]) -> _Token | None:
    """The native calls for ``x``; ``None`` where it has to take the ordinary way.

    Args:
        options: everything the block was called with by name.
    """
    if x.shape[:-1] != (1, 1) or not x.is_cpu or x.dtype not in VALUE_DTYPES or block.training:
        return None
    if torch.is_grad_enabled() or is_recorded(x) or torch.is_autocast_enabled("cpu"):
        return None  # a cache may want gradients, too
    for name, option in options.items():
        if option is not None and option is not False and name not in block.usual_arguments:
            return None
    mask = options.get("attention_mask")
    if mask is not None and not (mask.dtype is torch.bool and mask.shape[:3] == (1, 1, 1) and mask.is_contiguous()):
        return None
    if kernel_for("sparse_linear", x) is not cpu.KERNELS["sparse_linear"]:
        return None
    token: _Token | None
    dtype, token = block.__dict__.get("_token") or (None, None)
    if dtype is not x.dtype or (token is not None and not token.made_of.are_there()):
        block.__dict__.pop("_token", None)  # and with it what the block itself let go
        if compat.attention_of(block.self_attn.config) not in _ATTENTIONS:
            return None
        token = _made_for(block, x)
        block.__dict__["_token"] = x.dtype, token
    if token is None or token.is_watched() or not token.takes(x, rotation):
        return None
    return token


def _one_token_class(base: type[nn.Module]) -> type[nn.Module]:
    """``base``, a decoder block of transformers, that takes one token natively."""
    cache_name = compat.cache_name(base)

    class Block(base):  # type: ignore[misc, valid-type]
        usual_arguments = compat.block_arguments(base)
        native_calls = 0  # tokens that this block has taken natively

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache, rotation = kwargs.get(cache_name), kwargs.get("position_embeddings")
            if not (args or cache is None or rotation is None or is_dynamo_compiling()):
                token = _token_of(self, hidden_states, rotation, kwargs)
                if token is not None:
                    place = self.self_attn.layer_idx
                    after = token.run(
                        hidden_states, rotation, kwargs.get("attention_mask"),
                        lambda key, value: cache.update(key, value, place),
                    )  # fmt: skip
                    self.__dict__["native_calls"] = self.native_calls + 1
                    return after
            return super().forward(hidden_states, *args, **kwargs)

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.pop("_token", None)
            return super()._apply(*args, **kwargs)

        def __getstate__(self) -> dict[str, Any]:
            # the calls have addresses, and what another block has taken is not a copy's affair
            return {name: value for name, value in self.__dict__.items() if name not in ("_token", "native_calls")}

    # by its old name, which transformers and accelerate look for, and where pickle finds it
    Block.__name__ = Block.__qualname__ = base.__name__
    return Block


def __getattr__(name: str) -> type[nn.Module]:
    family = {f"{each.capitalize()}DecoderLayer": each for each in SUPPORTED_MODEL_TYPES}.get(name)
    if family is None:  # and transformers stays unread
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _one_token_class(compat.decoder_layer(family))
    return made


def take_tokens_natively(block: nn.Module) -> None:
    """Make a decoder block of a supported model one of this module's; again, after its layers were replaced.

    Where the installed transformers is not known well enough (:func:`mosaic_kernels.compat.why_not_native`) the block
    stays what it is, and a warning says so once.
    """
    block.__dict__.pop("_token", None)
    kind = type(block)
    if compat.decoder_family(kind) not in SUPPORTED_MODEL_TYPES:
        return
    why_not = compat.why_not_native(kind)
    if why_not is None:
        block.__class__ = globals().get(kind.__name__) or __getattr__(kind.__name__)
    else:
        _warn_once(why_not)


@functools.cache
def _warn_once(why_not: str) -> None:
    logger.warning("decoder blocks run through transformers' modules, not natively: %s", why_not)


def native_tokens(model: nn.Module) -> list[int]:
    """Tokens that each decoder block of ``model`` has taken natively; 0 for a block that never does.

    A block counts in its attribute ``native_calls``; copies start at 0.
    """
    return [getattr(block.module, "native_calls", 0) for block in ModelAdapter.of(model).blocks]

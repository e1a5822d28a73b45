# SPDX-License-Identifier: Apache-2.0
"""Prepares the native calls of one decoder block, and finds reasons why a block cannot have them.

:mod:`mosaic_kernels.decode` uses this at every token; :mod:`mosaic_kernels.explain` shows the reasons.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mosaic_kernels import compat
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import KernelError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import PROJECTIONS
from mosaic_kernels.ops import cpu


class Contents:
    """Remembers entries of dictionaries (``None``: no such key) and the addresses of tensors among them.

    :meth:`are_there` tells if all are still the same. With ``nothing=True``, it tells if no key has an entry.
    """

    def __init__(self, found: Iterable[tuple[dict[str, Any], str]], *, nothing: bool = False) -> None:
        holders, names = zip(*found, strict=True)
        objects = tuple(None if nothing else holder.get(name) for holder, name in zip(holders, names, strict=True))
        # a layer reads its bitmask only once, to build its index, so its address does not matter
        at = [name != "bitmask" and isinstance(each, Tensor) for name, each in zip(names, objects, strict=True)]
        places = [cpu.address(each) if is_read else 0 for is_read, each in zip(at, objects, strict=True)]
        self._asked = holders, names, objects, struct.pack(f"{len(places)}Q", *places)

    def are_there(self) -> bool:
        return cpu.unchanged(*self._asked)


@dataclass(frozen=True)
class Token:
    """The native calls of a block for inputs of one dtype, and the state for which they are valid.

    Attributes:
        native: the calls; they read parameters by their address in memory.
        hidden, query_heads, key_heads, head_dim: the sizes of the block.
        made_of: the modules, parameters, numbers and attention implementation that the calls were made for.
        methods: the check that no module has a ``forward`` other than that of its class.
        hooks: the modules' hooks that run before ``forward``, and those that run after it.
        kept: the tensors that the calls read, not the parameters: during a call, another thread may give a parameter
            other memory.
    """

    native: Any
    dtype: torch.dtype
    hidden: int
    query_heads: int
    key_heads: int
    head_dim: int
    made_of: Contents
    methods: Contents
    hooks: tuple[Sequence[Mapping[int, Any]], Sequence[Mapping[int, Any]]]
    kept: list[Tensor]

    def is_watched(self) -> bool:
        """True if a hook or a replaced ``forward`` has to be called for a module of the block."""
        before, after = self.hooks
        if any(before) or _global_forward_hooks or _global_forward_pre_hooks:
            return True
        if any(after) and not all(compat.captures_nothing(hook) for hooks in after for hook in hooks.values()):
            return True
        return not self.methods.are_there()

    def takes(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> bool:
        """True if ``x`` and the rotary embedding have the sizes and the dtype of this block."""
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
    """Keys or values of a cache as native code reads them: in ``dtype``, and contiguous in the last dimension."""
    if cached.dtype is not dtype:
        cached = cached.to(dtype)
    return cached if cached.stride(-1) == 1 else cached.contiguous()


def _parts(block: Any) -> dict[str, nn.Module]:
    """The modules that the native calls replace, by their names in the block."""
    parents = {"": block, "self_attn.": block.self_attn, "mlp.": block.mlp}
    return {prefix + name: part for prefix, parent in parents.items() for name, part in parent._modules.items()}


def _held(block: Any) -> list[tuple[dict[str, Any], str]]:
    """The dictionaries and keys that hold a block's modules, their parameters and the state of its packed layers."""
    parts = _parts(block).values()
    parents = (block, block.self_attn, block.mlp)
    held: list[tuple[dict[str, Any], str]] = [(parent._modules, name) for parent in parents for name in parent._modules]
    held += [(part._parameters, name) for part in parts for name in part._parameters]
    packed = [part.__dict__ for part in parts if isinstance(part, MosaicLinear)]
    return held + [(state, name) for state in packed for name in ("_parameters", "_index", "quantize_activations")]


def contents(block: Any) -> Contents:
    """Remembers the parts of a block: while they are the same, so is the reason why it has no native calls."""
    return Contents(_held(block))


def watchers(block: Any) -> str:
    """Names the hook or the replaced ``forward`` that makes :meth:`Token.is_watched` true."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "hooks on every module of torch (register_module_forward_hook)"
    for name, part in _parts(block).items():
        if part._forward_pre_hooks or not all(map(compat.captures_nothing, part._forward_hooks.values())):
            return f"hooks on {name}"
        if "forward" in part.__dict__:
            return f"the forward of {name} was replaced (accelerate does so to move weights)"
    return "hooks that are gone by now"


def _norms(block: Any) -> dict[str, Any]:
    attn = block.self_attn
    found = {name: getattr(block, name) for name in ("input_layernorm", "post_attention_layernorm")}
    if getattr(attn, "q_norm", None) is not None:
        found |= {"self_attn.q_norm": attn.q_norm, "self_attn.k_norm": attn.k_norm}
    return found


def _layers(block: Any) -> dict[str, Any]:
    return {name: block.get_submodule(name) for name in PROJECTIONS}


def why_none(block: Any, x: Tensor) -> str | None:
    """The first reason why the native calls cannot run ``block`` for inputs like ``x``; ``None`` if they can."""
    attn, mlp = block.self_attn, block.mlp
    home = type(block).__bases__[0].__module__
    for name, part in {"self_attn": attn, "mlp": mlp, **_norms(block)}.items():
        kind = type(part)
        if kind.__module__ != home or kind.forward.__module__ != home:
            return f"{name} is not transformers' own: it is a {kind.__qualname__} of {kind.forward.__module__}"
    if not compat.is_silu(mlp.act_fn):
        return f"the activation is {type(mlp.act_fn).__name__}: the native block knows SiLU"
    if compat.attention_setting(attn.config) is None:
        return "this transformers version stores the attention implementation elsewhere, so a change would be missed"
    for name, layer in _layers(block).items():
        if reason := _unreadable(layer, x.dtype):
            return f"{name} {reason}"
    return _misfit(_layers(block), _norms(block), attn.head_dim, x)


def made_for(block: Any, x: Tensor) -> Token:
    """Make the native calls of a block for which :func:`why_none` returned ``None``.

    If another thread replaces weights meanwhile, ``made_of.are_there()`` of the result is false.
    """
    attn, layers, norms = block.self_attn, list(_layers(block).values()), list(_norms(block).values())
    setting = compat.attention_setting(attn.config)
    assert setting is not None  # for the type checker
    for layer in layers:
        if isinstance(layer, MosaicLinear):
            layer.operands_of(layer._parameters)  # may build an index
    parts = list(_parts(block).values())
    held = _held(block)
    held += [(part.__dict__, name) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    held += [(norm.__dict__, compat.NORM_EPSILON) for norm in norms]
    held += [(attn.__dict__, "scaling"), (attn.__dict__, "config"), setting]
    made_of = Contents(held)  # before anything is read, so that later replacements by other threads are noticed
    tensors = [[None if each is None else each.detach() for each in _operands(layer)] for layer in layers]
    weights = [norm.weight.detach() for norm in norms]
    unused = 4 - len(norms)
    native = cpu.prepared_block(
        x.dtype,
        [_addresses(layer, *found) for layer, found in zip(layers, tensors, strict=True)],
        [weight.data_ptr() for weight in weights] + [0] * unused,
        [getattr(norm, compat.NORM_EPSILON) for norm in norms] + [0.0] * unused,
        attn.head_dim, attn.scaling,
    )  # fmt: skip
    hooks = [part._forward_pre_hooks for part in parts], [part._forward_hooks for part in parts]
    query_heads, key_heads = (layer.out_features // attn.head_dim for layer in layers[:2])
    return Token(
        native, x.dtype, x.shape[-1], query_heads, key_heads, attn.head_dim,
        made_of, Contents([(part.__dict__, "forward") for part in parts], nothing=True), hooks,
        weights + [each for found in tensors for each in found if each is not None],
    )  # fmt: skip


def _operands(layer: Any) -> cpu.Operands | tuple[Tensor, None, None, None, Tensor | None]:
    """Values, scales, words, offsets and bias of a layer; the weight and the bias of a dense one."""
    return layer.operands if isinstance(layer, MosaicLinear) else (layer.weight, None, None, None, layer.bias)


def _misfit(layers: dict[str, Any], norms: dict[str, Any], head_dim: int, x: Tensor) -> str | None:
    """Why the sizes of layers or norms do not fit each other or ``x``; ``None`` if all fit."""
    hidden = x.shape[-1]
    query, key, value, output, gate, up, down = ((layer.in_features, layer.out_features) for layer in layers.values())
    fit = query[0] == key[0] == value[0] == gate[0] == up[0] == output[1] == down[1] == hidden
    fit = fit and key[1] == value[1] > 0 and output[0] == query[1] > 0 and gate[1] == up[1] == down[0] > 0
    if not (fit and head_dim % 2 == key[1] % head_dim == query[1] % key[1] == 0):
        return "the sizes of its projections are not those of one decoder block"
    for (name, norm), size in zip(norms.items(), (hidden, hidden, head_dim, head_dim), strict=False):
        weight = getattr(norm, "weight", None)
        if not hasattr(norm, compat.NORM_EPSILON) or weight is None or weight.shape != (size,):
            return f"{name} is not an RMSNorm of {size} features"
        if weight.dtype is not x.dtype:
            return f"{name} is {weight.dtype} and the activations are {x.dtype}"
        if not weight.is_cpu or not weight.is_contiguous():
            return f"the weight of {name} is {_elsewhere(weight)}"
    names = list(layers)
    for alike in (names[:3], names[4:6]):
        if not _alike([layers[name] for name in alike]):
            return f"layers of mixed kinds share an input: {', '.join(alike)}"
    return None


def _alike(layers: list[Any]) -> bool:
    """True if layers that share an input round it in the same way and read it in the same order."""
    packed = [layer for layer in layers if isinstance(layer, MosaicLinear)]
    kinds = {(layer.weights, layer.quantize_activations) for layer in packed}
    return len(kinds | {("float", False)} if len(packed) < len(layers) else kinds) == 1


def _unreadable(layer: Any, dtype: torch.dtype) -> str | None:
    """Why native code cannot read a layer for an input of ``dtype``; ``None`` if it can."""
    kind = type(layer)
    if kind is DenseLinear:
        if not cpu.DENSE_ROWS:
            return "is dense, and this instruction set has no dense kernel"
        kinds = {dtype}
    elif kind is MosaicLinear:
        kinds = {dtype, torch.int8} if layer.scales is not None else {dtype}
    elif kind is nn.Linear:
        return "is an nn.Linear that is not prepared: call mk.prepare_inference(model)"
    else:
        return f"was replaced by a module that is none of ours: a {kind.__qualname__} of {kind.__module__}"
    for held in layer._parameters.values():
        if held is not None and not (held.is_cpu and held.is_contiguous()):
            return f"is {_elsewhere(held)}"
    if layer.weight.dtype not in kinds:
        return f"has {layer.weight.dtype} values and the activations are {dtype}"
    if layer.bias is not None and layer.bias.dtype is not dtype:
        return f"has a {layer.bias.dtype} bias and the activations are {dtype}"
    return None


def _elsewhere(tensor: Tensor) -> str:
    """Describes why native code cannot read a tensor in place."""
    if tensor.is_meta:
        return "not in memory (offloaded, or not loaded yet)"
    return "not contiguous in memory" if tensor.is_cpu else f"on {tensor.device}"


def _addresses(
    layer: Any, values: Any, scales: Tensor | None, words: Tensor | None, offsets: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """Addresses and sizes of a layer, as :func:`~mosaic_kernels.ops.cpu.prepared_block` takes them."""
    return (
        cpu.address(values), cpu.address(words), cpu.address(offsets), cpu.address(bias), layer.in_features,
        layer.out_features, 0 if words is None else values.numel(), cpu.address(scales),
        0 if scales is None else scales.shape[1], int(getattr(layer, "quantize_activations", False)),
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks that take one token in two native calls.

Between two of our kernels transformers runs some 60 small operators a block (norms, rotation, attention,
activation), which for one token cost what they do nearly all in Python and dispatch. A block of this module does
what they do natively (``csrc/cpu/block.cpp``), with transformers' cache updated in between, whenever one token of
one sequence is decoded on a CPU without a mask; it is the block it was made of for every other input, and where
hooks, gradients, a compiler or another attention implementation want to see what happens inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mosaic_kernels import attention
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import PROJECTIONS, SUPPORTED_MODEL_TYPES
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for

_ATTENTIONS = ("sdpa", attention.NAME)


@dataclass(frozen=True)
class _Token:
    """A block as the native calls know it, for inputs of one dtype.

    Attributes:
        native: the calls; they read the parameters' memory by address.
        parameters: each one's place in its module, itself, and its address.
        modules: each one's place in its parent, and itself.
        index: what the bits were made into, kept for as long as it is read.
    """

    native: Any
    dtype: torch.dtype
    sizes: tuple[int, int]  # query and key heads
    head_dim: int
    parameters: list[tuple[dict[str, nn.Parameter | None], str, Tensor | None, int]]
    modules: list[tuple[dict[str, nn.Module | None], str, nn.Module]]
    index: list[object]

    def is_watched(self) -> bool:
        """Whether somebody wants to see what goes in or out of a module."""
        for _, _, module in self.modules:
            state = module.__dict__
            if "forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"]:
                return True
        return bool(_global_forward_hooks or _global_forward_pre_hooks)

    def is_current(self) -> bool:
        """Whether every parameter and module is the one, and where it was."""
        for parents, name, module in self.modules:
            if parents.get(name) is not module:
                return False
        for held, name, parameter, place in self.parameters:
            now = held.get(name)
            if now is not parameter or (now is not None and now.data_ptr() != place):
                return False
        return True

    def trains(self) -> bool:
        return any(parameter is not None and parameter.requires_grad for _, _, parameter, _ in self.parameters)

    def run(self, x: Tensor, rotation: tuple[Tensor, Tensor], update: Callable[[Tensor, Tensor], Any]) -> Tensor:
        threads, x = cpu.threads(), x.contiguous()
        cosine, sine = (each.contiguous() for each in rotation)
        queries, keys = self.sizes
        query = x.new_empty(queries, self.head_dim)
        key, value = x.new_empty(1, keys, 1, self.head_dim), x.new_empty(1, keys, 1, self.head_dim)
        self.native.input(
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            threads,
        )
        all_keys, all_values = (_readable(found, self.dtype) for found in update(key, value))
        out = torch.empty_like(x)
        strides = (all_keys.stride(1), all_keys.stride(2), all_values.stride(1), all_values.stride(2))
        self.native.output(
            x.data_ptr(), query.data_ptr(), all_keys.data_ptr(), all_values.data_ptr(), all_keys.shape[2], strides,
            out.data_ptr(), threads,
        )  # fmt: skip
        return out


def _readable(cached: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values of a cache, which may hold them in another form."""
    cached = cached.to(dtype)
    return cached if cached.stride(-1) == 1 else cached.contiguous()


def _made_for(block: nn.Module, x: Tensor) -> _Token | None:
    """``None`` where some part of ``block`` is none that the native calls know."""
    home, attn, mlp = type(block).__bases__[0].__module__, block.self_attn, block.mlp
    norms = [block.input_layernorm, block.post_attention_layernorm]
    norms += [norm for norm in (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)) if norm is not None]
    layers = [block.get_submodule(name) for name in PROJECTIONS]
    if any(type(module).__module__ != home for module in (attn, mlp, *norms)) or len(norms) == 3:
        return None
    if not all(isinstance(norm, nn.Module) and hasattr(norm, "variance_epsilon") for norm in norms):
        return None
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    takes_dense = cpu.DENSE_ROWS and x.dtype is torch.bfloat16
    if not all(type(layer) is MosaicLinear or (takes_dense and type(layer) is DenseLinear) for layer in layers):
        return None
    head_dim = attn.head_dim
    queries, keys = (layer.out_features // head_dim for layer in layers[:2])
    if not queries or not keys or queries % keys or not layers[4].out_features or head_dim % 2:
        return None
    modules, index = [(block._modules, name, module) for name, module in block.named_children()], []
    for parent in (attn, mlp):
        modules += [(parent._modules, name, module) for name, module in parent.named_children()]
    described = []
    for layer in layers:
        found = _described(layer, x.dtype)
        if found is None:
            return None
        described.append(found[0])
        index.append(found[1])
    if not all(norm.weight.dtype is x.dtype and norm.weight.is_cpu and norm.weight.is_contiguous() for norm in norms):
        return None
    places = [
        (module._parameters, name, parameter, cpu.address(parameter))
        for module in (*layers, *norms)
        for name, parameter in module._parameters.items()
    ]
    unused = 4 - len(norms)
    native = cpu.prepared_block(
        described,
        [cpu.address(norm.weight) for norm in norms] + [0] * unused,
        [norm.variance_epsilon for norm in norms] + [0.0] * unused,
        head_dim, attn.scaling, x.dtype,
    )  # fmt: skip
    return _Token(native, x.dtype, (queries, keys), head_dim, places, modules, index)


def _described(layer: Any, dtype: torch.dtype) -> tuple[tuple[int, ...], object] | None:
    """A layer's addresses and sizes, and the tensors among these that no parameter holds."""
    values, scales, words, offsets = layer.weight, None, None, None
    if isinstance(layer, MosaicLinear):
        if not layer.bitmask.is_cpu:
            return None
        values, scales, words, offsets, _ = layer.operands
    tensors = [tensor for tensor in (values, scales, layer.bias) if tensor is not None]
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    kinds = {tensor.dtype for tensor in (values, layer.bias) if tensor is not None} - {torch.int8}
    if kinds - {dtype}:
        return None
    return (
        cpu.address(values), cpu.address(words), cpu.address(offsets), cpu.address(layer.bias), layer.in_features,
        layer.out_features, values.numel() if words is not None else 0, cpu.address(scales),
        0 if scales is None else scales.shape[1], int(getattr(layer, "quantize_activations", False)),
    ), (words, offsets)  # fmt: skip


def _token_of(block: Any, x: Tensor, rotation: tuple[Tensor, Tensor], options: dict[str, Any]) -> _Token | None:
    """The native calls for ``x``; ``None`` where it has to take the ordinary way."""
    if x.shape[:-1] != (1, 1) or not x.is_cpu or is_recorded(x) or block.training:
        return None
    if any(option is not None and option is not False for option in options.values()):
        return None
    if block.self_attn.config._attn_implementation not in _ATTENTIONS:
        return None
    if kernel_for("sparse_linear", x) is not cpu.KERNELS["sparse_linear"]:
        return None
    dtype, token = block.__dict__.get("_token") or (None, None)
    if dtype is not x.dtype or (token is not None and not token.is_current()):
        token = _made_for(block, x)
        block.__dict__["_token"] = x.dtype, token
    if token is None or token.is_watched() or (torch.is_grad_enabled() and token.trains()):
        return None
    if any(each.dtype is not x.dtype or each.shape != (1, 1, token.head_dim) for each in rotation):
        return None
    return token


def _one_token_class(base: type[nn.Module]) -> type[nn.Module]:
    """``base``, a decoder block of transformers, that takes one token natively."""

    class Block(base):  # type: ignore[misc, valid-type]
        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = False,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **kwargs: Any,
        ) -> Any:
            if attention_mask is None and past_key_values is not None and not is_dynamo_compiling():
                rotation = position_embeddings
                token = None if rotation is None else _token_of(self, hidden_states, rotation, kwargs)
                if token is not None and rotation is not None:
                    place = self.self_attn.layer_idx
                    return token.run(
                        hidden_states, rotation, lambda key, value: past_key_values.update(key, value, place)
                    )
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.pop("_token", None)
            return super()._apply(*args, **kwargs)

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in self.__dict__.items() if name != "_token"}  # it has addresses

    # by its old name, which transformers and accelerate look for, and where pickle finds it
    Block.__name__ = Block.__qualname__ = base.__name__
    return Block


def __getattr__(name: str) -> type[nn.Module]:
    for family in SUPPORTED_MODEL_TYPES:
        home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if name == f"{home.__name__.rpartition('.modeling_')[2].capitalize()}DecoderLayer":
            globals()[name] = _one_token_class(getattr(home, name))
            return globals()[name]  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def take_tokens_natively(block: nn.Module) -> None:
    """Make a decoder block of a supported model one of this module's; again, after its layers were replaced."""
    block.__dict__.pop("_token", None)
    kind = type(block)
    if kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("DecoderLayer"):
        block.__class__ = globals().get(kind.__name__) or __getattr__(kind.__name__)

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

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from mosaic_kernels import attention, compat, siblings
from mosaic_kernels.format import VALUE_DTYPES
from mosaic_kernels.models import STAGES, SUPPORTED_MODEL_TYPES, ModelAdapter
from mosaic_kernels.native_block import Token as _Token
from mosaic_kernels.native_block import contents, made_for, watchers, why_none
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, kernel_for, why_not_ours

_ATTENTIONS = ("sdpa", attention.NAME)
# Projections of a block that read the same input.
SAME_INPUT = tuple(stage for stage in STAGES if len(stage) > 1)

# Reasons why a call takes transformers' modules that depend on the call and not on the block.
SEVERAL_ROWS = "more than one token or sequence"
GRADIENTS = "gradients are enabled"
TRAINING = "the model is in training mode: call model.eval()"
NOT_PREPARED = "not prepared: call mk.prepare_inference(model)"
REPLACED = "another thread replaces weights of the block"
NO_DTYPE = "activations are neither fp32 nor bf16 nor fp16"
# For these three, _in_words() makes a longer text.
WATCHED = "hooks"
ATTENTION = "another attention implementation"
NO_KERNELS = "another backend"


_NOT_LOOKED_AT: tuple[Any, str, Any] = (None, "", None)


def _token_of(block: Any, x: Tensor, rotation: tuple[Tensor, Tensor], options: dict[str, Any]) -> _Token | str:
    """The native calls for ``x``, or the first reason why ``x`` has to take transformers' modules.

    This runs at every token, so it formats no text: reasons are constants, or were made when the block was examined.

    Args:
        options: all keyword arguments of the call.
    """
    if x.shape[:-1] != (1, 1):
        return SEVERAL_ROWS
    if not x.is_cpu:
        return "the device is not a CPU"
    if x.dtype not in VALUE_DTYPES:
        return NO_DTYPE
    if block.training:
        return TRAINING
    if torch.is_grad_enabled():
        return GRADIENTS  # a cache may want them, too
    if is_recorded(x) or torch.is_autocast_enabled("cpu"):
        return "a tracer, a function transform or autocast is active"
    for name, option in options.items():
        if option is not None and option is not False and name not in block.usual_arguments:
            return "an option was passed that only transformers' modules know, such as output_attentions"
    mask = options.get("attention_mask")
    if mask is not None and not (mask.dtype is torch.bool and mask.shape[:3] == (1, 1, 1) and mask.is_contiguous()):
        return "the attention mask is not a boolean mask for one token"
    if kernel_for("sparse_linear", x) is not cpu.KERNELS["sparse_linear"]:
        return NO_KERNELS
    token: _Token | str
    dtype, token, made_of = block.__dict__.get("_token") or _NOT_LOOKED_AT
    if dtype is not x.dtype or not made_of.are_there():
        block.__dict__.pop("_token", None)  # and with it what the block itself let go
        token = _why_none(block, x) or made_for(block, x)
        if type(token) is _Token and not token.made_of.are_there():
            return REPLACED
        if token is not ATTENTION:
            block.__dict__["_token"] = x.dtype, token, token.made_of if type(token) is _Token else contents(block)
    if type(token) is not _Token:
        return token
    if token.is_watched():
        return WATCHED
    return token if token.takes(x, rotation) else "the rotary embedding has another size or dtype than the heads"


def _why_none(block: Any, x: Tensor) -> str | None:
    """Why a block can have no native calls at all; ``None`` if it can."""
    return ATTENTION if compat.attention_of(block.self_attn.config) not in _ATTENTIONS else why_none(block, x)


def why_not(block: Any, x: Tensor, rotation: tuple[Tensor, Tensor], **options: Any) -> str | None:
    """Why one token takes transformers' modules in this block, as a text; ``None`` if it runs natively.

    The block makes the same decision at every call.

    Args:
        block: a decoder block.
        x, rotation, options: the arguments of the call; see :meth:`_Token.run`.
    """
    return _unknown(block) or _in_words(_token_of(block, x, rotation, options), block, x)


def why_never(block: Any, x: Tensor) -> str | None:
    """Like :func:`why_not`, but ignores what changes between calls: training mode, gradients, hooks, options."""
    if unknown := _unknown(block):
        return unknown
    if x.dtype not in VALUE_DTYPES:
        return NO_DTYPE
    if kernel_for("sparse_linear", x) is not cpu.KERNELS["sparse_linear"]:
        return _in_words(NO_KERNELS, block, x)
    return _in_words(_why_none(block, x), block, x)


def _unknown(block: Any) -> str | None:
    """Why ``block`` is not an instance of one of this module's classes; ``None`` if it is."""
    kind = type(block)
    if hasattr(kind, "usual_arguments"):
        return None
    if compat.decoder_family(kind) not in SUPPORTED_MODEL_TYPES:
        return f"a {kind.__qualname__} of {kind.__module__} is no decoder block that is known"
    return compat.why_not_native(kind) or NOT_PREPARED


def _in_words(found: _Token | str | None, block: Any, x: Tensor) -> str | None:
    """The text of a reason from :func:`_token_of`, with details that the constants lack."""
    if found is None or type(found) is _Token:
        return None
    if found is WATCHED:
        return watchers(block)
    if found is ATTENTION:
        name = compat.attention_of(block.self_attn.config)
        return f"the attention implementation is {name}: call model.set_attn_implementation('sdpa')"
    if found is NO_KERNELS:
        return why_not_ours("sparse_linear", x.device)
    return str(found)


def _one_token_class(base: type[nn.Module]) -> type[nn.Module]:
    """``base``, a decoder block of transformers, that takes one token natively."""
    cache_name = compat.cache_name(base)

    class Block(base):  # type: ignore[misc, valid-type]
        usual_arguments = compat.block_arguments(base)
        native_tokens = 0  # tokens that this block has taken natively

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache, rotation = kwargs.get(cache_name), kwargs.get("position_embeddings")
            if not (args or cache is None or rotation is None or is_dynamo_compiling()):
                token = _token_of(self, hidden_states, rotation, kwargs)
                if type(token) is _Token:
                    place = self.self_attn.layer_idx
                    after = token.run(
                        hidden_states, rotation, kwargs.get("attention_mask"),
                        lambda key, value: cache.update(key, value, place),
                    )  # fmt: skip
                    self.__dict__["native_tokens"] = self.native_tokens + 1
                    return after
            return super().forward(hidden_states, *args, **kwargs)

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.pop("_token", None)
            return super()._apply(*args, **kwargs)

        def _load_from_state_dict(self, *args: Any) -> None:
            self.__dict__.pop("_token", None)  # it holds the old weights
            super()._load_from_state_dict(*args)

        def __getstate__(self) -> dict[str, Any]:
            # native calls hold addresses of this block's tensors, and a copy starts its count at 0
            own = {name: value for name, value in self.__dict__.items() if name not in ("_token", "native_tokens")}
            return {**own, "_together": [names for names in SAME_INPUT if _siblings_of(self, names)]}

        def __setstate__(self, state: dict[str, Any]) -> None:
            together = state.pop("_together", ())
            super().__setstate__(state)
            for names in together:
                siblings.join(self.get_submodule(name) for name in names)

    # by its old name, which transformers and accelerate look for, and where pickle finds it
    Block.__name__ = Block.__qualname__ = base.__name__
    return Block


def _siblings_of(block: nn.Module, names: tuple[str, ...]) -> bool:
    """True if these projections of a block run in one dispatch."""
    found = {id(each) for name in names if (each := getattr(block.get_submodule(name), "siblings", None)) is not None}
    return len(found) == 1


def join_siblings(block: nn.Module) -> None:
    """Let the projections of a block that read the same input run together, where they are packed alike."""
    for names in SAME_INPUT:
        siblings.join(block.get_submodule(name) for name in names)


def __getattr__(name: str) -> type[nn.Module]:
    family = {f"{each.capitalize()}DecoderLayer": each for each in SUPPORTED_MODEL_TYPES}.get(name)
    if family is None:  # and transformers stays unread
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _one_token_class(compat.decoder_layer(family))
    return made


def take_tokens_natively(block: nn.Module) -> None:
    """Let a decoder block of a supported model take tokens natively; call it again after replacing the block's layers.

    If the installed transformers lacks something that this needs (:func:`mosaic_kernels.compat.why_not_native`), the
    block stays as it is, and :func:`why_not` gives the reason.
    """
    block.__dict__.pop("_token", None)
    kind = type(block)
    if compat.decoder_family(kind) not in SUPPORTED_MODEL_TYPES:
        return
    if compat.why_not_native(kind) is None:
        block.__class__ = globals().get(kind.__name__) or __getattr__(kind.__name__)


def native_tokens(model: nn.Module) -> list[int]:
    """The number of tokens that each decoder block of ``model`` has taken natively.

    A block counts in its attribute ``native_tokens``; copies start at 0.
    """
    return [getattr(block.module, "native_tokens", 0) for block in ModelAdapter.of(model).blocks]

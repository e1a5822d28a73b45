# SPDX-License-Identifier: Apache-2.0
"""Registers the operators with torch: their schemas, backends and fake tensors, and autograd for linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.device import is_slow
from mosaic_kernels.errors import KernelError
from mosaic_kernels.format import dequantize
from mosaic_kernels.ops import cpu, cuda, reference, tensor_cores, triton
from mosaic_kernels.ops import select as _select
from mosaic_kernels.semistructured import TWO_OF_FOUR_WORDS
from mosaic_kernels.tiles import step_counts, tile_counts

_SCHEMAS = {
    "sparse_linear": "(Tensor x, Tensor values, Tensor words, Tensor offsets, Tensor? bias, int in_features) -> Tensor",
    "sparse_linear_int8": "(Tensor x, Tensor values, Tensor scales, Tensor words, Tensor offsets, Tensor? bias, "
    "int in_features, bool quantize_x) -> Tensor",
    "dense_linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "tile_linear": "(Tensor x, Tensor tiles, Tensor offsets, Tensor? bias, int out_features, int in_features, "
    "int largest_step) -> Tensor",
    "pack_tiles": "(Tensor weight, Tensor? keep=None) -> (Tensor tiles, Tensor offsets)",
    "expand_tiles": "(Tensor tiles, Tensor offsets, int rows, int columns) -> Tensor",
    "two_of_four_linear": "(Tensor x, Tensor tiles, Tensor? bias, int out_features, int in_features) -> Tensor",
    "pack_two_of_four": "(Tensor weight, Tensor? keep=None) -> Tensor",
    "expand_two_of_four": "(Tensor tiles, int rows, int columns, ScalarType dtype) -> Tensor",
    "pack": "(Tensor weight, Tensor? keep=None) -> (Tensor values, Tensor bitmask)",
    "unpack": "(Tensor values, Tensor bitmask, int in_features) -> Tensor",
    "outlier_stats": "(Tensor weight, Tensor column_norms, float[] alphas) -> (Tensor score_sum, Tensor counts)",
    "column_square_sums": "(Tensor x) -> Tensor",
    "select": "(Tensor scores, Tensor keep, str scope) -> Tensor",
    "score_select": "(Tensor weight, Tensor column_norms, Tensor keep, str scope) -> Tensor",
    "score_pack": "(Tensor weight, Tensor column_norms, Tensor keep, str scope) -> (Tensor values, Tensor bitmask)",
    "obs_block": "(Tensor weight, Tensor factor, Tensor keep, int n, int m) -> (Tensor, Tensor, Tensor)",
    "admm_step": "(Tensor(a!) proposal, Tensor keep, Tensor gradient, float penalty) -> Tensor",
    "cg_step": "(Tensor(a!) solution, Tensor(b!) residual, Tensor(c!) direction, Tensor(d!) energy, Tensor image, "
    "Tensor keep) -> ()",
}

_select.register(_select.Backend("cuda", ("cuda",), {**cuda.KERNELS, **tensor_cores.KERNELS}, cuda.why_not))
_select.register(_select.Backend("cpu", ("cpu",), cpu.KERNELS, cpu.why_not))
_select.register(_select.Backend("triton", triton.DEVICES, triton.KERNELS, triton.why_not))
_select.register(
    _select.Backend("reference", ("cpu", "cuda"), {op: getattr(reference, op) for op in _SCHEMAS}, lambda: None)
)


def _run(op: str) -> Callable[..., Any]:
    def run(first: Tensor, *rest: Any) -> Any:
        return _select.kernel(op, first.device)(first, *rest)

    return run


_library = torch.library.Library("mosaic", "DEF")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_op, _run(_op), "CompositeExplicitAutograd")


# Arguments of linear operators that autocast casts, as it does those of F.linear. int8 values and their scales do not
# decide the dtype of the product. Tiles have bits among their values, which cannot be cast: _run_in_autocast() and
# fast_tile_linear() expand them.
_CAST = {
    "sparse_linear": ("x", "values", "bias"),
    "sparse_linear_int8": ("x", "bias"),
    "dense_linear": ("x", "weight", "bias"),
    "tile_linear": ("x", "bias"),
    "two_of_four_linear": ("x", "bias"),
}


def _run_in_autocast(op: str, device: str) -> Callable[..., Tensor]:
    names = [part.split()[1] for part in _SCHEMAS[op].partition(")")[0].strip("(").split(", ")]
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    target = getattr(torch.ops.mosaic, op)

    def run(*arguments: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        if op == "tile_linear" and arguments[1].dtype is not dtype:
            x, tiles, offsets, bias, *shape, _ = arguments
            return F.linear(x, torch.ops.mosaic.expand_tiles(tiles, offsets, *shape), bias)
        cast = [
            each.to(dtype) if name in _CAST[op] and each is not None and each.dtype is not torch.float64 else each
            for name, each in zip(names, arguments, strict=True)
        ]
        with torch._C._ExcludeDispatchKeyGuard(key):
            found: Tensor = target(*cast)
            return found

    return run


for _op in _CAST:
    _library.impl(_op, _run_in_autocast(_op, "cpu"), "AutocastCPU")
    _library.impl(_op, _run_in_autocast(_op, "cuda"), "AutocastCUDA")


@torch.library.register_fake("mosaic::sparse_linear")
def _(x: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


@torch.library.register_fake("mosaic::sparse_linear_int8")
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    words: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    in_features: int,
    quantize_x: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


@torch.library.register_fake("mosaic::dense_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("mosaic::tile_linear")
def _(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    largest_step: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("mosaic::pack_tiles")
def _(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    down, across = step_counts(*weight.shape)
    tiles = weight.new_empty(torch.library.get_ctx().new_dynamic_size())
    return tiles, weight.new_empty(down * across + 1, dtype=torch.int32)


@torch.library.register_fake("mosaic::expand_tiles")
def _(tiles: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    return tiles.new_empty(rows, columns)


@torch.library.register_fake("mosaic::two_of_four_linear")
def _(x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("mosaic::pack_two_of_four")
def _(weight: Tensor, keep: Tensor | None = None) -> Tensor:
    return weight.new_empty((*tile_counts(*weight.shape), TWO_OF_FOUR_WORDS), dtype=torch.int32)


@torch.library.register_fake("mosaic::expand_two_of_four")
def _(tiles: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tiles.new_empty((rows, columns), dtype=dtype)


@torch.library.register_fake("mosaic::pack")
def _(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    rows, columns = weight.shape
    return weight.new_empty(nnz), weight.new_empty(rows, -(-columns // 8), dtype=torch.uint8)


@torch.library.register_fake("mosaic::unpack")
def _(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    return values.new_empty(bitmask.shape[0], in_features)


@torch.library.register_fake("mosaic::outlier_stats")
def _(weight: Tensor, column_norms: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    return weight.new_empty((), dtype=torch.float64), weight.new_empty(len(alphas), dtype=torch.int64)


@torch.library.register_fake("mosaic::column_square_sums")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1], dtype=torch.float64)


@torch.library.register_fake("mosaic::select")
def _(scores: Tensor, keep: Tensor, scope: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.register_fake("mosaic::score_select")
def _(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


@torch.library.register_fake("mosaic::score_pack")
def _(weight: Tensor, column_norms: Tensor, keep: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    rows, columns = weight.shape
    return weight.new_empty(nnz), weight.new_empty(rows, -(-columns // 8), dtype=torch.uint8)


@torch.library.register_fake("mosaic::obs_block")
def _(weight: Tensor, factor: Tensor, keep: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(keep)


@torch.library.register_fake("mosaic::admm_step")
def _(proposal: Tensor, keep: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    return torch.empty_like(proposal)


@torch.library.register_fake("mosaic::cg_step")
def _(solution: Tensor, residual: Tensor, direction: Tensor, energy: Tensor, image: Tensor, keep: Tensor) -> None: ...


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, words, _, bias, in_features = inputs
    _require_frozen(values, bias)
    ctx.save_for_backward(values, words)
    ctx.in_features = in_features


def _save_int8_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, words, _, bias, in_features, _ = inputs
    _require_frozen(scales, bias)
    ctx.save_for_backward(values, scales, words)
    ctx.in_features = in_features


def _require_frozen(*constants: Tensor | None) -> None:
    if any(t is not None and t.requires_grad for t in constants):
        raise KernelError(
            "sparse_linear is differentiable in its activations only; call .requires_grad_(False) on the packed "
            "values, their scales and the bias, or train the dense layer"
        )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, words = ctx.saved_tensors
    weight = torch.ops.mosaic.unpack(values, words.view(torch.uint8), ctx.in_features)
    return _product(grad, weight), None, None, None, None, None


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # if the kernel rounds the activations to int8, their gradient ignores the rounding (straight-through)
    values, scales, words = ctx.saved_tensors
    bits = words.view(torch.uint8)
    weight = torch.ops.mosaic.unpack(dequantize(values, scales, bits).to(grad.dtype), bits, ctx.in_features)
    return _product(grad, weight), None, None, None, None, None, None, None


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``, computed in fp32 if torch multiplies their dtype slowly on this processor.

    While a graph is traced, ``grad`` is of a subclass of ``Tensor``, and the product is left to torch.
    """
    if type(grad) is Tensor and is_slow(grad):
        return (grad.float() @ weight.float()).to(grad.dtype)
    return grad @ weight


def _save_tiles_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tiles, offsets, bias, *shape, _ = inputs
    _require_frozen(tiles, bias)
    ctx.save_for_backward(tiles, offsets)
    ctx.shape = shape


def _tile_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.mosaic.expand_tiles(*ctx.saved_tensors, *ctx.shape)
    return grad @ weight, None, None, None, None, None, None


def _save_two_of_four_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tiles, bias, *shape = inputs
    _require_frozen(bias)
    ctx.save_for_backward(tiles)
    ctx.shape = shape


def _two_of_four_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.mosaic.expand_two_of_four(*ctx.saved_tensors, *ctx.shape, grad.dtype)
    return grad @ weight, None, None, None, None


torch.library.register_autograd(
    "mosaic::two_of_four_linear", _two_of_four_backward, setup_context=_save_two_of_four_for_backward
)
torch.library.register_autograd("mosaic::tile_linear", _tile_backward, setup_context=_save_tiles_for_backward)
torch.library.register_autograd("mosaic::sparse_linear", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("mosaic::sparse_linear_int8", _int8_backward, setup_context=_save_int8_for_backward)

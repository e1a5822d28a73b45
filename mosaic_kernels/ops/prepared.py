# SPDX-License-Identifier: Apache-2.0
"""Calls of one layer that cost little more than its kernel: what can be checked once is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from mosaic_kernels.format import VALUE_DTYPES
from mosaic_kernels.ops import cpu
from mosaic_kernels.ops.select import is_recorded, is_seen, kernel_for, resolved


def is_trained(held: dict[str, Any]) -> bool:
    """True if the bias gets a gradient. Then torch adds the bias, because no kernel computes its gradient."""
    bias = held.get("bias")
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()


# The result, or None where the ordinary way has to be taken; of x, the layer's parameters by name and quantize_x.
PreparedCall = Callable[[Tensor, dict[str, Any], bool], Tensor | None]


def prepare(
    x: Tensor, operands: cpu.Operands, bitmask: Tensor, in_features: int, quantize_x: bool
) -> PreparedCall | None:
    """A call that does what ``sparse_linear`` or ``sparse_linear_int8`` does for inputs like ``x``.

    It returns ``None`` where an input has another dtype, width or device, where something must see the call
    (see :func:`~mosaic_kernels.ops.select.is_recorded`), where another backend is forced, where ``quantize_x``
    changed, and where a parameter was replaced or has its memory elsewhere. Values that are written to in place
    are read anew by every call. A parameter that another thread replaces during a call lives until the call ends.

    Beyond Module.__call__, the allocation of the result and the kernel (1.2, 1.0 and 0.6 us) it takes 2 us; the
    checks of the operator's backend made that 4.3. Between the layers of a model, whose weights drive all else from
    the caches, the whole call takes 6.9 us, and 9.5 where parameters are looked at in Python (64x64, one row; Zen 4,
    torch 2.13, Nov 2026).

    Args:
        x: an input that the kernel took.
        operands: the layer's parameters, and the index made of its bitmask.
        bitmask: the parameter that the index was made of.
        in_features: of the layer.
        quantize_x: see ``sparse_linear_int8``.

    Returns:
        The call; ``None`` if the CPU kernel does not take ``x``.
    """
    values, scales, words, offsets, bias = operands
    op = "sparse_linear" if scales is None else "sparse_linear_int8"
    kernel = cpu.KERNELS[op]
    if not x.is_cpu or x.dtype not in VALUE_DTYPES or is_recorded(x) or kernel_for(op, x) is not kernel:
        return None
    if not all(t is None or t.is_contiguous() for t in (values, scales, bias)):
        return None
    run_if, threads = cpu.linear_at(operands, in_features, x.dtype, quantize_x), cpu.threads
    dtype, out_features, on_cpu = x.dtype, words.shape[0], (op, "cpu")
    # Nothing here keeps a parameter in memory that its layer let go: every call asks whether it is still there.
    parameters = {"weight": values, "scales": scales, "bias": bias}
    names, has_bias = ("bitmask", *parameters), bias is not None
    objects = (bitmask, *(None if t is None else ref(t) for t in parameters.values()))
    addresses = struct.pack("4Q", 0, *map(cpu.address, parameters.values()))

    def result_of(shape: torch.Size) -> tuple[torch.Size, tuple[int, ...], int]:
        return shape, (*shape[:-1], out_features), shape[:-1].numel()

    seen = result_of(x.shape)

    def call(x: Tensor, held: dict[str, Any], rounded: bool) -> Tensor | None:
        if is_seen(x) or x.dtype is not dtype or not x.is_cpu or resolved.get(on_cpu) is not kernel:
            return None
        if rounded is not quantize_x or (has_bias and is_trained(held)):
            return None
        nonlocal seen  # shapes repeat, and to take one apart costs half as much as to allocate the result
        shape, sizes, rows = seen
        if x.shape != shape:
            shape = x.shape
            if not shape or shape[-1] != in_features:
                return None
            shape, sizes, rows = seen = result_of(shape)
        x = x.contiguous()
        out = x.new_empty(*sizes)  # takes 1.0 us, and with the sizes in a tuple 1.5
        found = run_if(held, names, objects, addresses, x.data_ptr(), out.data_ptr(), rows, threads())
        return out if found else None

    call.index = words, offsets  # type: ignore[attr-defined]  # the kernel has their addresses
    return call

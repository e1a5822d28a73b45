# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operator: a registry, one rule, and one way to force it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from mosaic_kernels.errors import BackendError, KernelError, UsageError
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap

# found once: a look-up from module to module costs as much as the question
_is_compiling = torch.compiler.is_compiling
_is_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

logger = logging.getLogger(__name__)

BACKEND_NAMES = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    """One implementation of (some of) the operators.

    Attributes:
        name: one of :data:`BACKEND_NAMES`.
        devices: torch device types whose tensors it takes.
        kernels: operator name -> function with the reference's signature.
        why_not: ``None`` where it can run on this machine, else the reason in one sentence.
    """

    name: str
    devices: tuple[str, ...]
    kernels: Mapping[str, Callable[..., Any]]
    why_not: Callable[[], str | None]


_registry: dict[str, Backend] = {}
_forced: str | None = None
_reported: set[str] = set()  # backends whose absence was logged
# What `kernel` found, by operator and type of device, until a backend is forced or added.
resolved: dict[tuple[str, str], Callable[..., Any]] = {}


def register(backend: Backend) -> None:
    """Add a backend; the order of registration is the order of preference."""
    _registry[backend.name] = backend
    resolved.clear()


def backends() -> dict[str, Backend]:
    """Every registered backend by name, the preferred first."""
    return dict(_registry)


def forced() -> str | None:
    """The backend that ``MOSAIC_BACKEND`` or :func:`use_backend` forces, if any."""
    return _forced


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs ``op`` on tensors of ``device``.

    Raises:
        BackendError: a forced backend cannot run here, or lacks this operator.
    """
    found = resolved.get((op, device.type))
    if found is None:
        found = resolved[op, device.type] = _resolve(op, device)
    return found


def kernel_for(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """:func:`kernel` of the device of ``x``, without making a ``torch.device`` where it is the CPU (0.4 us)."""
    found = resolved.get((op, "cpu")) if x.is_cpu else None
    return kernel(op, x.device) if found is None else found


def _resolve(op: str, device: torch.device) -> Callable[..., Any]:
    if _forced is not None:
        return _forced_kernel(_registry[_forced], op, device)
    passed_over: list[tuple[str, str]] = []
    for backend in _registry.values():
        if device.type in backend.devices and op in backend.kernels:
            reason = backend.why_not()
            if reason is None:
                _report(passed_over, device, backend.name)
                return backend.kernels[op]
            passed_over.append((backend.name, reason))
    return _registry["reference"].kernels[op]


def running(op: str, device: torch.device) -> str:
    """The name of the backend that runs ``op`` on tensors of ``device``.

    Raises:
        BackendError: a forced backend cannot run here, or lacks this operator.
    """
    chosen = kernel(op, device)
    return next(name for name, backend in _registry.items() if backend.kernels.get(op) is chosen)


def why_not_ours(op: str, device: torch.device) -> str | None:
    """Why a device's own backend does not run ``op``, but the reference or a forced backend; ``None`` if it does."""
    if _forced is not None and (_forced == "reference" or device.type not in _registry[_forced].devices):
        by_variable = os.environ.get("MOSAIC_BACKEND") == _forced
        return f"MOSAIC_BACKEND={_forced}" if by_variable else f"use_backend({_forced!r}) is in force"
    own = [each for each in _registry.values() if device.type in each.devices and each.name != "reference"]
    able = [each for each in own if op in each.kernels]
    reasons = {each.name: each.why_not() for each in able}
    if None in reasons.values():
        return None
    return (
        "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or f"no kernel of '{op}' for {device.type}"
    )


def _report(passed_over: list[tuple[str, str]], device: torch.device, chosen: str) -> None:
    """Log, once for each, the backends that should have run: a broken build must not be slow in silence."""
    for name, reason in passed_over:
        if name not in _reported:
            _reported.add(name)
            logger.warning("backend '%s' cannot run, so %s tensors use '%s': %s", name, device.type, chosen, reason)


def _forced_kernel(backend: Backend, op: str, device: torch.device) -> Callable[..., Any]:
    reason = backend.why_not()
    if reason is None and device.type not in backend.devices and backend.name != "reference":
        reason = f"its kernels take {' or '.join(backend.devices)} tensors and this one is on {device}"
    if reason is None and op not in backend.kernels:
        reason = f"it has no kernel for '{op}' (it has: {', '.join(sorted(backend.kernels))})"
    if reason is not None:
        raise BackendError(f"backend '{backend.name}' was forced but cannot run: {reason}; unset MOSAIC_BACKEND")
    return backend.kernels[op]


def _checked(name: str) -> str:
    if name not in BACKEND_NAMES:
        raise UsageError(f"MOSAIC_BACKEND={name!r} is not a backend; choose one of {', '.join(BACKEND_NAMES)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force ``name`` inside a ``with`` block, as ``MOSAIC_BACKEND`` does for a process."""
    global _forced
    before, _forced = _forced, _checked(name)
    resolved.clear()
    try:
        yield
    finally:
        _forced = before
        resolved.clear()


if os.environ.get("MOSAIC_BACKEND"):
    _forced = _checked(os.environ["MOSAIC_BACKEND"])


def fast_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
) -> torch.Tensor:
    """``torch.ops.mosaic.sparse_linear``, calling the kernel directly where nothing records the call.

    The operator's dispatch costs several microseconds; a decode step of a small model is hundreds of
    such calls. The kernels check their arguments themselves, so nothing is lost.
    """
    if is_recorded(x):
        return recorded(torch.ops.mosaic.sparse_linear, x, values, words, offsets, bias, in_features)
    direct: torch.Tensor = kernel_for("sparse_linear", x)(x, values, words, offsets, bias, in_features)
    return direct


def fast_sparse_linear_int8(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    quantize_x: bool,
) -> torch.Tensor:
    """``torch.ops.mosaic.sparse_linear_int8``, as directly as :func:`fast_sparse_linear`."""
    arguments = (x, values, scales, words, offsets, bias, in_features, quantize_x)
    if is_recorded(x):
        return recorded(torch.ops.mosaic.sparse_linear_int8, *arguments)
    direct: torch.Tensor = kernel_for("sparse_linear_int8", x)(*arguments)
    return direct


def fast_tile_linear(x: torch.Tensor, weight: TileBitmap | TwoOfFour, bias: torch.Tensor | None) -> torch.Tensor:
    """``torch.ops.mosaic.tile_linear`` or ``two_of_four_linear``, as directly as :func:`fast_sparse_linear`."""
    arguments: tuple[Any, ...] = (x, weight.tiles, bias, *weight.shape)
    if isinstance(weight, TileBitmap):
        arguments = (x, weight.tiles, weight.offsets, bias, *weight.shape, weight.largest_step)
    name = "tile_linear" if isinstance(weight, TileBitmap) else "two_of_four_linear"
    if is_recorded(x):
        if isinstance(weight, TwoOfFour) and _is_cast(weight):
            return F.linear(x, weight.to_dense(), bias)  # its values are packed into integers, which cannot be cast
        return recorded(getattr(torch.ops.mosaic, name), *arguments)
    out: torch.Tensor = kernel_for(name, x)(*arguments)
    return out


def _is_cast(weight: TwoOfFour) -> bool:
    """True if autocast multiplies in another dtype than that of ``weight``."""
    device = weight.tiles.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not weight.dtype


def recorded(op: Callable[..., Any], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """A linear operator where something sees the call.

    Forward-mode derivatives (``torch.func.jvp``) with respect to ``x`` pass through it as ``x`` does: torch gives
    operators of a library no rule for them, and would drop them in silence.

    Raises:
        KernelError: forward-mode derivatives of forward-mode derivatives, or with respect to the bias.
    """
    if forward_ad._current_level < 0:
        out: torch.Tensor = op(x, *rest)
        return out
    names = [argument.name for argument in op.default._schema.arguments][1:]  # type: ignore[attr-defined]
    own = dict(zip(names, rest, strict=True))
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    biased = own["bias"] is not None and _parts(own["bias"])[1] is not None
    if biased or levels.count(torch._C._functorch.TransformType.Jvp) > 1:
        raise KernelError(
            "a packed weight passes one forward-mode derivative, of its activations: use to_dense() for derivatives "
            "of derivatives or with respect to the bias"
        )
    primal, tangent = _parts(x)
    out = op(primal, *rest)
    if tangent is None:
        return out
    own |= {name: value for name, value in (("bias", None), ("quantize_x", False)) if name in own}  # as in backward
    dual: torch.Tensor = forward_ad.make_dual(out, op(tangent, *own.values()))  # type: ignore[no-untyped-call]
    return dual


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A tensor and its forward-mode derivative."""
    found: tuple[torch.Tensor, torch.Tensor | None] = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return found


def is_recorded(x: torch.Tensor) -> bool:
    """True if autograd, autocast, a compiler, tracer, function transform or tensor subclass must see the call."""
    return _is_compiling() or is_seen(x)


def is_seen(x: torch.Tensor) -> bool:
    """As :func:`is_recorded`, for calls outside dynamo. Other compilers are known by their tensor subclasses."""
    return (
        type(x) is not torch.Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or _is_autocast()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _is_wrapped(x)
    )

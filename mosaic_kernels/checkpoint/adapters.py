# SPDX-License-Identifier: Apache-2.0
"""Refuses PEFT adapters that packed layers cannot take, before the model is changed.

``docs/peft.md`` has the table of kinds; ``tests/test_peft.py`` tries every kind of the installed PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mosaic_kernels import compat
from mosaic_kernels.errors import UsageError
from mosaic_kernels.linear import MosaicLinear

# Kinds whose layers call the layer they adapt and compute with their own parameters alone. All others read or write
# the dense weight, which packed layers do not have.
WORKING = frozenset({
    "ADALORA", "BEFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "LORA", "MISS", "OFT", "POLY", "PVERA",
    "RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA",
})  # fmt: skip
# Values of init_lora_weights that read no weight; all others split the dense weight.
_LORA_STARTS = (True, False, "gaussian", "orthogonal")
# LoRA settings that read the dense weight or are untested. Settings named ..._config count as such, but for _HARMLESS.
_LORA_VARIANTS = ("use_dora", "use_qalora", "use_bdlora")
_HARMLESS = ("runtime_config", "megatron_config")

_ADVICE = "call model.dequantize() first, or use plain LoRA"


def guard_adapters() -> None:
    """Make PEFT raise :class:`UsageError` for adapters that packed layers cannot take. Further calls do nothing."""
    tuner, layer = compat.tuner_classes()
    injections = dict.fromkeys(compat.INJECTIONS, _check_injection)
    _guard(tuner, {**injections, "merge_and_unload": _check_tuner, "merge_adapter": _check_tuner})
    _guard(layer, {"merge": _check_layer})


def why_not(config: Any) -> str | None:
    """The reason why packed layers cannot take an adapter with this PEFT config; ``None`` if they can."""
    kind = compat.adapter_kind(config)
    if kind not in WORKING:
        return f"PEFT's {kind} reads the dense weight of the layers it adapts"
    if kind != "LORA":
        return None
    start = getattr(config, "init_lora_weights", True)
    if start not in _LORA_STARTS:
        return f"init_lora_weights={start!r} splits the dense weight of the layers it adapts"
    variants = [*_LORA_VARIANTS, *(name for name in vars(config) if name.endswith("_config") and name not in _HARMLESS)]
    used = next((name for name in variants if getattr(config, name, None)), None)
    return None if used is None else f"{used} may read the dense weight of the layers it adapts"


def _check_injection(tuner: Any, *args: Any, **options: Any) -> None:
    model, adapter_name, config = compat.injected_adapter(tuner, *args, **options)
    packed = {name for name, module in model.named_modules() if isinstance(_base(module), MosaicLinear)}
    if not packed:
        return
    saved = compat.trained_copies(config)
    for name in sorted(packed):
        own = name.removesuffix(".base_layer")
        if any(own == each or own.endswith(f".{each}") for each in saved):
            raise UsageError(f"modules_to_save names {own}, and packed weights cannot be trained: {_ADVICE}")
    for target in compat.target_parameters(config):
        owner = target.rpartition(".")[0]
        if any(name == owner or name.endswith(f".{owner}") for name in packed):
            raise UsageError(f"target_parameters names {target}, which is packed: {_ADVICE}")
    reason = why_not(config)
    if reason is None:
        return
    targets = compat.adapted_modules(tuner, model, adapter_name)
    hit = sorted(packed if targets is None else packed & targets)
    if hit:
        some = hit[0] + (f" and {len(hit) - 1} more" if len(hit) > 1 else "")
        raise UsageError(f"{reason}, and {some} hold only packed values: {_ADVICE}")


def _check_tuner(tuner: Any, *_: Any, **__: Any) -> None:
    for module in tuner.model.modules():  # check all before PEFT merges the first
        if _base(module) is not module:
            _check_layer(module)


def _check_layer(layer: Any, *_: Any, **__: Any) -> None:
    if isinstance(_base(layer), MosaicLinear):
        raise UsageError(
            "an adapter is dense and cannot be merged into packed sparse weights: keep it as an adapter, "
            "or call model.dequantize() before attaching it and merge into dense weights"
        )


def _base(module: nn.Module) -> nn.Module:
    """The layer below a module's adapters."""
    base = getattr(module, "get_base_layer", None)
    return module if base is None or not isinstance(module, compat.tuner_classes()[1]) else base()


def _guard(base: type, checks: dict[str, Callable[..., None]]) -> None:
    """Run checks before methods of ``base`` and of all its subclasses, also those that are defined later."""

    def guard(kind: type) -> None:
        for name, check in checks.items():
            method: Any = kind.__dict__.get(name)
            if callable(method) and not hasattr(method, "checked_by"):
                setattr(kind, name, _checked(method, check))

    def guard_all(kind: type) -> None:
        guard(kind)
        each: type
        for each in kind.__subclasses__():
            guard_all(each)

    guard_all(base)
    if "__init_subclass__" not in base.__dict__:

        def init_subclass(cls: type, **options: Any) -> None:
            super(base, cls).__init_subclass__(**options)  # type: ignore[arg-type]
            guard(cls)

        base.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment, arg-type]


def _checked(method: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        check(self, *args, **options)
        return method(self, *args, **options)

    checked.checked_by = check  # type: ignore[attr-defined]
    return checked

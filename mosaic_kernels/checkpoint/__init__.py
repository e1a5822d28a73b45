# SPDX-License-Identifier: Apache-2.0
"""The ``mosaic`` checkpoint format: how Hugging Face transformers reads and writes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from mosaic_kernels import compat

__all__ = ["register_with_transformers"]


def register_with_transformers() -> None:
    """Let ``from_pretrained`` read checkpoints whose ``quant_method`` is ``mosaic``; calls may repeat.

    Where transformers is not imported yet, this waits until it is: its part that keeps the register
    takes 1.9 s of 3.5 s (2-core x86-64, November 2026), which users of the layers alone need not pay.
    """
    _when_imported(compat.CONFIGURATIONS, _extend_configs)
    _when_imported(compat.QUANTIZERS, _register_quantizer)
    _when_imported(compat.MODELS, _complete_models)
    _when_imported(compat.TUNERS, _guard_adapters)
    _when_imported(compat.ADAPTED_MODELS, _count_adapted_models)


def _register_quantizer() -> None:
    # The module registers its classes at its end; importing it is all there is to do, also where its own
    # first import of transformers is what brought us here.
    importlib.import_module("mosaic_kernels.checkpoint.quantizer")


def _extend_configs() -> None:
    # transformers reads a configuration before it imports what the models need
    from mosaic_kernels.checkpoint.autoload import extend_configs

    extend_configs()


def _complete_models() -> None:
    """Give transformers' models empty layouts, casts, our attention and right counts."""
    # A prepared model that was pickled in another process asks for our attention, but was not prepared in this one.
    from mosaic_kernels.attention import register_with_transformers as register_attention
    from mosaic_kernels.checkpoint.counts import count_weights_of_models
    from mosaic_kernels.checkpoint.quantizer import complete_models

    complete_models()

    register_attention()
    count_weights_of_models()


def _guard_adapters() -> None:
    from mosaic_kernels.checkpoint.adapters import guard_adapters

    guard_adapters()


def _count_adapted_models() -> None:
    from mosaic_kernels.checkpoint.counts import count_weights_of_adapted_models

    count_weights_of_adapted_models()


def _when_imported(module: str, call: Callable[[], None]) -> None:
    if module in sys.modules:
        call()
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, call))


class _AfterImport(MetaPathFinder):
    """Calls a function once, as soon as somebody has imported a module."""

    def __init__(self, module: str, call: Callable[[], None]) -> None:
        self.module, self.call = module, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.call()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec

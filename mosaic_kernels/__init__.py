# SPDX-License-Identifier: Apache-2.0
"""Composite projection pruning of Hugging Face language models, and the kernels that run the result.

Importing the package registers the ``mosaic`` checkpoint format with transformers; it touches no
GPU and no network.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mosaic_kernels.signals import starting

with starting():  # a signal or a wrong MOSAIC_* variable may end a command while torch is imported
    from mosaic_kernels.checkpoint import register_with_transformers
    from mosaic_kernels.errors import MosaicError
    from mosaic_kernels.explain import explain
    from mosaic_kernels.format import PackedWeight
    from mosaic_kernels.inference import prepare_inference
    from mosaic_kernels.int8 import quantize
    from mosaic_kernels.linear import MosaicLinear
    from mosaic_kernels.ops import pack, sparse_linear, unpack

if TYPE_CHECKING:  # at run time the subpackage itself is callable, see prune/__init__.py
    from mosaic_kernels.prune.pipeline import prune

__all__ = [
    "MosaicError",
    "MosaicLinear",
    "PackedWeight",
    "__version__",
    "explain",
    "pack",
    "prepare_inference",
    "prune",
    "quantize",
    "sparse_linear",
    "unpack",
]

try:
    __version__ = version("mosaic-kernels")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "prune":
        return importlib.import_module("mosaic_kernels.prune")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""Pruning. The subpackage is callable: ``mosaic_kernels.prune(...)`` is :func:`pipeline.prune`.

``python -m mosaic_kernels.prune`` and ``mosaic_kernels.prune(...)`` share one name, and importing a
subpackage binds it on its parent; so the module itself answers the call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from mosaic_kernels.prune.pipeline import prune

        return prune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

# SPDX-License-Identifier: Apache-2.0
"""Running the prune command in tests: what it returned, what it wrote, and how to stop it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune import pipeline

QUICK = ("--calibration", "random", "--samples", "4", "--seqlen", "16")


def watched(seen: list[int]) -> Any:
    """``prune_block`` that notes the blocks it solves."""
    inner = pipeline.prune_block

    def watch(block: Any, *args: Any, **options: Any) -> Any:
        seen.append(block.index)
        return inner(block, *args, **options)

    return watch


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def require_failure(result: Result, code: int, *words: str) -> None:
    """One line on stderr that says what, where and what to do; nothing on stdout, nothing in the directory."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert list(Path.cwd().iterdir()) == []


def kept_weights(adapter: ModelAdapter) -> int:
    """Non-zero weights, counted in the dense form."""
    return sum(
        int((layer.to_dense() if isinstance(layer, MosaicLinear) else layer).weight.count_nonzero())
        for _, _, layer in adapter.projections()
    )


def digests(directory: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob(pattern))}


@contextmanager
def stopped_at(index: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Block ``index`` raises instead of being solved."""
    inner = pipeline.prune_block

    def stop(block: Any, *args: Any, **options: Any) -> Any:
        if block.index == index:
            raise error
        return inner(block, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_block", stop)
        yield

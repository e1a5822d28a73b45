# SPDX-License-Identifier: Apache-2.0
"""Where the seconds of a run go, by kind of work rather than by station."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, ParamSpec, TypeVar

import torch

Kind = Literal["forward", "gram", "probe", "solve", "tune"]
P = ParamSpec("P")
R = TypeVar("R")


class Split:
    """Seconds by kind of work; work inside other work counts once, as its own kind. A probe is a probe throughout."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[Kind, float]] = []

    @contextmanager
    def count(self, kind: Kind) -> Iterator[None]:
        """Count what happens inside."""
        if self._open and self._open[-1][0] == "probe":
            yield
            return
        self._switch()
        self._open.append((kind, time.perf_counter()))
        try:
            yield
        finally:
            self._switch()
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], time.perf_counter())

    def _switch(self) -> None:
        """Book the time since the last change."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        if self._open:
            kind, since = self._open[-1]
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - since


_current: ContextVar[Split | None] = ContextVar("mosaic_split", default=None)


@contextmanager
def measuring() -> Iterator[Split]:
    """Count the timed functions that are called inside."""
    split = Split()
    token = _current.set(split)
    try:
        yield split
    finally:
        _current.reset(token)


def timed(kind: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: calls count as this kind of work, where somebody measures."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **options: P.kwargs) -> R:
            split = _current.get()
            if split is None:
                return function(*args, **options)
            with split.count(kind):
                return function(*args, **options)

        return wrapper

    return decorate

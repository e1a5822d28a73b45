# SPDX-License-Identifier: Apache-2.0
"""Measures the seconds of a run, by station and by kind of work."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

import torch

Kind = Literal["forward", "gram", "probe", "solve", "tune"]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Clock:
    """Seconds of each station."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def lap(self, station: str, since: float) -> float:
        """Add the time since ``since`` to a station; return the current time."""
        now = time.perf_counter()
        self.seconds[station] = self.seconds.get(station, 0.0) + now - since
        return now

    def stop(self) -> None:
        """Record the seconds of the whole run."""
        self.seconds["total"] = time.perf_counter() - self.started


class _Mark:
    """A moment: of the host, and of the current device's stream where CUDA is in use, which is not waited for."""

    def __init__(self) -> None:
        self.host = time.perf_counter()
        self.stream: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.stream = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.stream.record()  # type: ignore[no-untyped-call]

    def until(self, end: _Mark) -> float:
        """Seconds between two marks; waits for the second one."""
        if self.stream is None or end.stream is None:
            return end.host - self.host
        end.stream.synchronize()
        return float(self.stream.elapsed_time(end.stream)) / 1000


class Split:
    """Seconds by kind of work; work inside other work counts once, as its own kind. A probe is a probe throughout.

    On a GPU the seconds are those of its stream, taken from events when they are asked for: counting never waits.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[Kind, _Mark]] = []
        self._spans: list[tuple[Kind, _Mark, _Mark]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by kind."""
        for kind, start, end in self._spans:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + start.until(end)
        self._spans.clear()
        return self._seconds

    @contextmanager
    def count(self, kind: Kind) -> Iterator[None]:
        """Count what happens inside."""
        if self._open and self._open[-1][0] == "probe":
            yield
            return
        self._open.append((kind, self._switch()))
        try:
            yield
        finally:
            now = self._switch()
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], now)

    def _switch(self) -> _Mark:
        """Book the time since the last change."""
        now = _Mark()
        if self._open:
            self._spans.append((*self._open[-1], now))
        return now


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

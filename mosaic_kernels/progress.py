# SPDX-License-Identifier: Apache-2.0
"""What is under way and how long it will take: one bar on a terminal, lines in the log elsewhere.

Work announces itself as a *station*. On a terminal, the innermost one is drawn as a bar on stderr. Elsewhere a line is
logged when a station begins, and another whenever none was for 15 seconds, by a thread of its own: one long step of a
station is not silent either. Of the processes that torchrun starts, the first alone shows anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mosaic_kernels.cli import leads

logger = logging.getLogger(__name__)

LINE_SECONDS = 15.0  # at most so long without a line
_TICK_SECONDS = 1.0  # how often the thread looks, and moves a bar's clock
_MARGIN_SECONDS = 2.0  # a line comes so much earlier, as a busy machine lets the thread look late


@dataclass(eq=False)
class Station:
    """A part of a run that is under way.

    Attributes:
        name: what is done, e.g. ``evaluate dense``.
        total: how much there is to do; ``None`` where nobody knows.
        unit: of that, in the singular.
        numbered: the units are few and the name carries the number of the one under way: ``block 4/30``.
        detail: a part of the station around it, which goes on being named and has announced itself already.
        started: when it began.
        done: how much was done by ``moved``.
        moved: when something was done last.
    """

    name: str
    total: int | None
    unit: str
    numbered: bool
    detail: bool
    started: float
    clock: Callable[[], float]
    done: int = 0
    moved: float = 0.0
    shown: _Display | None = None

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done, self.moved = self.done + count, self.clock()
        if self.shown is not None:
            self.shown.move(self, count)

    @property
    def label(self) -> str:
        """The name, with the number of the unit that is under way."""
        if self.total is None or not self.numbered:
            return self.name
        return f"{self.name} {min(self.done + 1, self.total)}/{self.total}"

    def seconds_left(self, now: float) -> float | None:
        """The time that what is left takes at the pace so far; ``None`` before anything was done.

        Between two advances it falls with the clock, but not below zero.
        """
        if self.total is None or not self.done:
            return None
        pace = (self.moved - self.started) / self.done
        return max(0.0, pace * (self.total - self.done) - (now - self.moved))

    def beginning(self) -> str:
        """The line of its beginning."""
        if self.total is None or self.numbered:
            return self.label
        return f"{self.name}: {self.total:,} {self.unit}{'' if self.total == 1 else 's'}"

    def state(self, now: float) -> str:
        """The line of its being under way."""
        left = self.seconds_left(now)
        if left is None or self.total is None:
            return f"{self.label}: {duration(now - self.started)} so far"
        share = f"{100 * self.done // max(1, self.total)} % done"
        pace = self.done / max(1e-9, self.moved - self.started)
        shown = f"{pace:.3g}" if pace < 1000 else f"{pace:,.0f}"
        rate = "" if self.numbered else f", {shown} {self.unit}s/s"
        return f"{self.label}: {share}{rate}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """``45 s``, ``2 min 30 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _Display:
    """Shows the innermost of the stations that are open."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._open: list[Station] = []
        self._bar: Any = None
        self._said = 0.0  # when the last line was logged
        self._lock = threading.RLock()
        self._stop: threading.Event | None = None

    def begin(self, station: Station) -> None:
        with self._lock:
            station.shown = self
            self._open.append(station)
            if _on_terminal():
                self._draw()
            elif not station.detail:
                self._say(station.beginning())
            if self._stop is None:
                self._stop = threading.Event()
                threading.Thread(target=self._watch, args=(self._stop,), daemon=True, name="mosaic-progress").start()

    def end(self, station: Station) -> None:
        with self._lock:
            if station not in self._open:  # it was left open in the process that this one was forked from
                return
            self._open.remove(station)
            if self._bar is not None:
                self._draw()
            if not self._open and self._stop is not None:
                self._stop.set()
                self._stop = None

    def move(self, station: Station, count: int) -> None:
        if self._bar is None:
            return
        with self._lock:
            if self._bar is not None and self._open and self._open[-1] is station:
                self._bar.set_description_str(self._around() + station.label, refresh=False)
                self._bar.update(count)

    def tick(self) -> None:
        """Look whether something is to be shown."""
        with self._lock:
            if not self._open:
                return
            now = self.clock()
            if self._bar is not None:
                self._bar.refresh()
            elif now - self._said > LINE_SECONDS - _MARGIN_SECONDS:
                self._say(self._around() + self._open[-1].state(now))

    def _say(self, line: str) -> None:
        self._said = self.clock()
        logger.info("%s", line)

    def _around(self) -> str:
        """The station that the innermost one is a detail of."""
        return f"{self._open[-2].label}, " if self._open[-1].detail and len(self._open) > 1 else ""

    def _draw(self) -> None:
        """Replace the bar by that of the innermost station, which may be none."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if not self._open:
            return
        station = self._open[-1]
        label = self._around() + station.label
        plain = "{desc} [{elapsed}]" if station.total is None else None
        self._bar = tqdm(
            total=station.total, initial=station.done, desc=label, unit=station.unit, bar_format=plain,
            unit_scale=not station.numbered, file=sys.stderr, leave=False, ncols=_columns(),
        )  # fmt: skip

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_TICK_SECONDS):
            with contextlib.suppress(ValueError, OSError):  # a stderr that was closed meanwhile
                self.tick()


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _columns() -> int:
    """Width of the terminal; 80 where it does not say, as in some containers, where tqdm would draw nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


_display = _Display()


def _forget() -> None:
    """A forked child has no thread, maybe a lock that nobody opens, and shows nothing of its parent's work.

    The display stays the same object: stations that are open in the parent know it, and the child may leave them.
    """
    _display.__init__(_display.clock)  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def station(
    name: str, total: int | None = None, unit: str = "step", *, numbered: bool = False, detail: bool = False
) -> Iterator[Station]:
    """Show that ``name`` is under way while the block runs; see :class:`Station`.

    Yields:
        The station, to be told of what is done: ``advance()``.
    """
    display = _display
    begun = Station(name, total, unit, numbered, detail, display.clock(), display.clock)
    begun.moved = begun.started
    if not leads():
        yield begun
        return
    try:
        display.begin(begun)  # inside: Ctrl-C may come when the station is open already
        yield begun
    finally:
        display.end(begun)

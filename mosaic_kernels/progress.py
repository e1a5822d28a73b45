# SPDX-License-Identifier: Apache-2.0
"""Shows the current step of a run and the time left: as one bar on a terminal, as lines in the log elsewhere.

A step of a run is a *station*; stations may be nested. On a terminal, the innermost one is drawn as a bar on stderr.
Elsewhere a line is logged when a station begins, and then at least every 15 seconds; a thread logs these, so that they
appear during one long operation too. Of the processes that torchrun starts, only the first shows anything.
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

LINE_SECONDS = 15.0  # the longest time without a line
_TICK_SECONDS = 1.0  # how often the thread checks the time, and redraws a bar
_MARGIN_SECONDS = 2.0  # a line is logged this much earlier, because a busy machine delays the thread


@dataclass(eq=False)
class Station:
    """One step of a run.

    Attributes:
        name: the name of the step, e.g. ``evaluate dense``.
        total: the number of units to do; ``None`` if unknown.
        unit: the name of a unit, in the singular.
        numbered: the units are few, and the label has the number of the current one: ``block 4/30``.
        detail: it is part of the station around it: lines name both, and none is logged when it begins.
        started: the time at which it began.
        clock: the clock of all times.
        done: the number of units done.
        moved: the time at which ``done`` changed last.
        shown: the display that shows it; ``None`` in a process that shows nothing.
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
        """Report that ``count`` more units are done."""
        self.done, self.moved = self.done + count, self.clock()
        if self.shown is not None:
            self.shown.move(self, count)

    @property
    def label(self) -> str:
        """The name, with the number of the current unit if ``numbered``."""
        if self.total is None or not self.numbered:
            return self.name
        return f"{self.name} {min(self.done + 1, self.total)}/{self.total}"

    def seconds_left(self, now: float) -> float | None:
        """The time that the rest takes at the average pace so far; ``None`` before the first unit is done.

        Between two calls of :meth:`advance` it decreases with the clock, but not below zero.
        """
        if self.total is None or not self.done:
            return None
        pace = (self.moved - self.started) / self.done
        return max(0.0, pace * (self.total - self.done) - (now - self.moved))

    def beginning(self) -> str:
        """The line that is logged when it begins."""
        if self.total is None or self.numbered:
            return self.label
        return f"{self.name}: {self.total:,} {self.unit}{'' if self.total == 1 else 's'}"

    def state(self, now: float) -> str:
        """The line that is logged while it runs."""
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
    """Shows the innermost of the open stations."""

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
            if station not in self._open:  # the process that this one was forked from opened it
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
        """Redraw the bar, or log a line if the last one is too old."""
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
        """The label of the outer station, if the innermost one is a detail of it."""
        return f"{self._open[-2].label}, " if self._open[-1].detail and len(self._open) > 1 else ""

    def _draw(self) -> None:
        """Replace the bar by that of the innermost station; if none is open, remove it."""
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
            unit_scale=not station.numbered, file=sys.stderr, leave=False, ncols=_columns(), nrows=_ROWS,
        )  # fmt: skip

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_TICK_SECONDS):
            with contextlib.suppress(ValueError, OSError):  # stderr may have been closed
                self.tick()


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


# tqdm hides bars that would not fit the height of the terminal, and draws nothing where a terminal says it has no rows,
# as those of `script` and some containers do. There is one bar, and it always fits.
_ROWS = 20


def _columns() -> int:
    """Width of the terminal; 80 if it is unknown, as in some containers, because tqdm would draw nothing there."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


_display = _Display()


def _forget() -> None:
    """Reset the display in a forked child: it has no thread, and its lock may be held for ever.

    The display stays the same object, because stations that are open in the parent refer to it and the child may
    leave them.
    """
    _display.__init__(_display.clock)  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def station(
    name: str, total: int | None = None, unit: str = "step", *, numbered: bool = False, detail: bool = False
) -> Iterator[Station]:
    """Show the step ``name`` while the block runs; see :class:`Station` for the arguments.

    Yields:
        The station; call its ``advance()`` whenever a unit is done.
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

# SPDX-License-Identifier: Apache-2.0
"""Device time: chains of calls in a CUDA graph, timed by events, in turns. On a CPU the same by the clock."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from gpu.bench import reason

# A replay shorter than this would be timed together with its launch.
REPLAY_SECONDS = 200e-6


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, so that what is kept for a stream is made once."""
    return torch.cuda.Stream(device)


class Chain:
    """Calls that run one after the other, captured as one CUDA graph where that works.

    A graph keeps Python and launches out of the figure, as it does in decoding, and lets a kernel that may
    start early do so. Every call runs once before the capture: modules load, workspaces are allocated.

    Args:
        why_not_capture: do not try, for this reason.

    Attributes:
        calls: how many calls one :meth:`run` makes.
        why_not_captured: ``None`` for a graph; on a CPU and where the capture failed, the reason.
    """

    def __init__(
        self, calls: Sequence[Callable[[], object]], device: torch.device, why_not_capture: str | None = None
    ) -> None:
        self._calls, self.device, self.calls = calls, device, len(calls)
        self.why_not_captured = why_not_capture if device.type == "cuda" else "no CUDA device"
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.why_not_captured is None:
            self._capture()
        else:
            self._run()

    def _capture(self) -> None:
        stream, graph = _capture_stream(self.device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):  # a compiler may look twice
                self._run()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._run()
        except RuntimeError as error:  # a synchronisation inside, for one; what was captured is gone
            torch.cuda.synchronize()
            self.why_not_captured = reason(error)
            return
        self._graph = graph
        self.run()
        torch.cuda.synchronize()

    def _run(self) -> None:
        for call in self._calls:
            call()

    def run(self) -> None:
        """Make all calls; on a CUDA device only enqueue them."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()


def passes(seconds: float) -> int:
    """How often to go through calls that take ``seconds`` in all, so that a replay is long enough to be timed."""
    return max(1, min(64, math.ceil(REPLAY_SECONDS / max(seconds, 1e-9))))


class Marks:
    """Points in time on a device: CUDA events, or the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._points: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Note this point, after all that was enqueued before."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each point and the next; waits for the last one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return [self._between(a, b) for a, b in zip(self._points, self._points[1:], strict=False)]

    @staticmethod
    def _between(a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
        if isinstance(a, float) or isinstance(b, float):
            assert isinstance(a, float)
            assert isinstance(b, float)
            return b - a
        return float(a.elapsed_time(b)) / 1e3


def in_turns(chains: Mapping[str, Chain], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of every chain, one figure a round; in each round all chains run, in changing order.

    Nothing waits in between: the device always has the next replay before it ends this one.
    """
    marks: dict[str, list[Marks]] = {name: [] for name in chains}
    order = list(chains.items())
    for index in range(rounds):
        for name, chain in order if index % 2 else reversed(order):
            points = Marks(chain.device)
            points.mark()
            chain.run()
            points.mark()
            marks[name].append(points)
    return {name: [m.seconds()[0] / chains[name].calls for m in found] for name, found in marks.items()}


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return {"median_us": statistics.median(seconds) * 1e6, "p10_us": cuts[0] * 1e6, "p90_us": cuts[-1] * 1e6}


def waited(run: Callable[[], object], device: torch.device) -> Callable[[int], None]:
    """``run`` for :func:`measure.interleaved`: for work that itself waits for the device, so that a clock must do."""

    def call(_: int) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def copies(nbytes: int, rotated: int, least: int = 4) -> int:
    """How many copies of a weight to rotate through so that they hold ``rotated`` bytes, past the L2."""
    return max(least, -(-rotated // max(1, nbytes)))

# SPDX-License-Identifier: Apache-2.0
"""Seconds by kind of work: nested work counts once, and all of a run's work is found."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from small_models import random_model

import mosaic_kernels as mk
from mosaic_kernels.prune import timing
from mosaic_kernels.prune.timing import measuring, timed


@pytest.fixture
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only when a test sleeps, and exactly so long; real sleeps end late on a busy machine."""
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))


@timed("solve")
def slow(seconds: float) -> None:
    time.sleep(seconds)


@timed("forward")
def outer() -> None:
    time.sleep(0.02)
    slow(0.05)
    time.sleep(0.02)


@timed("probe")
def probe() -> None:
    outer()


@pytest.mark.usefixtures("_quiet_machine")
def test_nested_work_counts_as_its_own_kind() -> None:
    with measuring() as split:
        outer()
    assert split.seconds["solve"] == pytest.approx(0.05)
    assert split.seconds["forward"] == pytest.approx(0.04)


@pytest.mark.usefixtures("_quiet_machine")
def test_a_probe_is_a_probe_throughout() -> None:
    with measuring() as split:
        probe()
        slow(0.01)
    assert set(split.seconds) == {"probe", "solve"}
    assert split.seconds["probe"] == pytest.approx(0.09)


def test_nothing_is_counted_where_nobody_measures() -> None:
    with measuring() as split:
        pass
    outer()
    assert split.seconds == {}


def test_an_error_leaves_the_count_usable() -> None:
    @timed("gram")
    def broken() -> None:
        raise ValueError

    with measuring() as split:
        with pytest.raises(ValueError):  # noqa: PT011
            broken()
        slow(0.01)
    assert set(split.seconds) == {"gram", "solve"}


def test_a_run_reports_its_split() -> None:
    report = mk.prune(random_model(), calibration="random", samples=4, seqlen=16, sparsity=0.5)
    assert set(report["seconds_by_kind"]) == {"forward", "gram", "probe", "solve"}
    assert 0 < sum(report["seconds_by_kind"].values()) <= report["seconds"]["allocate"] + report["seconds"]["prune"]


class FakeEvent:
    """A stream whose clock runs at a tenth of the host's: what is counted must come from it."""

    synchronized = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = timing.time.perf_counter() / 10

    def synchronize(self) -> None:
        FakeEvent.synchronized += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.usefixtures("_quiet_machine")
def test_a_gpu_counts_by_its_own_clock_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits() -> None:
        raise AssertionError("the host waits for the GPU")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", waits)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    with measuring() as split:
        outer()
        assert FakeEvent.synchronized == 0
        assert split.seconds["solve"] == pytest.approx(0.005)
        assert split.seconds["forward"] == pytest.approx(0.004)
    assert FakeEvent.synchronized == 3

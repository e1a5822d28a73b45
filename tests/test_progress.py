# SPDX-License-Identifier: Apache-2.0
"""Progress: every station in order, a line at least every 15 seconds, one bar on a terminal."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import pty
import re
import signal
import struct
import termios
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prune_runs import Run
from small_models import random_model

from mosaic_kernels import progress
from mosaic_kernels.evaluate import zero_shot
from mosaic_kernels.evaluate.latency import latency
from mosaic_kernels.evaluate.task_files import LAYOUTS, TaskFile
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.progress import duration, station


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """No terminal, lines in ``caplog``, and no ticks of the thread."""
    made = Clock()
    monkeypatch.setattr(progress, "_display", progress._Display(made))
    monkeypatch.setattr(progress, "_TICK_SECONDS", 1e6)
    caplog.set_level(logging.INFO, logger=progress.logger.name)
    return made


def ticks(clock: Clock, seconds: int) -> None:
    """Move the clock, with a tick every second, as the thread does."""
    for _ in range(seconds):
        clock.now += 1
        progress._display.tick()


def test_what_is_left_takes_as_long_as_what_is_done(clock: Clock) -> None:
    with station("block", 30, "block", numbered=True) as here:
        assert here.seconds_left(clock.now) is None
        clock.now += 8
        assert here.seconds_left(clock.now) is None, "nobody knows before the first one ends"
        here.advance()  # 8 s for one
        assert here.seconds_left(clock.now) == 29 * 8
        clock.now += 4
        here.advance(2)  # 12 s for three, 4 s each
        assert here.seconds_left(clock.now) == 27 * 4
        clock.now += 10
        assert here.seconds_left(clock.now) == 27 * 4 - 10
        clock.now += 1e4
        assert here.seconds_left(clock.now) == 0
        here.advance(27)
        assert here.seconds_left(clock.now) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (44.6, "45 s"),
        (89, "89 s"),
        (90, "1 min 30 s"),
        (599.7, "9 min 59 s"),
        (600, "10 min"),
        (3600, "60 min"),
        (5400, "1 h 30 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_at_the_beginning_and_every_fifteen_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with station("load"):
        assert caplog.messages == ["load"]
        ticks(clock, 12)
        assert len(caplog.messages) == 1
        ticks(clock, 3)
        assert caplog.messages[1:] == ["load: 14 s so far"]
    caplog.clear()
    with station("evaluate dense", 4000, "token") as here:
        for _ in range(10):
            ticks(clock, 4)
            here.advance(400)
        assert caplog.messages == [
            "evaluate dense: 4,000 tokens",
            "evaluate dense: 30 % done, 100 tokens/s, about 26 s left",
            "evaluate dense: 60 % done, 100 tokens/s, about 12 s left",
        ]
    caplog.clear()
    with station("block", 4, "block", numbered=True) as here:
        ticks(clock, 10)
        here.advance()
        ticks(clock, 5)
        assert caplog.messages == ["block 1/4", "block 2/4: 25 % done, about 26 s left"]
    ticks(clock, 100)
    assert len(caplog.messages) == 2, "silent where nothing is under way"


def test_never_fifteen_seconds_of_silence(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    said = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(clock.now)

    note = Note()
    progress.logger.addHandler(note)
    try:
        start = clock.now
        with station("prune"):
            for work in (3, 40, 1, 16):  # seconds: of one long step each
                with station("work", 2, "part"):
                    ticks(clock, work)
            ticks(clock, 33)
        moments = [start, *said, clock.now]
    finally:
        progress.logger.removeHandler(note)
    assert max(b - a for a, b in itertools.pairwise(moments)) <= 15


def test_a_detail_announces_itself_late_and_names_what_it_is_of(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with station("block", 2, "block", numbered=True), station("recover", 8, "step", detail=True) as here:
        assert caplog.messages == ["block 1/2"]
        clock.now += 2
        here.advance(2)
        ticks(clock, 13)
        assert caplog.messages[1:] == ["block 1/2, recover: 25 % done, 1 steps/s, about 0 s left"]


def test_the_thread_speaks_by_itself_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_display", progress._Display())
    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.005)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    spoken = threading.Event()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "so far" in record.getMessage():
                spoken.set()

    note, level = Note(), progress.logger.level
    progress.logger.addHandler(note)
    progress.logger.setLevel(logging.INFO)
    try:
        before = set(threading.enumerate())
        with station("one long step"):
            (thread,) = set(threading.enumerate()) - before
            assert thread.daemon
            assert spoken.wait(60)
        thread.join(60)
        assert not thread.is_alive()
    finally:
        progress.logger.removeHandler(note)
        progress.logger.setLevel(level)


def test_a_failure_closes_its_station(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), station("prune"), station("load"):
        raise KeyboardInterrupt
    assert not progress._display._open
    assert progress._display._stop is None


def test_a_forked_child_is_silent_about_its_parents_work(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with station("load"):
        progress._forget()  # what a fork does in the child
        assert not progress._display._open
        caplog.clear()
        progress._display.tick()
    assert not caplog.messages


def test_a_forked_child_may_leave_a_station_whose_lock_nobody_opens(clock: Clock) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:  # as the thread that watches does when the fork comes
        with progress._display._lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    with station("prune", 2) as here:
        progress._display._bar = object()  # advance() takes the lock where there is a bar
        holder.start()
        held.wait()
        with warnings.catch_warnings():  # of forks in processes with threads
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            signal.alarm(10)  # ends a child that waits
            here.advance()
            progress._display.end(here)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        progress._display._bar = None
        done.set()
        holder.join()
    assert code == 0


def test_ctrl_c_while_a_station_opens_closes_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress._display, "_say", interrupted)
    with pytest.raises(KeyboardInterrupt), station("load"):
        pass
    assert not progress._display._open


def test_other_processes_of_torchrun_are_silent(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    before = set(threading.enumerate())
    with station("block", 2, "block") as here:
        here.advance()
        assert here.seconds_left(clock.now + 3) is not None
        assert not progress._display._open
        assert set(threading.enumerate()) <= before
    assert not caplog.messages
    monkeypatch.setenv("RANK", "0")
    with station("block", 2, "block"):
        assert caplog.messages == ["block: 2 blocks"]


STATIONS = ["prune", "load", "calibrate", "evaluate dense", "rank", "probe", "share trial 1/3", "share trial 2/3",
            "share trial 3/3", "block", "pack", "evaluate pruned", "write"]  # fmt: skip


def options(text: Path) -> list[str]:
    return [
        "--output-dir", "out", "--calibration", "random", "--samples", "6", "--seqlen", "16", "--sparsity", "0.5",
        "--eval-text", str(text), "--compute-dtype", "float32", "--json",
    ]  # fmt: skip


@pytest.fixture
def short_text(validation_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text(validation_text.read_text()[:2000])
    return path


def test_a_log_file_names_every_station_in_order(run: Run, dense_dir: Path, short_text: Path) -> None:
    found = run(dense_dir, *options(short_text))
    assert found.code == 0, found.err
    places = [found.err.find(f"\n{name}") for name in ["load", *STATIONS[2:]]]
    assert found.err.startswith(f"prune {dense_dir}\n")
    assert -1 not in places, dict(zip(STATIONS[1:], places, strict=True))
    assert places == sorted(places)
    assert "\r" not in found.err, "a log file holds no bars"
    json.loads(found.out)  # and nothing else


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100, rows: int = 24) -> Iterator[list[bytes]]:
    """Make stderr a terminal and collect what is written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # Linux's way to say that the other side is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        yield parts
    reader.join(60)
    os.close(ours)


def test_a_terminal_shows_one_bar(
    dense_dir: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from mosaic_kernels.prune.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with terminal(monkeypatch) as parts:
        assert main([str(dense_dir), *options(short_text)]) == 0
    shown = b"".join(parts).decode()
    json.loads(capsys.readouterr().out)
    places = [shown.find(f"\r{name}") for name in STATIONS]
    assert -1 not in places, dict(zip(STATIONS, places, strict=True))
    assert places == sorted(places)
    assert "\x1b[A" not in shown, "no second bar below the first"
    assert re.search(r"block 1/3: +0%\|.*\[", shown)
    assert "Loading weights" not in shown, "nor transformers' own"
    lines = [line.rpartition("\r")[2].strip() for line in shown.split("\r\n")]
    assert not any("%|" in line for line in lines), "bars go when they are done"
    logged = [line for line in lines if line]
    assert any("structured share" in line for line in logged), "log lines stand above the bar"
    assert not any(line in STATIONS for line in logged), "what the bar says is not logged as well"


@pytest.mark.parametrize(("columns", "rows"), [(0, 24), (100, 24), (100, 0), (0, 0)])
def test_a_bar_has_the_rate_and_the_time_left_whatever_the_size(
    columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal without a width or a height still shows bars; after the inner station the outer one is shown again."""
    monkeypatch.setattr(progress, "_display", progress._Display())
    with terminal(monkeypatch, columns, rows) as parts, station("block", 4, "block", numbered=True) as here:
        here.advance()
        with station("recover", 10, "step", detail=True) as inner:
            inner.advance(5)
            progress._display.tick()
        progress._display.tick()
    drawn = b"".join(parts).decode().split("\r")
    assert all(len(line) <= (columns or 80) for line in drawn)
    assert any(line.startswith("block 2/4, recover:  50%|") and "step/s]" in line for line in drawn)
    last = [line for line in drawn if line.strip()][-1]
    assert re.match(r"block 2/4: +25%\|.*1/4 \[\d\d:\d\d<.*\]", last)


def test_speed_is_measured_in_numbered_runs(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    latency(random_model(), prompt_tokens=2, new_tokens=1, repeats=2)
    assert [record.message for record in caplog.records if record.name == progress.logger.name] == ["latency 1/3"]


def test_sequences_of_tasks_are_counted(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"query": "a", "choices": ["b", "c", "d"], "gold": 0}, {"query": "a", "choices": ["b", "c"], "gold": 1}]
    words = {"context": "a", "continuation": "b"}
    files = {"one": TaskFile(LAYOUTS[0], rows), "two": TaskFile(LAYOUTS[-1], [words, words])}
    assert zero_shot._sequences(files, None) == 3 + 2 + 2
    assert zero_shot._sequences(files, 1) == 3 + 1
    model = random_model()
    with station("zero-shot", 7, "sequence") as here, zero_shot._counted(model, here):
        model(input_ids=torch.zeros(2, 3, dtype=torch.int64))
        model(torch.zeros(4, 3, dtype=torch.int64))
        assert here.done == 6
    model(torch.zeros(4, 3, dtype=torch.int64))
    assert here.done == 6


@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
def test_recovery_is_a_station(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("peft")
    from mosaic_kernels.prune.recover import recover_lora

    model = random_model()
    recover_lora(model, torch.randint(96, (4, 8)), steps=3)
    assert caplog.messages[0] == "recover: 3 steps"
    assert len(ModelAdapter.of(model).blocks) == 3


def test_a_closed_stderr_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr(progress, "_display", progress._Display())
    with station("load"):
        progress._display.tick()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    with station("load"):
        progress._display.tick()

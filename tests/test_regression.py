# SPDX-License-Identifier: Apache-2.0
"""The comparison with committed figures: what fails, what does not, and what is not compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from regression import Comparison, committed_figures, misses

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

MACHINE = {"cpu": "Some CPU", "threads": 2, "isa": "avx512", "torch_isa": "AVX512", "torch": "2.13", "commit": "abc"}
COMMITTED = {"ratios": {"speed_up": 2.0}, "memory": {"weight_bytes": 1000, "load": 1.5}, "median_us": 10.0}


def write(results: Path, noun: str = "score", machine: dict[str, Any] = MACHINE, suffix: str = "some-cpu") -> None:
    results.mkdir(exist_ok=True)
    benchmarks = [{"name": "test_it[a]", "extra_info": COMMITTED}]
    (results / f"{noun}-{suffix}.json").write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))


def found(speed_up: float = 2.0, weight_bytes: float = 1000, load: float = 1.5) -> dict[str, Any]:
    return {"ratios": {"speed_up": speed_up}, "memory": {"weight_bytes": weight_bytes, "load": load}}


def test_what_is_as_good_or_better_passes() -> None:
    assert misses("b", found(), COMMITTED) == []
    assert misses("b", found(speed_up=9, weight_bytes=1, load=0.1), COMMITTED) == []
    assert misses("b", found(speed_up=1.701, weight_bytes=1029, load=1.54), COMMITTED) == []
    assert misses("b", {**found(), "median_us": 1e9}, COMMITTED) == []  # absolute times are not compared


def test_what_is_worse_than_its_limit_is_named() -> None:
    (miss,) = misses("test_it[a]", found(speed_up=1.69), COMMITTED)
    assert str(miss) == "test_it[a]: ratios['speed_up'] was 2 and is 1.69; 15% allow at least 1.7"
    (miss,) = misses("test_it[a]", found(weight_bytes=1031), COMMITTED)
    assert str(miss) == "test_it[a]: memory['weight_bytes'] was 1000 and is 1031; 3% allow at most 1030"
    assert len(misses("b", found(speed_up=0.1, weight_bytes=9999, load=9), COMMITTED)) == 3


def test_a_figure_that_vanishes_fails_and_a_new_one_does_not() -> None:
    (miss,) = misses("b", {"ratios": {"renamed": 2.0}, "memory": COMMITTED["memory"]}, COMMITTED)
    assert str(miss) == "b: ratios['speed_up'] is committed as 2 but was not measured"
    assert misses("b", {**found(), "ratios": {"speed_up": 2.0, "new": 0.1}}, COMMITTED) == []
    assert misses("b", found(), {}) == []


@pytest.mark.parametrize("difference", [{"cpu": "Other"}, {"threads": 1}, {"isa": "avx2"}, {"torch_isa": "AVX2"}])
def test_another_kind_of_machine_is_not_compared(tmp_path: Path, difference: dict[str, Any]) -> None:
    write(tmp_path)
    comparison = Comparison(MACHINE | difference, tmp_path)
    assert comparison.of("score", "test_it[a]", found(speed_up=0.1)) == []
    assert comparison.summary().startswith("nothing was compared; no committed figures of a machine like this (")
    assert comparison.summary().endswith("for score")


def test_other_versions_on_the_same_kind_of_machine_are_compared(tmp_path: Path) -> None:
    write(tmp_path, machine=MACHINE | {"isa": "avx2"}, suffix="a")
    write(tmp_path, suffix="b")
    write(tmp_path, noun="score-extra", suffix="b")
    assert committed_figures("score", MACHINE | {"torch": "9", "commit": "def"}, tmp_path) == {"test_it[a]": COMMITTED}
    comparison = Comparison(MACHINE, tmp_path)
    assert len(comparison.of("score", "test_it[a]", found(speed_up=1.0))) == 1
    assert comparison.of("score", "test_it[b]", found()) == []
    assert comparison.of("pack", "test_it[a]", found()) == []
    summary = comparison.summary()
    assert summary.startswith("1 compared")
    assert "for pack" in summary
    assert summary.endswith("not in the committed files: test_it[b]")


BENCH = """
import itertools
import pytest

calls = itertools.count()

def test_steady(benchmark, tmp_path):
    (tmp_path / "out").mkdir()  # a second run gets a directory of its own
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(ratios={"speed_up": SPEEDS[min(next(calls), len(SPEEDS) - 1)]})

def test_silent(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)

@pytest.mark.skip
def test_skipped(benchmark):
    pass

def test_no_benchmark():
    pass
"""


@cache
def machine_of_a_process() -> dict[str, Any]:
    probe = "import json, measure; print(json.dumps(measure.machine()))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_benchmarks(directory: Path, speeds: list[float], committed: list[str], *arguments: str) -> tuple[bool, str]:
    """The hooks themselves, in a copy of benchmarks/ with one file and committed figures: passed, and said."""
    for name in ("conftest.py", "measure.py", "regression.py"):
        (directory / name).write_text((BENCHMARKS / name).read_text())
    (directory / "bench_fake.py").write_text(f"SPEEDS = {speeds}\n{BENCH}")
    (directory / "results").mkdir()
    (directory / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    benchmarks = [{"name": name, "extra_info": {"ratios": {"speed_up": 2.0}}} for name in committed]
    (directory / "results" / "fake-here.json").write_text(
        json.dumps({"machine_info": machine_of_a_process(), "benchmarks": benchmarks})
    )
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this may be, but the run to look at is none
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark-only", "-p", "no:cacheprovider", *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("speeds", "options", "passes", "says"),
    [
        pytest.param([1.0, 1.9], [], True, "1 compared", marks=pytest.mark.slow),
        ([1.0, 1.1], [], False, "test_steady: ratios['speed_up'] was 2 and is 1.1"),
        pytest.param([1.0], ["--no-regression"], True, "2 passed", marks=pytest.mark.slow),
    ],
)
def test_a_slow_benchmark_fails_the_run_when_it_is_slow_twice(
    tmp_path: Path, speeds: list[float], options: list[str], passes: bool, says: str
) -> None:
    gone = ["test_gone"] if "--no-regression" in options else []
    passed, said = run_benchmarks(tmp_path, speeds, ["test_steady", "test_skipped", *gone], *options)
    assert passed is passes, said
    assert says in said
    assert "no longer there" not in said


@pytest.mark.parametrize(
    ("options", "complete"),
    [
        (["bench_fake.py"], True),
        pytest.param(["-k", "steady"], False, marks=pytest.mark.slow),
        pytest.param(["bench_fake.py::test_steady"], False, marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_that_vanishes_fails_a_run_of_its_whole_file(
    tmp_path: Path, options: list[str], complete: bool
) -> None:
    committed = ["test_steady", "test_gone[a]", "test_skipped", "test_no_benchmark"]
    passed, said = run_benchmarks(tmp_path, [2.0], committed, *options)
    assert passed is not complete, said
    assert ("; committed but no longer there: test_gone[a], test_no_benchmark\n" in said) is complete


def test_a_benchmark_that_declares_nothing_any_more_fails(tmp_path: Path) -> None:
    passed, said = run_benchmarks(tmp_path, [2.0], ["test_steady", "test_silent"], "-k", "silent")
    assert not passed
    assert "test_silent: ratios['speed_up'] is committed as 2 but was not measured" in said


def test_every_committed_figure_has_its_benchmark() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        if "benchmarks" in json.loads(path.read_text()):
            assert (BENCHMARKS / f"bench_{path.stem.split('-')[0]}.py").exists(), path.name

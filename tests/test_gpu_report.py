# SPDX-License-Identifier: Apache-2.0
"""What the GPU's benchmarks write, print and claim, and the command that runs them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu import goals, kernels, report
from gpu.__main__ import errors, main
from gpu.bench import Bench, load, write

ROOT = Path(__file__).parents[1]


def tiny(seconds: float = 600.0) -> Bench:
    return Bench(torch.device("cpu"), tiny=True, seconds=seconds)


# --- files


def test_a_run_that_fails_leaves_what_it_had(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"value": 1}
        raise ValueError("broken\nin many lines")

    with pytest.raises(ValueError, match="broken"):
        write("kernels", rows(), tiny(), tmp_path)
    found = json.loads((tmp_path / "gpu-kernels-cpu.json").read_text())
    assert (found["rows"], found["complete"], found["error"]) == ([{"value": 1}], False, "ValueError: broken")
    assert found["machine_info"]["torch"] == torch.__version__
    assert found["tiny"]
    assert not list(tmp_path.glob("*.part"))


def test_a_stage_without_time_says_that_it_is_incomplete(tmp_path: Path) -> None:
    found = json.loads(write("kernels", kernels.measure(tiny(0)), tiny(0), tmp_path).read_text())
    assert (found["rows"], found["complete"]) == ([], False)


def test_a_gpus_file_goes_before_a_cpus(tmp_path: Path) -> None:
    assert load("kernels", tmp_path) is None
    for name in ("cpu", "nvidia-h200"):
        (tmp_path / f"gpu-kernels-{name}.json").write_text(json.dumps({"name": name}))
    assert load("kernels", tmp_path) == {"name": "nvidia-h200"}


# --- goals and tables

MACHINE = {"gpu": "NVIDIA H200", "cuda": "13.0", "cpu": "a CPU", "torch": "2.11.0", "commit": "abc1234"}


def file_of(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"machine_info": MACHINE, "tiny": False, "complete": True, "error": None, "rows": rows, **settings}


def cell(speed: float | None, rows: int = 1, pattern: str = "50%", out: int = 11008, **more: Any) -> dict[str, Any]:
    speeds = {"dense": 1.0} if speed is None else {"dense": 1.0, "mosaic": speed}
    errors = {"mosaic": "ArithmeticError: wrong"} if speed is None else {}
    return {"rows": rows, "pattern": pattern, "out": out, "in": 4096, "speed_up": speeds, "errors": errors,
            "not_captured": {}, **more}  # fmt: skip


def verdict(name: str, **files: Any) -> str:
    return next(goal.verdict for goal in goals.goals(files) if goal.name.startswith(name))


def test_a_goal_is_held_by_the_slowest_large_shape() -> None:
    assert verdict("50% at 1 row", kernels=file_of([cell(1.5), cell(1.41), cell(0.5, out=1024)])) == "met"
    assert verdict("50% at 1 row", kernels=file_of([cell(1.5), cell(1.39)])) == "MISSED"
    assert verdict("50% at 8 to 16 rows", kernels=file_of([cell(1.5, 8), cell(1.1, 16)])) == "MISSED"
    assert verdict("50% at 1 row", kernels=file_of([cell(1.5), cell(None)])) == "FAILED: ArithmeticError: wrong"
    assert verdict("60% at 1 row", kernels=file_of([cell(1.5)])) == "not measured"
    assert verdict("50% at 1 row", kernels=file_of([cell(9.0)], tiny=True)) == "not measured"


def test_goals_of_whole_models_and_ranking() -> None:
    rows = [
        {"variant": "composite 80%", "ratios": {"tokens_per_s": 3.1, "latency": 0.32, "peak_bytes": 0.4}},
        {"variant": "unstructured 50%", "error": "RuntimeError: no"},
    ]
    assert verdict("7B, composite 80%: latency", e2e=file_of(rows)) == "met"
    assert verdict("7B, composite 80%: peak", e2e=file_of(rows)) == "MISSED"
    assert verdict("7B, unstructured 50%", e2e=file_of(rows)) == "FAILED: RuntimeError: no"
    better = {"variant": "composite 80%, compiled", "ratios": {"tokens_per_s": 3.5, "latency": 0.28, "peak_bytes": 0.3}}
    assert verdict("7B, composite 80%: peak", e2e=file_of(rows), compiled=file_of([better])) == "met"
    ranked = {"operation": "score + select + pack, 7B model", "milliseconds": 51.0}
    assert verdict("score", ranking=file_of([ranked])) == "MISSED"
    assert goals.table({}).endswith("0 of 28 goals met, 28 not measured")


def test_nothing_is_claimed_without_a_file(tmp_path: Path) -> None:
    assert report.markdown(tmp_path) == report.state(tmp_path) == report.NOTHING
    assert report.ways(tmp_path) == ""
    write("kernels", iter([cell(1.5)]), tiny(), tmp_path)
    assert report.markdown(tmp_path) == report.NOTHING  # small shapes measure nothing
    assert "not a measurement" in report.markdown(tmp_path, tiny=True)


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    def save(stage: str, rows: list[dict[str, Any]], **settings: Any) -> None:
        (tmp_path / f"gpu-{stage}-nvidia-h200.json").write_text(json.dumps(file_of(rows, **settings)))

    semi = cell(1.2, pattern="2:4")
    semi["speed_up"]["torch 2:4"], semi["not_captured"] = 0.5, {"torch 2:4": "RuntimeError: no"}
    save("kernels", [cell(1.5), cell(1.7), cell(None, pattern="60%"), semi], complete=False)
    latency = {"p50": 2.0, "p90": 2.1, "p99": 2.2}
    ratios = {"tokens_per_s": 1.5, "latency": 0.66, "weight_bytes": 0.5, "peak_bytes": 0.55}
    ok = {"variant": "2:4", "tokens_per_s": 500.0, "latency_ms": latency, "weight_bytes": 7e9, "peak_bytes": 8e9}
    save("e2e", [{**ok, "variant": "dense"}, {**ok, "ratios": ratios}, {"variant": "composite", "error": "broken"}])
    run = {
        "variant": "wanda",
        "blocks": 8,
        "of_blocks": 32,
        "tokens": 262144,
        "seconds": 3.14,
        "by_kind": {"gram": 1.0},
    }
    save("prune", [run])
    rates = {f"{name}_lanes_per_cycle": 16.0 for name in ("popc", "shfl", "lds_u16", "lds_64_broadcast")}
    rates |= {"multiprocessors": 132, "hmma_tflops": 600.0, "copy_gb_per_s": 4300.0, "read_gb_per_s": 4100.0}
    save("micro", [{"kind": "rates", **rates}, {"kind": "dense", "out": 8, "in": 9, "gigabytes_per_s": 3900.0}])
    text = report.markdown(tmp_path)
    assert "| 1 | 1.60x (1.50x) |  failed |  | 1.20x (1.20x) | 0.50x (0.50x) without a graph |" in text
    assert "NVIDIA H200, CUDA 13.0, torch 2.11.0, commit abc1234; not all of it was measured" in text
    assert "| 2:4 | 500.0 | 1.50x | 2.00 / 2.10 / 2.20 | 7,000 (0.50x) | 8,000 (0.55x) |" in text
    assert "| composite | failed: broken |" in text
    assert "| wanda | 8 of 32 | 262,144 | 3.1 | gram 1.0 |" in text
    assert "POPC 16.0" in text
    assert "8 x 9 3900" in text
    by_way = cell(1.0, 64) | {"speed_up": {"dense": 1.0, "decode": 1.2, "expand": 0.4}}
    save("dispatch", [by_way, by_way | {"speed_up": {"dense": 1.0, "decode": 1.4}}])
    assert "| rows of x | 50% decode | 50% expand |" in report.ways(tmp_path)
    assert "| 64 | 1.30 | 0.40 |" in report.ways(tmp_path)
    assert "decode |" not in report.markdown(tmp_path)
    assert report.state(tmp_path) == "Figures of NVIDIA H200 are under [On a GPU](#on-a-gpu)."


# --- commands


def test_its_modules_stand_for_no_packages(tmp_path: Path) -> None:
    code = (
        "import contextlib, importlib.util, runpy, sys\n"
        f"sys.path[0], sys.argv[1:] = 'benchmarks/gpu', ['summary', '--output', {str(tmp_path)!r}]\n"
        "with contextlib.suppress(SystemExit):\n"
        "    runpy.run_path('benchmarks/gpu/__main__.py', run_name='__main__')\n"
        "found = importlib.util.find_spec('kernels')\n"
        "assert found is None or 'benchmarks' not in found.origin, found\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_needs_a_gpu_or_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["ranking", "--output", str(tmp_path)]) == 3
    assert "--dry-run" in capsys.readouterr().err
    assert main(["ranking", "summary", "--dry-run", "--output", str(tmp_path)]) == 0
    assert "| OBS sweep of a block |" in capsys.readouterr().out


def run_gpu(*arguments: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "run_gpu.sh", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **variables},
    )  # fmt: skip


@pytest.mark.slow
def test_one_command_runs_the_stages(tmp_path: Path) -> None:
    done = run_gpu("--dry-run", "build", "micro", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "=== build" in done.stdout
    assert "skipped: dry run" in done.stdout
    assert "0 of 28 goals met" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".log"}
    assert run_gpu("nonsense", out=tmp_path).returncode == 2


def test_a_stage_that_fails_does_not_stop_the_next_but_is_told(tmp_path: Path) -> None:
    done = run_gpu("micro", "ranking", out=tmp_path, SECONDS_IN_ALL="5")
    assert done.returncode == 1
    assert "--- micro: 0s, status 124" in done.stdout
    assert "failed: micro (out of time) ranking (out of time)" in done.stdout


def test_tests_that_do_not_end_in_time_say_what_failed(tmp_path: Path) -> None:
    """A kernel may never end: pytest is interrupted early enough to name the failures so far."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"-m pytest "*) ;; *) exit 1 ;; esac\n'  # nothing to import, no figures to sum up
        'echo "$@"; trap "echo 1 failed; exit 2" INT; sleep 60 & wait\n'
    )
    python.chmod(0o755)
    done = run_gpu("tests", out=tmp_path / "out", SECONDS_IN_ALL="12", PYTHON=str(python))
    assert "-m cuda and not slow" in done.stdout
    assert "tests/test_cuda_linear.py" in done.stdout
    assert "test_gpu_report" not in done.stdout  # only files with such tests are collected
    assert "1 failed\n--- tests: " in done.stdout
    assert "failed: tests (out of time) summary" in done.stdout


def test_errors_of_ours_fail_a_stage() -> None:
    rows = [
        {"shape": "a", "rows": 1, "errors": {"torch 2:4": "no"}, "deterministic": {"mosaic": True}},
        {"shape": "b", "rows": 1, "errors": {"mosaic": "wrong"}},
        {"shape": "c", "rows": 8, "errors": {}, "deterministic": {"mosaic": False}},
        {"operation": "pack", "same_result": False},
        {"variant": "wanda", "error": "broken"},
    ]
    assert errors(rows) == [
        "b 1, mosaic: wrong", "c 8, mosaic: two runs differ", "pack: not the result of plain torch", "wanda: broken"
    ]  # fmt: skip

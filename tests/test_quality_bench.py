# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark: it counts what it compares, goes on where it stopped, its baselines are what they claim."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import random_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from quality import baselines, judge, plots, speed, summary
from quality.__main__ import main
from quality.cells import METHODS, SPARSITIES, Cell, grid
from quality.log import Log
from quality.runner import Settings

from mosaic_kernels.models import PROJECTIONS, ModelAdapter
from mosaic_kernels.prune.gram import InputStatistics
from mosaic_kernels.prune.solvers import Target
from mosaic_kernels.prune.solvers.sparsegpt import sparsegpt

GROUP, CHANNEL = 6 * 16 * 64, 3 * 64  # parameters of a unit of random_model()


@pytest.fixture
def bench(dense_dir: Path, calibration_text: Path, validation_text: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """Run the benchmark on two cheap methods: ``bench("--report-only")`` -> (exit code, result, log lines)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "cells.jsonl"

    def call(*options: str) -> tuple[int, dict[str, Any], list[str]]:
        code = main([
            "--models", str(dense_dir), "--calibration", str(calibration_text), "--validation", str(validation_text),
            "--samples", "4", "--seqlen", "64", "--eval-tokens", "512", "--kl-tokens", "128", "--seeds", "0",
            "--device", "cpu", "--output", str(log), *options,
        ])  # fmt: skip
        result = log.with_suffix(".json")
        return code, json.loads(result.read_text()) if result.exists() else {}, log.read_text().splitlines()

    call.log = log  # type: ignore[attr-defined]
    return call


CHEAP = ("--methods", "magnitude", "wanda", "--sparsities", "0.6")


def test_a_run_counts_judges_and_goes_on_where_it_stopped(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, log = bench(*CHEAP)
    assert code == 0
    assert [row["method"] for row in result["rows"]] == ["magnitude", "wanda"]
    budget = round(0.6 * result["prunable"])
    assert [row["removed"] for row in result["rows"]] == [[budget], [budget]]
    assert len(log) == 3  # and the dense model
    assert all(np.isfinite(row["excess"]) and row["kl"] > 0 for row in result["rows"])
    assert "| unstructured | 60.00% | wanda |" in capsys.readouterr().out

    with bench.log.open("a") as file:
        file.write('{"key": "cut o')
    assert bench(*CHEAP)[2] == log
    code, again, same = bench("--report-only", *CHEAP)
    assert (code, same, again["rows"]) == (0, log, result["rows"])


def test_different_counts_in_a_row_are_a_failure(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, log = bench(*CHEAP)
    record = json.loads(log[-1])
    record["nonzeros"], record["removed"] = record["nonzeros"] + 1, record["removed"] - 1
    bench.log.write_text("\n".join([*log[:-1], json.dumps(record)]) + "\n")
    code, result, _ = bench("--report-only", *CHEAP)
    assert code == 1
    assert len(result["count_faults"]) == 2  # the row, and the report against the model
    assert "unstructured 0.6 seed 0: non-zeros differ by 1" in capsys.readouterr().err


def test_the_reference_is_compared_at_the_count_it_reached(bench: Any) -> None:
    code, result, _ = bench("--methods", "mosaic-reference", "--sparsities", "0.7")
    assert code == 0
    reference, matched = result["rows"]
    assert (reference["method"], matched["method"]) == ("mosaic-reference", "sparsegpt-matched")
    assert reference["removed"] == matched["removed"] != [round(0.7 * result["prunable"])]


def test_structured_rows_are_given_the_same_units(bench: Any) -> None:
    code, result, _ = bench(
        "--methods", "flap", "flap-pooled", "ours-uniform", "--categories", "structured", "--sparsities", "0.5"
    )
    assert code == 0
    removed = [row["removed"][0] for row in result["rows"]]
    assert len(removed) == 3
    assert max(removed) - min(removed) <= summary.unit_parameters(64)


def test_only_structured_rows_may_differ_and_by_one_unit() -> None:
    dense = {"window_nll": [1.0, 1.0]}

    def faults(category: str, difference: int) -> tuple[int, int]:
        records = [
            {"category": category, "sparsity": 0.5, "share": None, "method": method, "seed": 0, "removed": 100,
             "nonzeros": 1000 + extra, "window_nll": [2.0, 2.0]}
            for method, extra in zip(METHODS[category], (0, difference), strict=False)
        ]  # fmt: skip
        found = summary.Findings(dense, records).count_faults(8)
        return len(found[0]), len(found[1])

    assert faults("structured", 8) == (0, 1)
    assert faults("structured", 9) == (1, 0)
    assert faults("unstructured", 1) == (1, 0)


def test_the_grid_is_complete_and_begins_with_what_decides() -> None:
    cells = list(grid([0, 1]))
    assert len(cells) == len(set(cells))
    assert {c.category for c in cells} == set(METHODS)
    for category, sparsities in SPARSITIES.items():
        assert {c.sparsity for c in cells if c.category == category} == set(sparsities)
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    first = [(c.sparsity, c.method) for c in cells[:12]]
    assert first == [(s, m) for s in (0.7, 0.6, 0.8) for m in ("sparsegpt", "owl", "fast", "default")]
    assert Cell("unstructured", 0.5, None, "sparsegpt", 0).missing is None
    places = {(*c.row, c.method) for c in cells}
    assert {p for bar in summary.BARS for p in (bar.place, *bar.against)} <= places


def test_an_interval_of_a_mean_is_the_one_of_the_textbook() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, (1, 400))
    low, high = judge.interval(judge.Bootstrap(1, 400, 20_000).medians(values))
    width = 1.96 * values.std() / 20
    # the quantiles of 20,000 draws are known to about 1.5 % of a standard error
    assert low == pytest.approx(values.mean() - width, abs=0.05 * width)
    assert high == pytest.approx(values.mean() + width, abs=0.05 * width)


def test_the_median_of_resampled_seeds_has_its_exact_distribution() -> None:
    values = np.repeat([[0.0], [0.0], [1.0]], 5, axis=1)
    medians = judge.Bootstrap(3, 5, 20_000).medians(values)
    expected = 7 / 27  # at least two of three draws hit the third seed
    assert medians.mean() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 20_000) ** 0.5)


def test_comparisons_are_paired_and_take_the_better_baseline() -> None:
    baseline = np.random.default_rng(2).lognormal(size=(5, 30))
    value, (low, high) = judge.compare(baseline / 4, [baseline, 2 * baseline], np.divide)
    assert (value, low, high) == pytest.approx((0.25, 0.25, 0.25))
    value, bounds = judge.compare(baseline - 0.1, [baseline], np.subtract)
    assert (value, *bounds) == pytest.approx((-0.1, -0.1, -0.1))


@pytest.mark.parametrize("channels", [1, 5, 12])  # one step; most of the channels; all that may go
@pytest.mark.parametrize(("groups", "pooled"), [(0, False), (2, False), (2, True)])
def test_flap_removes_what_was_asked(channels: int, groups: int, pooled: bool) -> None:
    model = random_model()
    before = judge.nonzeros(model)
    tokens = torch.randint(96, (10, 32))
    wished = min(channels * 8 * CHANNEL + groups * GROUP, 12 * 8 * CHANNEL + 2 * GROUP)
    assert baselines.flap(model, tokens, wished, pooled=pooled) == wished == before - judge.nonzeros(model)
    adapter = ModelAdapter.of(model)
    assert all(block.channels % 8 == 0 < block.channels for block in adapter.blocks)
    assert all(block.query_heads == 2 * block.key_value_heads > 0 for block in adapter.blocks)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens).logits).all()


def test_flap_takes_the_nearest_count_that_units_allow() -> None:
    for wished in (8 * CHANNEL + 700, 8 * CHANNEL + 900):
        removed = baselines.flap(random_model(), torch.randint(96, (4, 32)), wished)
        assert abs(removed - wished) <= 4 * CHANNEL


@torch.no_grad()
def test_flap_keeps_the_mean_of_what_the_consumer_gives() -> None:
    model = random_model()
    block = ModelAdapter.of(model).blocks[0]
    x, seen = torch.randn(50, 64), baselines._Moments(40)
    handle = block.projection("mlp.down_proj").register_forward_pre_hook(seen.observe)
    before = block.module.mlp(x).mean(0)
    handle.remove()
    baselines._cut(block, "mlp.down_proj", [3, 17, 18, 39], seen.mean)
    assert block.channels == 36
    after = block.module.mlp(x).mean(0)
    # sums of 40 products in fp32, averaged in fp32
    assert float((after - before).norm() / before.norm()) < 40 * torch.finfo(torch.float32).eps * 8


@pytest.mark.parametrize("features", [200, 64])  # two runs of columns, the second short; less than one run
def test_the_naive_sweep_agrees_with_ours(features: int) -> None:
    x = torch.randn(600, features) @ torch.randn(features, features) / features**0.5
    weight = torch.randn(48, features)
    found = InputStatistics(features, torch.device("cpu"), with_gram=True)
    found.add(x)
    remove = round(0.6 * weight.numel())
    ours, keep = sparsegpt(weight, found.finish("layer"), Target(remove), "layer")
    naive = baselines.fasterprune(weight, 2 * found.mean_gram, 0.6)
    assert int((naive == 0).sum()) == remove == int((~keep).sum())
    # both factorise in fp32 on their own way, so scores that tie within rounding may change places
    assert float(((naive != 0) == keep).float().mean()) > 0.999

    def error(pruned: Tensor) -> float:
        return float(((weight - pruned) @ x.T).square().sum())

    assert error(naive) == pytest.approx(error(ours * keep), rel=1e-3)


def test_the_naive_loop_prunes_every_projection_alike() -> None:
    model = random_model()
    baselines.naive_sparsegpt(model, torch.randint(96, (6, 32)), 0.5)
    for _, name, layer in ModelAdapter.of(model).projections():
        assert name in PROJECTIONS
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


def test_running_grams_are_the_mean_over_samples() -> None:
    layer, samples = torch.nn.Linear(5, 3), torch.randn(4, 7, 5)
    gram = baselines.RunningGram(layer)
    for sample in samples:
        gram.observe(layer, (sample.unsqueeze(0),))
    expected = 2 * samples.flatten(0, 1).double().T @ samples.flatten(0, 1).double() / 4
    assert float((gram.mean - expected).norm() / expected.norm()) < 28 * torch.finfo(torch.float32).eps


def test_speed_takes_turns_and_knows_its_bars(dense_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    settings = Settings(calibration_text, calibration_text, samples=2, seqlen=16, device="cpu")
    result = speed.measure(dense_dir, settings, repeats=1)
    assert set(result["seconds"]) == {"naive", *speed.VARIANTS}
    assert all(len(values) == 1 and values[0] > 0 for values in result["seconds"].values())
    assert len(result["bars"]) == len(speed.BARS)
    assert "| default / naive |" in speed.markdown(result)


def test_figures_are_drawn(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    _, result, _ = bench(*CHEAP)
    records = [r for r in Log(bench.log).records.values() if r["method"] != "dense"]
    files = plots.draw(result, records, tmp_path / "figures")
    assert {file.name for file in files} == {"perplexity.png", "pod.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

# SPDX-License-Identifier: Apache-2.0
"""The whole line: exact budgets, repeatable results, runs that go on where they stopped."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import digests, kept_weights, stopped_at, watched
from small_models import KINDS, logits, random_model

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.errors import CalibrationError, Interrupted, NonFiniteError, UsageError
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.ops import use_backend
from mosaic_kernels.prune import pipeline, planning

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"calibration": "random", "samples": 4, "seqlen": 16}


# Every category, solver, dtype and sparsity; policies and architectures take turns.
RUNS = [
    (*run, policy, kind)
    for run, policy, kind in zip(
        itertools.product(
            ("unstructured", "composite"),
            ("admm", "sparsegpt", "wanda", "magnitude"),
            (torch.float32, torch.bfloat16, torch.float16),
            (0.137, 0.6, 0.9),
        ),
        itertools.cycle(("curve", "pod", "owl", "uniform", "curve")),
        itertools.cycle((*KINDS, "llama", "qwen2", "mistral")),
        strict=False,
    )
]


@pytest.mark.parametrize(("category", "solver", "dtype", "sparsity", "policy", "kind"), RUNS)
def test_the_budget_is_met_to_the_last_parameter(
    category: str, solver: str, dtype: torch.dtype, sparsity: float, policy: str, kind: str
) -> None:
    model = random_model(kind, dtype=dtype)
    prunable = ModelAdapter.of(model).prunable_parameters
    report = mk.prune(model, sparsity=sparsity, category=category, solver=solver, policy=policy, **QUICK)
    removed = prunable - kept_weights(ModelAdapter.of(model))
    assert removed == round(sparsity * prunable) == report["removed_parameters"]
    assert report["removed_difference"] == 0
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("category", ["unstructured", "structured", "composite"])
def test_nothing_is_removed_at_zero(category: str) -> None:
    model = random_model(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert mk.prune(model, sparsity=0.0, category=category, **QUICK)["removed_parameters"] == 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("quality", ["fast", "default", "best"])
def test_every_quality_meets_the_budget(quality: str) -> None:
    model = random_model("qwen3")
    prunable = ModelAdapter.of(model).prunable_parameters
    report = mk.prune(model, sparsity=0.6, quality=quality, **QUICK)
    assert prunable - kept_weights(ModelAdapter.of(model)) == round(0.6 * prunable) == report["removed_parameters"]


@pytest.mark.parametrize("category", ["unstructured", "composite"])
def test_zeros_that_the_dense_model_holds_count_once(category: str) -> None:
    model = random_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for _, _, layer in ModelAdapter.of(model).projections():
            layer.weight[:4, :4] = 0
    prunable = ModelAdapter.of(model).prunable_parameters
    # so little that the policy leaves some projections dense
    report = mk.prune(model, sparsity=0.02, category=category, policy="pod", max_deviation=0.3, **QUICK)
    assert 0 in [round(entry["target"] * 1e6) for entry in report["projections"].values()]
    assert prunable - kept_weights(ModelAdapter.of(model)) == round(0.02 * prunable)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.97])
def test_structured_comes_as_near_as_units_allow(sparsity: float) -> None:
    model = random_model()
    prunable = ModelAdapter.of(model).prunable_parameters
    report = mk.prune(model, sparsity=sparsity, category="structured", **QUICK)
    adapter = ModelAdapter.of(model)
    removed = prunable - kept_weights(adapter)
    assert removed == report["removed_parameters"] == report["structured_removed"]
    assert report["unstructured_zeros"] == 0
    assert report["removed_difference"] == removed - round(sparsity * prunable)
    smallest = all(block.key_value_heads == 1 and block.channels == 8 for block in adapter.blocks)
    assert smallest == (sparsity == 0.97)
    assert smallest or 2 * abs(report["removed_difference"]) <= 8 * 3 * 64  # half a step of 8 channels


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_mosaic_reference_reports_its_true_sparsity(sparsity: float, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    report = mk.prune(
        model, sparsity=sparsity, category="unstructured", policy="mosaic-reference", outlier_threshold=2, **QUICK
    )
    prunable = report["prunable_parameters"]
    removed = prunable - kept_weights(ModelAdapter.of(model))
    assert removed == report["removed_parameters"] != round(sparsity * prunable)
    assert report["removed_difference"] == removed - round(sparsity * prunable)
    assert report["sparsity"] == removed / prunable
    assert f"true sparsity {removed / prunable:.4f}, asked {sparsity:.4f}" in caplog.text


def test_two_to_four_everywhere() -> None:
    model = random_model("qwen3")
    mk.prune(model, category="unstructured", pattern="2:4", **QUICK)
    for _, _, layer in ModelAdapter.of(model).projections():
        weight = layer.to_dense().weight
        assert bool(((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all())


# --- the report ---


def test_the_report_is_counted_from_the_model() -> None:
    model = random_model("qwen2", dtype=torch.bfloat16)
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    shapes = {b.full_name(n): list(layer.weight.shape) for b, n, layer in ModelAdapter.of(model).projections()}
    report = mk.prune(model, sparsity=0.6, **QUICK)
    adapter = ModelAdapter.of(model)
    for block, name, layer in adapter.projections():
        entry = report["projections"][block.full_name(name)]
        dense = (layer.to_dense() if isinstance(layer, MosaicLinear) else layer).weight
        rows, columns = shapes[block.full_name(name)]
        assert entry["original_shape"] == [rows, columns]
        assert entry["shape"] == list(dense.shape)
        assert entry["nnz"] == int(dense.count_nonzero())
        assert entry["sparsity"] == 1 - entry["nnz"] / (rows * columns) == pytest.approx(entry["target"], rel=1e-12)
        assert 0 <= entry["outlier_ratio"] <= 1
    assert report["structured_removed"] + report["unstructured_zeros"] == report["removed_parameters"]
    pruned_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert report["bytes"] == {"dense": dense_bytes, "pruned": pruned_bytes}
    assert json.loads(json.dumps(report)) == report
    assert set(report["seconds"]) >= {"load", "calibrate", "allocate", "prune", "total"}
    assert report["perplexity"] is None


def test_perplexity_before_and_after(dense_dir: Path, tmp_path: Path, validation_text: Path) -> None:
    from mosaic_kernels.evaluate.perplexity import perplexity
    from mosaic_kernels.text import load_tokens

    text = tmp_path / "text.txt"
    text.write_text(validation_text.read_text()[:5000])
    out = tmp_path / "out"
    # bfloat16, as the model below, also where a processor multiplies it slowly
    report = mk.prune(dense_dir, output_dir=out, sparsity=0.5, eval_text=text, compute_dtype="bfloat16", **QUICK)
    for key, path in (("dense", dense_dir), ("pruned", out)):
        model, tokenizer = load_model(path)
        found = perplexity(model, load_tokens(text, tokenizer), 16)
        assert report["perplexity"]["tokens"] == found.tokens
        # the same weights by the same kernels: equal but for how threads share the sum
        assert report["perplexity"][key] == pytest.approx(found.perplexity, rel=1e-5)


@pytest.mark.parametrize("format", ["mosaic", "dense"])
def test_bytes_are_those_on_disk(dense_dir: Path, tmp_path: Path, format: str) -> None:
    from safetensors.torch import load_file

    report = mk.prune(dense_dir, output_dir=tmp_path / "out", sparsity=0.5, format=format, **QUICK)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report["bytes"]["pruned"] == sum(t.numel() * t.element_size() for t in stored.values())
    stored = load_file(dense_dir / "model.safetensors")
    assert report["bytes"]["dense"] == sum(t.numel() * t.element_size() for t in stored.values())


# --- one result, however it is asked for ---


def test_prune_is_a_function_and_a_package(dense_dir: Path, tmp_path: Path) -> None:
    import mosaic_kernels.prune.allocate

    assert isinstance(mk.prune, types.ModuleType)
    assert callable(mk.prune)
    assert mk.prune.allocate is mosaic_kernels.prune.allocate
    assert mk.prune(str(dense_dir), output_dir=str(tmp_path / "out"), **QUICK)["schema"] == 1


def test_two_runs_are_equal_to_the_byte(dense_dir: Path, tmp_path: Path) -> None:
    reports = [mk.prune(dense_dir, output_dir=tmp_path / name, sparsity=0.6, **QUICK) for name in ("a", "b")]
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != {}
    assert reports[0]["projections"] == reports[1]["projections"]
    other = mk.prune(dense_dir, output_dir=tmp_path / "c", sparsity=0.6, **{**QUICK, "seed": 1})
    assert digests(tmp_path / "a") != digests(tmp_path / "c")
    assert other["seed"] == 1


def test_a_path_and_an_object_give_the_same_weights(dense_dir: Path, tmp_path: Path) -> None:
    by_path = mk.prune(dense_dir, output_dir=tmp_path / "out", sparsity=0.5, **QUICK)
    model, _ = load_model(dense_dir)
    by_object = mk.prune(model, sparsity=0.5, **QUICK)
    written, _ = load_model(tmp_path / "out")
    state, other = model.state_dict(), written.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert by_path["projections"] == by_object["projections"]
    assert json.loads((tmp_path / "out" / "mosaic_report.json").read_text()) == by_path


def test_ranks_are_reused_to_the_byte(dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mk.prune(dense_dir, output_dir=tmp_path / "a", sparsity=0.6, **QUICK)
    monkeypatch.setattr(planning, "rank", None)  # the second run may not rank
    ranks = tmp_path / "a" / "ranks.json"
    mk.prune(dense_dir, output_dir=tmp_path / "b", sparsity=0.6, ranks=ranks, **QUICK)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert ranks.read_text() == (tmp_path / "b" / "ranks.json").read_text()
    report = mk.prune(dense_dir, output_dir=tmp_path / "c", sparsity=0.3, ranks=str(ranks), **QUICK)
    assert report["removed_difference"] == 0


def test_category_auto_follows_the_kernels() -> None:
    with use_backend("reference"):  # zeros would only cost time
        assert mk.prune(random_model(), category="auto", sparsity=0.25, **QUICK)["category"] == "structured"
        wanted = mk.prune(random_model(), category="auto", sparsity=0.5, pattern="2:4", **QUICK)
        assert wanted["category"] == "composite"
    assert mk.prune(random_model(), category="auto", sparsity=0.25, **QUICK)["category"] in ("composite", "structured")


def test_a_pruned_model_can_be_pruned_again(dense_dir: Path, tmp_path: Path) -> None:
    mk.prune(dense_dir, output_dir=tmp_path / "a", sparsity=0.4, **QUICK)
    report = mk.prune(tmp_path / "a", output_dir=tmp_path / "b", sparsity=0.6, **QUICK)
    model, _ = load_model(tmp_path / "b")
    removed = report["prunable_parameters"] - kept_weights(ModelAdapter.of(model))
    assert removed == round(0.6 * report["prunable_parameters"])


def test_a_model_object_needs_no_directory_but_a_path_does(dense_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"--output-dir DIR\) is needed"):
        mk.prune(dense_dir, **QUICK)


@pytest.mark.parametrize("option", ["eval_text", "calibration"])
def test_text_for_an_object_needs_a_tokenizer(
    option: str, calibration_text: Path, tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_text.read_text()[:2000])
    options = {**QUICK, option: str(text)}
    with pytest.raises((UsageError, CalibrationError), match=r"text needs a tokenizer: .*tokenizer="):
        mk.prune(random_model(vocab_size=4096), **options)
    assert mk.prune(random_model(vocab_size=4096), tokenizer=tokenizer, **options)["schema"] == 1


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UsageError, match=r"unknown option 'sparcity'; the options are: sparsity, "):
        mk.prune(random_model(), sparcity=0.5)


def test_the_model_knows_so_many_positions() -> None:
    with pytest.raises(UsageError, match=r"--seqlen 129 is more than the 128 positions"):
        mk.prune(random_model(), **{**QUICK, "seqlen": 129})
    assert (
        mk.prune(random_model(), calibration="random", samples=1, solver="wanda", policy="uniform")["calibration"][
            "seqlen"
        ]
        == 128
    )


# --- interruption ---


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were really solved, in order."""
    seen: list[int] = []
    monkeypatch.setattr(pipeline, "prune_block", watched(seen))
    return seen


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("category", ["composite", "unstructured"])
def test_a_resumed_run_gives_the_same_bytes(
    after: int, category: str, dense_dir: Path, tmp_path: Path, solved: list[int]
) -> None:
    options = {"sparsity": 0.6, "category": category, **QUICK}
    mk.prune(dense_dir, output_dir=tmp_path / "whole", **options)
    out = tmp_path / "parts"
    with stopped_at(after), pytest.raises(Interrupted, match="resume=True"):
        mk.prune(dense_dir, output_dir=out, **options)
    assert not out.exists()
    solved.clear()
    with pytest.MonkeyPatch.context() as patch:  # neither ranked nor probed again
        patch.setattr(planning, "rank", None)
        patch.setattr(planning, "measure", None)
        mk.prune(dense_dir, output_dir=out, resume=True, **options)
    assert solved == list(range(after, 3))
    assert (out / "ranks.json").read_text() == (tmp_path / "whole" / "ranks.json").read_text()
    assert digests(tmp_path / "whole") == digests(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


def test_resuming_with_other_options_is_refused_and_costs_nothing(
    dense_dir: Path, tmp_path: Path, solved: list[int]
) -> None:
    out = tmp_path / "out"
    with stopped_at(2), pytest.raises(Interrupted):
        mk.prune(dense_dir, output_dir=out, sparsity=0.6, **QUICK)
    for changes, words in (
        ({"sparsity": 0.5}, "cannot resume: sparsity differ"),
        ({"solver": "wanda", "policy": "uniform"}, "cannot resume: policy, solver differ"),
        ({"samples": 3}, "cannot resume: samples, calibration differ"),
        ({"seqlen": 8}, "cannot resume: seqlen, calibration differ"),
        ({"seed": 5}, "cannot resume: seed, calibration differ"),
        ({"dtype": "float32"}, "cannot resume: dtype differ"),
    ):
        with pytest.raises(UsageError, match=words):
            mk.prune(dense_dir, output_dir=out, resume=True, **{"sparsity": 0.6, **QUICK, **changes})
    with pytest.raises(CalibrationError):  # a slip of another kind
        mk.prune(dense_dir, output_dir=out, resume=True, sparsity=0.6, **{**QUICK, "calibration": "./nowhere.txt"})
    solved.clear()
    mk.prune(dense_dir, output_dir=out, resume=True, sparsity=0.6, **QUICK)
    assert solved == [2]


def test_resume_without_an_interrupted_run_starts_afresh(dense_dir: Path, tmp_path: Path, solved: list[int]) -> None:
    mk.prune(dense_dir, output_dir=tmp_path / "out", resume=True, **QUICK)
    assert solved == [0, 1, 2]


def test_an_error_before_the_first_block_leaves_nothing_behind(dense_dir: Path, tmp_path: Path) -> None:
    with stopped_at(0, NonFiniteError), pytest.raises(NonFiniteError):
        mk.prune(dense_dir, output_dir=tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [NonFiniteError, ZeroDivisionError, MemoryError, OSError])
def test_finished_blocks_survive_any_error(
    error: type[Exception], dense_dir: Path, tmp_path: Path, solved: list[int]
) -> None:
    out = tmp_path / "out"
    with stopped_at(1, error), pytest.raises(error, match=r"finished blocks are kept in .*resume=True"):
        mk.prune(dense_dir, output_dir=out, **QUICK)
    assert not out.exists()
    solved.clear()
    mk.prune(dense_dir, output_dir=out, resume=True, **QUICK)
    assert solved == [1, 2]


def test_finished_blocks_survive_a_failure_of_the_last_step(
    dense_dir: Path, tmp_path: Path, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("made to fail")

    mk.prune(dense_dir, output_dir=tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_checkpoint", fails)
        with pytest.raises(RuntimeError, match=r"made to fail\nfinished blocks are kept in .*resume=True"):
            mk.prune(dense_dir, output_dir=out, **QUICK)
    solved.clear()
    mk.prune(dense_dir, output_dir=out, resume=True, **QUICK)
    assert solved == []
    assert digests(out) == digests(tmp_path / "whole")


def test_an_interrupted_object_says_that_it_is_half_done() -> None:
    with stopped_at(1), pytest.raises(Interrupted, match="partly pruned"):
        mk.prune(random_model(), **QUICK)

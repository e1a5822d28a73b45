# SPDX-License-Identifier: Apache-2.0
"""Computing in one dtype and storing in another: new weights are rounded once, and all others are unchanged."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import Run, digests, stopped_at
from safetensors.torch import load_file
from small_models import logits, random_model, zero_weights

import mosaic_kernels as mk
from mosaic_kernels import compute, device
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.compute import Computing, computing_in, settle_compute_dtype, settle_evaluation_dtype
from mosaic_kernels.errors import Interrupted, UsageError
from mosaic_kernels.evaluate import __main__ as evaluate_command
from mosaic_kernels.evaluate.perplexity import perplexity
from mosaic_kernels.models import PROJECTIONS, ModelAdapter
from mosaic_kernels.prune import pipeline, planning
from mosaic_kernels.prune.search import Evolution, search

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, FP32 = torch.device("cpu"), Computing(torch.float32, "a test wants it")
QUICK = {"calibration": "random", "samples": 4, "seqlen": 16}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitates a processor that multiplies only fp32 quickly."""
    slow = device.Products(fast=False, ratio=0.125, instructions=False)
    fast = device.Products(fast=True, ratio=1.0, instructions=True)
    monkeypatch.setattr(compute, "products", lambda dtype: slow if dtype in HALF else fast)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", HALF)
def test_auto_leaves_what_is_fast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "products", lambda dtype: device.Products(True, 3.0, True))
    assert settle_compute_dtype("auto", dtype, CPU).dtype is dtype


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("dtype", HALF)
def test_auto_avoids_what_is_slow_and_says_how_slow(dtype: torch.dtype) -> None:
    found = settle_compute_dtype("auto", dtype, CPU)
    assert found.dtype is torch.float32
    for word in ("no", device.name_of(dtype), "instructions", "0.12x"):
        assert word in found.why
    assert settle_compute_dtype("auto", dtype, torch.device("cuda")).dtype is dtype, "of a GPU nothing was measured"
    assert settle_compute_dtype(str(dtype).removeprefix("torch."), dtype, CPU).dtype is dtype, "asked for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_need_no_measurement(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "products", None)
    assert settle_compute_dtype("auto", dtype, CPU).dtype is dtype


@pytest.mark.parametrize(
    ("asked", "stored"),
    [("bfloat16", torch.float32), ("float16", torch.bfloat16), ("bfloat16", torch.float16), ("float32", torch.float64)],
)
def test_a_dtype_that_cannot_hold_the_weights_is_refused(asked: Any, stored: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"--compute-dtype {asked} cannot hold {device.name_of(stored)} weights"):
        settle_compute_dtype(asked, stored, CPU)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tied", [False, True])
def test_the_way_there_and_back_changes_nothing(dtype: torch.dtype, tied: bool) -> None:
    """Norms are fp32 here, as in some models: they must not be rounded on the way back."""
    model = random_model("qwen2", dtype=dtype, tie_word_embeddings=tied)
    model.model.norm.float()
    before, objects = bits(model), dict(model.named_parameters())
    with computing_in(ModelAdapter.of(model), FP32) as working:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert dict(model.named_parameters()).keys() == objects.keys()
        assert all(parameter is objects[name] for name, parameter in model.named_parameters())
        for block in working.blocks:
            assert {block.stored_dtype(name) for name in PROJECTIONS} == {dtype}
            assert block.copy().stored_dtype("mlp.up_proj") is dtype
            assert block.stored_dtype("self_attn.q_proj", "bias") is dtype
    assert same(bits(model), before)


def test_a_run_that_fails_leaves_the_dtypes_as_they_were() -> None:
    model = random_model(dtype=torch.bfloat16)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), computing_in(ModelAdapter.of(model), FP32):
        raise KeyboardInterrupt
    assert same(bits(model), before)


def test_nothing_happens_where_nothing_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(dtype=torch.bfloat16)
    adapter = ModelAdapter.of(model)
    with caplog.at_level("INFO"), computing_in(adapter, Computing(torch.bfloat16, "")) as working:
        assert working is adapter
    assert not caplog.messages


@pytest.mark.parametrize("weights", ["float", "int8", "int8-group"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
def test_packed_models_compute_in_fp32_too(kind: str, weights: Any) -> None:
    model = random_model(kind, dtype=torch.bfloat16)
    zero_weights(ModelAdapter.of(model), 0.5)
    wanted = logits(model.float())
    model.bfloat16()
    pack_model(ModelAdapter.of(model), weights)
    before = bits(model)
    with computing_in(ModelAdapter.of(model), FP32):
        found = logits(model)
    assert found.dtype is torch.float32
    # floats are the same numbers in another order; int8 is off by 1/254 of a row's largest weight at most
    bound = 1e-5 if weights == "float" else 0.05
    assert float((found - wanted).norm() / wanted.norm()) < bound
    assert same(bits(model), before)
    assert logits(model).dtype is torch.bfloat16


@pytest.mark.parametrize("category", ["unstructured", "structured", "composite"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_later_blocks_see_what_is_stored(kind: str, category: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that was pruned in fp32 holds bf16 numbers before the next block is pruned."""
    inner, seen = pipeline.prune_block, []

    def prune_block(block: Any, *args: Any, **options: Any) -> Any:
        after = inner(block, *args, **options)
        for name in PROJECTIONS:
            for held in (block.projection(name).weight, block.projection(name).bias):
                if held is not None:
                    assert held.dtype is torch.float32
                    assert torch.equal(held, held.bfloat16().float())
        seen.append(block.index)
        return after

    monkeypatch.setattr(pipeline, "prune_block", prune_block)
    model = random_model(kind, dtype=torch.bfloat16)
    prunable = ModelAdapter.of(model).prunable_parameters
    report = mk.prune(model, sparsity=0.5, category=category, compute_dtype="float32", **QUICK)
    assert seen == [0, 1, 2]
    assert report["removed_parameters"] - report["removed_difference"] == round(0.5 * prunable)
    assert report["removed_difference"] == 0 or category == "structured"
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"recover": "reconstruct"}, {"recover": "lora"}, {"policy": "curve+search"}])
@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
def test_what_comes_after_the_solver_is_rounded_too(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights pruned in fp32 are exact in bf16, so packing and storing them rounds nothing."""
    pytest.importorskip("peft")
    inner, checked = pipeline.pack_model, []

    def pack(adapter: ModelAdapter, *args: Any) -> None:
        for _, name, layer in adapter.projections():
            assert layer.weight.dtype is torch.float32
            assert torch.equal(layer.weight, layer.weight.bfloat16().float())
            checked.append(name)
        inner(adapter, *args)

    monkeypatch.setattr(pipeline, "pack_model", pack)
    short = functools.partial(search, evolution=Evolution(generations=2, offspring=2, rounds=((32, 1),)))
    monkeypatch.setattr(planning, "search", short)
    model = random_model(dtype=torch.bfloat16)
    prunable = ModelAdapter.of(model).prunable_parameters
    report = mk.prune(model, sparsity=0.6, compute_dtype="float32", **QUICK | {"samples": 8}, **options)
    assert len(checked) == 3 * len(PROJECTIONS)
    assert report["removed_parameters"] == round(0.6 * prunable)


@pytest.mark.parametrize("format", ["mosaic", "dense"])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_the_checkpoint_is_that_of_its_own_dtype(
    run: Run, tmp_path: Path, slow_half: None, format: str, weights: str
) -> None:
    if format == "dense" and weights != "float":
        pytest.skip("a dense checkpoint has no int8 values")
    source = tmp_path / "model"
    random_model("qwen3", dtype=torch.bfloat16).save_pretrained(source)
    common = ("--calibration", "random", "--samples", "4", "--seqlen", "16", "--format", format, "--weights", weights)
    found = run(source, "--output-dir", "out", "--json", "--sparsity", "0.5", "--category", "unstructured", *common)
    assert found.code == 0, found.err
    assert "computing in float32: this processor has no bfloat16 instructions" in found.err
    assert "the checkpoint stays bfloat16" in found.err
    report = json.loads(found.out)
    assert (report["device"]["compute_dtype"], report["dtype"]) == ("float32", "bfloat16")
    assert "0.12x" in report["device"]["compute_dtype_why"]
    before, after = load_file(source / "model.safetensors"), load_file(Path("out/model.safetensors"))
    projections = {f"{name}.weight" for name in report["projections"]}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in projections)
    floats = {tensor.dtype for name, tensor in after.items() if tensor.is_floating_point() and "scales" not in name}
    assert floats == {torch.bfloat16}
    assert report["bytes"]["pruned"] == sum(tensor.nbytes for tensor in after.values())
    assert report["bytes"]["dense"] == sum(tensor.nbytes for tensor in before.values())
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert "computed in float32, weights rounded to bfloat16" in Path("out/README.md").read_text()


def test_both_dtypes_prune_alike(
    tiny_llama: Path, calibration_text: Path, validation_text: Path, tmp_path: Path
) -> None:
    """The plan is the same, and so is the quality except for the rounding of activations."""
    text = tmp_path / "text.txt"
    text.write_text(validation_text.read_text()[:20_000])
    half, single = (
        mk.prune(
            tiny_llama, sparsity=0.6, category="unstructured", policy="uniform", quality="fast", samples=16, seqlen=64,
            calibration=calibration_text, eval_text=text, compute_dtype=dtype, output_dir=tmp_path / dtype,
        )
        for dtype in ("bfloat16", "float32")
    )  # fmt: skip
    assert {name: entry["nnz"] for name, entry in half["projections"].items()} == {
        name: entry["nnz"] for name, entry in single["projections"].items()
    }
    # logits are rounded to 8 bits; over many tokens these errors change perplexity by less than a quarter of a percent
    assert half["perplexity"]["dense"] == pytest.approx(single["perplexity"]["dense"], rel=0.0025)
    assert half["perplexity"]["pruned"] == pytest.approx(single["perplexity"]["pruned"], rel=0.01)


def test_a_run_is_resumed_in_the_dtype_it_began_in(dense_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "sparsity": 0.6, "quality": "fast"}
    whole = mk.prune(dense_dir, output_dir=tmp_path / "whole", compute_dtype="float32", **options)
    out = tmp_path / "out"
    with stopped_at(2), pytest.raises(Interrupted):
        mk.prune(dense_dir, output_dir=out, compute_dtype="float32", **options)
    blocks = list(tmp_path.rglob("block-*.safetensors"))
    assert blocks
    assert {tensor.dtype for path in blocks for tensor in load_file(path).values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="compute_dtype differ"):
        mk.prune(dense_dir, output_dir=out, compute_dtype="bfloat16", resume=True, **options)
    again = mk.prune(dense_dir, output_dir=out, compute_dtype="float32", resume=True, **options)
    assert digests(out) == digests(tmp_path / "whole")
    assert again["projections"] == whole["projections"]


def test_dry_run_counts_the_wider_weights(run: Run, dense_dir: Path) -> None:
    peaks = {}
    for dtype in ("bfloat16", "float32"):
        found = run(dense_dir, "--dry-run", "--json", "--policy", "uniform", "--compute-dtype", dtype)
        plan = json.loads(found.out)
        assert plan["compute_dtype"] == dtype
        peaks[dtype] = plan["peak_memory_bytes"]["host"]
        sizes = plan["bytes"]
    assert peaks["float32"] - peaks["bfloat16"] >= sizes["dense"]


@pytest.mark.usefixtures("slow_half")
def test_evaluation_computes_dense_models_in_fp32_and_measures_speed_as_loaded(
    dense_dir: Path, validation_text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, list[torch.dtype]] = {"quality": [], "speed": []}

    def judged(model: Any, *args: Any) -> Any:
        used["quality"].append(model.dtype)
        return perplexity(model, *args)

    def timed(model: Any, *args: Any) -> Any:
        used["speed"].append(model.dtype)
        return evaluate_latency(model, 4, 1, 1)

    from mosaic_kernels.evaluate.latency import latency as evaluate_latency

    monkeypatch.setattr("mosaic_kernels.evaluate.perplexity.perplexity", judged)
    monkeypatch.setattr("mosaic_kernels.evaluate.latency.latency", timed)
    command = [
        str(dense_dir),
        "--text",
        str(validation_text),
        "--seqlen",
        "16",
        "--samples",
        "2",
        "--latency",
        "--json",
    ]
    assert evaluate_command.main(command) == 0
    assert json.loads(capsys.readouterr().out)["compute_dtype"] == "float32"
    assert used == {"quality": [torch.float32], "speed": [torch.bfloat16]}
    assert evaluate_command.main([*command, "--compute-dtype", "float32"]) == 0
    assert used["speed"] == [torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("slow_half")
def test_packed_models_are_evaluated_as_they_are() -> None:
    model = random_model(dtype=torch.bfloat16)
    adapter = ModelAdapter.of(model)
    assert settle_evaluation_dtype("auto", adapter).dtype is torch.float32
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    assert settle_evaluation_dtype("auto", adapter).dtype is torch.bfloat16
    assert settle_evaluation_dtype("float32", adapter).dtype is torch.float32


def test_options_are_checked() -> None:
    from mosaic_kernels.config import PruneConfig

    with pytest.raises(UsageError, match="compute_dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        PruneConfig(compute_dtype="int8")  # type: ignore[arg-type]
    assert dataclasses.asdict(PruneConfig())["compute_dtype"] == "auto"

# SPDX-License-Identifier: Apache-2.0
"""The GPU's benchmarks, run on a CPU with small shapes: what they count and what they catch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu import decode, dispatch, kernels, micro, pruning, ranking, timing
from gpu.bench import Bench
from models import LLAMA_7B, pruned, random_llama

import mosaic_kernels as mk

CPU = torch.device("cpu")
EPSILON = torch.finfo(torch.bfloat16).eps


def tiny(seconds: float = 600.0) -> Bench:
    return Bench(CPU, tiny=True, seconds=seconds)


# --- timing


def test_a_chain_makes_every_call_and_figures_are_of_one_call() -> None:
    made: list[int] = []
    chains = {name: timing.Chain([lambda: made.append(1)] * 4, CPU) for name in ("first", "second")}
    assert len(made) == 8  # the warm-up
    found = timing.in_turns(chains, rounds=3)
    assert len(made) == 8 + 2 * 3 * 4
    assert chains["first"].why_not_captured == "no CUDA device"
    assert {name: len(values) for name, values in found.items()} == {"first": 3, "second": 3}
    assert all(0 < value < 0.1 for values in found.values() for value in values)


class FakeGraph:
    """A graph that runs what was captured."""

    captured: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a capture needs of ``torch.cuda``; the list says in which order it was used."""
    used: list[str] = []

    @contextmanager
    def capturing(graph: FakeGraph, stream: object) -> Iterator[None]:
        used.append("capture")
        FakeGraph.captured.append(graph)
        yield

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        used.append("stream")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_capture_stream", lambda device: "a stream")
    return used


def test_a_chain_warms_up_on_the_stream_that_it_captures(fake_cuda: list[str]) -> None:
    made: list[str] = []
    chain = timing.Chain([lambda: made.append(fake_cuda[-1])], torch.device("cuda"))
    assert made == ["stream", "stream", "capture"]
    assert chain.why_not_captured is None
    before = FakeGraph.captured[-1].replays
    chain.run()
    assert FakeGraph.captured[-1].replays == before + 1
    assert len(made) == 3


def test_a_chain_that_cannot_be_captured_runs_all_the_same(fake_cuda: list[str]) -> None:
    made: list[str] = []

    def call() -> None:
        made.append(fake_cuda[-1])
        if fake_cuda[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    chain = timing.Chain([call], torch.device("cuda"))
    assert chain.why_not_captured == "RuntimeError: operation not permitted when stream is capturing"
    fake_cuda.append("later")
    chain.run()
    assert made[-1] == "later"


@pytest.mark.parametrize(("seconds", "wanted"), [(1e-3, 1), (2e-4, 1), (1e-4, 2), (0.0, 64)])
def test_short_chains_are_repeated(seconds: float, wanted: int) -> None:
    assert timing.passes(seconds) == wanted


def test_copies_hold_more_than_the_cache() -> None:
    assert timing.copies(50 << 20, 192 << 20) == 4
    assert timing.copies(8 << 20, 192 << 20) == 24
    assert timing.copies(1 << 30, 192 << 20) == 4


def test_percentiles() -> None:
    found = timing.microseconds([i * 1e-6 for i in range(1, 100)])
    assert found == pytest.approx({"median_us": 50, "p10_us": 10, "p90_us": 90})
    assert decode.latencies([i * 1e-3 for i in range(1, 100)]) == pytest.approx({"p50": 50, "p90": 90, "p99": 99})


# --- kernels


@pytest.mark.parametrize("pattern", kernels.PATTERNS)
def test_random_weights_have_the_pattern(pattern: str) -> None:
    weight = kernels.random_weight((256, 512), pattern, CPU)
    kept = (weight != 0).float()
    if pattern == "2:4":
        assert bool((kept.view(-1, 4).sum(1) == 2).all())
    else:
        assert float(kept.mean()) == pytest.approx(kernels.KEPT[pattern], abs=0.01)


def test_kernels_are_checked_and_timed() -> None:
    rows = list(kernels.measure(tiny()))
    assert [(row["pattern"], row["rows"]) for row in rows] == [
        (pattern, rows) for pattern in kernels.PATTERNS for rows in (1, 8, 64, 128)
    ]
    for row in rows:
        assert set(row["figures"]) == set(row["deterministic"]) == {"dense", "mosaic"}
        assert max(row["relative_error"].values()) <= EPSILON
        assert row["speed_up"]["mosaic"] == pytest.approx(
            row["figures"]["dense"]["median_us"] / row["figures"]["mosaic"]["median_us"]
        )
        speed = row["bytes"] / row["figures"]["mosaic"]["median_us"] / 1e3
        assert row["gigabytes_per_s"]["mosaic"] == pytest.approx(speed)
        assert row["errors"] == {}
    at_half = next(row for row in rows if row["pattern"] == "50%")
    assert 0.5 < at_half["bytes"] / at_half["dense_bytes"] < 0.65


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mk.MosaicLinear.forward
    monkeypatch.setattr(mk.MosaicLinear, "forward", lambda self, x: right(self, x) * 1.05)
    row = next(kernels.measure(tiny()))
    assert set(row["figures"]) == {"dense"}
    assert row["errors"]["mosaic"].startswith("ArithmeticError: wrong result: relative error 0.0")


def test_a_kernel_that_leaves_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mk.MosaicLinear.forward
    monkeypatch.setattr(mk.MosaicLinear, "forward", lambda self, x: right(self, x) * float("nan"))
    assert next(kernels.measure(tiny()))["errors"]["mosaic"] == "ArithmeticError: wrong result: relative error nan"


def test_results_that_change_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = mk.MosaicLinear.forward, iter(range(10**6))
    monkeypatch.setattr(mk.MosaicLinear, "forward", lambda self, x: right(self, x) * (1 + 2**-7 * (next(calls) % 2)))
    monkeypatch.setattr(torch, "finfo", lambda dtype: type("Loose", (), {"eps": 1.0}))
    assert next(kernels.measure(tiny()))["deterministic"] == {"dense": True, "mosaic": False}


def test_every_way_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []

    @contextmanager
    def going(way: object, device: torch.device) -> Iterator[None]:
        gone.append(next(name for name, value in dispatch.WAYS.items() if value is way))
        yield

    monkeypatch.setattr(dispatch, "going", going)
    rows = list(dispatch.measure(tiny()))
    assert len(rows) == 6
    for row in rows:
        assert set(row["speed_up"]) == {"dense", *dispatch.WAYS} - ({"prefill"} if row["pattern"] == "2:4" else set())
        assert row["errors"] == {}
    assert set(gone) == set(dispatch.WAYS)


def test_a_way_is_taken_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    default = dispatch.Rows(64, 1024)
    monkeypatch.setattr(dispatch.tensor_cores, "_rows", {0: default})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with dispatch.going(dispatch.WAYS["expand"], torch.device("cuda")):
        assert dispatch.tensor_cores.rows_of(0) == (0, 0)
    assert dispatch.tensor_cores.rows_of(0) is default


# --- whole models


def test_shapes_are_those_of_a_7b_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_7B, "num_hidden_layers": 1}, tie_word_embeddings=False))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if "layers" in name)
    assert sum(sizes.values()) + (LLAMA_7B["num_hidden_layers"] - 1) * block == 6_738_415_616
    assert sum(out * columns for out, columns in ranking.BLOCK) == block - 2 * LLAMA_7B["hidden_size"]
    assert LLAMA_7B["num_hidden_layers"] == ranking.BLOCKS


def test_a_decoder_writes_what_generate_writes() -> None:
    model = random_llama(**decode.TINY)
    prompt = torch.randint(128, (1, 7))
    decoder = decode.Decoder(model, prompt, new_tokens=6)
    seconds = decoder.write()
    assert len(seconds) == 6
    assert min(seconds) > 0
    decoder.read()
    tokens = [int(decoder.token)]
    for _ in range(5):
        decoder.step.run()
        tokens.append(int(decoder.token))
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 7:]
    assert tokens == wanted.tolist()
    assert decoder.drift() <= decode.rounding(2)


def test_a_decoder_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decode.Decoder(random_llama(**decode.TINY), torch.randint(128, (1, 7)), new_tokens=6)
    step = decoder.step.run

    def forgetting() -> None:
        for layer in decoder.cache.layers:
            layer.values.zero_()
        step()

    monkeypatch.setattr(decoder.step, "run", forgetting)
    assert decoder.drift() > decode.rounding(2)


def test_patterns_of_pruned_models() -> None:
    adapter, plan = pruned(random_llama(**decode.TINY), 0.5, pattern="2:4")
    assert plan.removed * 2 == plan.prunable
    for _, _, layer in adapter.projections():
        assert bool(((layer.weight.view(-1, 4) != 0).sum(1) == 2).all())


def test_whole_models_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: decode.VARIANTS[name] for name in ("composite 80%", "2:4")}
    monkeypatch.setattr(decode, "VARIANTS", few)
    dense, *rows = decode.measure(tiny())
    assert dense["variant"] == "dense"
    assert [row["variant"] for row in rows] == list(few)
    for row in rows:
        assert "error" not in row, row
        assert max(row["packing_error"], row["drift"]) <= row["drift_limit"]
        assert row["ratios"]["weight_bytes"] == row["weight_bytes"] / dense["weight_bytes"]
        assert row["ratios"]["tokens_per_s"] == row["tokens_per_s"] / row["dense_in_turns"]["tokens_per_s"]
        assert row["peak_bytes"] is None
    assert set(dense["beside_weights"]) == {"p50", "p90", "p99"}
    assert rows[0]["weight_bytes"] < rows[1]["weight_bytes"] < dense["weight_bytes"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_compiled_models_are_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(decode, "COMPILED", ("unstructured 50%",))
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or real(model, **options))
    dense, row = decode.measure_compiled(tiny())
    assert (dense["variant"], row["variant"]) == ("dense, compiled", "unstructured 50%, compiled")
    assert "error" not in row, row
    assert max(row["packing_error"], row["drift"]) <= row["drift_limit"]
    assert len(compiled) == 2  # the dense one and the packed one


def test_a_model_that_packing_changes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "VARIANTS", {"2:4": decode.VARIANTS["2:4"]})
    right = mk.MosaicLinear.forward
    monkeypatch.setattr(mk.MosaicLinear, "forward", lambda self, x: -right(self, x))
    *_, row = decode.measure(tiny())
    assert row["error"].startswith("ArithmeticError: wrong result: packing moved logits by")
    assert "tokens_per_s" not in row


# --- ranking and pruning


def test_steps_of_pruning_agree_with_torch() -> None:
    model, *rows = ranking.measure(tiny())
    assert model["milliseconds"] > 0
    assert model["weights"] == 2 * 96 * 256
    assert len(rows) == 8
    assert all(row["same_result"] and row["speed_up"] > 0 for row in rows), rows


def test_steps_that_differ_are_noticed() -> None:
    packed = mk.pack(torch.eye(3))
    assert ranking.same((packed.values, packed.bitmask), packed)
    assert not ranking.same((packed.values * 2, packed.bitmask), packed)
    assert not ranking.same([1000], (0.0, [1010]))
    assert not ranking.same(torch.ones(3), torch.ones(3) * 1.1)


@pytest.mark.parametrize(
    ("blocks", "seconds", "left", "wanted"),
    [(1, 1.0, 100.0, 32), (1, 10.0, 100.0, 8), (2, 10.0, 100.0, 16), (1, 100.0, 50.0, 0)],
)
def test_as_many_blocks_as_fit(blocks: int, seconds: float, left: float, wanted: int) -> None:
    assert pruning.fitting(blocks, seconds, 32, left) == wanted


def test_pruning_says_how_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "VARIANTS", {name: pruning.VARIANTS[name] for name in ("wanda", "sparsegpt")})
    rows = list(pruning.measure(tiny()))
    assert [(row["variant"], row["blocks"]) for row in rows] == [
        ("wanda", 1), ("wanda", 2), ("sparsegpt", 1), ("sparsegpt", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["of_blocks"] == 2
        assert row["removed_difference"] == 0
        assert row["seconds"] >= sum(row["stations"][station] for station in ("allocate", "prune"))


def test_rates_need_a_gpu() -> None:
    rates, *dense = micro.measure(tiny())
    assert "no" in rates["skipped"]
    assert all(row["gigabytes_per_s"] > 0 for row in dense)

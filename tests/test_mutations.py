# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged at random: refused in words, or as before; values of other bytes only verify sees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mutations
import pytest
import torch
from mutations import BAD, CRASH, HANG, HUGE, REFUSED, SAME, VALUES, WARNED, campaign, table
from small_models import random_model, save, zero_weights

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.models import ModelAdapter

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """fp32 values in one file; int8 values in shards; fp16 values with tied embeddings."""
    folder, found = tmp_path_factory.mktemp("sources"), []
    for kind, weights, options, written in (
        ("llama", "float", {}, {}),
        ("qwen2", "int8-group", {"dtype": torch.bfloat16}, {"max_shard_size": "2KB"}),
        ("qwen3", "float", {"dtype": torch.float16, "tie_word_embeddings": True}, {}),
    ):
        adapter = ModelAdapter.of(random_model(kind, **TINY, **options))
        zero_weights(adapter, 0.5)
        pack_model(adapter, weights)  # type: ignore[arg-type]
        found.append(save(adapter, folder / kind, **written))
    assert (found[1] / mutations.INDEX).exists()
    return found


def _judge(outcomes: list[mutations.Outcome], count: int) -> None:
    print(table(outcomes))  # noqa: T201
    assert [outcome.number for outcome in outcomes] == list(range(count))
    bad = [outcome for outcome in outcomes if outcome.what in BAD]
    assert not bad, "\n".join(map(str, bad[:20]))
    counts = Counter(outcome.what for outcome in outcomes)
    # else the damage reaches nothing, and the campaign could not fail
    assert min(counts[what] for what in (SAME, REFUSED, VALUES)) > count / 50
    assert {outcome.kind for outcome in outcomes} == set(mutations.KINDS)


def test_three_hundred_damaged_checkpoints(sources: list[Path], tmp_path: Path) -> None:
    _judge(campaign(sources, tmp_path, 300), 300)


@pytest.mark.slow
def test_ten_thousand_damaged_checkpoints(sources: list[Path], tmp_path: Path) -> None:
    outcomes = campaign(sources, tmp_path, 10_000, seed=1, children=2)
    _judge(outcomes, 10_000)
    assert any(outcome.what == WARNED for outcome in outcomes)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        ("os._exit(7)", CRASH),
        ("os.kill(os.getpid(), 11)", CRASH),
        ("time.sleep(60)", HANG),
        ("bytearray(8 << 30)", HUGE),
    ],
)
def test_the_campaign_sees_what_it_looks_for(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, what: str
) -> None:
    """The third load of a child does harm; the loads after it are still judged."""
    monkeypatch.setattr(mutations, "PATIENCE", 3.0)
    plain, calls = mutations.load, []

    def load(directory: Path, **options: object) -> object:
        calls.extend([directory] if not options else [])
        if len(calls) == len(sources) + 3:
            exec(f"import os, time; {harm}")
        return plain(directory, **options)

    monkeypatch.setattr(mutations, "load", load)
    outcomes = campaign(sources, tmp_path, 4)
    assert [outcome.number for outcome in outcomes] == [0, 1, 2, 3]
    assert outcomes[2].what == what
    assert outcomes[3].what not in BAD

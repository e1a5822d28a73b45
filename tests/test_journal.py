# SPDX-License-Identifier: Apache-2.0
"""The journal: finished blocks come back bit for bit, damaged or foreign ones never."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import KINDS, random_model

from mosaic_kernels.errors import EnvironmentError_, UsageError
from mosaic_kernels.models import PROJECTIONS, Block, ModelAdapter
from mosaic_kernels.prune import journal as journal_module
from mosaic_kernels.prune.block import prune_block
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.journal import Journal
from mosaic_kernels.prune.solvers import SOLVERS
from mosaic_kernels.prune.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = {"model": "m", "sparsity": 0.5, "structured_share": None, "seed": 0}


def prepared(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Block, list[Batch]]:
    adapter = ModelAdapter.of(random_model(kind, dtype=dtype))
    tokens = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(2))
    return adapter.blocks[0], embed(adapter, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_comes_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    block, batches = prepared(kind, dtype)
    zeros = {block.full_name(name): 50 for name in PROJECTIONS}
    prune_block(block, batches, SOLVERS["magnitude"], Units(groups=1, channels=8), zeros, None)
    Journal(tmp_path / "journal", RUN).record(block)
    other, _ = prepared(kind, dtype)
    other.module.requires_grad_(False)
    other.module.self_attn.num_heads = 4
    assert Journal(tmp_path / "journal", RUN).restore(other)
    for name in PROJECTIONS:
        mine, theirs = block.projection(name), other.projection(name)
        assert torch.equal(mine.weight, theirs.weight)
        assert mine.weight.dtype == theirs.weight.dtype == dtype
        assert (mine.out_features, mine.in_features) == (theirs.out_features, theirs.in_features)
        assert (mine.bias is None) == (theirs.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, theirs.bias)
        assert not theirs.weight.requires_grad
        assert not theirs.training
    assert (other.query_heads, other.key_value_heads, other.channels) == (2, 1, 32)
    assert other.module.self_attn.num_heads == 2
    assert torch.equal(advance(block, batches)[0].hidden, advance(other, batches)[0].hidden)
    (tmp_path / "journal" / "block-00000.safetensors").unlink()  # as publishing the result does
    assert torch.equal(advance(block, batches)[0].hidden, advance(other, batches)[0].hidden)


def test_an_unfinished_block_is_not_there(tmp_path: Path) -> None:
    block, _ = prepared("llama")
    before = {name: block.projection(name) for name in PROJECTIONS}
    assert not Journal(tmp_path, RUN).restore(block)
    assert all(block.projection(name) is before[name] for name in PROJECTIONS)


def test_a_block_that_was_being_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = prepared("llama")
    journal = Journal(tmp_path, RUN)

    def cut_off(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "save_file", cut_off)
        with pytest.raises(KeyboardInterrupt):
            journal.record(block)
    assert not Journal(tmp_path, RUN).restore(block)
    journal.record(block)
    assert Journal(tmp_path, RUN).restore(block)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100])
def test_a_block_that_a_power_cut_spoiled_is_solved_again(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    block, _ = prepared("llama")
    Journal(tmp_path, RUN).record(block)
    (tmp_path / "block-00000.safetensors").write_bytes(damage)
    assert not Journal(tmp_path, RUN).restore(block)
    assert "model.layers.0" in caplog.text
    assert "solved again" in caplog.text


@pytest.mark.parametrize("error", ["No space left on device (os error 28)", "File too large (os error 27)"])
def test_a_full_disk_is_the_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {error}")

    block, _ = prepared("llama")
    monkeypatch.setattr(journal_module, "save_file", full)
    with pytest.raises(EnvironmentError_, match=r"disk full .*free some space"):
        Journal(tmp_path, RUN).record(block)


def test_the_same_options_are_taken_up(tmp_path: Path) -> None:
    Journal(tmp_path, RUN)
    Journal(tmp_path, dict(RUN))


def test_other_options_are_named(tmp_path: Path) -> None:
    Journal(tmp_path, RUN)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(UsageError, match=r"cannot resume: sparsity, seed differ .*--overwrite"):
        Journal(tmp_path, RUN | {"sparsity": 0.6, "seed": 1})
    with pytest.raises(UsageError, match="structured_share differ"):
        Journal(tmp_path, RUN | {"structured_share": 0.0})
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run.json is damaged; start afresh with --overwrite"):
        Journal(tmp_path, RUN)


def test_the_journal_says_what_run_it_is_of(tmp_path: Path) -> None:
    Journal(tmp_path / "new", RUN)
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == RUN
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]

# SPDX-License-Identifier: Apache-2.0
"""The journal: finished blocks come back bit for bit, damaged or foreign ones never."""

from __future__ import annotations

import json
import os
import random
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


def solved(tmp_path: Path, blocks: int = 2) -> tuple[Path, list[Block]]:
    """A journal of magnitude-pruned blocks."""
    adapter = ModelAdapter.of(random_model())
    journal = Journal(tmp_path / "journal", RUN)
    for block in adapter.blocks[:blocks]:
        for name in PROJECTIONS:
            weight = block.projection(name).weight.data
            weight[weight.abs() < weight.abs().median()] = 0
        journal.record(block)
    return tmp_path / "journal", list(adapter.blocks[:blocks])


def restored(directory: Path, blocks: int = 2) -> list[bool]:
    """Which blocks a resumed run takes over; those are bit for bit the ones that were recorded."""
    journal = Journal(directory, RUN)
    fresh = ModelAdapter.of(random_model()).blocks[:blocks]
    return [journal.restore(block) for block in fresh]


def test_no_changed_byte_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One bit anywhere: in the length, the header, the notes of the run, or a value."""
    directory, _ = solved(tmp_path, 1)
    path = directory / "block-00000.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    places = [*range(8), *chance.sample(range(8, header), 150), *chance.sample(range(header, len(whole)), 50)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        if restored(directory, 1) == [True]:  # a bit of the padding, or of a name that nobody reads
            block = ModelAdapter.of(random_model()).blocks[0]
            assert Journal(directory, RUN).restore(block)
            path.write_bytes(whole)
            same = ModelAdapter.of(random_model()).blocks[0]
            assert Journal(directory, RUN).restore(same)
            assert all(torch.equal(block.projection(n).weight, same.projection(n).weight) for n in PROJECTIONS)
        else:
            assert "block-00000.safetensors" in caplog.text
            assert "solved again" in caplog.text
    path.write_bytes(whole)
    assert restored(directory, 1) == [True]


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -4096])
def test_truncated_blocks_are_solved_again(tmp_path: Path, size: int) -> None:
    directory, _ = solved(tmp_path)
    path = directory / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert restored(directory) == [True, False]


def test_exchanged_blocks_are_solved_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, _ = solved(tmp_path)
    first, second = (directory / f"block-0000{index}.safetensors" for index in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert restored(directory) == [False, False]
    assert "block-00000.safetensors is another block (1 model.layers.1); the block is solved again" in caplog.text


def test_a_block_of_another_run_is_solved_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, blocks = solved(tmp_path)
    Journal(tmp_path / "other", RUN | {"seed": 1}).record(blocks[0])
    name = "block-00000.safetensors"
    (directory / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert restored(directory)[0] is False
    assert f"{name} is of another run" in caplog.text


def test_a_block_of_another_plan_is_solved_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, blocks = solved(tmp_path)
    journal = Journal(tmp_path / "other", RUN)
    journal.follow({"zeros": {"a": 1}})
    journal.record(blocks[0])
    again = Journal(tmp_path / "other", RUN)
    again.follow({"zeros": {"a": 2}})
    assert not again.restore(blocks[0])
    assert "was pruned by another plan" in caplog.text
    again.follow({"zeros": {"a": 1}})
    assert again.restore(blocks[0])


def test_blocks_after_one_that_came_out_otherwise_are_solved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their inputs came through it. Where it comes out as before, they stay."""
    directory, blocks = solved(tmp_path)
    path = directory / "block-00000.safetensors"
    for change, expected in ((0.0, True), (1.0, False)):
        path.unlink()
        journal = Journal(directory, RUN)
        assert not journal.restore(ModelAdapter.of(random_model()).blocks[0])
        blocks[0].projection(PROJECTIONS[0]).weight.data[0, 0] += change
        journal.record(blocks[0])
        assert journal.restore(ModelAdapter.of(random_model()).blocks[1]) is expected
    assert "block-00001.safetensors follows a block that has changed" in caplog.text


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would never end."""
    directory, _ = solved(tmp_path, 1)
    path = directory / "block-00000.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert restored(directory, 1) == [False]
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match=r"block-00000.safetensors is a directory .* remove it"):
        Journal(directory, RUN)
    path.rmdir()
    path.symlink_to(directory / "nowhere")
    assert restored(directory, 1) == [False]
    (directory / "run.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(UsageError, match=r"run.json is damaged"):
        Journal(directory, RUN)
    (directory / "run.json").unlink()
    os.mkfifo(directory / "run.json")
    with pytest.raises(UsageError, match=r"run.json is damaged"):
        Journal(directory, RUN)


def test_blocks_of_nobody_knows_what_run_are_refused_and_kept(tmp_path: Path) -> None:
    directory, _ = solved(tmp_path)
    (directory / "run.json").unlink()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(UsageError, match=r"holds block-00000.safetensors but no run.json.*--overwrite"):
        Journal(directory, RUN)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_no_changed_byte_of_the_run_file_is_taken_over(tmp_path: Path) -> None:
    directory, _ = solved(tmp_path)
    path = directory / "run.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="cannot resume"):
            Journal(directory, RUN)


PLAN: tuple[float | None, dict[str, int]] = (0.25, {"model.layers.0.mlp.up_proj": 12})


@pytest.mark.parametrize("share", [0.1 + 0.2, None])
def test_a_plan_comes_back(tmp_path: Path, share: float | None) -> None:
    Journal(tmp_path, RUN).keep_plan(share, PLAN[1])
    assert Journal(tmp_path, RUN).plan() == (share, PLAN[1])


def test_no_changed_byte_of_a_plan_or_ranking_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, RUN)
    journal.keep_plan(*PLAN)
    journal.keep_ranks(lambda path: path.write_text(json.dumps({"model": "m", "projections": {"a": {"5.0": 1.5}}})))
    assert journal.plan() == PLAN
    assert journal.has_ranks()
    for path, found in ((tmp_path / "plan.json", journal.plan), (journal.ranks, journal.has_ranks)):
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            caplog.clear()
            assert not found()
            assert f"{path} is damaged or of another run" in caplog.text
        for size in (0, 1, len(whole) // 2):
            path.write_bytes(whole[:size])
            assert not found()
        path.write_bytes(whole)
        assert found()


def test_a_plan_of_another_run_is_made_again(tmp_path: Path) -> None:
    Journal(tmp_path / "a", RUN).keep_plan(*PLAN)
    other = Journal(tmp_path / "b", RUN | {"seed": 1})
    (tmp_path / "b" / "plan.json").write_bytes((tmp_path / "a" / "plan.json").read_bytes())
    assert other.plan() is None


def test_a_missing_plan_is_told_where_there_are_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Journal(tmp_path / "new", RUN).plan() is None
    assert not caplog.text
    directory, _ = solved(tmp_path)
    assert Journal(directory, RUN).plan() is None
    assert "the journal has blocks but no plan.json; the plan is made again" in caplog.text


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


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run.json is damaged; start afresh with --overwrite"):
        Journal(tmp_path, RUN)


def test_the_journal_says_what_run_it_is_of(tmp_path: Path) -> None:
    Journal(tmp_path / "new", RUN)
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == RUN
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]

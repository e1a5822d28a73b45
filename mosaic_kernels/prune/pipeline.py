# SPDX-License-Identifier: Apache-2.0
"""The whole line: calibration, ranking, plan, pruning, packing, writing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mosaic_kernels.checkpoint.beside import check_files_beside
from mosaic_kernels.checkpoint.directory import write_errors
from mosaic_kernels.checkpoint.public import public_name
from mosaic_kernels.checkpoint.reader import check_finite, load_model
from mosaic_kernels.checkpoint.writer import OutputDirectory, pack_model, write_checkpoint
from mosaic_kernels.cli import current_device
from mosaic_kernels.compute import computing_in, settle_compute_dtype
from mosaic_kernels.config import DEFAULT_SEQLEN, Category, PruneConfig
from mosaic_kernels.errors import CalibrationError, UsageError
from mosaic_kernels.evaluate.perplexity import Perplexity, perplexity
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import Block, ModelAdapter
from mosaic_kernels.ops import reference
from mosaic_kernels.ops.select import kernel
from mosaic_kernels.paths import local_path
from mosaic_kernels.progress import station
from mosaic_kernels.prune.block import prune_block, share_block
from mosaic_kernels.prune.calibration import Calibration, calibrate
from mosaic_kernels.prune.capture import Batch, advance, embed
from mosaic_kernels.prune.composite import Plan
from mosaic_kernels.prune.fingerprint import fingerprint
from mosaic_kernels.prune.given import sequence_length
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.interruption import resumable
from mosaic_kernels.prune.journal import Journal, has_run
from mosaic_kernels.prune.masked_lora import lora_layer
from mosaic_kernels.prune.options import make_config
from mosaic_kernels.prune.planning import settle_plan, settle_ranks
from mosaic_kernels.prune.ranks import Team, joined
from mosaic_kernels.prune.recover import HELD_OUT, dense_teacher, recover_lora
from mosaic_kernels.prune.report import log_removed, make_report
from mosaic_kernels.prune.solvers import choose_solver
from mosaic_kernels.prune.timing import Clock, Split, measuring
from mosaic_kernels.prune.torch_state import as_by_default, leave_inference_mode
from mosaic_kernels.text import load_tokens, windows
from mosaic_kernels.wrappers import require_prunable

logger = logging.getLogger(__name__)


@as_by_default()
def prune(
    model: Any,
    *,
    output_dir: str | Path | None = None,
    tokenizer: Any = None,
    command: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Prune a causal language model; the library form of ``python -m mosaic_kernels.prune``.

    Args:
        model: directory or hub id, or a ``PreTrainedModel``, which is pruned in place.
        output_dir: where to write the checkpoint. Needed for a path; optional for a model.
        tokenizer: the tokenizer of a model given as an object; needed for texts.
        command: the command line, for the report and for the resume hint.
        **options: fields of :class:`~mosaic_kernels.config.PruneConfig`. ``calibration`` is the path of a text file, a
            table or a folder (docs/calibration.md), the name of a dataset, ``random``, a list of texts, a tensor of
            token ids, or any iterable of texts or of sequences of token ids. Of text and of one flat sequence of ids
            ``samples`` windows of ``seqlen`` tokens are drawn by ``seed``; of a tensor ``[sequences, tokens]`` (or
            sequences of one length) the first ``samples`` are used as they are, and ``seqlen`` is their length.

    Returns:
        The report, the same object as ``mosaic_report.json``.

    Raises:
        UsageError: an option is invalid, or ``output_dir`` is not empty.
        ModelLoadError, UnsupportedModelError, CalibrationError, NonFiniteError: bad input.
        EnvironmentError_: no disk space, no device, no network.
        Interrupted: stopped by Ctrl-C or a signal; the message says how to resume. It is a ``KeyboardInterrupt``.

    Example:
        >>> import mosaic_kernels as mk
        >>> report = mk.prune("examples/tiny-llama", sparsity=0.6, calibration="examples/text/calibration.txt",
        ...                   samples=8, seqlen=64, output_dir=tmp / "pruned")
        >>> report["removed_parameters"] == round(0.6 * report["prunable_parameters"])
        True
    """
    config = make_config(options)
    if output_dir is None and isinstance(model, (str, Path)):
        raise UsageError("output_dir (--output-dir DIR) is needed to prune a model given by path")
    if not isinstance(model, (str, Path)):
        model = require_prunable(model)
    with joined(config.device) as (team, device):
        output = None
        if output_dir is not None:
            output = team.first(
                lambda: OutputDirectory(
                    output_dir, overwrite=config.overwrite, resume=config.resume, source=_name(model)
                )
            )
            if output is not None and config.resume and not has_run(output.journal):
                logger.info("nothing to resume in %s: the run starts afresh", output.path)
        if not isinstance(model, (str, Path)):  # pruned where it is
            device = next(model.parameters()).device
            leave_inference_mode(model)
        with (
            resumable(output, command, team), current_device(device), measuring() as split,
            station(f"prune {_name(model)}"),
        ):  # fmt: skip
            return _run(model, tokenizer, config, output, list(command), split, device, team)


def _run(
    source: Any,
    tokenizer: Any,
    config: PruneConfig,
    output: OutputDirectory | None,
    command: list[str],
    split: Split,
    device: torch.device,
    team: Team,
) -> dict[str, Any]:
    clock = Clock()
    if config.recover != "none":  # descent goes through the sequences one after the other: all of them, everywhere
        team = team.whole()
    adapter, tokenizer = team.each(lambda: _load(source, tokenizer, config, device))
    model: Any = adapter.model
    config = settle_category(config, device)
    computing = team.from_first(lambda: settle_compute_dtype(config.compute_dtype, adapter.dtype, device))
    name = _name(source)
    staging = None if output is None else output.staging
    # every process takes part, though only the first one has a place to write to
    team.first(lambda: None if staging is None else check_files_beside(model, tokenizer, local_path(name), staging))
    lap = clock.lap("load", clock.started)

    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQLEN
    seqlen = sequence_length(config.calibration, config.seqlen, limit)
    with station("calibrate"):
        calibration, eval_tokens, given = team.each(lambda: _read(config, adapter, tokenizer, seqlen))

        def journal_of(output: OutputDirectory) -> Journal:
            computes = "as stored" if computing.dtype is adapter.dtype else computing.name
            return Journal(output.journal, fingerprint(adapter, tokenizer, calibration, config, computes, team.world))

        journal = team.first(lambda: None if output is None else journal_of(output))

    def judged(which: str) -> Perplexity | None:
        return None if eval_tokens is None else perplexity(model, eval_tokens, seqlen, name=f"evaluate {which}")

    with computing_in(adapter, computing) as working:
        dense = team.first(lambda: judged("dense"))
        batches = team.each(lambda: _embed(working, calibration.tokens, config, team))
        lap = clock.lap("calibrate", lap)
        ranks = settle_ranks(working, calibration, config, public_name(name), given, journal, team)
        plan = settle_plan(working, ranks, calibration, config, journal, team)
        team.first(lambda: log_removed(working, plan, config))
        lap = clock.lap("allocate", lap)
        batches = _prune_blocks(working, batches, plan, config, journal, team)
        lap = clock.lap("prune", lap)
        tuned = None
        if config.recover == "lora" and plan.removed:
            tuned = team.first(lambda: _recover(working, batches, calibration.tokens, config))
            clock.lap("recover", lap)
        judgements = team.first(lambda: _packed(working, config, judged))

    def finish() -> dict[str, Any]:
        pruned, before_int8 = judgements or (None, None)
        report = make_report(
            adapter, plan, ranks, config, computing, calibration, command=command, model=name, seconds=clock.seconds,
            by_kind=split.seconds, tuned=tuned, perplexities=_perplexities(config, dense, pruned, before_int8),
        )  # fmt: skip
        if output is None:
            clock.stop()
        else:
            _write(adapter, tokenizer, plan, ranks, config, output, report, clock, name)
        if config.format == "dense" and not isinstance(source, (str, Path)):
            model.dequantize()
        return report

    return team.from_first(finish)


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else str(model.config._name_or_path or "in-memory model")


def _load(source: Any, tokenizer: Any, config: PruneConfig, device: torch.device) -> tuple[ModelAdapter, Any]:
    """The dense model, checked, and its tokenizer."""
    if config.recover == "lora":
        lora_layer()  # says now, not after hours, that PEFT is missing
    model = source
    if isinstance(source, (str, Path)):
        model, tokenizer = load_model(source, dtype=config.dtype, device=device)
    adapter = ModelAdapter.of(model.eval())
    _unpack_projections(adapter)
    check_finite(model)
    return adapter, tokenizer


def _read(
    config: PruneConfig, adapter: ModelAdapter, tokenizer: Any, seqlen: int
) -> tuple[Calibration, Tensor | None, Ranks | None]:
    """Calibration sequences, and the tokens to evaluate on and the ranking where they are given."""
    if config.eval_text is not None and tokenizer is None:
        raise UsageError("evaluation text needs a tokenizer: add its files to the model directory, or pass tokenizer=")
    if config.eval_text is not None and config.eval_tokens is not None and config.eval_tokens < seqlen:
        raise UsageError(
            f"--eval-tokens {config.eval_tokens} is less than one window of {seqlen} tokens: give at least {seqlen}, "
            "or lower --seqlen"
        )
    eval_tokens = None if config.eval_text is None else load_tokens(config.eval_text, tokenizer)[: config.eval_tokens]
    if eval_tokens is not None:
        windows(eval_tokens, seqlen, str(config.eval_text))  # raises now if the text is too short
    vocabulary = cast(Any, adapter.model).get_input_embeddings().num_embeddings
    calibration = calibrate(
        config.calibration, tokenizer, vocabulary, samples=config.samples, seqlen=seqlen, seed=config.seed
    )
    if config.recover != "none" and len(calibration.tokens) < 2:
        raise CalibrationError(
            f"recovery needs a second sequence to judge by, and {calibration.source} makes one of {seqlen} tokens: "
            "give more text or a smaller --seqlen"
        )
    given = None if config.ranks is None else Ranks.load(config.ranks, adapter, config.outlier_threshold)
    return calibration, eval_tokens, given


def _recover(adapter: ModelAdapter, batches: Sequence[Batch], tokens: Tensor, config: PruneConfig) -> dict[str, Any]:
    """Train a masked update of the whole model towards the dense model's predictions; return the result."""
    teacher = dense_teacher(adapter, batches)
    return recover_lora(adapter.model, tokens, teacher=teacher, seed=config.seed, stored=adapter.blocks[0].stored)


def _packed(
    adapter: ModelAdapter, config: PruneConfig, judged: Callable[[str], Perplexity | None]
) -> tuple[Perplexity | None, Perplexity | None]:
    """Pack the model; return its perplexity, and the perplexity before its values were rounded to int8."""
    pack_model(adapter)
    floats = judged("pruned")
    if config.weights == "float":
        return floats, None
    pack_model(adapter, config.weights)
    return judged(config.weights), floats


def _embed(adapter: ModelAdapter, tokens: Tensor, config: PruneConfig, team: Team) -> list[Batch]:
    """This process's calibration batches; where targets are aimed at, one sequence in ``HELD_OUT`` judges in all."""
    held_out = len(tokens) // HELD_OUT if keeps_dense_side(config) else 0
    batches = embed(adapter, team.mine(tokens[: len(tokens) - held_out]))
    return [*batches, *embed(adapter, tokens[len(tokens) - held_out :], held_out=True)]


def settle_category(config: PruneConfig, device: torch.device) -> PruneConfig:
    """Settle ``auto``: zeros pay only where a kernel uses them, so elsewhere only whole units go."""
    if config.category != "auto":
        return config
    slow = kernel("sparse_linear", device) is reference.sparse_linear
    wants_zeros = config.group is not None or config.structured_share is not None
    category: Category = "structured" if slow and not wants_zeros else "composite"
    logger.info("category auto: %s (sparse kernels %s on %s)", category, "missing" if slow else "present", device.type)
    return replace(config, category=category)


def _unpack_projections(adapter: ModelAdapter) -> None:
    """A model that was pruned before is pruned again from its dense form."""
    for block, name, layer in adapter.projections():
        if isinstance(layer, MosaicLinear):
            block.replace(name, layer.to_dense(adapter.dtype))


def _prune_blocks(
    adapter: ModelAdapter, batches: list[Batch], plan: Plan, config: PruneConfig, journal: Journal | None, team: Team
) -> list[Batch]:
    """Prune every block; the batches after the last one, their dense side where it was kept."""
    if not plan.removed:
        return batches  # refitting a dense model to itself would only add rounding
    solver = choose_solver(config.solver, config.quality)
    beside = keeps_dense_side(config)
    if journal is not None:
        journal.follow({"units": [vars(each) for each in plan.units], "zeros": plan.zeros})
    if beside:
        batches = [replace(batch, dense=batch.hidden) for batch in batches]
    with station("block", len(adapter.blocks), "block", numbered=True) as here:
        for block, units in zip(adapter.blocks, plan.units, strict=True):
            dense = block.copy() if beside else None
            if team.from_first(partial(_restore, journal, block)):
                share_block(block, team)
                batches = advance(block, batches, dense)
            else:
                batches = prune_block(
                    block, batches, solver, units, plan.zeros, config.group, dense,
                    per_row=config.per_row, recover=config.recover == "reconstruct", team=team,
                )  # fmt: skip
                team.first(partial(_record, journal, block))
            here.advance()
    return batches


def _restore(journal: Journal | None, block: Block) -> bool:
    return journal is not None and journal.restore(block)


def _record(journal: Journal | None, block: Block) -> None:
    if journal is not None:
        journal.record(block)


def keeps_dense_side(config: PruneConfig) -> bool:
    """Whether the dense model's activations run beside the pruned one's."""
    return choose_solver(config.solver, config.quality).two_streams or config.recover != "none"


def _perplexities(
    config: PruneConfig, dense: Perplexity | None, pruned: Perplexity | None, before_int8: Perplexity | None
) -> dict[str, Any] | None:
    if dense is None or pruned is None:
        return None
    found = {
        "text": str(config.eval_text),
        "tokens": dense.tokens,
        "dense": dense.perplexity,
        "pruned": pruned.perplexity,
    }
    return found if before_int8 is None else {**found, "before_int8": before_int8.perplexity}


def _write(
    adapter: ModelAdapter,
    tokenizer: Any,
    plan: Plan,
    ranks: Ranks,
    config: PruneConfig,
    output: OutputDirectory,
    report: dict[str, Any],
    clock: Clock,
    name: str,
) -> None:
    started = time.perf_counter()
    write_checkpoint(
        adapter, output.staging, tokenizer=tokenizer, report=report, original_shapes=plan.original_shapes,
        source=name, format=config.format,
    )  # fmt: skip
    with write_errors(output.staging):
        ranks.save(output.staging / "ranks.json")
        clock.lap("write", started)
        clock.stop()
        (output.staging / "mosaic_report.json").write_text(json.dumps(report, indent=1))  # now with all seconds
    output.publish()

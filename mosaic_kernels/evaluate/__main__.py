# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.evaluate``: perplexity, zero-shot accuracy, speed and size of a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mosaic_kernels.cli import peak_memory_bytes, run_command, show
from mosaic_kernels.config import ComputeDtype
from mosaic_kernels.errors import ModelLoadError, UsageError

DEFAULT_SEQLEN = 2048


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mosaic_kernels.evaluate",
        description="Measure perplexity, zero-shot accuracy, speed and size of a language model, dense or pruned.",
        epilog="example: python -m mosaic_kernels.evaluate examples/tiny-llama "
        "--text examples/text/validation.txt --seqlen 256 --latency",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or a hub id")
    quality = parser.add_argument_group("perplexity")
    quality.add_argument(
        "--text",
        metavar="FILE",
        help="text to predict: UTF-8, or a table with a column 'text' (.jsonl, .json, .csv, .parquet; PATH:COLUMN "
        "for another), - for the standard input",
    )
    quality.add_argument(
        "--seqlen", type=int, metavar="N", help=f"tokens in a window (default: {DEFAULT_SEQLEN} or the model's maximum)"
    )
    quality.add_argument("--samples", type=int, metavar="N", help="windows, from the start of the text (default: all)")
    quality.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="windows at once, and zero-shot sequences (default: %(default)s)",
    )
    accuracy = parser.add_argument_group("zero-shot accuracy")
    accuracy.add_argument(
        "--zero-shot", type=Path, metavar="DIR", help="a TASK.jsonl for each task, given to lm-eval (README, Use it)"
    )
    accuracy.add_argument("--tasks", metavar="A,B", help="names of some of these files (default: all)")
    accuracy.add_argument("--limit", type=int, metavar="N", help="examples of each task, from its start (default: all)")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--latency", action="store_true", help="measure prefill and decode, batch size 1, greedy")
    speed.add_argument("--prompt-tokens", type=int, metavar="N", help="(default: 128, or what the model knows)")
    speed.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    speed.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs, of which the median counts (default: %(default)s)"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    running.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    running.add_argument(
        "--compute-dtype",
        choices=get_args(ComputeDtype),
        default="auto",
        help="dtype of the arithmetic; auto: the dtype of the weights, but float32 for perplexity and accuracy of a "
        "dense model on a CPU that multiplies that dtype slowly; --latency follows only a named dtype "
        "(default: %(default)s)",
    )
    running.add_argument("--json", action="store_true", help="one JSON line on stdout instead of a table")
    return parser


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurements that the arguments ask for, under the names that ``--json`` prints."""
    from mosaic_kernels.checkpoint.reader import load_model
    from mosaic_kernels.compute import computing_in, settle_evaluation_dtype
    from mosaic_kernels.device import name_of
    from mosaic_kernels.evaluate.latency import latency, prompt_length, weight_bytes
    from mosaic_kernels.evaluate.perplexity import perplexity
    from mosaic_kernels.evaluate.zero_shot import check_zero_shot, zero_shot
    from mosaic_kernels.explain import explain
    from mosaic_kernels.models import ModelAdapter
    from mosaic_kernels.text import load_tokens, windows
    from mosaic_kernels.text_files import read_texts

    if arguments.text is None and arguments.zero_shot is None and not arguments.latency:
        raise UsageError("nothing to measure: give --text FILE, --zero-shot DIR, --latency, or several of these")
    for option in ("samples", "limit", "batch_size", "prompt_tokens", "new_tokens", "repeats"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if arguments.seqlen is not None and arguments.seqlen < 2:
        raise UsageError(f"--seqlen {arguments.seqlen}: a window needs at least 2 tokens, one to predict the next")
    texts = None if arguments.text is None else read_texts(arguments.text)  # before a large model is loaded
    tasks = None if arguments.tasks is None else arguments.tasks.split(",")
    if arguments.zero_shot is not None:
        check_zero_shot(arguments.zero_shot, tasks)
    elif tasks is not None or arguments.limit is not None:
        raise UsageError("--tasks and --limit belong to --zero-shot DIR, which is not given")
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    result: dict[str, Any] = {}
    prompt_tokens = prompt_length(model, arguments.prompt_tokens, arguments.new_tokens) if arguments.latency else 0
    needing = "--text" if arguments.text is not None else "--zero-shot" if arguments.zero_shot is not None else None
    if tokenizer is None and needing is not None:
        raise ModelLoadError(f"{arguments.model} has no tokenizer files, and {needing} needs them: copy them there")
    if texts is not None:
        limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQLEN
        seqlen = arguments.seqlen or min(DEFAULT_SEQLEN, limit)
        if seqlen > limit:
            raise UsageError(f"--seqlen {seqlen} is more than the {limit} positions this model knows")
        parts = windows(load_tokens(texts, tokenizer), seqlen, str(texts))[: arguments.samples]

    def measure_quality() -> None:
        if texts is not None:
            result.update(vars(perplexity(model, parts.flatten(), seqlen, arguments.batch_size)))
        if arguments.zero_shot is not None:
            result["zero_shot"] = zero_shot(
                model, tokenizer, arguments.zero_shot, tasks, arguments.limit, arguments.batch_size
            )

    def measure_speed() -> None:
        result.update(vars(latency(model, prompt_tokens, arguments.new_tokens, arguments.repeats)))
        result["latency_dtype"] = name_of(model.get_input_embeddings().weight.dtype)
        result["runs"] = explain(model).summary

    asked = arguments.compute_dtype
    if needing is not None or asked != "auto":
        adapter = ModelAdapter.of(model)
        computing = settle_evaluation_dtype(asked, adapter)
        result["compute_dtype"] = computing.name
        with computing_in(adapter, computing):
            measure_quality()
            if arguments.latency and asked != "auto":
                measure_speed()
    if arguments.latency and asked == "auto":  # as a user would load it
        measure_speed()
    return {**result, "weight_bytes": weight_bytes(model), "peak_memory_bytes": peak_memory_bytes()}


def format_table(result: dict[str, Any]) -> str:
    """The result as people read it."""
    mib, peak = 1 << 20, result["peak_memory_bytes"]
    lines = []
    if "perplexity" in result:
        measured = f"on {result['tokens']:,} tokens in {result['seconds']:.1f} s, in {result['compute_dtype']}"
        lines.append(f"perplexity   {result['perplexity']:.3f} {measured}")
    lines += _accuracy_lines(result.get("zero_shot", {}))
    if "decode_tokens_per_s" in result:
        lines.append(f"decode       {result['decode_tokens_per_s']:,.1f} tokens/s, in {result['latency_dtype']}")
        lines.append(f"prefill      {result['prefill_tokens_per_s']:,.1f} tokens/s, in {result['latency_dtype']}")
        lines.append(f"runs         {result['runs']}")
    lines.append(f"weights      {result['weight_bytes'] / mib:,.1f} MiB")
    device = "" if peak["device"] is None else f", device {peak['device'] / mib:,.0f} MiB"
    lines.append(f"peak memory  host {peak['host'] / mib:,.0f} MiB{device}")
    return "\n".join(lines)


def _accuracy_lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    width = max([12, *map(len, scores)])
    lines = []
    for name, found in scores.items():
        parts = [f"{name:<{width}} accuracy {100 * found['accuracy']:.1f} %"]
        if found["stderr"] is not None:
            parts.append(f"± {100 * found['stderr']:.1f}")
        if found["accuracy_norm"] is not None:
            parts.append(f"(by length {100 * found['accuracy_norm']:.1f} %)")
        if "perplexity" in found:
            parts.append(f"(perplexity {found['perplexity']:,.4g})")
        lines.append(" ".join([*parts, f"on {found['examples']:,} examples"]))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mosaic-evaluate``; returns the exit code."""

    def body() -> None:
        arguments = make_parser().parse_args(argv)
        result = evaluate(arguments)
        show(json.dumps(result) if arguments.json else format_table(result))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())

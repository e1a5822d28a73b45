# SPDX-License-Identifier: Apache-2.0
"""Zero-shot accuracy by the stock lm-evaluation-harness, on local files."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mosaic_kernels.errors import EnvironmentError_, NonFiniteError, UsageError
from mosaic_kernels.evaluate.task_files import MEAN, TaskFile, read_tasks
from mosaic_kernels.progress import Station, station

logger = logging.getLogger(__name__)

Scores = dict[str, Any]


def zero_shot(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Scores]:
    """Accuracy without examples in the prompt, by lm-eval (Gao et al., doi:10.5281/zenodo.10256836).

    The network is not used. Log-probabilities are summed in float32 whatever the model's dtype; prompts longer than
    the model's positions lose their beginning, and a warning says how many.

    Args:
        model: a Hugging Face causal language model; its training mode is restored.
        tokenizer: its tokenizer.
        directory: holds one ``TASK.jsonl`` for each task. Every line is a JSON object with ``query, choices, gold``
            (the best continuation of a text), ``context_options, continuation, gold`` (the context that fits best, as
            in WinoGrande) or ``context, continuation`` (the next words exactly, as in LAMBADA); ``gold`` is an index.
            Texts are joined by one space.
        tasks: names of files without ``.jsonl``; default: all.
        limit: so many examples of each task, from its start; default: all.
        batch_size: sequences at once.

    Returns:
        For each task ``accuracy``, ``accuracy_norm`` (log-probability over the choice's characters; ``None`` where
        choices do not differ in length), ``stderr`` of the accuracy (``None`` for one example) and ``examples``;
        ``perplexity`` of the continuation where there are no choices. Then their unweighted ``mean``.

    Raises:
        UsageError: no such directory or task, or a line is none of these; the message names file and line.
        EnvironmentError_: lm-eval is not installed.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    files = check_zero_shot(directory, tasks)
    training = model.training
    try:
        with (
            station("zero-shot", _sequences(files, limit), "sequence") as here,
            _counted(model, here), tempfile.TemporaryDirectory() as folder, _quiet(), _offline(),
        ):  # fmt: skip
            scores = _run(model, tokenizer, files, limit, batch_size, Path(folder))
    finally:
        model.train(training)
    return {**scores, MEAN: _mean(list(scores.values()))}


def check_zero_shot(directory: str | Path, tasks: Sequence[str] | None = None) -> dict[str, TaskFile]:
    """Read the files and import lm-eval: what can fail without the model fails here, as in :func:`zero_shot`."""
    files = read_tasks(directory, tasks)
    _lm_eval()
    return files


def _lm_eval() -> tuple[Any, Any, Any]:
    """lm-eval's ``evaluate``, its task class and its wrapper of Hugging Face models."""
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except (ImportError, AttributeError) as error:  # releases before 0.4.10 name what transformers 5 has dropped
        raise EnvironmentError_(
            f"zero-shot evaluation needs lm-eval 0.4.10 or newer ({error}): pip install 'mosaic-kernels[zeroshot]'"
        ) from error
    return evaluate, ConfigurableTask, HFLM


def _run(
    model: Any, tokenizer: Any, files: dict[str, TaskFile], limit: int | None, batch_size: int, folder: Path
) -> dict[str, Scores]:
    evaluate, task_class, wrapper = _lm_eval()
    tasks = {name: task_class(config=_config(name, file, folder)) for name, file in files.items()}
    # a copy, as lm-eval gives the tokenizer a padding token; float32, as a bf16 sum of -100 is off by up to 0.25 nats
    with _warnings_counted() as seen:
        words = copy.deepcopy(tokenizer)
        lm = wrapper(pretrained=model, tokenizer=words, batch_size=batch_size, softmax_dtype="float32")
        seen.clear()  # it warns that the model is an object, not a name
        # bootstrap_iters=0: no standard errors, or it starts a process for each core; ours has a closed form
        found = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=False)["results"]
    return {name: _scores(name, files[name], task.instances, found[name]) for name, task in tasks.items()}


def _sequences(files: Mapping[str, TaskFile], limit: int | None) -> int:
    """The number of sequences that the model will score, one for each choice; lm-eval may score several at once."""
    rows = (row for file in files.values() for row in file.rows[:limit])
    return sum(len(row.get("choices") or row.get("context_options") or [""]) for row in rows)


@contextmanager
def _counted(model: Any, here: Station) -> Iterator[None]:
    """Count every sequence that goes through the model."""
    handle = model.register_forward_hook(lambda _, __, output: here.advance(len(output.logits)))
    try:
        yield
    finally:
        handle.remove()


def _config(name: str, file: TaskFile, folder: Path) -> dict[str, Any]:
    """The lm-eval task of a file: its checked lines are copied to ``folder``, where its cache is too."""
    from datasets import Features, Value

    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in file.rows), encoding="utf-8")
    text = Value("string")  # said outright: a column of dates would become timestamps
    types = {"gold": Value("int64"), "choices": [text], "context_options": [text]}
    features = Features({key: types.get(key, text) for key in file.layout.keys})
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "features": features, "cache_dir": str(folder)},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in file.layout.metrics
        ],
        **file.layout.config,
    }


def _scores(name: str, file: TaskFile, requests: list[Any], found: Mapping[str, Any]) -> Scores:
    for request in requests:
        if not math.isfinite(request.resps[0][0]):
            raise NonFiniteError(
                f"the model's logits are NaN or Inf on example {request.doc_id + 1} of {name}; "
                "check the weights, or evaluate in float32"
            )
    examples = len({request.doc_id for request in requests})
    accuracy, norm = float(found["acc,none"]), found.get("acc_norm,none")
    scores: Scores = {
        "accuracy": accuracy,
        "accuracy_norm": None if norm is None else float(norm),
        "stderr": math.sqrt(accuracy * (1 - accuracy) / (examples - 1)) if examples > 1 else None,
        "examples": examples,
    }
    if file.layout.config["output_type"] == "loglikelihood":
        nll = -sum(request.resps[0][0] for request in requests) / examples
        scores["perplexity"] = math.exp(min(nll, 700))  # beyond, a double overflows
    return scores


def _mean(scores: list[Scores]) -> Scores:
    """Every task counts the same, whatever its size; tasks are independent, so variances add."""
    mean: Scores = {"examples": sum(one["examples"] for one in scores)}
    for key in ("accuracy", "accuracy_norm"):
        values = [one[key] for one in scores]
        mean[key] = None if None in values else sum(values) / len(values)
    errors = [one["stderr"] for one in scores]
    mean["stderr"] = None if None in errors else math.hypot(*errors) / len(errors)
    return mean


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what lm-eval prints and its progress bars; the station shows progress instead."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _offline() -> Iterator[None]:
    """As with ``HF_DATASETS_OFFLINE=1``, which is read only once: loading a local file counts as a download."""
    from datasets import config

    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


class _Tally(logging.Handler):
    """The first warning of each place in the source, and how many there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: dict[tuple[str, int], tuple[str, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        first, count = self.seen.get(place, (record.getMessage(), 0))
        self.seen[place] = (first, count + 1)


@contextmanager
def _warnings_counted() -> Iterator[dict[Any, tuple[str, int]]]:
    """lm-eval warns of every prompt that is too long: pass on one of each kind."""
    source, tally = logging.getLogger("lm_eval"), _Tally()
    propagate, source.propagate = source.propagate, False
    source.addHandler(tally)
    try:
        yield tally.seen
    finally:
        source.removeHandler(tally)
        source.propagate = propagate
        for message, count in tally.seen.values():
            logger.warning("lm-eval: %s%s", message, f" (and {count - 1} more)" if count > 1 else "")

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import math
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import zero_weights

from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import EnvironmentError_, NonFiniteError, UsageError
from mosaic_kernels.evaluate.__main__ import main
from mosaic_kernels.evaluate.task_files import read_tasks
from mosaic_kernels.evaluate.zero_shot import zero_shot
from mosaic_kernels.models import ModelAdapter

pytestmark = pytest.mark.usefixtures("one_thread")
harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'mosaic-kernels[zeroshot]'"
)

QUERIES = [  # one, three and two tokens difference in length; a number; a query that ends in a space
    ("Question: What is the colour of the sky?\nAnswer:", ["blue", "a very long time ago in the house", "green"]),
    ("The man opened the door and", ["went out of the room.", "spoon."]),
    ("She sat down by the", ["fire", "window of her own little room", "xylophone", "sea"]),
    ("12", ["o'clock", "in the morning when he came home"]),
    ("It was a dark ", ["night", "and very stormy night upon the sea"]),
]
CONTEXTS = [
    (["The captain stood on the deck and he", "The captain stood on the deck and it"], "said to the men."),
    (["The letter came so the letter", "The letter came so the girl"], "began to cry."),
    (["1", "The ship"], "sailed away."),
]
LAST_WORDS = [
    ("Once upon a", "time"),
    ("He looked at me for a", "moment"),
    ("At the end of the", "xylophone"),
    ("I do not", "know"),
    ("It was one of", "the"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)  # transformers logs to the stderr of the first test


@pytest.fixture(scope="module")
def trained(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One small file of each layout."""
    write(tmp_path, "choice", [{"query": q, "choices": c, "gold": 0, "id": i} for i, (q, c) in enumerate(QUERIES)])
    write(tmp_path, "context", [{"context_options": c, "continuation": t, "gold": 1} for c, t in CONTEXTS])
    write(tmp_path, "word", [{"context": c, "continuation": t} for c, t in LAST_WORDS])
    return tmp_path


def write(folder: Path, name: str, rows: list[Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def by_hand(trained: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation after a space, and whether it is what greedy decoding writes."""
    model, tokenizer = trained
    context = context.rstrip()
    begin, tokens = len(tokenizer.encode(context)), torch.tensor(tokenizer.encode(f"{context} {continuation}"))
    rows = model(input_ids=tokens[None]).logits[0, begin - 1 : -1].double().log_softmax(-1)
    targets = tokens[begin:]
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@harness
def test_the_best_choice_is_the_one_found_by_hand(trained: Any, tmp_path: Path) -> None:
    queries = [(query.rstrip(), choices) for query, choices in QUERIES]
    found = [[by_hand(trained, query, choice)[0] for choice in choices] for query, choices in queries]
    best = [values.index(max(values)) for values in found]
    lengths = [[len(choice) for choice in choices] for _, choices in queries]
    per_character = [[v / n for v, n in zip(*pair, strict=True)] for pair in zip(found, lengths, strict=True)]
    norm = [values.index(max(values)) for values in per_character]
    same = sum(a == b for a, b in zip(best, norm, strict=True))
    assert 0 < same < len(best)  # so that the two are told apart
    rows = [{"query": q, "choices": c, "gold": g} for (q, c), g in zip(queries, best, strict=True)]
    write(tmp_path, "right", rows)
    write(tmp_path, "mixed", [rows[0], {**rows[1], "gold": 1 - best[1]}, *rows[2:]])
    scores = zero_shot(*trained, tmp_path)
    assert scores["right"] == {"accuracy": 1, "accuracy_norm": same / 5, "stderr": 0, "examples": 5}
    assert scores["mixed"]["accuracy"] == 4 / 5
    assert scores["mixed"]["stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 4))
    assert scores["mean"]["accuracy"] == pytest.approx(0.9)
    assert scores["mean"]["stderr"] == pytest.approx(scores["mixed"]["stderr"] / 2)
    assert scores["mean"]["examples"] == 10


@harness
def test_the_best_context_is_the_one_found_by_hand(trained: Any, tmp_path: Path) -> None:
    found = [[by_hand(trained, one, text)[0] for one in contexts] for contexts, text in CONTEXTS]
    best = [values.index(max(values)) for values in found]
    gold = [best[0], best[1], 1 - best[2]]
    rows = [{"context_options": c, "continuation": t, "gold": g} for (c, t), g in zip(CONTEXTS, gold, strict=True)]
    write(tmp_path, "context", rows)
    scores = zero_shot(*trained, tmp_path)["context"]
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["accuracy_norm"] is None


@harness
@pytest.mark.parametrize("batch_size", [1, 3])
def test_last_words_are_those_found_by_hand(trained: Any, folder: Path, batch_size: int) -> None:
    found = [by_hand(trained, *pair) for pair in LAST_WORDS]
    greedy = sum(is_greedy for _, is_greedy in found)
    assert 0 < greedy < len(found)
    scores = zero_shot(*trained, folder, tasks=["word"], batch_size=batch_size)["word"]
    assert scores["accuracy"] == greedy / len(found)
    nll = -sum(value for value, _ in found) / len(found)
    # fp32 logits over 4096 words; padding and batches only change the order of sums in fp32 matrix products
    assert math.log(scores["perplexity"]) == pytest.approx(nll, rel=64 * torch.finfo(torch.float32).eps)


@harness
def test_a_packed_model_scores_as_the_same_zeros(tiny_llama: Path, folder: Path) -> None:
    model, tokenizer = load_model(tiny_llama, dtype="float32")
    adapter = ModelAdapter.of(model)
    zero_weights(adapter, 0.5)
    dense = zero_shot(model, tokenizer, folder)
    pack_model(adapter)
    packed = zero_shot(model, tokenizer, folder)
    assert packed["word"].pop("perplexity") == pytest.approx(dense["word"].pop("perplexity"), rel=1e-4)
    assert packed == dense


@harness
def test_nothing_else_is_touched(trained: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """No network, no output, no cache; the model, its tokenizer and the random numbers are as before."""
    from datasets import config

    calls: list[Any] = []
    offline: set[bool] = set()
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: calls.append(arguments) or [])
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", folder / "cache")
    model, tokenizer = trained[0], copy.deepcopy(trained[1])
    tokenizer.pad_token = None
    hook = model.register_forward_pre_hook(lambda *_: offline.add(config.HF_HUB_OFFLINE))
    before, numbers = (tokenizer.pad_token, sorted(folder.iterdir())), torch.get_rng_state()
    model.train()
    zero_shot(model, tokenizer, folder, limit=1)
    assert model.training
    model.eval()
    hook.remove()
    assert (tokenizer.pad_token, sorted(folder.iterdir())) == before
    assert torch.get_rng_state().equal(numbers)
    assert not calls
    assert offline == {True}
    assert not config.HF_HUB_OFFLINE
    assert capfd.readouterr() == ("", "")


@harness
def test_long_prompts_are_warned_of_once(trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"query": "the sea and " * 300, "choices": ["land", "the wide sea"], "gold": 0}
    write(tmp_path, "long", [row] * 2)
    zero_shot(*trained, tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mosaic_kernels")]
    assert "maximum length (512)" in message
    assert message.endswith("more)")


@harness
def test_nan_logits_are_no_choice(tiny_llama: Path, folder: Path) -> None:
    model, tokenizer = load_model(tiny_llama)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or Inf on example 1 of choice"):
        zero_shot(model, tokenizer, folder, limit=2)


@harness
def test_command(tiny_llama: Path, folder: Path, capsys: Any) -> None:
    words = [str(tiny_llama), "--zero-shot", str(folder), "--device", "cpu"]
    assert main([*words, "--tasks", "word,choice", "--limit", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert not err
    found = json.loads(out)
    assert set(found) == {"zero_shot", "weight_bytes", "peak_memory_bytes"}
    assert list(found["zero_shot"]) == ["word", "choice", "mean"]
    assert found["zero_shot"]["choice"]["examples"] == 2
    assert main([*words, "--limit", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["choice", "context", "word", "mean", "weights", "peak"]
    assert "on 1 examples" in table[0]


def test_bad_arguments(tmp_path: Path, capsys: Any, tiny_llama: Path) -> None:
    write(tmp_path, "one", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    for name in ("limit", "batch_size"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
            zero_shot(None, None, tmp_path, **{name: 0})
    for words, message in [
        (["--zero-shot", str(tmp_path), "--limit", "0"], "--limit must be at least 1"),
        (["--zero-shot", str(tmp_path), "--tasks", "a,b"], "no task 'a', 'b'"),
        (["--tasks", "a", "--latency"], "--tasks and --limit belong to --zero-shot"),
    ]:
        assert main([str(tiny_llama), *words]) == 2
        assert message in capsys.readouterr().err


def test_lm_eval_is_optional(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentError_, match=r"pip install 'mosaic-kernels\[zeroshot\]'"):
        zero_shot(None, None, folder)


@harness
def test_the_papers_tasks(trained: Any) -> None:
    directory = os.environ.get("MOSAIC_ZEROSHOT_DATA")
    if not directory:
        pytest.skip("MOSAIC_ZEROSHOT_DATA names no directory with the real tasks")
    files = read_tasks(directory)
    scores = zero_shot(*trained, directory, limit=8)
    assert set(scores) == {*files, "mean"}
    assert all(0 <= scores[name]["accuracy"] <= 1 and scores[name]["examples"] == 8 for name in files)

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_model, zero_weights

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import CalibrationError, NonFiniteError, UsageError
from mosaic_kernels.evaluate import perplexity as module
from mosaic_kernels.evaluate.__main__ import main
from mosaic_kernels.evaluate.latency import latencies, latency, weight_bytes
from mosaic_kernels.evaluate.perplexity import perplexity
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(1))


def _by_hand(model: Any, tokens: torch.Tensor, seqlen: int) -> float:
    """Mean next-token NLL, one window and one token at a time, in float64."""
    losses = []
    for begin in range(0, len(tokens) - seqlen + 1, seqlen):
        window = tokens[begin : begin + seqlen]
        with torch.no_grad():
            rows = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        losses += [-float(rows[i, window[i + 1]]) for i in range(seqlen - 1)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("count", "seqlen", "batch_size"), [(90, 16, 8), (96, 16, 1), (96, 16, 4), (40, 2, 3)])
def test_perplexity_is_the_exponential_of_the_mean_nll(count: int, seqlen: int, batch_size: int) -> None:
    model, tokens = random_model(), _tokens(count)
    found = perplexity(model, tokens, seqlen, batch_size)
    # one fp32 softmax over 96 words; batches only change the order of sums in fp32 matrix products
    assert found.nll == pytest.approx(_by_hand(model, tokens, seqlen), rel=64 * torch.finfo(torch.float32).eps)
    assert found.perplexity == math.exp(found.nll)
    assert found.tokens == (count // seqlen) * (seqlen - 1)
    assert found.seconds > 0


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, _tokens(64), 16).perplexity == pytest.approx(96, rel=1e-6)


def test_little_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(), _tokens(96)
    expected = perplexity(model, tokens, 16)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1)  # one window at once
    monkeypatch.setattr(module, "_FP32_AT_ONCE", 200)  # two rows of logits at once
    assert perplexity(model, tokens, 16).nll == pytest.approx(expected.nll, rel=64 * torch.finfo(torch.float32).eps)


def test_training_mode_is_restored_and_ignored() -> None:
    model = random_model(attention_dropout=0.5).train()
    found = perplexity(model, _tokens(64), 16)
    assert model.training
    assert found.nll == perplexity(model.eval(), _tokens(64), 16).nll


def test_packed_layers_still_pass_gradients_afterwards() -> None:
    adapter = ModelAdapter.of(random_model())
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    perplexity(adapter.model, _tokens(64), 16)
    embeddings = torch.randn(1, 4, 64, requires_grad=True)
    adapter.model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None


def test_nan_logits_name_the_window() -> None:
    model = random_model()
    model.model.embed_tokens.weight.data[7] = float("nan")
    tokens = torch.zeros(64, dtype=torch.int64)
    tokens[40] = 7
    with pytest.raises(NonFiniteError, match="windows 2 to 2"):
        perplexity(model, tokens, 16, batch_size=1)


def test_inputs_that_cannot_work() -> None:
    model = random_model()
    with pytest.raises(CalibrationError, match="5 tokens but one window needs 16"):
        perplexity(model, _tokens(5), 16)
    with pytest.raises(CalibrationError, match="id 96 but the model knows 96 tokens"):
        perplexity(model, torch.full((16,), 96), 16)
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        perplexity(model, _tokens(32), 16, batch_size=0)


def test_latency_writes_exactly_so_many_tokens() -> None:
    """An end-of-text token does not end it: here every token is one."""
    model = random_model(eos_token_id=list(range(96)))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *inputs: calls.append(inputs[2]["input_ids"].shape[1]), with_kwargs=True)
    found = latency(model, prompt_tokens=10, new_tokens=4, repeats=2)
    assert calls == [10, 1, 1, 1, 1] * 3
    assert found.decode_tokens_per_s > 0
    assert found.prefill_tokens_per_s > 0
    assert found.weight_bytes == weight_bytes(model)


def test_models_take_turns() -> None:
    order: list[str] = []
    models = [random_model(), random_model("qwen3")]
    for name, model in zip("ab", models, strict=True):
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    first, second = latencies(models, prompt_tokens=3, new_tokens=1, repeats=2)
    assert "".join(order) == "aabb" * 3
    assert (first.weight_bytes, second.weight_bytes) == tuple(weight_bytes(model) for model in models)


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"new_tokens": 0}, {"repeats": 0}])
def test_latency_counts_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be at least 1"):
        latency(random_model(), **wrong)


def test_weight_bytes_count_tied_weights_once() -> None:
    tied, untied = random_model(tie_word_embeddings=True), random_model()
    assert weight_bytes(untied) - weight_bytes(tied) == 96 * 64 * 4
    assert weight_bytes(tied) == sum(p.numel() for p in tied.parameters()) * 4


@pytest.mark.parametrize("in_features", [64, 40, 33, 25])  # rows of 8, 5, 5 and 4 bytes
def test_weight_bytes_count_what_kernels_read(in_features: int) -> None:
    dense = torch.nn.Linear(in_features, 7)
    dense.weight.data[:, ::2] = 0
    layer = MosaicLinear.from_linear(dense)
    index = layer.packed.index()
    shared = index.words.data_ptr() == layer.bitmask.data_ptr()
    derived = index.offsets.nbytes + (0 if shared else index.words.nbytes)
    assert weight_bytes(layer) == sum(p.nbytes for p in layer.parameters()) + derived


def test_command_prints_one_json_line(tiny_llama: Path, validation_text: Path, capsys: Any) -> None:
    words = [str(tiny_llama), "--text", str(validation_text), "--seqlen", "64", "--samples", "4", "--device", "cpu"]
    assert main([*words, "--latency", "--new-tokens", "2", "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == {
        "perplexity", "tokens", "nll", "seconds", "decode_tokens_per_s", "prefill_tokens_per_s", "weight_bytes",
        "peak_memory_bytes", "compute_dtype", "latency_dtype", "runs",
    }  # fmt: skip
    assert found["latency_dtype"] == "bfloat16"  # as it is stored and loaded, whatever perplexity was computed in
    assert found["runs"].startswith("0 of 6 blocks natively (not prepared: call mk.prepare_inference(model)), 42 ")
    assert found["tokens"] == 4 * 63
    assert found["perplexity"] < 200  # it was trained; a random model has 4096
    assert set(found["peak_memory_bytes"]) == {"host", "device"}
    assert "Loading weights" not in err  # no progress bar where stderr is no terminal


def test_command_prints_a_table(tiny_llama: Path, validation_text: Path, capsys: Any) -> None:
    assert main([str(tiny_llama), "--text", str(validation_text), "--seqlen", "32", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", "weights", "peak"]
    assert main([str(tiny_llama), "--latency", "--new-tokens", "1", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["decode", "prefill", "runs", "weights", "peak"]
    assert "runs         0 of 6 blocks natively (not prepared" in out
    assert out.count(" tokens/s, in bfloat16\n") == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing to measure"),
        (["--text", "missing.txt"], 2, "no such text file"),
        (["--text", "{text}", "--seqlen", "4096"], 2, "more than the 512 positions"),
        (["--text", "{text}", "--seqlen", "1"], 2, "at least 2 tokens"),
        (["--text", "{text}", "--samples", "0"], 2, "--samples must be at least 1"),
        (["--text", "{text}", "--seqlen", "0"], 2, "--seqlen 0: a window needs at least 2 tokens"),
        (["--text", "{short}", "--seqlen", "64"], 1, "short.txt has 4 tokens but one window needs 64"),
        (["--text", "{folder}"], 2, "without texts"),
        (["--latency", "--prompt-tokens", "500", "--new-tokens", "13"], 2, "more than the 512 positions"),
        (["--latency", "--new-tokens", "0"], 2, "--new-tokens must be at least 1"),
        (["--latency", "--device", "abacus"], 2, "'abacus' is not a device"),
        (["--latency", "--dtype", "int4"], 2, "'int4' is not supported"),
        (["--slow"], 2, "unrecognized arguments"),
    ],
)
def test_command_errors(
    words: list[str], code: int, message: str, tiny_llama: Path, validation_text: Path, capsys: Any, tmp_path: Path
) -> None:
    (short := tmp_path / "short.txt").write_text("Once upon a time")
    (folder := tmp_path / "empty").mkdir()
    given = {"text": validation_text, "short": short, "folder": folder}
    assert main([str(tiny_llama), *(word.format(**given) for word in words)]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert not out


def test_a_text_needs_a_tokenizer(tmp_path: Path, validation_text: Path, capsys: Any) -> None:
    random_model().save_pretrained(tmp_path)
    assert main([str(tmp_path), "--text", str(validation_text)]) == 1
    assert "has no tokenizer files" in capsys.readouterr().err
    assert main([str(tmp_path), "--latency", "--new-tokens", "1", "--repeats", "1"]) == 0

# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.prune``: exit codes, messages, and that nothing is lost or left half-written."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import QUICK, Run, digests, kept_weights, require_failure
from safetensors.torch import load_file, save_file
from small_models import random_model

from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.evaluate.perplexity import perplexity
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune.__main__ import main, make_parser
from mosaic_kernels.text import load_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(dense_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(dense_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the model ---


def test_missing_directory(run: Run) -> None:
    require_failure(run("./nowhere", "--output-dir", "out", *QUICK), 1, "./nowhere: no such directory")


def test_hub_id_without_network(run: Run) -> None:
    require_failure(
        run("someone/no-such-model", "--output-dir", "out", *QUICK), 3, "someone/no-such-model", "give its directory"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_corrupt_directory(run: Run, model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, "config.json")


def test_truncated_weights(run: Run, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, "model.safetensors is truncated", "again")


def test_config_without_weights(run: Run, model: Path) -> None:
    (model / "model.safetensors").unlink()
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, "no weights (model.safetensors", "copy it again")


def test_missing_tensor(run: Run, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, "model.layers.1.mlp.up_proj.weight")


def test_no_causal_language_model(run: Run, model: Path) -> None:
    edit(model / "config.json", architectures=["LlamaModel"])
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, "LlamaModel is not a causal language model")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral", "made-up"])
def test_unsupported_architecture(run: Run, model: Path, kind: str) -> None:
    edit(model / "config.json", model_type=kind, architectures=["BertModel"])
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, repr(kind), "llama, mistral, qwen2, qwen3")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_non_finite_weights(run: Run, model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    require_failure(run(model, "--output-dir", "out", *QUICK), 1, f"{name}: 1 of ", "NaN or Inf")


@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_activations_that_overflow(run: Run, model: Path, solver: str) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(6e4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = run(
        model, "--output-dir", "out", "--dtype", "float16", "--compute-dtype", "float16", "--solver", solver, *QUICK
    )
    require_failure(result, 1, "model.layers.1.mlp.down_proj", "NaN or infinite", "--dtype float32")


# --- the options ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sparsity", "1"), ("sparsity", "0 <= S < 1")),
        (("--sparsity", "-0.5"), ("sparsity", "0 <= S < 1")),
        (("--sparsity", "nan"), ("sparsity", "0 <= S < 1")),
        (("--sparsity", "inf"), ("sparsity", "0 <= S < 1")),
        (("--sparsity", "half"), ("--sparsity", "half")),
        (("--sparsity", "0.3", "--structured-share", "0.4"), ("structured share", "0.3", "0.4")),
        (("--structured-share", "nan"), ("structured share",)),
        (("--pattern", "2to4"), ("pattern", "2:4")),
        (("--sparsty", "0.5"), ("unrecognized arguments", "--sparsty")),
        (("--solver", "best"), ("--solver", "best", "sparsegpt")),
        (("--samples", "0"), ("samples", "at least 1")),
        (("--seqlen", "129"), ("--seqlen 129", "128 positions")),
        (("--device", "gpu"), ("--device", "gpu", "cuda:N")),
        (("--dtype", "int8"), ("int8", "bfloat16")),
        (("--ranks", "nowhere.json"), ("nowhere.json", "--ranks")),
        (("--weights", "int4"), ("--weights", "int4", "int8-group")),
        (("--weights", "int8", "--format", "dense"), ("--weights int8 needs --format mosaic",)),
    ],
)
def test_wrong_options(run: Run, dense_dir: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    require_failure(run(dense_dir, "--output-dir", "out", *QUICK, *options), 2, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(run: Run, dense_dir: Path) -> None:
    result = run(dense_dir, "--output-dir", "out", *QUICK, "--device", "cuda:1")
    require_failure(result, 3, "--device cuda:1", "--device cpu")


def test_no_output_directory(run: Run, dense_dir: Path) -> None:
    require_failure(run(dense_dir, *QUICK), 2, "--output-dir")


def test_a_pattern_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    random_model(intermediate_size=42).save_pretrained(tmp_path / "odd")
    result = run(tmp_path / "odd", "--output-dir", "out", *QUICK, "--pattern", "2:4", "--category", "unstructured")
    require_failure(result, 2, "2:4", "multiple of 4", "model.layers.0.mlp.down_proj has 42")


# --- the texts ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("text.txt", "empty")),
        (b"\x7fELF\x00\x00", ("text.txt", "binary", "UTF-8")),
        (b"Short.", ("text.txt has", "one window needs 16", "--seqlen")),
        (None, ("text.txt", "no such text file")),
    ],
)
@pytest.mark.parametrize("option", ["--calibration", "--eval-text"])
def test_unusable_texts(
    run: Run, dense_dir: Path, tmp_path: Path, option: str, content: bytes | None, words: tuple[str, ...]
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    if option == "--eval-text" and content == b"Short.":
        words = ("one window needs 16", "--seqlen")
    code = 2 if content is None else 1  # a wrong path, or a text that cannot be used
    require_failure(run(dense_dir, "--output-dir", "out", *QUICK, option, text), code, *words)


def test_a_dataset_without_its_package(run: Run, dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run(dense_dir, "--output-dir", "out", *QUICK, "--calibration", "wikitext2")
    require_failure(result, 3, "'wikitext2'", "local text file")


@pytest.mark.parametrize("size", [("1", "1"), ("1", "2"), ("2", "1")])
@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_a_single_token_and_a_singular_gram(run: Run, dense_dir: Path, size: tuple[str, str], solver: str) -> None:
    samples, seqlen = size
    options = ("--calibration", "random", "--samples", samples, "--seqlen", seqlen, "--solver", solver)
    result = run(dense_dir, "--output-dir", "out", "--json", "--sparsity", "0.6", *options)
    assert result.code == 0, result.err
    assert json.loads(result.out)["removed_difference"] == 0
    written, _ = load_model("out")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in written.parameters())


# --- the output ---


def test_a_directory_with_files_is_left_alone(run: Run, dense_dir: Path) -> None:
    Path("out").mkdir()
    Path("out", "thesis.txt").write_text("years of work")
    result = run(dense_dir, "--output-dir", "out", *QUICK)
    assert (result.code, result.out) == (2, "")
    assert "out is not empty" in result.err
    assert "--overwrite" in result.err
    assert "--resume" in result.err
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]
    assert Path("out", "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_only_on_success(run: Run, dense_dir: Path) -> None:
    assert run(dense_dir, "--output-dir", "out", *QUICK).code == 0
    before = digests(Path("out"), "*")
    assert run(dense_dir, "--output-dir", "out", *QUICK, "--overwrite", "--calibration", "./none.txt").code == 2
    assert digests(Path("out"), "*") == before
    assert run(dense_dir, "--output-dir", "out", *QUICK, "--overwrite", "--sparsity", "0.7").code == 0
    assert digests(Path("out"), "*").keys() == before.keys()
    assert all(digests(Path("out"))[name] != before[name] for name in digests(Path("out")))
    assert json.loads(Path("out", "mosaic_report.json").read_text())["sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]


def test_a_file_is_no_directory(run: Run, dense_dir: Path) -> None:
    Path("out").write_text("a file")
    assert run(dense_dir, "--output-dir", "out", *QUICK).code == 2
    assert Path("out").read_text() == "a file"


# --- what is printed ---

COUNT, NUMBER, TEXT = int, float, str
REPORT = {
    "schema": COUNT,
    "model": TEXT,
    "command": [TEXT],
    "seed": COUNT,
    "versions": {},
    "device": {},
    "category": TEXT,
    "policy": TEXT,
    "solver": TEXT,
    "prunable_parameters": COUNT,
    "removed_parameters": COUNT,
    "sparsity": NUMBER,
    "structured_removed": COUNT,
    "unstructured_zeros": COUNT,
    "projections": {},
    "bytes": {"dense": COUNT, "pruned": COUNT},
    "perplexity": {"text": TEXT, "tokens": COUNT, "dense": NUMBER, "pruned": NUMBER},
    "seconds": dict.fromkeys(("load", "calibrate", "allocate", "prune", "write", "total"), NUMBER),
    "peak_memory_bytes": {"host": COUNT, "device": (COUNT, type(None))},
}
PROJECTION = {
    "original_shape": [COUNT],
    "shape": [COUNT],
    "nnz": COUNT,
    "target": NUMBER,
    "sparsity": NUMBER,
    "outlier_ratio": NUMBER,
}


def require_shape(value: Any, shape: Any, place: str = "report") -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), place
        for key, inner in shape.items():
            assert key in value, f"{place}.{key}"
            require_shape(value[key], inner, f"{place}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), place
        for item in value:
            require_shape(item, shape[0], place)
    else:
        assert isinstance(value, shape), f"{place} is {value!r}"
        assert not isinstance(value, bool), place


def test_json_is_one_line_and_complete(run: Run, dense_dir: Path, tmp_path: Path, validation_text: Path) -> None:
    text = tmp_path / "eval.txt"
    text.write_text(validation_text.read_text()[:3000])
    arguments = [str(dense_dir), "--output-dir", "out", "--json", "--sparsity", "0.6", *QUICK, "--eval-text", str(text)]
    result = run(*arguments)
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    assert result.out.endswith("\n")
    report = json.loads(result.out)
    require_shape(report, REPORT)
    for name, entry in report["projections"].items():
        require_shape(entry, PROJECTION, name)
    model, _ = load_model(dense_dir)
    sizes = ModelAdapter.of(model).sizes()
    assert report["projections"].keys() == sizes.keys()
    assert report["removed_parameters"] == round(0.6 * sum(sizes.values()))
    public = [Path(word).name if word.startswith("/") else word for word in arguments]
    assert report["command"] == ["python", "-m", "mosaic_kernels.prune", *public]
    assert json.loads(Path("out", "mosaic_report.json").read_text()) == report
    written, _ = load_model("out")
    assert kept_weights(ModelAdapter.of(written)) == report["prunable_parameters"] - report["removed_parameters"]


def test_perplexity_on_the_first_tokens_of_a_text(
    run: Run, dense_dir: Path, tmp_path: Path, validation_text: Path, tokenizer: Any
) -> None:
    """It is that of the text that ends there."""
    (tmp_path / "long.txt").write_text(validation_text.read_text()[:6000])
    tokens = load_tokens(tmp_path / "long.txt", tokenizer)
    assert len(tokens) > 400
    model, _ = load_model(dense_dir)
    options = (
        "--sparsity",
        "0.5",
        "--solver",
        "magnitude",
        "--policy",
        "uniform",
        "--compute-dtype",
        "bfloat16",
        "--json",
    )
    result = run(
        dense_dir, "--output-dir", "out", *options, *QUICK, "--eval-text", tmp_path / "long.txt", "--eval-tokens", "100"
    )
    found = json.loads(result.out)["perplexity"]
    expected = perplexity(model, tokens[:100], 16)
    assert found["tokens"] == expected.tokens == 6 * 15
    assert found["dense"] == expected.perplexity


def test_the_table_names_what_counts(run: Run, dense_dir: Path) -> None:
    result = run(dense_dir, "--output-dir", "out", *QUICK, "--sparsity", "0.6")
    report = json.loads(Path("out", "mosaic_report.json").read_text())
    assert result.code == 0
    for words in (
        f"model          {dense_dir.name}\n",
        "composite, policy curve, solver admm",
        f"{report['removed_parameters']:,}",
        "60.00%",
    ):
        assert words in result.out


def test_logs_go_to_stderr(
    run: Run, dense_dir: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_text.read_text()[:2000])
    monkeypatch.setenv("MOSAIC_LOG_LEVEL", "debug")
    result = run(
        dense_dir, "--output-dir", "out", "--json", "--samples", "9999", "--seqlen", "16", "--calibration", text,
        "--policy", "mosaic-reference", "--category", "auto",
    )  # fmt: skip
    assert result.code == 0
    json.loads(result.out)
    for words in ("windows of 16 tokens, not 9999", "misses the budget", "category auto"):
        assert words in result.err
    assert "\r" not in result.err  # no progress bar where stderr is no terminal


def test_help_shows_every_option_its_default_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for option in (
        "--sparsity", "--category", "--structured-share", "--pattern", "--channel-multiple", "--policy",
        "--outlier-threshold", "--max-deviation", "--solver", "--ranks", "--calibration", "--samples", "--seqlen",
        "--seed", "--eval-text", "--eval-tokens", "--device", "--dtype", "--resume", "--overwrite", "--dry-run",
        "--format", "--json", "--output-dir",
    ):  # fmt: skip
        assert option in out
    flat = " ".join(out.split())
    for default in ("(default: 0.5)", "(default: composite)", "(default: 128)", "(default: 5.0)", "(default: 0.08)"):
        assert default in flat
    assert "python -m mosaic_kernels.prune examples/tiny-llama" in out


def test_the_example_in_help_is_a_valid_command(tmp_path: Path) -> None:
    example = (make_parser().epilog or "").split("\n\n")[0]
    lines = [line.strip().rstrip("\\") for line in example.splitlines()[1:]]
    options = make_parser().parse_args(shlex.split(" ".join(lines))[3:])
    assert (ROOT / options.model / "config.json").exists()
    assert (ROOT / options.calibration).exists()
    assert (ROOT / options.eval_text).exists()


def test_fewer_evaluation_tokens_than_a_window(run: Run, dense_dir: Path, validation_text: Path) -> None:
    result = run(
        dense_dir, "--output-dir", "out", *QUICK, "--eval-text", validation_text, "--eval-tokens", "5"
    )  # fmt: skip
    require_failure(result, 2, "--eval-tokens 5 is less than one window of 16 tokens: give at least 16, or lower")

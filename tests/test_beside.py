# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights: nothing foreign is published or run, and nothing foreign fails the last step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prune_runs import QUICK, Run
from small_models import composite, random_model, save

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.beside import check_files_beside, copy_licences, save_tokenizer
from mosaic_kernels.checkpoint.foreign import MOST_LICENCE_BYTES
from mosaic_kernels.checkpoint.generation import plain_config, valid_generation
from mosaic_kernels.errors import ModelLoadError, UsageError

SECRET = "SECRET of somebody else"
FAST = ("--sparsity", "0.5", "--solver", "wanda", "--policy", "uniform", *QUICK)
OPTIONS: dict[str, Any] = {
    "sparsity": 0.5, "solver": "wanda", "policy": "uniform", "calibration": "random", "samples": 4, "seqlen": 16,
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "key").write_text(SECRET)
    return tmp_path / "source"


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "link": lambda s: link(s / "LICENSE", s.parent / "secret"),
    "relative link": lambda s: link(s / "NOTICE.txt", "../secret"),
    "link to a link": lambda s: (link(s / "other", "../secret"), link(s / "LICENSE", "other")),
    "hard link": lambda s: os.link(s.parent / "secret", s / "LICENSE"),
    "linked folder": lambda s: link(s / "LICENSES", s.parent / "folder"),
    "link in a folder": lambda s: link(s / "LICENSES" / "MIT.txt", s.parent / "secret"),
    "broken link": lambda s: link(s / "LICENSE", "gone"),
    "circle": lambda s: link(s / "LICENSE", "LICENSE"),
    "pipe": lambda s: os.mkfifo(s / "LICENSE"),
    "folder": lambda s: (s / "LICENSE").mkdir(),
    "huge": lambda s: (s / "LICENSE").write_bytes(b"x" * (MOST_LICENCE_BYTES + 1)),
    "device": lambda s: link(s / "LICENSE", "/dev/zero"),
    "own process": lambda s: link(s / "LICENSE", "/proc/self/environ"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_licence_of_the_model_is_not_copied(
    source: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    FOREIGN[kind](source)
    (out := tmp_path / "out").mkdir()
    copy_licences(source, out)
    assert not any(file.is_file() for file in out.rglob("*"))
    assert "not copied" in caplog.text


def test_licences_are_copied(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["LICENSE", "LICENSE.md", "LICENSE-2.0", "licence.txt", "NOTICE", "USE_POLICY.md", "COPYING"]
    for name in names:
        (source / name).write_text(name)
    (source / "LICENSES").mkdir()
    (source / "LICENSES" / "Apache-2.0.txt").write_text("Apache")
    (source / "LICENSES" / "tool.py").write_text("code")
    (source / "LICENSE_CHECK.py").write_text("code")
    (source / "other.txt").write_text("no licence")
    link(source / "NOTICE.txt", "other.txt")  # inside the model
    (out := tmp_path / "out").mkdir()
    copy_licences(source, out)
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == sorted(
        [*names, "LICENSES/Apache-2.0.txt", "NOTICE.txt"]
    )
    assert (out / "LICENSES" / "Apache-2.0.txt").read_text() == "Apache"
    assert (out / "NOTICE.txt").read_text() == "no licence"
    assert not (out / "NOTICE.txt").is_symlink()
    assert not caplog.records


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--llama"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("the licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    (tmp_path / "secret").write_text(SECRET)
    (snapshot / "NOTICE").symlink_to("../../../secret")
    (out := tmp_path / "out").mkdir()
    copy_licences(snapshot, out)
    assert {file.name: file.read_text() for file in out.iterdir()} == {"LICENSE": "the licence"}


@pytest.fixture
def model_dir(dense_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(dense_dir, tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def everything(folder: Path) -> str:
    return "\n".join(
        file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".md", ".jinja", ".html")
    )


def test_no_code_and_no_place_of_the_source_is_published(run: Run, model_dir: Path, tmp_path: Path) -> None:
    remote = {"AutoTokenizer": ["xyzzy/repo--evilcode.Tok", None], "AutoModelForCausalLM": "evilcode.Model"}
    rewrite(model_dir / "tokenizer_config.json", auto_map=remote, trust_remote_code=True, name_or_path="/home/jane/l",
            vocab_file="/home/jane/vocab.json", tokenizer_file="/home/jane/t.json")  # fmt: skip
    rewrite(model_dir / "config.json", custom_pipelines={"x": {"impl": "evilcode.Pipe"}}, _name_or_path="/home/jane/l",
            trust_remote_code=True, notes="/home/jane/notes/x.txt",
            data=["/home/jane/a/b", {"at": "/home/jane/c"}])  # fmt: skip
    rewrite(model_dir / "generation_config.json", custom_generate="xyzzy/evilcode", auto_map=remote)
    (model_dir / "evilcode.py").write_text("raise SystemExit('run')")
    (model_dir / "custom_generate").mkdir()
    (model_dir / "custom_generate" / "generate.py").write_text("raise SystemExit('run')")
    (model_dir / "README.md").write_text(
        "---\nlicense: mit\nlicense_link: /home/jane/LICENSE\nbase_model: /home/jane/base\n---\n"
    )
    (text := tmp_path / "acme-corp" / "text.jsonl").parent.mkdir()
    text.write_text(json.dumps({"text": "Once upon a time there was a word. " * 40}))
    result = run(model_dir, "--output-dir=acme", f"--calibration={text}", "--eval-text", text, "--samples", "4",
                 "--seqlen=16", "--solver", "wanda", "--policy", "uniform", "--json")  # fmt: skip
    assert result.code == 0, result.err
    found = everything(Path("acme"))
    for words in ("evilcode", "jane", "xyzzy", str(tmp_path), "acme-corp", "custom_pipelines"):
        assert words not in found, words
    assert [file.name for file in Path("acme").rglob("*.py")] == ["mosaic_autoload.py"]
    assert "auto_map" not in json.loads(Path("acme", "tokenizer_config.json").read_text())
    assert json.loads(Path("acme", "config.json").read_text())["auto_map"]["AutoConfig"].startswith("mosaic_autoload.")
    report = json.loads(Path("acme", "mosaic_report.json").read_text())
    assert report == json.loads(result.out)
    assert (report["model"], report["perplexity"]["text"], report["calibration"]["source"]) == (
        "llama", "text.jsonl", "text.jsonl",
    )  # fmt: skip
    card = Path("acme", "README.md").read_text()
    assert "license: mit\n" in card
    assert "license_link: LICENSE\n" in card
    assert "base_model: base\n" in card


@pytest.mark.parametrize("kind", ["link", "huge", "yaml", "pipe", "types"])
def test_a_strange_readme_costs_its_metadata_alone(tmp_path: Path, source: Path, kind: str) -> None:
    readme = source / "README.md"
    if kind == "link":
        (tmp_path / "secret").write_text(f"---\nlicense: {SECRET}\n---\n")
        readme.symlink_to("../secret")
    elif kind == "pipe":
        os.mkfifo(readme)
    else:
        content = {
            "huge": f"license: {SECRET}\n---\n" + "x" * (2 << 20),
            "yaml": f"license: !!python/object/apply:os.system ['touch {tmp_path}/run']\n---\n",
            "types": "license: {a: 1}\nlanguage: [1, 2]\nbase_model: 7\n---\n",
        }[kind]
        readme.write_text("---\n" + content)
    save(composite(), tmp_path / "out", source=str(source))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in card
    assert SECRET not in card
    assert "base_model: source\n" in card
    assert not (tmp_path / "run").exists()


def test_a_chat_template_of_somebody_else_is_left_out(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    link(model_dir / "chat_template.jinja", "../secret")
    mk.prune(model_dir, output_dir=tmp_path / "out", **OPTIONS)
    assert SECRET not in everything(tmp_path / "out")
    assert "chat_template.jinja is not used for the result: it is a link that leads out" in caplog.text
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    mk.prune(model_dir, output_dir=tmp_path / "own", **OPTIONS)
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "folder"],
)
def test_a_small_file_of_somebody_else_is_not_published(run: Run, model_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    if name == "folder":
        name = "additional_chat_templates"
        (tmp_path / "elsewhere" / "one.jinja").write_text(SECRET)
        link(model_dir / name, "../elsewhere")
    else:
        content = {
            "special_tokens_map.json": {"additional_special_tokens": [SECRET]}, "added_tokens.json": {SECRET: 5},
        }.get(name, {"account": SECRET})  # fmt: skip
        (model_dir / name).unlink(missing_ok=True)
        (tmp_path / "elsewhere" / "key.json").write_text(json.dumps(content))
        link(model_dir / name, "../elsewhere/key.json")
    result = run(model_dir, "--output-dir", "out", *FAST)
    assert result.code == 0, result.err
    assert f"{name}" in result.err
    assert "is not used for the result: it is a link that leads out of the model's directory" in result.err
    assert SECRET not in everything(Path("out"))


def test_a_directory_of_links_to_one_model_is_that_model(run: Run, model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for file in model_dir.iterdir():
        link(tmp_path / "links" / file.name, file)
    result = run(tmp_path / "links", "--output-dir", "out", *FAST)
    assert result.code == 0, result.err
    assert "not used" not in result.err
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert Path("out", name).is_file(), name


def test_a_link_in_a_circle_and_our_own_file_cost_nothing(run: Run, model_dir: Path) -> None:
    link(model_dir / "LICENSE", "LICENSE")
    result = run(model_dir, "--output-dir", "out", *FAST)
    assert result.code == 0, result.err
    assert "LICENSE is not copied: it cannot be read" in result.err
    assert "is code of the model's source" not in result.err


class Unsaved:
    """A tokenizer whose own code fails when it is saved."""

    chat_template = None

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "half.json").write_text("{}")
        raise RuntimeError("no vocabulary")


def test_a_tokenizer_that_does_not_save_is_told_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_files_beside(random_model(), Unsaved(), tmp_path, tmp_path)
    assert "the tokenizer does not save (RuntimeError: no vocabulary): the result has none" in caplog.text
    (out := tmp_path / "out").mkdir()
    save_tokenizer(Unsaved(), out, tmp_path)
    assert list(out.iterdir()) == []


def test_a_tokenizer_of_foreign_code_is_refused_before_the_weights_are_read(run: Run, model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenization_x.py").write_text("raise SystemExit('run')")
    rewrite(
        model_dir / "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}
    )
    with (model_dir / "model.safetensors").open("r+b") as weights:  # not a number in it: found only if it is read
        weights.seek(-64, os.SEEK_END)
        weights.write(b"\xff" * 64)
    result = run(model_dir, "--output-dir", "out", *QUICK)
    assert result.code == 1
    assert "its tokenizer is code of the model, which this package does not run" in result.err


GENERATION: dict[str, tuple[dict[str, Any], set[str]]] = {
    # settings beside bos_token_id and eos_token_id, and those of them that do not survive
    "nothing odd": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, set()),
    "beams": ({"num_beams": 4, "early_stopping": True, "length_penalty": 1.2}, set()),
    "greedy": ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {"temperature", "top_p", "top_k"}),
    "two kinds": ({"temperature": 0.6, "pad_token_id": -1}, {"temperature", "pad_token_id"}),
    "no beams": ({"early_stopping": True, "length_penalty": 2.0, "top_p": 1.0}, {"early_stopping", "length_penalty"}),
    "outputs": ({"output_scores": True, "output_hidden_states": True}, {"output_scores", "output_hidden_states"}),
    "sequences": ({"num_return_sequences": 3, "repetition_penalty": 1.1}, {"num_return_sequences"}),
    "cutoffs": ({"epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3}, {"epsilon_cutoff", "eta_cutoff"}),
    "types": (
        {"max_new_tokens": -1, "early_stopping": "often", "do_sample": True, "top_p": 0.5},
        {"max_new_tokens", "early_stopping"},
    ),
    "cache": ({"cache_implementation": "nonsense", "repetition_penalty": 1.1}, {"cache_implementation"}),
    "all at once": (
        {"temperature": 0.1, "top_p": 0.5, "pad_token_id": -1, "early_stopping": True, "output_logits": True},
        {"temperature", "top_p", "pad_token_id", "early_stopping", "output_logits"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATION)
def test_generation_settings(name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    settings, dropped = GENERATION[name]
    given = GenerationConfig()
    for key, value in {"bos_token_id": 0, "eos_token_id": 1, **settings}.items():
        setattr(given, key, value)
    before = dict(vars(given))
    found = valid_generation(given)
    assert vars(given) == before
    found.validate(strict=True)
    for key, value in {"bos_token_id": 0, "eos_token_id": 1, **settings}.items():
        assert (getattr(found, key) == value) is (key not in dropped), key
    for key in settings:
        assert (f"{key} = " in caplog.text) is (key in dropped)
    found.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").exists()


def test_generation_settings_in_the_configuration(dense_dir: Path, tmp_path: Path) -> None:
    """transformers loads them and does not save them."""
    shutil.copytree(dense_dir, tmp_path / "llama")
    rewrite(tmp_path / "llama" / "config.json", temperature=0.7, do_sample=True, num_beams=4)
    mk.prune(tmp_path / "llama", output_dir=tmp_path / "out", **OPTIONS)
    assert not {"temperature", "num_beams"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    config = random_model().config
    config.temperature = 0.7
    plain_config(config).save_pretrained(tmp_path)
    assert config.temperature == 0.7


def test_a_configuration_that_does_not_save_is_told_first(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("unheard of")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", refuse)
    monkeypatch.setattr("mosaic_kernels.prune.pipeline._prune_blocks", None)
    with pytest.raises(ModelLoadError, match=r"cannot save it \(ValueError: unheard of\): correct the file"):
        mk.prune(model_dir, output_dir=tmp_path / "out", **OPTIONS)


def test_a_directory_whose_name_is_no_unicode(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors cannot write there, which would show in the last step."""
    monkeypatch.setattr("mosaic_kernels.prune.pipeline._prune_blocks", None)
    with pytest.raises(UsageError, match="cannot be written as UTF-8"):
        mk.prune(model_dir, output_dir=os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"), **OPTIONS)


def test_a_result_that_is_larger_than_its_source_is_told(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mk.prune(model_dir, output_dir=tmp_path / "out", **OPTIONS)
    assert "more than the" not in caplog.text
    mk.prune(model_dir, output_dir=tmp_path / "wide", **{**OPTIONS, "sparsity": 0.1, "dtype": "float32"})
    assert "bytes, more than the" in caplog.text

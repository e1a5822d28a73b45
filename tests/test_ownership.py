# SPDX-License-Identifier: Apache-2.0
"""Which directories a run replaces, and which places it refuses before it does anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prune_runs import QUICK, Run

import mosaic_kernels as mk
from mosaic_kernels.checkpoint import manifest, places
from mosaic_kernels.checkpoint.directory import OutputDirectory
from mosaic_kernels.checkpoint.ownership import require_output
from mosaic_kernels.errors import EnvironmentError_, UsageError

REPLACE = ({"overwrite": True}, {"resume": True})


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "LICENSES").mkdir()
    (output.staging / "LICENSES" / "MIT.txt").write_text("...")
    (output.staging / "model.safetensors").write_bytes(bytes(2 << 20))
    output.publish()
    return output.path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "a"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def _tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime) for path in folder.rglob("*")}


def _refused(path: Path, words: str, **options: object) -> None:
    """Nothing is touched, whether the run is tried or only asked about."""
    before = _tree(path.parent)
    for take in (OutputDirectory, require_output):
        with pytest.raises(UsageError, match=words):
            take(path, **options)  # type: ignore[operator]
    assert _tree(path.parent) == before


@pytest.mark.parametrize("options", REPLACE)
def test_our_own_result_is_replaced(ours: Path, options: dict[str, bool]) -> None:
    require_output(ours, **options)
    output = OutputDirectory(ours, **options)
    (output.staging / "config.json").write_text("{}")
    output.publish()
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", manifest.FILE_NAME]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda d: (d / "notes.txt").write_text("x"), "notes.txt is a file that mosaic-kernels did not write"),
    "hidden file": (lambda d: (d / ".DS_Store").write_text("x"), ".DS_Store is a file"),
    "deep file": (lambda d: (d / "LICENSES" / "mine").write_text("x"), "LICENSES/mine is a file"),
    "empty folder": (lambda d: (d / "__pycache__").mkdir(), "__pycache__ is a folder"),
    "link": (lambda d: (d / "latest").symlink_to("model.safetensors"), "latest is a link"),
    "broken link": (lambda d: (d / "gone").symlink_to("nowhere"), "gone is a link"),
    "pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe is a device, pipe or socket"),
    "a bit of a large file": (
        lambda d: _flip(d / "model.safetensors"),
        "model.safetensors has changed: another sha256",
    ),
    "edited": (lambda d: (d / "LICENSES" / "MIT.txt").write_text("mine"), "LICENSES/MIT.txt has changed"),
    "file for link": (lambda d: _replace_by_link(d / "model.safetensors"), "model.safetensors was replaced: it is a l"),
    "folder for link": (lambda d: _replace_by_link(d / "LICENSES"), "LICENSES was replaced: it is a link"),
    "no manifest": (lambda d: (d / manifest.FILE_NAME).unlink(), "no mosaic_manifest.json.*an older release"),
    "torn manifest": (lambda d: (d / manifest.FILE_NAME).write_text("{"), "not a manifest of this package"),
    "manifest link": (lambda d: _replace_by_link(d / manifest.FILE_NAME), "is a link, not a manifest"),
}


@pytest.mark.parametrize("options", REPLACE)
@pytest.mark.parametrize("case", FOREIGN)
def test_a_directory_with_anything_else_is_not_replaced(ours: Path, case: str, options: dict[str, bool]) -> None:
    change, words = FOREIGN[case]
    change(ours)
    _refused(ours, f"{words}.*choose another --output-dir", **options)


def test_a_result_without_some_of_its_files_is_replaced(ours: Path) -> None:
    (ours / "model.safetensors").unlink()  # to have room
    OutputDirectory(ours, overwrite=True).publish()
    assert [path.name for path in ours.iterdir()] == [manifest.FILE_NAME]


@pytest.mark.parametrize("options", [*REPLACE, {}])
def test_the_source_model(source: Path, options: dict[str, bool]) -> None:
    manifest.write(source)  # even a result of ours is not replaced by what is made from it
    link = source.parent.parent / "link"
    link.symlink_to(source)
    for name in (source, link, f"{source}/../a/", os.path.relpath(source)):
        for path, words in (
            (source, "is or contains the source model|not empty"),
            (link, "is or contains the source model|not empty"),
            (source.parent, "is or contains the source model|not empty"),
            (source / "out", "lies inside the source model"),
            (link / "deep" / "out", "lies inside the source model"),
        ):
            _refused(path, words, source=name, **options)
    require_output(source.parent / "b", source=source, **options)
    require_output(source.parent / "ab", source=source, **options)


def test_files_that_the_source_model_links_to(source: Path) -> None:
    blobs = source.parent.parent / "blobs"
    blobs.mkdir()
    (source / "config.json").rename(blobs / "config.json")
    manifest.write(blobs)
    (source / "config.json").symlink_to("../../blobs/config.json")
    _refused(blobs, "contains files of the source model", source=source, overwrite=True)


def test_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for source in ("owner/name", snapshot):
        _refused(snapshot / "out", "inside the source model", source=source, overwrite=True)
        _refused(snapshot.parent.parent / "out", "inside the source model", source=source, overwrite=True)
    require_output(tmp_path / "models--owner--other", source="owner/name", overwrite=True)


def test_places_that_hold_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", "is a file", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        OutputDirectory(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="mount point"):
        OutputDirectory("/proc", overwrite=True)
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("work")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    for place in (".", "..", "", "./", "../../link", "~", "~/..", tmp_path / "work"):
        with pytest.raises(UsageError, match="other work"):
            OutputDirectory(place, overwrite=True)
    for kind in (".git", ".hg"):
        (tmp_path / kind / "clone" / kind).mkdir(parents=True)
        _refused(tmp_path / kind / "clone", "is a repository", overwrite=True)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".git").write_text("gitdir: elsewhere")  # a work tree
    _refused(tmp_path / "tree", "is a repository", overwrite=True)


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/out", "n" * 246, "n" * 300 + "/out", "loop"])
def test_what_is_not_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError, match="--output-dir"):
        OutputDirectory(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    "name", ["two words", "zeile\nzwei", "größe 模型", "-o", "$HOME", "n" * 245, os.fsdecode(b"\xff")]
)
def test_odd_names(tmp_path: Path, name: str) -> None:
    OutputDirectory(tmp_path / name).publish()
    OutputDirectory(tmp_path / name, overwrite=True).publish()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    OutputDirectory(tmp_path / "out").publish()
    assert (tmp_path / "out").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Mount a small disk, or a folder a second time."""
    done: list[Path] = []

    def mount(place: Path, bound: Path | None = None) -> None:
        place.mkdir(parents=True, exist_ok=True)
        command = ["mount", "--bind", str(bound)] if bound else ["mount", "-t", "tmpfs", "tmpfs"]
        if shutil.which("mount") is None or subprocess.run([*command, str(place)], check=False).returncode:
            pytest.skip("this user may not mount; test_mounts_where_nothing_is_mounted reads the same table")
        done.append(place)

    yield mount
    for place in reversed(done):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["disk", "bind"])
def test_mounts(ours: Path, mounted: Callable[..., None], kind: str) -> None:
    data = ours.parent / "data"
    data.mkdir()
    bound = data if kind == "bind" else None
    mounted(ours / "a b", bound)
    (ours / "a b" / "precious").write_text("x")
    _refused(ours, "contains the mount point .*a b", overwrite=True)
    _refused(ours / "a b", "is a mount point", overwrite=True)
    stage = ours.parent / ".new.partial"
    OutputDirectory(ours.parent / "new").release()
    mounted(stage / "journal", bound)
    (stage / "journal" / "precious").write_text("x")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"mount point .*journal"):
            OutputDirectory(ours.parent / "new", **options)
    assert (stage / "journal" / "precious").exists()


def test_the_source_under_another_name(source: Path, mounted: Callable[..., None]) -> None:
    again = source.parent.parent / "again"
    mounted(again, source.parent)
    _refused(again / "a", "is or contains the source", source=source, overwrite=True)
    _refused(again / "a" / "out", "inside the source", source=source, overwrite=True)


def test_mounts_where_nothing_is_mounted(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ours.parent / "mountinfo"
    place = os.fsencode(ours.parent / "with space").replace(b" ", b"\\040")
    table.write_bytes(b"36 35 98:0 / " + place + b"/below rw - ext4 /dev/root rw\n")
    monkeypatch.setattr(places, "_MOUNTS", table)
    (ours.parent / "with space").mkdir()
    _refused(ours.parent / "with space", "contains the mount point .*with space/below", overwrite=True)
    require_output(ours.parent / "with", overwrite=True)
    monkeypatch.setattr(places, "_MOUNTS", ours / "nowhere")  # another system
    require_output(ours, overwrite=True)


def test_a_place_that_is_read_only(ours: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; test_forbidden_places_are_environment_errors covers the message")
    ours.parent.chmod(0o500)
    try:
        with pytest.raises(EnvironmentError_, match="no permission"):
            OutputDirectory(ours, overwrite=True)
        with pytest.raises(UsageError, match="not empty"):
            OutputDirectory(ours)
    finally:
        ours.parent.chmod(0o700)


@pytest.mark.parametrize("wish", ["--overwrite", "--resume"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_commands_refuse_before_the_model_is_loaded(
    run: Run, dense_dir: Path, monkeypatch: pytest.MonkeyPatch, wish: str, dry: tuple[str, ...]
) -> None:
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("x")
    monkeypatch.setattr("mosaic_kernels.prune.pipeline.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("mosaic_kernels.prune.dry_run.predict", lambda *_, **__: pytest.fail("it was read"))
    shutil.copytree(dense_dir, "models/a")
    for model, out in ((dense_dir, "mine"), ("models/a", "models"), ("models/a", "models/a/out")):
        result = run(model, "--output-dir", out, wish, *dry, *QUICK)
        assert (result.code, result.out) == (2, "")
        assert "--output-dir" in result.err
    assert Path("mine", "thesis.txt").exists()
    assert Path("models", "a", "config.json").exists()


def test_the_source_of_a_model_in_memory(dense_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(dense_dir, tmp_path / "models" / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "a")
    with pytest.raises(UsageError, match="contains the source model"):
        mk.prune(model, output_dir=tmp_path / "models", overwrite=True, calibration="random", samples=2, seqlen=8)

# SPDX-License-Identifier: Apache-2.0
"""What a directory's manifest sees, and what it deletes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_kernels.checkpoint import manifest
from mosaic_kernels.errors import FormatError

BIG = (1 << 20) + 1  # one byte more than a quick comparison hashes


@pytest.fixture
def written(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    (directory / "LICENSES").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(BIG))
    (directory / "LICENSES" / "MIT.txt").write_text("...")
    manifest.write(directory)
    return directory


def test_it_lists_every_file_and_no_place(written: Path) -> None:
    body = json.loads((written / manifest.FILE_NAME).read_text())
    assert set(body["files"]) == {"config.json", "model.safetensors", "LICENSES/MIT.txt"}
    assert body["package"] == "mosaic-kernels"
    assert body["files"]["model.safetensors"] == {"size": BIG, "sha256": hashlib.sha256(bytes(BIG)).hexdigest()}
    assert str(written.parent) not in json.dumps(body)
    assert manifest.differences(written, thorough=True) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "bit": (lambda d: _flip(d / "config.json"), "config.json has changed: another sha256"),
    "longer": (lambda d: (d / "config.json").write_text("{} "), "config.json has changed: 3 bytes instead of 2"),
    "file": (lambda d: (d / "notes.txt").write_text(""), "notes.txt is a file that mosaic-kernels did not write"),
    "deep file": (lambda d: (d / "LICENSES" / "x").write_text(""), "LICENSES/x is a file that mosaic-kernels did not"),
    "folder": (lambda d: (d / ".cache").mkdir(), ".cache is a folder that mosaic-kernels did not write"),
    "link": (lambda d: (d / "latest").symlink_to("nowhere"), "latest is a link that mosaic-kernels did not write"),
    "pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe is a device, pipe or socket that mosaic-kernels did not write"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("thorough", [False, True])
def test_a_difference_is_named(written: Path, case: str, thorough: bool) -> None:
    change, words = CHANGES[case]
    change(written)
    (difference,) = manifest.differences(written, thorough=thorough)
    assert difference.startswith(words)


def test_a_file_that_became_a_link_or_a_folder(written: Path) -> None:
    (written / "config.json").rename(written.parent / "config.json")
    (written / "config.json").symlink_to("../config.json")  # the same bytes, but elsewhere
    (written / "model.safetensors").unlink()
    (written / "model.safetensors").mkdir()
    assert manifest.differences(written, thorough=True) == [
        "config.json was replaced: it is a link",
        "model.safetensors was replaced: it is a folder",
    ]


def test_a_flipped_bit_of_a_large_file_is_seen_by_reading_it(written: Path) -> None:
    _flip(written / "model.safetensors")
    assert manifest.differences(written, thorough=False) == []
    assert manifest.differences(written, thorough=True) == ["model.safetensors has changed: another sha256"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"package": "another", "schema": 1, "version": "1", "files": {}}',
        '{"package": "mosaic-kernels", "schema": 99, "version": "1", "files": {}}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": []}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": {"../x": {"size": 1, "sha256": ""}}}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": {"/etc/x": {"size": 1, "sha256": ""}}}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": {"a/./b": {"size": 1, "sha256": ""}}}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": {"a": {"size": "x", "sha256": ""}}}',
        '{"package": "mosaic-kernels", "schema": 1, "version": "1", "files": {"a": 1}}',
        "[" * 100_000,
    ],
)
def test_what_is_not_our_manifest(tmp_path: Path, body: str) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(body)
    with pytest.raises(FormatError, match="is not a manifest"):
        manifest.read(tmp_path)


def test_no_manifest_and_no_plain_file(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    with pytest.raises(FormatError, match="older release"):
        manifest.differences(tmp_path, thorough=False)
    os.mkfifo(tmp_path / manifest.FILE_NAME)  # opening it for reading would wait without end
    with pytest.raises(FormatError, match="not a manifest"):
        manifest.read(tmp_path)
    (tmp_path / manifest.FILE_NAME).unlink()
    (tmp_path / manifest.FILE_NAME).symlink_to("/etc/hostname")
    with pytest.raises(FormatError, match="is a link"):
        manifest.read(tmp_path)


def test_a_link_is_not_put_into_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(FormatError, match="is a link"):
        manifest.write(tmp_path)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_text("x")
    (tmp_path / "two\nlines").write_text("x")
    manifest.write(tmp_path)
    assert manifest.differences(tmp_path, thorough=True) == []
    (tmp_path / name).unlink()
    assert manifest.differences(tmp_path, thorough=True) == [f"{name} is missing"]


def test_only_listed_files_are_deleted(written: Path) -> None:
    listed = manifest.read(written)
    assert listed is not None
    (written / "LICENSES" / "mine.txt").write_text("x")
    assert not manifest.remove(written, listed)
    assert [path.name for path in written.rglob("*") if path.is_file()] == [manifest.FILE_NAME, "mine.txt"]
    (written / "LICENSES" / "mine.txt").unlink()
    assert manifest.remove(written, listed)
    assert not written.exists()


def test_nothing_is_deleted_through_a_link(written: Path) -> None:
    listed = manifest.read(written)
    assert listed is not None
    (written / "LICENSES").rename(written.parent / "elsewhere")
    (written / "LICENSES").symlink_to(written.parent / "elsewhere")
    assert not manifest.remove(written, listed)
    assert (written.parent / "elsewhere" / "MIT.txt").exists()


def test_empty_folders_are_not_kept(written: Path) -> None:
    (written / "empty" / "deeper").mkdir(parents=True)
    manifest.write(written)
    assert not (written / "empty").exists()

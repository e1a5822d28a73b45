# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights: tokenizer, generation settings, licences.

Problems with such files end no run, and code among them is never run.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic_kernels.checkpoint import autoload
from mosaic_kernels.checkpoint.files import GENERATION_FILE
from mosaic_kernels.checkpoint.foreign import ForeignFileError, foreign_links, read_own_file
from mosaic_kernels.checkpoint.generation import plain_config, valid_generation
from mosaic_kernels.checkpoint.public import without_paths
from mosaic_kernels.cli import DISK_FULL
from mosaic_kernels.errors import ModelLoadError, UsageError

logger = logging.getLogger(__name__)

_MOST_LICENCES = 64  # files in a folder LICENSES
_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
_LICENCE_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")
# Keys of transformers' JSON files whose values are code or paths of the source model, or secrets.
_NOT_OURS = {
    "auto_map", "custom_pipelines", "trust_remote_code", "custom_generate", "_name_or_path", "name_or_path",
    "_commit_hash", "token", "use_auth_token", "local_files_only", "is_local", "cache_dir",
}  # fmt: skip
_TOKEN_KEYS = ("_token", "_tokens")  # such as "</s>", which look like anything
# Files of a tokenizer that take any text or any keys, and hand them on to the result.
_FREE_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
_CODE = (".py", ".pyc", ".so", ".sh", ".pkl", ".pickle", ".bin", ".pt", ".pth")


def copy_licences(source: Path, directory: Path) -> None:
    """Copy licences and notices of the model's directory and of its folder ``LICENSES``.

    A warning names each file that cannot be copied; the run goes on.

    Raises:
        OSError: writing fails.
    """
    try:
        found = sorted(source.iterdir()) if source.is_dir() else []
    except OSError as error:
        logger.warning("licences are not copied: %s cannot be read (%s)", source, error.strerror)
        return
    for path in found:
        if not path.name.upper().startswith(_LICENCES):
            continue
        if path.name.upper() in ("LICENSES", "LICENCES") and path.is_dir() and not path.is_symlink():
            _copy_folder(path, source, directory)
        elif path.suffix.lower() in _LICENCE_SUFFIXES or path.suffix[1:].isdigit():
            _copy_licence(path, source, directory / path.name)
        else:
            logger.info("%s is not copied: it is no text", path)


def _copy_folder(folder: Path, source: Path, directory: Path) -> None:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        logger.warning("%s is not copied: %s", folder, error.strerror)
        return
    for path in found[:_MOST_LICENCES]:
        if path.suffix.lower() in _CODE:
            logger.info("%s is not copied: it is no text", path)
        else:
            _copy_licence(path, source, directory / folder.name / path.name)
    if len(found) > _MOST_LICENCES:
        logger.warning("%s: only the first %d of %d files are copied", folder, _MOST_LICENCES, len(found))


def _copy_licence(path: Path, source: Path, target: Path) -> None:
    try:
        data = read_own_file(path, source)
    except ForeignFileError as error:
        logger.warning("%s is not copied: %s; add the licence to the result yourself", path, error)
        return
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)


def check_files_beside(model: Any, tokenizer: Any, source: Path, directory: Path) -> None:
    """Save the small files of a result on trial before the work starts, and warn of what the last step will leave out.

    Args:
        model: the model to be pruned; it stays as it is.
        tokenizer: the model's tokenizer, or ``None``.
        source: the model's directory.
        directory: where the result will be written.

    Raises:
        UsageError: safetensors cannot write to a path with this name.
        ModelLoadError: transformers loads the configuration but cannot save it.
    """
    try:
        os.fspath(directory).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--output-dir {os.fspath(directory)!a}: this name cannot be written as UTF-8, which safetensors "
            "needs: choose another"
        ) from error
    valid_generation(model.generation_config)
    for link in foreign_links(source, [GENERATION_FILE]):
        logger.warning("%s: the result has none", link)
    config = plain_config(model.config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                config.save_pretrained(folder)
            except Exception as error:  # whatever a configuration's own checks raise
                if isinstance(error, OSError):
                    raise
                raise ModelLoadError(
                    f"{source}: transformers loads this config.json but cannot save it "
                    f"({type(error).__name__}: {_first_line(error)}): correct the file"
                ) from error
            if tokenizer is not None:
                save_tokenizer(tokenizer, Path(folder), source)
    except OSError as error:  # no room for temporary files says nothing about the output directory
        logger.debug("saving the small files was not tried: %s", error)


def save_tokenizer(tokenizer: Any, directory: Path, source: Path) -> None:
    """Save a tokenizer without names of code to run. If saving fails, warn and go on.

    Args:
        tokenizer: the model's tokenizer.
        directory: where to write.
        source: directory of the model before pruning. A chat template that is a link out of this directory is left
            out. If another file of the tokenizer is such a link, the tokenizer is not saved.

    Raises:
        OSError: writing fails.
    """
    if foreign := foreign_links(source, _FREE_FILES):
        logger.warning("%s: the result has no tokenizer; copy its files there", foreign[0])
        return
    with tempfile.TemporaryDirectory(dir=directory) as place:
        folder = Path(place) / "tokenizer"
        try:
            _without_foreign_template(tokenizer, source).save_pretrained(folder)
        except Exception as error:  # whatever a tokenizer's own code raises
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            logger.warning(
                "the tokenizer does not save (%s: %s): the result has none; copy its files there",
                type(error).__name__, _first_line(error),
            )  # fmt: skip
            return
        clean_json(folder / "tokenizer_config.json")
        for path in sorted(folder.rglob("*")):
            target = directory / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            elif path.suffix not in _CODE:
                shutil.copyfile(path, target)
        for path in sorted(directory.rglob("*"), reverse=True):
            if path.is_dir() and path != Path(place) and not path.is_relative_to(place) and not any(path.iterdir()):
                path.rmdir()


def _without_foreign_template(tokenizer: Any, source: Path) -> Any:
    """The tokenizer, or a copy without its chat template if that is a link to a file outside the model's directory."""
    more = [path.relative_to(source) for path in source.glob("*chat_templates/*")]
    if foreign := foreign_links(source, ["chat_template.jinja", "chat_template.json", *more]):
        logger.warning("%s: the result has no chat template", foreign[0])
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = None
    return tokenizer


def clean_json(path: Path, ours: Mapping[str, Any] | None = None) -> None:
    """Remove code, paths and secrets of the source model from a JSON file; then set the keys in ``ours``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(content, dict):
        return
    cleaned = {**_cleaned(content), **(ours or {})}
    if cleaned != content:
        path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def _cleaned(content: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        if key in _NOT_OURS:
            continue
        if key in ("added_tokens_decoder", "quantization_config", "chat_template"):
            found[key] = value
        elif isinstance(value, dict):
            found[key] = _cleaned(value)
        else:
            found[key] = value if key.endswith(_TOKEN_KEYS) else without_paths(value)
    return found


def remove_code(directory: Path) -> None:
    """Remove code files that transformers copied into the result; the result needs none of them."""
    for path in directory.glob("*"):
        if path.name == autoload.FILE_NAME:
            continue
        if path.suffix in _CODE or path.name == "custom_generate":
            logger.warning("%s is not part of the result: it is code of the model's source", path.name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

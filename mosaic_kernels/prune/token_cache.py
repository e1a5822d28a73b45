# SPDX-License-Identifier: Apache-2.0
"""Tokenised texts on disk, in a folder that only its owner can enter. Each is checked before use."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mosaic_kernels.paths import home_directory

logger = logging.getLogger(__name__)

_HEADER = 1 << 16  # bytes, far more than the header of one tensor needs


def cache_directory() -> Path | None:
    """Where tokenised texts are kept: ``$XDG_CACHE_HOME/mosaic-kernels`` (default ``~/.cache``).

    Returns:
        ``None`` if that variable is no absolute path and there is no home directory. Then nothing is kept.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if named and Path(named).is_absolute():
        return Path(named) / "mosaic-kernels"
    home = home_directory()
    return None if home is None else home / ".cache" / "mosaic-kernels"


def cached_tokens(text: str, tokenizer: Any, make: Callable[[], Tensor]) -> Tensor:
    """Tokens of ``text``: those kept under the hash of the text and the tokenizer, else those that ``make`` returns.

    An entry that is damaged, of another text, or of another user is ignored and written again. A folder that is a link
    or belongs to another user is not used.

    Args:
        text: the text to tokenise.
        tokenizer: a Hugging Face tokenizer.
        make: tokenises the text.

    Returns:
        ``int64 [tokens]``.
    """
    data = text.encode("utf-8", "surrogatepass")
    key = hashlib.sha256(data)
    key.update(tokenizer_text(tokenizer).encode("utf-8", "surrogatepass"))
    folder, name = _own_folder(), f"tokens-{key.hexdigest()}.safetensors"
    if folder is None:
        return make()
    found = _read(folder / name, key.hexdigest(), most=len(data) + 16, vocabulary=len(tokenizer))
    if found is not None:
        return found
    tokens = make()
    _write(folder / name, key.hexdigest(), tokens)
    return tokens


def tokenizer_text(tokenizer: Any) -> str:
    """What decides the tokens of a text: all of a fast tokenizer, the vocabulary of another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _own_folder() -> Path | None:
    """The cache's folder, made if it is missing; ``None`` if it cannot be made or may belong to another user."""
    folder = cache_directory()
    if folder is None:
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            logger.warning("%s is a link or another user's folder: tokens are not kept there", folder)
            return None
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:  # a cache that cannot be written costs time, not results
        logger.debug("tokens not cached: %s", error)
        return None
    return folder


def _read(path: Path, key: str, *, most: int, vocabulary: int) -> Tensor | None:
    """The tokens of an entry, if a run of this user wrote it for ``key`` and it is undamaged; else ``None``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > 8 * most + _HEADER:
            return None
        try:
            entry = load(file.read())
            tokens, said = entry["tokens"], (entry["key"], entry["digest"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
    if tokens.dtype is not torch.int64 or tokens.dim() != 1 or not 0 < len(tokens) <= most:
        return None
    if [bytes(part.tolist()).hex() for part in said if part.dtype is torch.uint8] != [key, _digest(tokens)]:
        return None
    return tokens if int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary else None


def _write(path: Path, key: str, tokens: Tensor) -> None:
    part = None
    try:
        descriptor, part = tempfile.mkstemp(prefix=".tokens-", dir=path.parent)  # 0600, and nobody can guess its name
        with os.fdopen(descriptor, "wb") as file:
            file.write(save({"tokens": tokens, "key": _bytes(key), "digest": _bytes(_digest(tokens))}))
        Path(part).replace(path)
    except (OSError, SafetensorError) as error:
        logger.debug("tokens not cached: %s", error)
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _bytes(digest: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens from a text file, a hub dataset, texts or token ids in memory, or drawn at random."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mosaic_kernels.errors import CalibrationError, EnvironmentError_
from mosaic_kernels.prune.given import MOST_ITEMS, Sequences, Stream, Texts, given_calibration
from mosaic_kernels.text import load_tokens, tokenize

logger = logging.getLogger(__name__)

# The field's usual calibration and test corpora: name -> (hub id, configuration, split, text column).
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "ptb": ("ptb_text_only", "penn_treebank", "train", "sentence"),
}


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences and where they came from.

    Attributes:
        tokens: ``int64 [samples, seqlen]``.
        source: file, dataset, ``random``, or a description of texts or tokens in memory, such as ``tensor [8, 64]``.
        digest: SHA-256 of the tokens, in hexadecimal.
    """

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def calibrate(source: Any, tokenizer: Any, vocabulary: int, *, samples: int, seqlen: int, seed: int) -> Calibration:
    """Draw ``samples`` windows of ``seqlen`` tokens, the same ones for the same seed.

    Args:
        source: path of a text file, a name in :data:`DATASETS`, a hub dataset id with a ``text`` column, ``random`` for
            uniformly random tokens, or texts or token ids: see :func:`~mosaic_kernels.prune.given.given_calibration`.
            Sequences of token ids that have one length are used as they are, the first ``samples`` of them.
        tokenizer: of the model; ``None`` is enough for ``random`` and for token ids.
        vocabulary: number of tokens the model knows.

    Raises:
        UsageError: ``source`` is none of these.
        CalibrationError: the text is unreadable, empty or binary, has fewer tokens than one window, or ids that the
            model does not know.
        EnvironmentError_: a dataset is needed but the hub cannot be reached.
    """
    generator = torch.Generator().manual_seed(seed)
    given = given_calibration(source, samples)
    if given == "random":
        return Calibration(torch.randint(vocabulary, (samples, seqlen), generator=generator), given)
    if isinstance(given, Sequences):
        return _as_they_are(given, vocabulary, samples)
    if isinstance(given, Stream):
        _require_known(given.tokens, vocabulary, given.description)
        return Calibration(_windows(given.tokens, given.description, samples, seqlen, generator), given.description)
    if tokenizer is None:
        raise CalibrationError(
            "calibration text needs a tokenizer: add its files to the model directory (in Python: pass tokenizer=), "
            "or use --calibration random"
        )
    name = given if isinstance(given, str) else given.description
    if isinstance(given, Texts):
        tokens = tokenize("\n\n".join(given.texts), tokenizer)
    else:
        tokens = _cached_tokens(Path(given), tokenizer) if _is_file(given) else _dataset_tokens(given, tokenizer)
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer makes token {int(tokens.max())} but the model knows {vocabulary}: one is of another model"
        )
    return Calibration(_windows(tokens, name, samples, seqlen, generator), name)


def _as_they_are(given: Sequences, vocabulary: int, samples: int) -> Calibration:
    _require_known(given.tokens, vocabulary, given.description)
    if len(given.tokens) > samples:
        logger.info("calibration: the first %d sequences of the %s", samples, given.description)
    return Calibration(given.tokens[:samples].clone(), given.description)


def _require_known(tokens: Tensor, vocabulary: int, name: str) -> None:
    """Refuse token ids that the model does not know."""
    strange = ((tokens < 0) | (tokens >= vocabulary)).nonzero()
    if len(strange):
        *sequence, place = strange[0].tolist()
        where = f"token {place} of sequence {sequence[0]}" if sequence else f"token {place}"
        raise CalibrationError(
            f"calibration ({name}): {where} is {int(tokens[tuple(strange[0])])}, but the model knows the ids 0 to "
            f"{vocabulary - 1}: they were made by the tokenizer of another model"
        )


def _windows(tokens: Tensor, name: str, samples: int, seqlen: int, generator: torch.Generator) -> Tensor:
    if tokens.numel() < seqlen:
        raise CalibrationError(
            f"{name} has {tokens.numel()} tokens but one window needs {seqlen}: give a text of at least "
            f"{seqlen} tokens (about {seqlen * 4} characters), or lower --seqlen"
        )
    return _draw(tokens, samples, seqlen, generator)


def _is_file(source: str) -> bool:
    path = Path(source)
    looks_local = path.suffix in {".txt", ".md", ".text"} or source.startswith((".", "/", "~"))
    return path.exists() or looks_local


def _draw(tokens: Tensor, samples: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """Distinct non-overlapping windows at random; with too little text all there are, and a warning."""
    available = tokens.numel() // seqlen
    if available < samples:
        logger.warning("the text holds %d windows of %d tokens, not %d: using all", available, seqlen, samples)
    spare = tokens.numel() - available * seqlen
    start = int(torch.randint(spare + 1, (), generator=generator))
    windows = tokens[start : start + available * seqlen].view(available, seqlen)
    return windows[torch.randperm(available, generator=generator)[:samples]].clone()


def cache_directory() -> Path:
    """Where tokenised texts are kept: ``$XDG_CACHE_HOME/mosaic-kernels`` (default ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic-kernels"


def _cached_tokens(path: Path, tokenizer: Any) -> Tensor:
    """Tokens of a text file; kept on disk under the hash of the text and the tokenizer."""
    if not path.is_file():
        return load_tokens(path, tokenizer)  # raises what is wrong with it
    key = hashlib.sha256(path.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    cached = cache_directory() / f"tokens-{key.hexdigest()}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        cached_tokens: Tensor = load_file(cached)["tokens"]
        return cached_tokens
    tokens = load_tokens(path, tokenizer)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}.part")
        save_file({"tokens": tokens}, part)
        part.replace(cached)
    except (OSError, SafetensorError) as error:  # a cache that cannot be written costs time, not results
        logger.debug("tokens not cached: %s", error)
    return tokens


def _dataset_tokens(source: str, tokenizer: Any) -> Tensor:
    name, configuration, split, column = DATASETS.get(source, (source, None, "train", "text"))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EnvironmentError_(
            f"calibration dataset '{source}' needs the 'datasets' package: pip install 'mosaic-kernels[datasets]', "
            "or give a local text file, which works offline"
        ) from error
    try:
        stream = load_dataset(name, configuration, split=split, streaming=True)
        texts = [document[column] for document in stream.take(MOST_ITEMS)]
    except Exception as error:  # the hub's errors have no common base
        raise EnvironmentError_(
            f"calibration dataset '{source}' could not be read ({type(error).__name__}: {error}); "
            "give a local text file, which works offline"
        ) from error
    return tokenize("\n\n".join(texts), tokenizer)

# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens from a text file, a hub dataset, texts or token ids in memory, or drawn at random."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels.documents import joined
from mosaic_kernels.errors import CalibrationError
from mosaic_kernels.prune.given import MOST_ITEMS, Sequences, Stream, given_calibration
from mosaic_kernels.prune.hub import DATASETS, dataset_documents
from mosaic_kernels.prune.token_cache import cache_directory, cached_tokens
from mosaic_kernels.text import tokenize

__all__ = ["DATASETS", "Calibration", "cache_directory", "calibrate"]

logger = logging.getLogger(__name__)


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
        source: path of a text file, a table or a folder of them, a name in :data:`DATASETS`, a hub dataset id,
            ``random`` for uniformly random tokens, or texts or token ids: see
            :func:`~mosaic_kernels.prune.given.given_calibration`.
            Sequences of token ids that have one length are used as they are, the first ``samples`` of them.
        tokenizer: the model's tokenizer; ``None`` is enough for ``random`` and for token ids.
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
    if isinstance(given, str):
        found = given_calibration(list(dataset_documents(given, MOST_ITEMS)), samples)
        given = replace(found, description=given) if not isinstance(found, str) else found
        return calibrate(given, tokenizer, vocabulary, samples=samples, seqlen=seqlen, seed=seed)
    name, text = given.description, joined(given, tokenizer)
    tokens = cached_tokens(text, tokenizer, lambda: tokenize(text, tokenizer))
    if not len(tokens):
        raise CalibrationError(f"{name}: the tokenizer makes no tokens of this text; give another file")
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


def _draw(tokens: Tensor, samples: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """Distinct non-overlapping windows at random; with too little text all there are, and a warning."""
    available = tokens.numel() // seqlen
    if available < samples:
        logger.warning("the text holds %d windows of %d tokens, not %d: using all", available, seqlen, samples)
    spare = tokens.numel() - available * seqlen
    start = int(torch.randint(spare + 1, (), generator=generator))
    windows = tokens[start : start + available * seqlen].view(available, seqlen)
    return windows[torch.randperm(available, generator=generator)[:samples]].clone()

# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: its ranking and every finished block, so that an interrupted run goes on where it was.

Every entry holds a checksum and the run it belongs to. Blocks also hold the plan they were pruned by and the digest of
the block before. An entry that does not fit is named in a warning and made again; none is used unchecked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosaic_kernels.checkpoint.directory import write_errors
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import PROJECTIONS, Block
from mosaic_kernels.prune.fingerprint import differences, plain, run_id, tensor_digest

logger = logging.getLogger(__name__)

_RUN_FILE, _PLAN_FILE, _RANKS_FILE = "run.json", "plan.json", "ranks.json"
_BLOCK_FILE = "block-{}.safetensors"
_CHECKSUM = "checksum"
_MOST_NAMES = 6  # differences that a message names


class Journal:
    """Finished work under one directory; every file appears by rename.

    Args:
        directory: the journal's own directory, made when first written to.
        fingerprint: everything that must be equal before blocks of an earlier run are used again, see
            :func:`~mosaic_kernels.prune.fingerprint.fingerprint`.

    Raises:
        UsageError: the directory holds the journal of a run with another fingerprint, or of an unknown run. Nothing in
            it is changed.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self.directory = directory
        fingerprint = plain(fingerprint)
        self._run = run_id(fingerprint)
        self._plan = ""
        self._last = ""  # the digest of the previous block
        state = directory / _RUN_FILE
        for place in self._entries():
            if place.is_dir():  # found now, not when a solved block is to be written there
                raise UsageError(f"cannot resume: {place} is a directory where the journal keeps a file: remove it")
        if os.path.lexists(state):
            _require_equal(state, fingerprint)
            return
        if held := self._entries():
            raise UsageError(
                f"cannot resume: {directory} holds {held[0].name} but no {_RUN_FILE}, which says what run it is of; "
                "start afresh with --overwrite"
            )
        self._write_text(state, json.dumps(fingerprint, indent=1))

    def _entries(self) -> list[Path]:
        places = [self.directory / _PLAN_FILE, self.directory / _RANKS_FILE]
        return [*_blocks(self.directory), *(place for place in places if place.exists())]

    @property
    def ranks(self) -> Path:
        """Where the ranking of this run is kept: its probes may cost more than the blocks."""
        return self.directory / _RANKS_FILE

    def keep_ranks(self, save: Callable[[Path], Any]) -> None:
        """Keep the JSON object that ``save`` writes to a path."""
        part = self.ranks.with_suffix(".unsealed")
        with write_errors(part):
            self.directory.mkdir(parents=True, exist_ok=True)
            save(part)
            body = json.loads(part.read_text())
            part.unlink()
        self._seal(self.ranks, body)

    def has_ranks(self) -> bool:
        """True if the journal holds an undamaged ranking of this run."""
        return self._sealed(self.ranks, "the projections are ranked") is not None

    def keep_plan(self, share: float | None, zeros: dict[str, int]) -> None:
        """Note what was found by trying: the structured share and the zeros of every projection."""
        self._seal(self.directory / _PLAN_FILE, {"structured_share": share, "zeros": zeros})

    def plan(self) -> tuple[float | None, dict[str, int]] | None:
        """The note of :meth:`keep_plan`; ``None`` if there is none or it is damaged."""
        found = self._sealed(self.directory / _PLAN_FILE, "the plan is made")
        if found is None:
            return None
        share, zeros = found["structured_share"], {str(k): int(v) for k, v in found["zeros"].items()}
        return None if share is None else float(share), zeros

    def follow(self, plan: object) -> None:
        """Use blocks again only if they were pruned by this plan, a JSON object."""
        self._plan = run_id({"plan": plan})

    def write(self, path: Path, save: Callable[[Path], Any]) -> None:
        """Make a file of the journal, which appears whole or not at all.

        Raises:
            EnvironmentError_: the disk is full.
        """
        part = path.with_suffix(".part")
        with write_errors(part):
            self.directory.mkdir(parents=True, exist_ok=True)
            save(part)
            part.replace(path)

    def _seal(self, path: Path, body: dict[str, Any]) -> None:
        self._write_text(path, json.dumps({**body, _CHECKSUM: self._checksum(body)}))

    def _sealed(self, path: Path, again: str) -> dict[str, Any] | None:
        """The JSON object of an entry; ``None``, with a warning, if this run did not write it as it is."""
        if not os.path.lexists(path):
            if _blocks(self.directory):
                logger.warning("the journal has blocks but no %s; %s again", path.name, again)
            return None
        try:
            body = _read(path)
            whole = body.pop(_CHECKSUM, None) == self._checksum(body)
        except (OSError, ValueError):
            whole = False
        if not whole:
            logger.warning("%s is damaged or of another run; %s again", path, again)
            return None
        return body

    def _checksum(self, body: dict[str, Any]) -> str:
        return hashlib.sha256(f"{self._run} {json.dumps(plain(body), sort_keys=True)}".encode()).hexdigest()

    def _write_text(self, path: Path, text: str) -> None:
        def save(part: Path) -> None:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # after a power cut a name without content would cost all blocks

        self.write(path, save)

    def _path(self, block: Block) -> Path:
        return self.directory / _BLOCK_FILE.format(f"{block.index:05d}")

    def _note(self, block: Block, digest: str) -> dict[str, str]:
        """The metadata in the file of a block, written and later compared."""
        return {
            "run": self._run,
            "plan": self._plan,
            "block": f"{block.index} {block.prefix}",
            "after": self._last,
            "sha256": digest,
        }

    def record(self, block: Block) -> None:
        """Write the projections of a finished block in their stored dtypes."""
        tensors = {}
        for name in PROJECTIONS:
            layer = block.projection(name)
            tensors[f"{name}.weight"] = layer.weight.detach().to("cpu", block.stored_dtype(name)).contiguous()
            if layer.bias is not None:
                stored = block.stored_dtype(name, "bias")
                tensors[f"{name}.bias"] = layer.bias.detach().to("cpu", stored).contiguous()
        digest = tensor_digest(sorted(tensors.items()))
        note = self._note(block, digest)
        self.write(self._path(block), lambda part: save_file(tensors, part, metadata=note))
        self._last = digest

    def restore(self, block: Block) -> bool:
        """Restore the projections of a finished block; false if the journal has no such block or it does not fit."""
        path = self._path(block)
        if not os.path.lexists(path):
            return False
        try:
            tensors = self._read_block(path, block)  # views of the file, which goes when the run is published
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s: %s %s; the block is solved again", block.prefix, path.name, error)
            return False
        for name in PROJECTIONS:
            old = block.projection(name)
            place, dtype, trains = old.weight.device, old.weight.dtype, old.weight.requires_grad
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.to(place, dtype, copy=True), requires_grad=trains)
            if bias is not None:
                layer.bias = nn.Parameter(bias.to(place, old.bias.dtype, copy=True), requires_grad=trains)
            block.replace(name, layer.train(old.training))
        block.refresh_heads()
        return True

    def _read_block(self, path: Path, block: Block) -> dict[str, Tensor]:
        """The tensors of a block's file.

        Raises:
            ValueError: the file is not as this run has written it; the message says why.
        """
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("is no file")
        try:
            tensors: dict[str, Tensor] = load_file(path)
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, KeyError, TypeError) as error:  # a power cut may leave a file without its content
            raise ValueError(f"is damaged ({error})") from None
        digest = tensor_digest(sorted(tensors.items()))
        if found.get("sha256") != digest:
            raise ValueError("is damaged: its bytes are not those that were written")
        reasons = {
            "run": "is of another run",
            "block": f"is another block ({found.get('block')})",
            "plan": "was pruned by another plan",
            "after": "follows a block that has changed",
        }
        expected = self._note(block, digest)
        for key, reason in reasons.items():
            if found.get(key) != expected[key]:
                raise ValueError(reason)
        self._last = digest
        return tensors


def has_blocks(directory: Path) -> bool:
    """Whether the journal in ``directory`` holds a finished block."""
    return bool(_blocks(directory))


def has_run(directory: Path) -> bool:
    """True if ``directory`` holds a journal that a run can resume."""
    return os.path.lexists(directory / _RUN_FILE) or has_blocks(directory)


def _blocks(directory: Path) -> list[Path]:
    return sorted(directory.glob(_BLOCK_FILE.format("*")))


def _require_equal(state: Path, fingerprint: dict[str, Any]) -> None:
    """Refuse to resume a run with another fingerprint; the message names what differs."""
    try:
        before = _read(state)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot resume: the journal {state} is damaged; start afresh with --overwrite ({error})"
        ) from None
    names, values, advice = differences(before, fingerprint)
    if not names:
        return
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    details = f" ({'; '.join(values[:_MOST_NAMES])})" if values else ""
    raise UsageError(
        f"cannot resume: {', '.join(names[:_MOST_NAMES])}{more} differ from the interrupted run's{details}; "
        f"{' and '.join(advice)}, or start afresh with --overwrite"
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("it holds no JSON object")
    return body

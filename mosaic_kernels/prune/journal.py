# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: its ranking and every finished block, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mosaic_kernels.checkpoint.directory import write_errors
from mosaic_kernels.errors import UsageError
from mosaic_kernels.models import PROJECTIONS, Block

logger = logging.getLogger(__name__)

_PLAN_FILE = "plan.json"
_BLOCK_FILE = "block-{}.safetensors"


class Journal:
    """Finished work under one directory; every file appears by rename.

    Args:
        directory: the journal's own directory, made when first written to.
        fingerprint: what must agree for blocks of an earlier run to be used again.

    Raises:
        UsageError: the directory holds the journal of a run with another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self.directory = directory
        state = directory / "run.json"
        if state.exists():
            before = _read(state)
            changed = [key for key in fingerprint if before.get(key) != fingerprint[key]]
            if changed:
                raise UsageError(
                    f"cannot resume: {', '.join(changed)} differ from the interrupted run's; repeat its options, "
                    "or start afresh with --overwrite"
                )
        else:
            self.write(state, lambda part: part.write_text(json.dumps(fingerprint, indent=1)))

    @property
    def ranks(self) -> Path:
        """Where the ranking of this run is kept: its probes may cost more than the blocks."""
        return self.directory / "ranks.json"

    def keep_plan(self, share: float | None, zeros: dict[str, int]) -> None:
        """Note what was found by trying: the structured share and the zeros of every projection."""
        body = json.dumps({"structured_share": share, "zeros": zeros})
        self.write(self.directory / _PLAN_FILE, lambda part: part.write_text(body))

    def plan(self) -> tuple[float | None, dict[str, int]] | None:
        """What :meth:`keep_plan` has noted, or ``None``.

        Raises:
            UsageError: the note is damaged.
        """
        path = self.directory / _PLAN_FILE
        if not path.exists():
            return None
        found = _read(path)
        try:
            share, zeros = found["structured_share"], {str(k): int(v) for k, v in found["zeros"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(f"cannot resume: {path} is damaged; start afresh with --overwrite") from None
        return None if share is None else float(share), zeros

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

    def _path(self, block: Block) -> Path:
        return self.directory / _BLOCK_FILE.format(f"{block.index:05d}")

    def record(self, block: Block) -> None:
        """Write the projections of a finished block in their stored dtypes."""
        tensors = {}
        for name in PROJECTIONS:
            layer = block.projection(name)
            tensors[f"{name}.weight"] = layer.weight.detach().to("cpu", block.stored_dtype(name)).contiguous()
            if layer.bias is not None:
                stored = block.stored_dtype(name, "bias")
                tensors[f"{name}.bias"] = layer.bias.detach().to("cpu", stored).contiguous()
        self.write(self._path(block), lambda part: save_file(tensors, part))

    def restore(self, block: Block) -> bool:
        """Put a finished block's projections back; false where the journal has none, or a damaged one."""
        path = self._path(block)
        if not path.exists():
            return False
        try:
            tensors = load_file(path)  # views of the file, which goes when the run is published: copied below
        except SafetensorError:  # a power cut may come between the name and the content
            logger.warning("%s: %s is damaged; the block is solved again", block.prefix, path.name)
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


def has_blocks(directory: Path) -> bool:
    """Whether the journal in ``directory`` holds a finished block."""
    return any(directory.glob(_BLOCK_FILE.format("*")))


def _read(state: Path) -> dict[str, Any]:
    try:
        before = json.loads(state.read_text())
        if isinstance(before, dict):
            return before
    except ValueError:
        pass
    raise UsageError(f"cannot resume: the journal {state} is damaged; start afresh with --overwrite")

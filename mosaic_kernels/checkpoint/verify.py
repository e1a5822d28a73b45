# SPDX-License-Identifier: Apache-2.0
"""Compares a whole directory with the checksums in it, without making a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_kernels.checkpoint import manifest
from mosaic_kernels.checkpoint.autoload import METHOD
from mosaic_kernels.checkpoint.checksums import config_is_as_written, damaged_tensors, header_digest
from mosaic_kernels.checkpoint.files import read_json, tensor_headers, weight_files
from mosaic_kernels.checkpoint.schema import check_description
from mosaic_kernels.errors import ModelLoadError


@dataclass(frozen=True)
class Verification:
    """The result of a comparison with the checksums.

    Attributes:
        directory: directory of the checkpoint.
        tensors: how many tensors have checksums.
        files: how many files the manifest lists.
        damaged: a line for each tensor or file that is not as it was written.
    """

    directory: Path
    tensors: int
    files: int
    damaged: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The result as a table for ``--json``."""
        return {"model": str(self.directory), "tensors": self.tensors, "files": self.files, "damaged": [*self.damaged]}

    def __str__(self) -> str:
        if self.damaged:
            return "\n".join((f"{self.directory}: not as it was written:", *(f"  {line}" for line in self.damaged)))
        checked = [f"{count} {what}" for count, what in ((self.tensors, "tensors"), (self.files, "files")) if count]
        return f"all {' and '.join(checked)} are as written"


def verify_directory(directory: Path) -> Verification:
    """Read every file of a checkpoint and compare it with the checksums it was written with.

    The tensors of a mosaic checkpoint have checksums in ``config.json``; ``mosaic_manifest.json`` has those of whole
    files. Files that were added later are no damage.

    Raises:
        ModelLoadError: the directory is missing or unreadable, or has neither kind of checksums.
        FormatError: its description or manifest is invalid.
        EnvironmentError_: a file may not be read.
    """
    if not directory.is_dir():
        raise ModelLoadError(f"{directory}: no such directory; --verify reads local files only")
    content = read_json(directory / "config.json")
    described = content.get("quantization_config")
    sums: Mapping[str, Any] = {}
    if isinstance(described, Mapping) and described.get("quant_method") == METHOD:
        check_description(described)
        sums = described.get("checksums") or {}
    damaged = _damage_by_checksums(directory, sums) if sums else []
    count, lines = _damage_by_manifest(directory, thorough=not sums)
    if not sums and not count:
        raise ModelLoadError(
            f"{directory} has no checksums and cannot be verified: an older release or another program wrote it; "
            "to add checksums to a mosaic checkpoint, load it and save it again"
        )
    return Verification(directory, len(sums.get("tensors", {})), count, (*damaged, *lines))


def _damage_by_checksums(directory: Path, sums: Mapping[str, Any]) -> list[str]:
    files = weight_files(directory)
    found = [] if config_is_as_written(directory, sums) else ["config.json was changed"]
    if header_digest(tensor_headers(files)) != sums.get("header"):
        found.append("names, dtypes or shapes of the tensors were changed")
    return found + [f"{name} was changed" for name in damaged_tensors(files, sums)]


def _damage_by_manifest(directory: Path, *, thorough: bool) -> tuple[int, list[str]]:
    """How many files ``mosaic_manifest.json`` lists, and a line for each that is missing or changed."""
    listed = manifest.read(directory)
    if listed is None:
        return 0, []
    found = manifest.compare(directory, listed, thorough=thorough)
    return len(listed.files), [str(difference) for difference in found if difference.kind != "extra"]

# SPDX-License-Identifier: Apache-2.0
"""The model card: what was done to the model, in the form the hub reads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic_kernels.checkpoint.foreign import own_file
from mosaic_kernels.checkpoint.public import public_command, public_name
from mosaic_kernels.format import weights_group
from mosaic_kernels.models import PROJECTIONS
from mosaic_kernels.paths import local_path

_LOAD_PLAIN = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

The zeros are stored as ordinary weights, and all blocks have one shape, so plain transformers loads this."""

_LOAD_MOSAIC = """\
```python
import mosaic_kernels  # pip install mosaic-kernels; or pass trust_remote_code=True instead
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Without the package the weights do not fit the stock architecture, and loading fails."""

# Keys of the source's front matter that the card takes over.
_KEPT = ("base_model", "license", "license_name", "license_link", "language")
_MOST_README_BYTES, _LONGEST_VALUE = 1 << 20, 500

_CATEGORIES = {
    "structured": "whole attention heads and FFN channels",
    "unstructured": "single weights of its projections",
    "composite": "whole attention heads and FFN channels, and single weights of the projections that remain,",
}


def model_card(
    report: Mapping[str, Any], original_shapes: Mapping[str, tuple[int, int]], source: str, *, plain: bool
) -> str:
    """Front matter and text of ``README.md``.

    Args:
        report: the content of ``mosaic_report.json``.
        original_shapes: shape of each projection before pruning.
        source: directory or hub id of the model before pruning.
        plain: whether plain transformers loads the result.
    """
    base = public_name(source)
    name = f"{base.rpartition('/')[2]}-pruned"
    parts = [
        _front_matter(base, source),
        f"# {name}",
        f"`{base}` pruned with `mosaic-kernels`: {_CATEGORIES[report['category']]} were removed.",
        "## Load",
        (_LOAD_PLAIN if plain else _LOAD_MOSAIC).format(name=name),
        "## Sparsity",
        _summary(report),
        _sparsity_table(report, original_shapes),
        "## Quality",
        _quality(report),
        "## How it was made",
        _made(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, source: str) -> str:
    from huggingface_hub import ModelCardData

    known = _known_metadata(source)
    data = ModelCardData(
        base_model=known.get("base_model", base) if base != source else base,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mosaic", "sparsity", "pruned"],
        **{key: known[key] for key in _KEPT if key in known and key != "base_model"},
    )
    return f"---\n{data.to_yaml()}\n---"


def _known_metadata(source: str) -> dict[str, Any]:
    """The source's own front matter, from its directory or the hub's cache: short texts and lists of them.

    No network is used. A README that is a link out of the directory is not read.
    """
    from huggingface_hub import metadata_load, try_to_load_from_cache

    try:
        folder = local_path(source)
        card: Any = folder / "README.md"
        if folder.is_dir():
            target = own_file(card, folder)
        else:
            card = try_to_load_from_cache(source, "README.md")
            if not isinstance(card, (str, Path)):
                return {}
            target = own_file(Path(card), Path(card).parent)
        if target.stat().st_size > _MOST_README_BYTES:
            return {}
        found = metadata_load(target) or {}
        return {key: value for key in _KEPT if (value := _plain(found.get(key))) is not None}
    except Exception:  # somebody else's README: whatever is wrong with it must not fail the run
        return {}


def _plain(value: Any) -> str | list[str] | None:
    """A short text, or list of short texts, that may be published; ``None`` for anything else."""
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_VALUE:
        return public_name(value)
    if isinstance(value, list) and 0 < len(value) <= 100 and all(isinstance(part, str) for part in value):
        return [public_name(part[:_LONGEST_VALUE]) for part in value]
    return None


def _summary(report: Mapping[str, Any]) -> str:
    size = report.get("bytes")
    lines = [
        f"- {report['removed_parameters']:,} of {report['prunable_parameters']:,} prunable parameters removed "
        f"({report['sparsity']:.2%}): {report['structured_removed']:,} in whole heads and channels, "
        f"{report['unstructured_zeros']:,} as zeros"
    ]
    if size:
        lines.append(f"- weights: {size['dense'] / 2**20:,.1f} MiB before, {size['pruned'] / 2**20:,.1f} MiB after")
    if report.get("weights", "float") != "float":
        columns = weights_group(report["weights"])
        shared = "row" if columns is None else f"{columns} columns of a row"
        lines.append(f"- the projections' values are int8, with one scale for each {shared}")
    return "\n".join(lines)


def _sparsity_table(report: Mapping[str, Any], original_shapes: Mapping[str, tuple[int, int]]) -> str:
    rows = ["| projection | weights | kept | removed | least and most of a block |", "|---|---|---|---|---|"]
    for projection in PROJECTIONS:
        found = {
            name: (shape[0] * shape[1], report["projections"][name]["nnz"])
            for name, shape in original_shapes.items()
            if name.endswith(f".{projection}") and name in report["projections"]
        }
        if found:
            before, kept = (sum(column) for column in zip(*found.values(), strict=True))
            each = [1 - part / whole for whole, part in found.values()]
            spread = f"{min(each):.1%} to {max(each):.1%}"
            rows.append(f"| {projection} | {before:,} | {kept:,} | {1 - kept / before:.1%} | {spread} |")
    return "\n".join(rows)


def _quality(report: Mapping[str, Any]) -> str:
    found = report.get("perplexity")
    if not found:
        return "Not measured; `python -m mosaic_kernels.evaluate` measures perplexity."
    rounding = f"| pruned, before int8 | {found['before_int8']:.2f} |\n" if "before_int8" in found else ""
    return (
        "| | perplexity |\n|---|---|\n"
        f"| before | {found['dense']:.2f} |\n{rounding}| after | {found['pruned']:.2f} |\n\n"
        f"On {found['tokens']:,} tokens of `{public_name(found['text'])}`, in windows that do not overlap."
    )


def _made(report: Mapping[str, Any]) -> str:
    method = f"policy `{report['policy']}`, solver `{report['solver']}`, seed {report['seed']}"
    lines = [f"- {report['category']} pruning, {method}"]
    computed, stored = report.get("device", {}).get("compute_dtype"), report.get("dtype")
    if computed and stored and computed != stored:
        lines.append(f"- computed in {computed}, weights rounded to {stored}")
    calibration = report.get("calibration")
    if calibration:
        lines.append(f"- calibration: {_calibration(calibration)}")
    versions = ", ".join(f"{package} {version}" for package, version in report.get("versions", {}).items())
    if versions:
        lines.append(f"- versions: {versions}")
    command = shlex.join(public_command(report.get("command", [])))
    return "\n".join(lines) + (f"\n\n```\n{command}\n```" if command else "")


def _calibration(calibration: Any) -> str:
    if not isinstance(calibration, Mapping):
        return f"`{public_name(str(calibration))}`"
    return ", ".join(f"{key} {public_name(str(value))}" for key, value in calibration.items())

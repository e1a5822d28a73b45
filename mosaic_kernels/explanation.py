# SPDX-License-Identifier: Apache-2.0
"""The result of :func:`mosaic_kernels.explain.explain`, and the table that it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_NATIVE, _MODULES = "native token", "transformers' modules"


@dataclass(frozen=True)
class BlockWay:
    """How one token of one sequence passes a decoder block.

    Attributes:
        name: its name in the model, e.g. ``model.layers.3``.
        native: True if two native calls run it, False if transformers' modules do.
        why_not: the first reason why it is not native; ``None`` if it is.
        native_tokens: the number of tokens that the block has taken natively so far.
    """

    name: str
    native: bool
    why_not: str | None
    native_tokens: int


@dataclass(frozen=True)
class LayerWay:
    """How a linear layer multiplies one row.

    Attributes:
        name: its name in the model.
        kind: ``packed`` (a :class:`~mosaic_kernels.linear.MosaicLinear`), ``dense`` (our kernel on an ordinary weight)
            or ``torch`` (the module's own ``F.linear``).
        kernel: the instruction set of a CPU kernel (``amx``, ``avx512``, ``avx2``, ``scalar``), ``cuda``, ``triton``,
            ``reference``, ``torch``, or ``none`` if no kernel can run: a call fails, or loads the weight first.
        values: the form of the stored weights, e.g. ``bf16`` or ``int8-group``.
        density: share of the weights that are kept.
        why_not: why no faster kernel runs; ``None`` if this is the fastest.
    """

    name: str
    kind: str
    kernel: str
    values: str
    density: float
    why_not: str | None


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``str()`` of it is a table.

    Attributes:
        blocks: the decoder blocks in their order.
        layers: every linear layer in its order, the head among them.
        notes: other facts that decide how the model runs.
        head: the name of the layer that makes the logits.
    """

    blocks: tuple[BlockWay, ...]
    layers: tuple[LayerWay, ...]
    notes: tuple[str, ...]
    head: str | None

    @property
    def summary(self) -> str:
        """The whole in one line."""
        said: set[str] = set()
        parts = []
        if self.blocks:
            native = sum(block.native for block in self.blocks)
            reasons = because([block.why_not for block in self.blocks], said)
            parts.append(f"{native} of {len(self.blocks)} blocks natively{reasons}")
        inner = [layer for layer in self.layers if layer.name != self.head]
        for (kind, kernel), count in Counter((layer.kind, layer.kernel) for layer in inner).items():
            reasons = because([layer.why_not for layer in inner if (layer.kind, layer.kernel) == (kind, kernel)], said)
            layers = "layer" if count == 1 else "layers"
            where = f"{count} {layers} by torch" if kind == "torch" else f"{count} {kind} {layers} on {kernel}"
            parts.append(f"{where}{reasons}")
        for layer in self.layers:
            if layer.name == self.head:
                where = "by torch" if layer.kind == "torch" else f"{layer.kind} on {layer.kernel}"
                parts.append(f"head {where}{because([layer.why_not], said)}")
        return ", ".join(parts) or "no linear layers"

    def as_dict(self) -> dict[str, Any]:
        """The same as a dictionary that ``json`` can write."""
        return {
            "summary": self.summary,
            "blocks": [asdict(block) for block in self.blocks],
            "layers": [asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"runs: {self.summary}"]
        if self.blocks:
            lines += ["", *_table(("blocks", "one token of one sequence"), _block_lines(self.blocks))]
        if self.layers:
            titles = ("blocks", "layers", "runs", "density")
            lines += ["", *_table(titles, _layer_lines(self.layers, [block.name for block in self.blocks]))]
        return "\n".join([*lines, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)])


def because(reasons: Sequence[str | None], said: set[str] | None = None) -> str:
    """The most frequent reason in brackets, and the number of others; skips reasons in ``said`` and adds to it."""
    said = set() if said is None else said
    counts = Counter(reason for reason in reasons if reason is not None and reason not in said)
    said.update(counts)
    if not counts:
        return ""
    (first, _), *others = counts.most_common()
    more = "" if not others else f"; {len(others)} other reason{'s' if len(others) > 1 else ''}"
    return f" ({first}{more})"


def _block_lines(blocks: tuple[BlockWay, ...]) -> Iterator[tuple[str, ...]]:
    """One line for all blocks that run in the same way."""
    alike: dict[str, list[int]] = {}
    for place, block in enumerate(blocks):
        said = _NATIVE if block.native else f"{_MODULES}: {block.why_not}"
        if block.native_tokens:
            said += f" ({block.native_tokens} taken natively so far)"
        alike.setdefault(said, []).append(place)
    yield from ((_ranges(places), said) for said, places in alike.items())


def _layer_lines(layers: tuple[LayerWay, ...], blocks: list[str]) -> Iterator[tuple[str, ...]]:
    """One line for all layers that run in the same way, joined over blocks in which these are the same layers."""
    said: dict[tuple[int, str], list[LayerWay]] = {}  # by block and way
    for layer in layers:
        place = next((i for i, block in enumerate(blocks) if layer.name.startswith(f"{block}.")), -1)
        said.setdefault((place, _way(layer)), []).append(layer)
    lines: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for (place, way), found in said.items():
        names = [layer.name if place < 0 else layer.name.removeprefix(f"{blocks[place]}.") for layer in found]
        places, densities = lines.setdefault((_shorter(names), way), ([], []))
        places.append(place)
        densities.extend(layer.density for layer in found)
    for (shown_names, way), (places, densities) in lines.items():
        low, high = (f"{density:.2f}" for density in (min(densities), max(densities)))
        shown = low if low == high else f"{low} to {high}"
        yield ("-" if places == [-1] else _ranges(places)), shown_names, way, shown


def _way(layer: LayerWay) -> str:
    words = f"{layer.values}, {'torch' if layer.kind == 'torch' else f'{layer.kind}, {layer.kernel}'}"
    return words if layer.why_not is None else f"{words}: {layer.why_not}"


def _shorter(names: list[str]) -> str:
    """``self_attn.q_proj``, ``self_attn.k_proj`` -> ``self_attn.{q,k}_proj``, as a shell would spell it out."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        stem, line, end = leaf.partition("_")
        groups.setdefault((parent + dot, line + end), []).append(stem)
    spelt = (
        f"{before}{stems[0] if len(stems) == 1 else '{' + ','.join(stems) + '}'}{after}"
        for (before, after), stems in groups.items()
    )
    return " ".join(spelt)


def _ranges(places: list[int]) -> str:
    """``0-3, 5`` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] + 1 == place:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _table(titles: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]

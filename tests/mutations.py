# SPDX-License-Identifier: Apache-2.0
"""Damages checkpoints at random, loads each, and says what happened.

Children that are forked from this process load them, so that a crash ends only a child, and a child that says nothing
for :data:`PATIENCE` seconds hangs. Memory beyond :data:`ROOM` cannot be had in a child: what asks for it is counted.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_models import load

import mosaic_kernels
from mosaic_kernels.errors import MosaicError

PATIENCE = 60.0  # seconds; a load takes 0.02, and the machine may be busy
ROOM = 1 << 30  # bytes of address space that a child may take beyond what it starts with; a model here takes 0.1 MB

INDEX = "model.safetensors.index.json"
# Outcomes, from good to bad.
SAME, REFUSED, TRANSFORMERS, WARNED, VALUES = "same", "refused", "refused by transformers", "warned", "other values"
BAD = SILENT, BARE, HUGE, CRASH, HANG, UNSEEN = (
    "silently wrong", "bare error", "huge allocation", "crash", "hang", "not seen by verify",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**40, 10**30, -(10**30), 1.5, float("nan"), float("inf"), "", "x", "F16",
    "BF16", "I8", "../x", "/etc/passwd", "float16", "x" * 3000, [], [1], [[]], {}, {"a": 1}, [2**40, 2**40],
    {"dtype": []},
)  # fmt: skip
KINDS = ("config", "config bytes", "header", "header bytes", "data", "exchange", "index", "length", "kind of file")


@dataclass(frozen=True)
class Outcome:
    """What one damaged checkpoint did; ``said`` is the damage and the message."""

    number: int
    kind: str
    what: str
    said: str


def campaign(sources: list[Path], folder: Path, count: int, *, seed: int = 0, children: int = 1) -> list[Outcome]:
    """Load ``count`` damaged copies of ``sources``; the same seed damages them the same way."""
    found: list[Outcome] = []
    waiting = {child: list(range(child, count, children)) for child in range(children)}
    pipes: dict[int, tuple[int, int]] = {}  # reading end -> child, its process
    for child in waiting:
        pipes |= _start(child, waiting[child], sources, folder, seed)
    rest = dict.fromkeys(range(children), b"")
    while pipes:
        ready, _, _ = select.select(list(pipes), [], [], PATIENCE)
        for pipe in ready or list(pipes):
            child, process = pipes[pipe]
            data = os.read(pipe, 1 << 16) if ready else b""
            if data:
                *lines, rest[child] = (rest[child] + data).split(b"\n")
                found += [Outcome(*json.loads(line)) for line in lines]
                del waiting[child][: len(lines)]
                continue
            if not ready:
                os.kill(process, signal.SIGKILL)
            del pipes[pipe]
            os.close(pipe)
            _, status = os.waitpid(process, 0)
            rest[child] = b""
            if waiting[child]:  # it died before it was done
                number = waiting[child].pop(0)
                what = CRASH if ready else HANG
                found.append(Outcome(number, "?", what, f"status {status}"))
                pipes |= _start(child, waiting[child], sources, folder, seed)
    return sorted(found, key=lambda outcome: outcome.number)


def table(outcomes: list[Outcome]) -> str:
    """How many of each kind of damage had each outcome."""
    counts = Counter((outcome.kind, outcome.what) for outcome in outcomes)
    whats = [what for what in (SAME, REFUSED, TRANSFORMERS, WARNED, VALUES, *BAD) if any(w == what for _, w in counts)]
    rows = [["", *whats]] + [[kind, *(str(counts[kind, what]) for what in whats)] for kind in (*KINDS, "?")]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _start(child: int, numbers: list[int], sources: list[Path], folder: Path, seed: int) -> dict[int, tuple[int, int]]:
    if not numbers:
        return {}
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return {reading: (child, process)}
    code = 1
    try:
        faulthandler.disable()
        nothing = os.open(os.devnull, os.O_RDWR)  # transformers asks on stdin whether it may run unknown code
        for stream in range(3):
            os.dup2(nothing, stream)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        worker = _Worker(sources, folder / f"child-{child}-{os.getpid()}")
        for number in numbers:
            outcome = worker.run(number, random.Random(f"{seed} {number}"))
            os.write(writing, json.dumps([number, *outcome]).encode() + b"\n")
        code = 0
    except BaseException as error:
        os.write(writing, json.dumps([-1, "?", BARE, repr(error)]).encode() + b"\n")
    os._exit(code)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class _Worker:
    """Damages and loads, one after the other, in a folder of its own."""

    def __init__(self, sources: list[Path], folder: Path) -> None:
        folder.mkdir()
        self.heard = _Heard()
        logging.getLogger("mosaic_kernels").addHandler(self.heard)
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        self.sources = []
        for source in sources:
            copy = Path(shutil.copytree(source, folder / source.name))
            files = {file.name: file.read_bytes() for file in copy.iterdir()}
            self.sources.append((copy, files, _answer(load(copy))))

    def run(self, number: int, draw: random.Random) -> tuple[str, str, str]:
        directory, files, expected = self.sources[number % len(self.sources)]
        kind = draw.choice(KINDS)
        damage = _damage(kind, directory, files, draw)
        self.heard.said.clear()
        try:
            what, said = self._load(directory, expected, kind)
        finally:
            for path in directory.iterdir():
                _restore(path, files)
            for name, content in files.items():
                if not (directory / name).exists():
                    (directory / name).write_bytes(content)
        return kind, what, f"{damage}: {said}"

    def _load(self, directory: Path, expected: torch.Tensor, kind: str) -> tuple[str, str]:
        try:
            answer = _answer(load(directory))
        except MosaicError as error:
            return REFUSED, f"{type(error).__name__}: {error!s:.200}"
        except MemoryError as error:
            return HUGE, str(error)
        except Exception as error:
            said = f"{type(error).__name__}: {error!s:.200}"
            if "allocate" in said:
                return HUGE, said
            return (TRANSFORMERS if _is_of_transformers(error) else BARE), said
        if torch.equal(answer, expected):
            return SAME, ""
        if self.heard.said:
            return WARNED, self.heard.said[0]
        if kind not in ("data", "exchange"):
            return SILENT, ""
        try:
            load(directory, verify=True)
        except MosaicError:
            return VALUES, ""
        return UNSEEN, ""


def _is_of_transformers(error: Exception) -> bool:
    """True where transformers refused the directory before it called this package, with an error that it raised itself.

    ``from_dict`` and ``get_config_dict`` stand around transformers' reading of every configuration, of whatever kind.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(mosaic_kernels.__file__).parent)
    around = ("from_dict", "get_config_dict", "_checked")
    if any(frame.filename.startswith(ours) and frame.name not in around for frame in frames):
        return False
    own = type(error).__module__.partition(".")[0] in ("transformers", "huggingface_hub")
    raised = (frames[-1].line or "").startswith("raise") and isinstance(error, (OSError, ValueError, RuntimeError))
    return own or raised


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(10)[None] % 24).logits
    return found.clone()


def _restore(path: Path, files: dict[str, bytes]) -> None:
    if path.is_symlink() or not path.is_file() or path.name not in files:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    elif path.read_bytes() != files[path.name]:
        path.write_bytes(files[path.name])


def _damage(kind: str, directory: Path, files: dict[str, bytes], draw: random.Random) -> str:
    weights = draw.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    content = files[weights]
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    if kind == "config":
        return _damage_json(directory / "config.json", files["config.json"], draw)
    if kind == "index":
        name = INDEX if INDEX in files else "config.json"
        return _damage_json(directory / name, files[name], draw)
    if kind == "config bytes":
        place, value = draw.randrange(len(files["config.json"])), draw.randrange(256)
        text = files["config.json"]
        (directory / "config.json").write_bytes(text[:place] + bytes([value]) + text[place + 1 :])
        return f"config.json byte {place} = {value}"
    if kind == "header":
        said = _edit(header, draw)
        text = json.dumps(header, default=str).encode()
        (directory / weights).write_bytes(struct.pack("<Q", len(text)) + text + content[start:])
        return f"{weights} header {said}"
    if kind == "header bytes":
        place = draw.randrange(start) if draw.random() < 0.8 else draw.randrange(8)
        value = draw.randrange(256)
        (directory / weights).write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        return f"{weights} byte {place} = {value}"
    if kind == "data":
        length = draw.choice((1, 1, 1, 2, 4, 64))
        place = draw.randrange(start, len(content) - length)
        piece = bytes(length) if draw.random() < 0.2 else draw.randbytes(length)
        if draw.random() < 0.2:
            piece = b"\xff" * length
        (directory / weights).write_bytes(content[:place] + piece + content[place + length :])
        return f"{weights} bytes from {place} = {piece.hex()}"
    if kind == "exchange":
        return _exchange(directory / weights, content, start, header, draw)
    if kind == "length":
        name = draw.choice(sorted(files))
        size = len(files[name])
        keep = draw.choice((0, 1, 7, 8, size - 1, draw.randrange(size)))
        more = files[name] + draw.randbytes(draw.choice((1, 8, 100)))
        (directory / name).write_bytes(files[name][:keep] if draw.random() < 0.7 else more)
        return f"{name} of {size} bytes, now {(directory / name).stat().st_size}"
    return _other_kind(directory / draw.choice(sorted(files)), draw)


def _damage_json(path: Path, text: bytes, draw: random.Random) -> str:
    content = json.loads(text)
    said = _edit(content, draw)
    path.write_text(json.dumps(content))
    return f"{path.name} {said}"


def _paths(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from _paths(value, (*above, key))


def _edit(content: Any, draw: random.Random) -> str:
    """Change one part of a JSON value: give it another value, take it away, or exchange it with another part."""
    paths = list(_paths(content))
    path = draw.choice(paths)
    node = content
    for key in path[:-1]:
        node = node[key]
    how, old = draw.random(), node[path[-1]]
    if how < 0.15:
        del node[path[-1]]
        return f"{path} removed"
    if how < 0.25 and isinstance(node, dict):
        node[f"{path[-1]}x"] = node.pop(path[-1])
        return f"{path} renamed"
    if how < 0.35:
        deep: Any = 0
        for _ in range(draw.choice((3, 900))):
            deep = [deep]
        node[path[-1]] = deep
        return f"{path} nested"
    if how < 0.5 and type(old) in (int, float):
        node[path[-1]] = old + draw.choice((1, -1, 8, 64)) if draw.random() < 0.7 else old * draw.choice((2, 0.5, -1))
    elif how < 0.6:
        other = draw.choice([p for p in paths if p[: len(path)] != path and path[: len(p)] != p] or [path])
        there = content
        for key in other[:-1]:
            there = there[key]
        node[path[-1]], there[other[-1]] = there[other[-1]], old
        return f"{path} exchanged with {other}"
    else:
        node[path[-1]] = draw.choice(ODD)
    return f"{path} = {node[path[-1]]!r:.40}"


def _exchange(path: Path, content: bytes, start: int, header: dict[str, Any], draw: random.Random) -> str:
    """Exchange the bytes of two tensors of the same size."""
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    pairs = [(a, b) for a in places for b in places if a < b and _size(places[a]) == _size(places[b]) > 0]
    if not pairs:
        return "nothing to exchange"
    a, b = draw.choice(pairs)
    new = bytearray(content)
    (i, j), (k, m) = places[a], places[b]
    new[start + i : start + j] = content[start + k : start + m]
    new[start + k : start + m] = content[start + i : start + j]
    path.write_bytes(bytes(new))
    return f"{a} and {b} exchanged"


def _size(place: list[int]) -> int:
    return place[1] - place[0]


def _other_kind(path: Path, draw: random.Random) -> str:
    path.unlink()
    kind = draw.choice(("missing", "folder", "pipe", "socket", "link to nothing", "/dev/zero", "/dev/null", "loop"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's path must be short
            made.bind(path.name)
            os.chdir(here)
    elif kind != "missing":
        path.symlink_to({"link to nothing": "nowhere", "loop": path.name}.get(kind, kind))
    return f"{path.name} is {kind}"

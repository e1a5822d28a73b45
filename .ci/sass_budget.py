# SPDX-License-Identifier: Apache-2.0
"""Compile every .cu for every architecture and hold each kernel to ``sass_budget.toml``.

``python .ci/sass_budget.py``, or with names of files (``linear_decode.cu``) for these alone. Needs nvcc but no GPU.
Fails on a warning, on serialised products, on a spill, on more registers than let the intended blocks share a
multiprocessor, on a kernel without a line in the budget, and on more instructions in a strip's decoding than the
design allows. The last needs the ``nvdisasm`` that comes with Triton and is left out, aloud, without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCES = ("csrc/cuda", "benchmarks/gpu")
REGISTERS, WARP, MOST_REGISTERS = 65536, 32, 255  # of a multiprocessor; lanes; of a thread (sm_80 to sm_90)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture.

    Attributes:
        name: without namespaces and parameters: ``stream_linear<Bitmap, __half, 1>``.
        symbol: mangled.
        spills: bytes of spill stores and loads.
        shared: bytes of static shared memory.
    """

    source: str
    arch: str
    name: str
    symbol: str
    registers: int
    spills: int
    shared: int


def short_name(demangled: str) -> str:
    """``void a::b::f<a::(anonymous namespace)::T, 1>(a::Args)`` as ``f<T, 1>``."""
    name = demangled.replace("(anonymous namespace)", "anonymous").removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:  # here the parameters begin
            name = name[:i]
            break
    return re.sub(r"\b\w+::", "", name)


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Readable names; c++filt is where a compiler for nvcc is."""
    symbols = list(symbols)
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def read_ptxas(source: str, arch: str, report: str) -> list[Kernel]:
    """Every kernel of one ``-Xptxas -v`` report."""
    parts = re.split(r"Compiling entry function '(\S+)'", report)[1:]
    names = demangled(parts[::2])
    found = []
    for symbol, text in zip(parts[::2], parts[1::2], strict=True):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        if registers is None or not spills:
            raise ValueError(f"{source}, sm_{arch}: ptxas does not say what {symbol} uses:\n{text}")
        found.append(
            Kernel(source, arch, short_name(names[symbol]), symbol, int(registers[1]), sum(spills),
                   int(shared[1]) if shared else 0)
        )  # fmt: skip
    return found


def allowed_registers(threads: int, blocks: int) -> int:
    """Registers of a thread with which ``blocks`` blocks fit; they are given out by eights, to whole warps."""
    warps = -(-threads // WARP) * blocks
    return min(MOST_REGISTERS, REGISTERS // (warps * WARP) // 8 * 8)


def compile_one(nvcc: str, source: Path, arch: str, cubin: Path) -> list[Kernel]:
    """Compile one source for one architecture; its kernels."""
    command = [nvcc, "-std=c++17", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc", "-Xptxas=-v", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = source.relative_to(ROOT).as_posix()
    report = done.stdout + done.stderr
    # A setmaxnreg that was ignored is a warning; wgmma products that wait for each other are only mentioned.
    if done.returncode or re.search(r"\bwarning\b|Potential Performance Loss", report):
        raise RuntimeError(f"{name} does not compile for sm_{arch}, or not without a warning:\n{report}")
    return read_ptxas(name, arch, report)


@dataclass(frozen=True)
class Loops:
    """Instructions that a warp issues for each turn of a few-row kernel's two loops, waits that succeed at once.

    Attributes:
        step: of a consumer, for one strip of 16 x 64 weights.
        decode: of these, from the first POPC (the first HMMA where there is none) to the last HMMA.
        popc, lds, prmt, lop3: of these, population counts, loads from shared memory, permutations, logic.
        producer: of the producer, for one step of 128 x 64 weights.
    """

    step: int
    decode: int
    popc: int
    lds: int
    prmt: int
    lop3: int
    producer: int


@dataclass(frozen=True)
class Code:
    """A function's instructions, and which may follow each; a jump that only diverged warps take is left out."""

    names: list[str]
    following: list[list[int]]


def function(sass: str, symbol: str) -> str:
    """The part of ``nvdisasm -c``'s output that is about ``symbol``."""
    for part in re.split(r"\.section\s+\.text\.", sass)[1:]:
        if part.split(",")[0].strip('"') == symbol:
            return part
    raise ValueError(f"no code of {symbol}")


def read_code(sass: str) -> Code:
    """Of ``nvdisasm``'s text for one function."""
    names: list[str] = []
    jumps: list[tuple[bool, str | None]] = []  # whether the next instruction may follow, and the target
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(names)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if not found or found[2] == "NOP":
            continue
        guarded, name, rest = found[1] is not None, found[2], found[3]
        target = re.search(r"\((\.L_\w+)\)", rest) if name.startswith("BRA") and name != "BRA.DIV" else None
        # "BRA P1, target" jumps where P1 says so, whatever stands before it.
        always = name == "BRA" and not guarded and re.match(r"\s+`", rest) is not None
        names.append(name)
        jumps.append((not (always or (name == "EXIT" and not guarded)), target[1] if target else None))
    following = []
    for i, (falls, target) in enumerate(jumps):
        after = [i + 1] if falls and i + 1 < len(names) else []
        following.append(after + ([labels[target]] if target in labels else []))
    return Code(names, following)


def shortest_path(code: Code, start: int, end: int) -> list[int] | None:
    """The fewest instructions behind ``start`` up to ``end``, which is the last."""
    before: dict[int, int] = {}
    edge = [start]
    while edge:
        reached = []
        for i in edge:
            for j in code.following[i]:
                if j not in before:
                    before[j] = i
                    reached.append(j)
        if end in before:
            path = [end]
            while before[path[-1]] != start:
                path.append(before[path[-1]])
            return path[::-1]
        edge = reached
    return None


def shortest_loop(code: Code, through: int, wait: int) -> list[int] | None:
    """The shortest way from the wait through an instruction and back to the wait, which is its first."""
    there, back = shortest_path(code, wait, through), shortest_path(code, through, wait)
    return None if there is None or back is None else [wait, *there, *back[:-1]]


def loops_of(sass: str) -> Loops:
    """Of a few-row kernel for sm_90, which waits with PHASECHK, multiplies with HMMA and copies weights with UBLKCP."""
    code = read_code(sass)
    waits = [i for i, name in enumerate(code.names) if "PHASECHK" in name]

    def turn(of: str, last: bool) -> list[str]:
        places = [i for i, name in enumerate(code.names) if name.startswith(of)]
        if not places:
            raise ValueError(f"no {of}: this is no kernel for few rows")
        places = places[-1:] if last else places
        found = [loop for place in places for wait in waits if (loop := shortest_loop(code, place, wait))]
        if not found:
            raise ValueError(f"no loop with a wait and {of}")
        return [code.names[i] for i in min(found, key=len)]

    step, producer = turn("HMMA", True), turn("UBLKCP", False)
    popc = [i for i, name in enumerate(step) if name == "POPC"]
    hmma = [i for i, name in enumerate(step) if name.startswith("HMMA")]

    def count(prefix: str) -> int:
        return sum(name.startswith(prefix) for name in step)

    decode = max(hmma) - min(popc + hmma) + 1
    return Loops(len(step), decode, len(popc), count("LDS"), count("PRMT"), count("LOP3"), len(producer))


def over_budget(kernels: Iterable[Kernel], budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What breaks the budget, in words."""
    wrong: list[str] = []
    homeless: dict[str, None] = {}
    used = set()
    for k in kernels:
        where = f"{k.source}, sm_{k.arch}: {k.name}"
        pattern = pattern_of(k, budget)
        if k.spills:
            wrong.append(f"{where} spills {k.spills} bytes")
        if pattern is None:
            homeless.setdefault(f"{k.source}: {k.name} has no line in .ci/sass_budget.toml")
            continue
        used.add(pattern)
        line = budget[pattern]
        limit = allowed_registers(line["threads"], line["blocks"])
        if k.registers > limit:
            wrong.append(
                f"{where} uses {k.registers} registers; {line['blocks']} blocks of {line['threads']} threads on a "
                f"multiprocessor leave {limit}"
            )
        if k.shared > line.get("shared", 0):
            wrong.append(f"{where} has {k.shared} bytes of static shared memory; {line.get('shared', 0)} are planned")
    return [*wrong, *homeless] + [
        f"no kernel is called {pattern!r} any more" for pattern in budget if pattern not in used
    ]


def pattern_of(kernel: Kernel, budget: Mapping[str, Any]) -> str | None:
    """The first line of the budget that means this kernel: patterns are ``FILE: NAME``."""
    name = f"{Path(kernel.source).name}: {kernel.name}"
    return next((pattern for pattern in budget if fnmatchcase(name, pattern)), None)


def table(kernels: Iterable[Kernel], budget: Mapping[str, Mapping[str, int]]) -> str:
    """Most registers of each line of the budget, by architecture."""
    most: dict[str, dict[str, int]] = {}
    shared: dict[str, int] = {}
    for k in kernels:
        pattern = pattern_of(k, budget) or f"{Path(k.source).name}: {k.name}"
        by_arch = most.setdefault(pattern, {})
        by_arch[k.arch] = max(by_arch.get(k.arch, 0), k.registers)
        shared[pattern] = max(shared.get(pattern, 0), k.shared)
    archs = sorted({arch for by_arch in most.values() for arch in by_arch})
    width = max(map(len, most), default=0)
    lines = [f"{'registers of':{width}}  allowed  {'  '.join(f'sm_{arch:<3}' for arch in archs)}  static shared"]
    for pattern, by_arch in most.items():
        line = budget.get(pattern)
        limit = allowed_registers(line["threads"], line["blocks"]) if line else "?"
        cells = "  ".join(f"{by_arch.get(arch, ''):>6}" for arch in archs)
        lines.append(f"{pattern:{width}}  {limit:>7}  {cells}  {shared[pattern]:>13}")
    return "\n".join(lines)


def nvdisasm() -> Path | None:
    """Triton ships the disassembler that a bare compiler lacks."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def check_strips(kernels: list[Kernel], cubins: Mapping[tuple[str, str], Path], budget: list[Any]) -> list[str]:
    """Count the strips that the budget names; what breaks it, in words."""
    tool = nvdisasm()
    if tool is None:
        print("instructions of a strip: not counted (no nvdisasm; Triton brings one)")
        return []
    wrong, texts = [], {}
    for line in budget:
        names = [k for k in kernels if Path(k.source).name == line["file"] and fnmatchcase(k.name, line["kernel"])]
        meant = [k for k in names if k.arch == line["arch"]]
        if not meant:
            wrong.append(f"no kernel is called {line['kernel']!r} on sm_{line['arch']}")
        for k in meant:
            key = (k.source, k.arch)
            if key not in texts:
                done = subprocess.run([tool, "-c", cubins[key]], capture_output=True, text=True, check=True)
                texts[key] = done.stdout
            found = loops_of(function(texts[key], k.symbol))
            print(f"{k.name}, sm_{k.arch}: {found}")
            for what in ("step", "decode", "popc", "producer"):
                if what in line and getattr(found, what) > line[what]:
                    wrong.append(f"{k.name}, sm_{k.arch}: {getattr(found, what)} {what}, {line[what]} planned")
    return wrong


def main(names: Sequence[str]) -> int:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        print("nvcc not found: skipped")
        return 0
    started = time.perf_counter()
    plan = tomllib.loads((HERE / "sass_budget.toml").read_text())
    sources = sorted(path for folder in SOURCES for path in (ROOT / folder).glob("*.cu"))
    if names:
        sources = [path for path in sources if path.name in names]
        plan["kernels"] = {key: line for key, line in plan["kernels"].items() if key.split(":")[0] in names}
        plan["strips"] = [line for line in plan["strips"] if line["file"] in names]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(path, arch) for path in sources for arch in plan["only"].get(path.name, plan["archs"])]
        cubins = {(path.relative_to(ROOT).as_posix(), arch): Path(folder, f"{path.stem}-{arch}") for path, arch in jobs}
        try:
            done = pool.map(lambda job: compile_one(nvcc, *job[0], job[1]), zip(jobs, cubins.values(), strict=True))
            kernels = [kernel for found in done for kernel in found]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print(table(kernels, plan["kernels"]))
        print(f"{len(jobs)} compilations, {len(kernels)} kernels, {time.perf_counter() - started:.0f} s")
        wrong = over_budget(kernels, plan["kernels"]) + check_strips(kernels, cubins, plan["strips"])
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""The budget of compiled kernels: it reads what the compiler says, and it fails where it should."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / ".ci" / "sass_budget.py"
    spec = importlib.util.spec_from_file_location("sass_budget", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_budget"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


budget = _load()

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6mosaic4cuda6streamIfLi8EEEvNS0_4ArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN6mosaic4cuda6streamIfLi8EEEvNS0_4ArgsE
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 96 registers, used 2 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z5smallPf' for 'sm_90'
ptxas info    : Function properties for _Z5smallPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def kernel(**settings: object) -> object:
    plain = budget.Kernel("csrc/cuda/a.cu", "90", "stream<float, 8>", "_Z", 96, 0, 0)
    return replace(plain, **settings)


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt, which comes with a C++ compiler")
def test_reads_the_compilers_report() -> None:
    stream, small = budget.read_ptxas("csrc/cuda/a.cu", "90", REPORT)
    assert stream == kernel(symbol="_ZN6mosaic4cuda6streamIfLi8EEEvNS0_4ArgsE", spills=32, shared=512)
    assert (small.name, small.registers, small.spills, small.shared) == ("small", 8, 0, 0)


def test_a_report_that_changed_its_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say what _Z5smallPf uses"):
        budget.read_ptxas("a.cu", "90", REPORT.replace("Used 8 registers", "8 registers are used"))


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("void a::b::f<a::b::(anonymous namespace)::T, __half, 1>(a::b::Args)", "f<T, __half, 1>"),
        ("f(float*)", "f"),
        ("void (anonymous namespace)::decode<float, 8, true>(mosaic::LinearArgs)", "decode<float, 8, true>"),
    ],
)
def test_names_are_short(long: str, short: str) -> None:
    assert budget.short_name(long) == short


@pytest.mark.parametrize(
    ("threads", "blocks", "registers"), [(288, 2, 112), (128, 4, 128), (128, 16, 32), (32, 1, 255)]
)
def test_registers_that_leave_room(threads: int, blocks: int, registers: int) -> None:
    assert budget.allowed_registers(threads, blocks) == registers


PLAN = {"a.cu: stream<*, 8>": {"threads": 288, "blocks": 2}}


def test_a_kernel_within_its_budget_passes() -> None:
    assert budget.over_budget([kernel()], PLAN) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"spills": 12}, "spills 12 bytes"),
        ({"registers": 113}, "uses 113 registers; 2 blocks of 288 threads on a multiprocessor leave 112"),
        ({"shared": 4}, "4 bytes of static shared memory; 0 are planned"),
        ({"name": "other"}, "no line in .ci/sass_budget.toml"),
    ],
)
def test_what_breaks_the_budget(changed: dict[str, object], complaint: str) -> None:
    assert any(complaint in line for line in budget.over_budget([kernel(), kernel(**changed)], PLAN))


def test_a_line_without_a_kernel_is_noticed() -> None:
    assert budget.over_budget([], PLAN) == ["no kernel is called 'a.cu: stream<*, 8>' any more"]


# A consumer whose work lies behind a jump, a wait that fails and a warp that diverged, which are no part of a turn,
# a loop over lanes of one turn; and a producer whose first copies wait for nothing.
SASS = """
\t.section\t.text._Zother,"ax",@progbits
        /*0000*/                   HMMA.16816.F32 R0, R4, R8, R0 ;
        /*0010*/                   UBLKCP.S.G [UR14], [UR12], UR4 ;
\t.section\t.text._Zmine,"ax",@progbits
        /*0000*/                   POPC R1, R2 ;
        /*0008*/              @P2 BRA `(.L_x_5) ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R56+URZ], R17 ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0030*/                   LDS R18, [R18+0xd80] ;
        /*0040*/                   POPC R19, R18 ;
        /*0048*/                   BRA.DIV UR4, `(.L_x_8) ;
        /*0050*/                   NOP ;
        /*0060*/                   HMMA.16816.F32.BF16 R20, R24, R16, R20 ;
        /*0070*/               @P1 LDS.U16 R2, [R3] ;
        /*0080*/                   HMMA.16816.F32.BF16 R20, R24, R18, R20 ;
        /*0090*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*00a0*/              @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R56+URZ+0x50], RZ ;
        /*00a8*/              @P1 BRA P0, `(.L_x_3) ;
        /*00b0*/                   POPC R1, R2 ;
        /*00b8*/                   POPC R1, R2 ;
.L_x_3:
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   UBLKCP.S.G [UR14], [UR12], UR4 ;
        /*00f0*/               @P2 BRA `(.L_x_5) ;
.L_x_6:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R56+URZ], R17 ;
        /*0110*/                   PRMT R24, R33, R21, R34 ;
.L_x_7:
        /*0120*/                   UBLKCP.S.G [UR14], [UR12], UR4 ;
        /*0130*/               @P2 BRA.U.ANY `(.L_x_7) ;
        /*0140*/              @!P0 BRA `(.L_x_6) ;
        /*0150*/                   EXIT ;
.L_x_8:
        /*0160*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*0170*/                   BRA `(.L_x_2) ;
"""


def test_counts_the_turns_of_both_loops() -> None:
    found = budget.loops_of(budget.function(SASS, "_Zmine"))
    assert found == budget.Loops(step=12, decode=5, popc=1, lds=2, prmt=0, lop3=0, producer=5)


def test_loops_that_are_not_there_are_errors() -> None:
    with pytest.raises(ValueError, match="no code of _Zgone"):
        budget.function(SASS, "_Zgone")
    with pytest.raises(ValueError, match="no loop with a wait and HMMA"):
        budget.loops_of(budget.function(SASS, "_Zother"))
    with pytest.raises(ValueError, match="no HMMA"):
        budget.loops_of("        /*0000*/                   POPC R1, R2 ;")


def test_every_line_of_the_budget_names_a_file_that_is_there() -> None:
    root = Path(__file__).parents[1]
    plan = tomllib.loads((root / ".ci" / "sass_budget.toml").read_text())
    there = {path.name for folder in budget.SOURCES for path in (root / folder).glob("*.cu")}
    assert {pattern.partition(":")[0] for pattern in plan["kernels"]} == there
    assert {line["file"] for line in plan["strips"]} <= there
    assert set(plan["only"]) <= there


def test_ci_runs_it() -> None:
    assert "python .ci/sass_budget.py" in (Path(__file__).parents[1] / ".ci" / "run").read_text()

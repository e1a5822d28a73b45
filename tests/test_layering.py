# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: imports point down, csrc stands alone, files stay short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mosaic_kernels"

# A module may import what stands on its own level or below; the package's __init__ ties it all together.
LEVELS = {
    "errors": 0, "paths": 0, "config": 0, "compat": 0, "signals": 0,
    "format": 1, "tiles": 1, "semistructured": 1, "text": 1, "text_files": 1, "documents": 1, "tables": 1,
    "cli": 1, "progress": 1, "cuda_toolkit": 1,
    "ops": 2, "device": 2, "_C_cpu": 2, "_C_cuda": 2,
    "arrangement": 3, "held": 3, "linear": 3, "int8": 3, "siblings": 3, "dense": 3,
    "models": 4, "wrappers": 4, "native_block": 4, "decode": 4,
    "attention": 4, "explanation": 5, "explain": 5,
    "compute": 5, "inference": 5, "checkpoint": 5, "evaluate": 5, "export": 5,
    "prune": 6, "deploy": 6,
    "report": 7, "info": 7, "profile": 7,
}  # fmt: skip
MAY_IMPORT_TRANSFORMERS = ("compat", "models", "checkpoint", "prune.calibration", "evaluate")
# compat knows how releases of transformers and PEFT differ, and alone uses more of them than these modules.
DOCUMENTED = (
    "transformers", "transformers.utils.logging", "transformers.quantizers.base",
    "transformers.utils.quantization_config", "peft",
)  # fmt: skip
# Names of theirs that are private, or that a release has changed.
CHANGEABLE = {
    "past_key_values", "cache_params", "variance_epsilon", "all_tied_weights_keys", "output_capturing",
    "_active_collector", "_attn_implementation", "_attn_implementation_internal", "_is_hf_initialized",
    "_hf_peft_config_loaded", "_get_generation_parameters", "AUTO_QUANTIZER_MAPPING",
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
}  # fmt: skip
# to print them, to write them down, or to compare them with those of an interrupted run
MAY_READ_VERSIONS = (
    "compat", "info", "checkpoint.manifest", "prune.fingerprint", "prune.report", "ops.cuda", "ops.triton.__main__",
)  # fmt: skip
MAY_IMPORT_TRITON = ("ops.triton",)
MOST_LINES = {".py": 400, ".cpp": 600, ".cu": 600, ".h": 600, ".cuh": 600}

# The rooms of csrc and whose headers each includes; the emulator stands in for the GPU in two files alone.
ROOMS = {
    "include": {"mosaic"},
    "cpu": {"mosaic", "cpu"},
    "cuda": {"mosaic", "cuda"},
    "simt": {"mosaic", "cpu", "cuda", "simt"},
}
MAY_INCLUDE_SIMT = ("ptx.cuh", "ptx_sm90a.cuh")

MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for folder in ("csrc", "python") for p in (ROOT / folder).rglob("*") if p.suffix in MOST_LINES)
SCRIPTS = sorted(p for folder in ("tests", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))
OURS = [*MODULES, *NATIVE, *SCRIPTS, ROOT / "setup.py"]


def dotted(path: Path) -> str:
    """``prune.solvers.target`` of ``mosaic_kernels/prune/solvers/target.py``; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, source: str | None = None) -> set[str]:
    """Absolute names of everything a file imports, wherever it does so."""
    found: set[str] = set()
    package = ["mosaic_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def level(module: str) -> int:
    first = module.partition(".")[0]
    assert first in LEVELS, f"mosaic_kernels/{first} has no level: give it one in LEVELS"
    return LEVELS[first]


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def upward(path: Path, source: str | None = None) -> list[str]:
    own = dotted(path)
    names = (name.partition(".") for name in imports(path, source))
    ours = (rest for top, _, rest in names if top == "mosaic_kernels")
    # ``from mosaic_kernels import x`` takes submodule x; names of the package itself are its __init__'s affair
    return sorted(name for name in ours if name.partition(".")[0] in LEVELS and level(name) > level(own))


def outside(path: Path, source: str | None = None) -> list[str]:
    """Imports that only other modules may make."""
    own, tops = dotted(path), {name.partition(".")[0] for name in imports(path, source)}
    found = []
    if "transformers" in tops and not within(own, MAY_IMPORT_TRANSFORMERS):
        found.append("transformers")
    if "triton" in tops and not within(own, MAY_IMPORT_TRITON):
        found.append("triton")
    return found


def names_in(source: str) -> set[str]:
    """Everything a file calls something by: attributes, variables, arguments, and words between quotes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("attr", "id", "arg", "value"):
            name = getattr(node, field, None)
            found |= {name} if isinstance(name, str) else set()
    return found


def changeable(path: Path, source: str | None = None) -> list[str]:
    """What a file uses of transformers and PEFT that only ``compat`` may, and versions it reads."""
    source, own = path.read_text() if source is None else source, dotted(path)
    if own == "compat":
        return []
    found = {name for name in names_in(source) if name in CHANGEABLE or re.match(r"(transformers|peft)\.\w", name)}
    for name in imports(path, source):
        module = name if re.match(r"(transformers|peft)(\.|$)", name) else ""
        # of ``from a.b import c`` the name is a.b.c
        if module and module not in DOCUMENTED and module.rpartition(".")[0] not in DOCUMENTED:
            found.add(module)
    tree = ast.walk(ast.parse(source))
    if own and not within(own, MAY_READ_VERSIONS):
        modules = {each.attr for each in tree if isinstance(each, ast.Attribute) and each.attr == "__version__"}
        found |= modules | {name for name in imports(path, source) if name == "importlib.metadata.version"}
    return sorted(found)


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p)], ids=dotted)
def test_imports_point_down(path: Path) -> None:
    assert level(dotted(path)) >= 0
    assert not upward(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: dotted(path) or "__init__")
def test_only_their_places_import_transformers_and_triton(path: Path) -> None:
    assert not outside(path)


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p)], ids=dotted)
def test_our_package_is_imported_by_its_parts(path: Path) -> None:
    """``import mosaic_kernels`` inside the package would hide what is needed, and make circles."""
    assert "mosaic_kernels" not in imports(path)
    names = {name.removeprefix("mosaic_kernels.") for name in imports(path) if name.startswith("mosaic_kernels.")}
    public = {name for name in names if name.partition(".")[0] not in LEVELS}
    assert public <= {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: dotted(path) or "__init__")
def test_one_file_knows_what_releases_of_transformers_change(path: Path) -> None:
    assert not changeable(path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_pass_caches_by_the_name_of_the_day(path: Path) -> None:
    told = path.name in ("test_compat.py", Path(__file__).name)
    assert told or "past_key_values" not in names_in(path.read_text())


@pytest.mark.parametrize("path", [p for p in NATIVE if "csrc" in p.parts], ids=lambda path: path.name)
def test_csrc_stands_alone(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', path.read_text(), flags=re.MULTILINE)
    assert not [name for name in included if re.match(r"(torch|ATen|c10|pybind11|Python\.h|pyconfig|numpy)", name)]


def strangers(path: Path, source: str | None = None) -> set[str]:
    """Rooms of csrc that a file includes from but may not."""
    source = path.read_text() if source is None else source
    rooms = set(re.findall(r'^\s*#\s*include\s*"(\w+)/', source, flags=re.MULTILINE))
    return (
        rooms - ROOMS[path.relative_to(ROOT / "csrc").parts[0]] - ({"simt"} if path.name in MAY_INCLUDE_SIMT else set())
    )


@pytest.mark.parametrize("path", [p for p in NATIVE if "csrc" in p.parts], ids=lambda path: path.name)
def test_rooms_of_csrc_keep_apart(path: Path) -> None:
    assert not strangers(path)


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_licensed(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MOST_LINES[path.suffix]
    assert not lines or "SPDX-License-Identifier: Apache-2.0" in "\n".join(lines[:2])


def test_the_checks_see_what_they_look_for() -> None:
    """A rule that finds nothing in a file that breaks it would pass for ever."""
    linear = PACKAGE / "linear.py"
    assert upward(linear, "from mosaic_kernels.prune import capture") == ["prune.capture"]
    assert upward(linear, "def f():\n    from mosaic_kernels import models") == ["models"]
    assert upward(linear, "from .models import Block") == ["models.Block"]
    assert upward(linear, "import importlib\nimportlib.import_module('mosaic_kernels.checkpoint')") == ["checkpoint"]
    assert upward(linear, "from mosaic_kernels.format import PackedWeight") == []
    assert upward(PACKAGE / "prune" / "solvers" / "target.py", "from ...report import html") == ["report.html"]
    assert outside(linear, "import transformers") == ["transformers"]
    assert outside(PACKAGE / "prune" / "gram.py", "from triton.language import load") == ["triton"]
    assert outside(PACKAGE / "ops" / "triton" / "linear.py", "import triton") == []
    assert changeable(linear, "from transformers.cache_utils import Cache") == ["transformers.cache_utils.Cache"]
    assert changeable(linear, "from transformers import AutoConfig\nfrom transformers.utils import logging") == []
    assert changeable(linear, "from peft.tuners.lora import Linear") == ["peft.tuners.lora.Linear"]
    assert changeable(linear, "model(past_key_values=cache)") == ["past_key_values"]
    assert changeable(linear, "config._attn_implementation") == ["_attn_implementation"]
    assert changeable(linear, "importlib.import_module('transformers.models')") == ["transformers.models"]
    assert changeable(linear, "if torch.__version__ > '3': pass") == ["__version__"]
    assert changeable(PACKAGE / "compat.py", "model(past_key_values=cache)") == []
    assert strangers(ROOT / "csrc" / "cuda" / "pack.cu", '#include "simt/simt.h"\n#include "cpu/lanes.h"') == {
        "simt",
        "cpu",
    }
    with pytest.raises(AssertionError, match="has no level"):
        level("novelty.things")

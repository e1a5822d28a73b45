# SPDX-License-Identifier: Apache-2.0
"""What every benchmark file shares: threads, the machine in the JSON, and the comparison with committed figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import machine
from regression import Comparison

_COMPARISON = pytest.StashKey[Comparison]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-regression", action="store_true", help="compare nothing with benchmarks/results: for making it anew"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--no-regression"):
        config.stash[_COMPARISON] = Comparison(machine())


def _noun(path: str | Path) -> str:
    return Path(path).stem.removeprefix("bench_")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if _COMPARISON in item.config.stash:
            item.config.stash[_COMPARISON].partial.add(_noun(item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Find committed benchmarks that no longer exist, in files that nothing was left out of."""
    comparison = session.config.stash.get(_COMPARISON, None)
    if comparison is None or session.config.getoption("lf", False):  # which leaves out without deselecting
        return
    comparison.partial |= {_noun(file) for file, *test in (arg.split("::") for arg in session.config.args) if test}
    found = defaultdict[str, set[str]](set)
    for item in session.items:
        if item.path.name.startswith("bench_"):
            measures = "benchmark" in getattr(item, "fixturenames", ())
            found[_noun(item.path)] |= {item.name} if measures else set()
    for noun, names in found.items():
        comparison.collected(noun, names)


def pytest_sessionfinish(session: pytest.Session) -> None:
    comparison = session.config.stash.get(_COMPARISON, None)
    if comparison and comparison.vanished and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=["one", "all"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, then as many as torch takes by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one" else before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


class Again:
    """Stands in for the ``benchmark`` fixture, which measures once only, when a test is run a second time."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], Any], **_: Any) -> Any:
        return target()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Fail what got worse. Speeds that did are measured once more first: a shared machine has bad minutes."""
    result = yield
    benchmark = pyfuncitem.funcargs.get("benchmark")
    comparison = pyfuncitem.config.stash.get(_COMPARISON, None)
    if benchmark is None or comparison is None:
        return result
    noun = _noun(pyfuncitem.path)
    found = comparison.of(noun, pyfuncitem.name, benchmark.extra_info)
    if any(miss.kind == "ratios" and miss.found is not None for miss in found):
        again = Again()
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        if "tmp_path" in arguments:
            arguments["tmp_path"] = arguments["tmp_path"] / "again"
            arguments["tmp_path"].mkdir()
        pyfuncitem.obj(**arguments | {"benchmark": again})
        benchmark.extra_info.update(again.extra_info, measured_again=True)
        comparison.compared -= 1
        found = comparison.of(noun, pyfuncitem.name, benchmark.extra_info)
    if found:
        pytest.fail("\n".join(map(str, found)), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _COMPARISON in config.stash:
        terminalreporter.write_line(f"regression: {config.stash[_COMPARISON].summary()}")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Replace the host's details by what a figure depends on; a published file names no machine."""
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Medians and percentiles stay, raw samples go."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json.pop("commit_info", None)

# SPDX-License-Identifier: Apache-2.0
"""What every benchmark file shares."""

from __future__ import annotations

from typing import Any

from measure import machine


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Replace the host's details by what a figure depends on; a published file names no machine."""
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Medians and percentiles stay, raw samples go."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json.pop("commit_info", None)

# SPDX-License-Identifier: Apache-2.0
"""Lists the tests of ``pytest -m quick``, and checks that they call a function of every module of the package.

They are run at every edit and take less than two minutes on two cores. A test belongs here if it takes less than a
second, or if it is the quickest that reaches a module. No quick test compiles, trains or starts torchrun.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "mosaic_kernels"

# Files whose tests are all quick; below, the beginnings of the names of quick tests in other files.
FILES = (
    "test_beside", "test_calibration", "test_capture", "test_cli", "test_config", "test_directory", "test_disk",
    "test_fingerprint", "test_format", "test_gram", "test_journal", "test_manifest", "test_models", "test_public",
    "test_quickstart", "test_roll_call", "test_sass_budget", "test_search", "test_sensitivity", "test_setup",
    "test_solvers", "test_sweep", "test_task_files", "test_text_files", "test_tile_groups", "test_tiles",
    "test_token_cache",
)  # fmt: skip
TESTS: dict[str, tuple[str, ...]] = {
    "test_2to4": ("test_is_two", "test_tiles_hold", "test_stored", "test_special", "test_bands", "test_other"),
    "test_allocate": ("test_pod_without", "test_nothing_and", "test_by_curves_puts", "test_mosaic_reference_warns"),
    "test_layering": ("test_imports_point", "test_files", "test_the_checks"),
    "test_admm": ("test_refit_is", "test_more_refit"),
    "test_arrangement": ("test_it_is_the_same_layer", "test_other_layers", "test_copies", "test_casts"),
    "test_attend": ("test_masks",),
    "test_block": ("test_a_pattern_holds", "test_rows_lose", "test_nothing_to_remove"),
    "test_checkpoint": ("test_shards", "test_files_beside", "test_model_card", "test_registering", "test_the_stand_in"),
    "test_composite": ("test_structured_removes", "test_the_default_share", "test_a_pattern"),
    "test_compute": ("test_auto", "test_the_way_there", "test_options"),
    "test_decode": ("test_int8_weights", "test_heads_shared"),
    "test_dry_run": ("test_dry_run_as_people",),
    "test_evaluate": ("test_perplexity_is", "test_latency_counts", "test_weight_bytes", "test_command_prints_a"),
    "test_freed": ("test_copies",),
    "test_generate": ("test_a_static_cache",),
    "test_importance": ("test_ratios_equal", "test_round_trip"),
    "test_inference": ("test_one_dispatch", "test_copies", "test_dense_linear_is"),
    "test_info": ("test_json", "test_the_active", "test_missing", "test_verify_needs"),
    "test_int8": ("test_quantize_rounds", "test_scales_are", "test_quantize_refuses"),
    "test_linear": ("test_computes", "test_looks", "test_back", "test_gradient", "test_casts"),
    "test_linear_group": ("test_a_group_is_its_parts", "test_dense_rows"),
    "test_checksums": ("test_saving_brings", "test_checkpoints_without"),
    "test_loading": ("test_a_chunk", "test_keys_of"),
    "test_lora": ("test_merges",),
    "test_missing": ("test_elsewhere",),
    "test_native": ("test_levels", "test_offsets", "test_no_threads"),
    "test_ops": ("test_unpack", "test_arguments", "test_pack_of"),
    "test_pair": ("test_where_nothing", "test_the_dense_side"),
    "test_peft": ("test_parameters", "test_kinds", "test_a_merge"),
    "test_pipeline": ("test_nothing_is_removed", "test_the_report", "test_an_interrupted_object", "test_an_unknown"),
    "test_processor": ("test_the_measurement", "test_a_contradiction"),
    "test_prune_cli": ("test_missing_directory", "test_wrong_options", "test_json", "test_help"),
    "test_ranks": ("test_a_process_alone", "test_sequences", "test_the_largest"),
    "test_reader": ("test_skeleton", "test_descriptions", "test_a_path"),
    "test_recover": (
        "test_reconstruction_leaves",
        "test_only_kept",
        "test_lora_changes_kept_weights_only_and_leaves_no_trace[qwen2",
        "test_an_unknown",
    ),
    "test_score": ("test_groups_are", "test_ties_are", "test_packing"),
    "test_nothing_removed": ("test_a_divergence",),
    "test_share": ("test_the_model_is_left", "test_nothing_is_tried"),
    "test_solver_steps": ("test_a_step", "test_a_proposal"),
    "test_structured": ("test_channels_go", "test_dead_units", "test_refit_is", "test_block_shape"),
    "test_swapped_weights": ("test_assigning_another", "test_a_state", "test_results"),
    "test_text": ("test_windows", "test_unusable", "test_too_short"),
    "test_timing": ("test_nested", "test_a_probe"),
    "test_wrappers": ("test_other_models", "test_the_method"),
    "test_units": ("test_what_must_not", "test_no_other"),
    "test_triton": ("test_triton_has", "test_a_device", "test_a_check", "test_sizes"),
    "test_zero_shot": ("test_the_best", "test_bad_arguments"),
}


# Modules that quick tests run in a process of its own, where calls are not seen: path prefix, and that quick test.
ELSEWHERE = {"mosaic_kernels/ops/triton/": "test_triton.py: test_a_check_of_every_module_interpreted"}


def is_quick(file: str, test: str) -> bool:
    """True if ``file`` (without ``.py``) or ``test`` (with its parameters) is in the lists above."""
    return file in FILES or test.startswith(TESTS.get(file, ("\0",)))


class Executed:
    """Records the files whose functions are called between ``start`` and ``stop``; imports call some, too."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()

    def start(self) -> None:
        sys.settrace(self._call)

    def stop(self) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> None:
        self._codes.add(frame.f_code)  # returns None, so Python does not trace the lines

    def missing(self) -> list[str]:
        """Modules of the package that define functions of which none was called."""
        called = {code.co_filename for code in self._codes if code.co_name != "<module>"}
        there = [path for path in sorted(PACKAGE.rglob("*.py")) if defines_functions(path.read_text())]
        names = [path.relative_to(PACKAGE.parent).as_posix() for path in there if str(path) not in called]
        return [name for name in names if not name.startswith(tuple(ELSEWHERE))]


def defines_functions(source: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(source)))

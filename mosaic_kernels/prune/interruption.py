# SPDX-License-Identifier: Apache-2.0
"""Keeps the finished blocks of a run that ends early, and tells the user how to resume it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mosaic_kernels.checkpoint.directory import OutputDirectory
from mosaic_kernels.errors import ExitCode, Interrupted, UsageError
from mosaic_kernels.prune.journal import has_blocks
from mosaic_kernels.prune.ranks import Team


@contextmanager
def resumable(output: OutputDirectory | None, command: Sequence[str], team: Team) -> Iterator[None]:
    """Do the work of a run inside.

    Args:
        output: where the run writes; ``None`` in all processes but the first, and without an output directory.
        command: the command line; empty for a call from Python.

    Raises:
        Interrupted: Ctrl-C or a signal has stopped the run; only in the first process.
        Exception: any error raised inside, with a note that tells how to resume if a block was finished. A run without
            a finished block leaves nothing behind.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not team.leads:
            raise
        code = getattr(stop, "exit_code", ExitCode.INTERRUPTED)
        cause = "" if code == ExitCode.INTERRUPTED else f"{stop}{_by_torchrun(team, code)}; "
        raise Interrupted(cause + _resume_hint(output, command), code) from None
    except Exception as error:
        if output is not None and not output.complete:
            if not has_blocks(output.journal):
                output.discard()
            elif isinstance(error, UsageError):  # the same command would end the same way
                error.add_note(f"finished blocks are kept in {output.journal}")
            else:
                error.add_note(_resume_hint(output, command))
        raise
    finally:
        if output is not None:
            output.release()  # a notebook keeps the error, whose frames hold the output and so its lock


def _by_torchrun(team: Team, code: ExitCode) -> str:
    if team.world == 1 or code != ExitCode.TERMINATED:
        return ""
    return " of torchrun, which sends it when another process has ended (see what it says of it) or when it is stopped"


def _resume_hint(output: OutputDirectory | None, command: Sequence[str]) -> str:
    if output is None:
        return "the model in memory is partly pruned"
    if output.complete and not os.path.lexists(output.staging):  # it was renamed
        return f"the result is finished, in {output.path}; the next run with this directory tidies up beside it"
    if output.complete:
        what, where = f"the result is finished, in {output.staging}", ""
    elif has_blocks(output.journal):
        what, where = "finished blocks are kept", f" in {output.journal}"
    else:
        what, where = "no block is finished yet", ""
    if not command:
        return f"{what}{where}; call again with resume=True (a model given as an object must be loaded again first)"
    again = [part for part in command if part not in ("--resume", "--overwrite")]
    return f"{what}. Resume with:\n  {shlex.join([*again, '--resume'])}"

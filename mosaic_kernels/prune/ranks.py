# SPDX-License-Identifier: Apache-2.0
"""The processes that ``torchrun`` starts, as one team; a process alone is a team of one, which never communicates.

Every process holds the model. Calibration sequences are split, sums over them are added up, projections are solved
by one process each and sent to the others; the first process alone makes the plan's choices, logs and writes files. So
all counts are those of a run in one process, and weights differ by the order of sums.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mosaic_kernels.cli import launched, resolve_device
from mosaic_kernels.errors import CalibrationError, EnvironmentError_, ExitCode, MosaicError, UsageError
from mosaic_kernels.prune.roll_call import PATIENCE_SECONDS, RollCall, call_roll

T = TypeVar("T")

_roll: RollCall | None = None  # of this process, if torchrun started several


class ElsewhereError(MosaicError):
    """Another process of the run has failed, with this exit code; the first process tells why."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: which one this is.
        world: how many there are.
        splits: each one sees its own calibration sequences; otherwise all see all of them.
    """

    rank: int = 0
    world: int = 1
    splits: bool = True

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides, logs and writes."""
        return self.rank == 0

    def whole(self) -> Team:
        """The same team where every process sees all calibration sequences, for what cannot be split."""
        return replace(self, splits=False)

    def mine(self, sequences: Tensor) -> Tensor:
        """Every ``world``-th sequence, from the ``rank``-th on.

        Raises:
            CalibrationError: there are fewer than processes.
        """
        if not self.splits or self.world == 1:
            return sequences
        if len(sequences) < self.world:
            raise CalibrationError(
                f"{self.world} processes split {len(sequences)} calibration sequences: give more text or --samples, "
                "or start fewer processes"
            )
        return sequences[self.rank :: self.world]

    def deal(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Who does which work: the largest first, each to the process that has least so far."""
        loads, owners = [0] * self.world, {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += sizes[name]
        return owners

    def sum_(self, *sums: Tensor) -> None:
        """Add up, in place, what every process has summed over its own sequences."""
        if self.splits and self.world > 1:
            for tensor in sums:
                with _meeting(self.rank):
                    distributed.all_reduce(tensor)

    def total(self, count: int) -> int:
        """The sum of every process's count."""
        return sum(self.gather(lambda: count)) if self.splits else count

    def send_(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        """Overwrite these tensors, in place and bit for bit, by those of ``owner``."""
        if self.world > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                with _meeting(self.rank):
                    distributed.broadcast(whole.view(-1).view(torch.uint8), owner)
                tensor.detach().copy_(whole)  # onto itself where it was contiguous

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process: all results, in the order of the processes, which are to be small.

        Raises:
            what any process has raised: there and in the first one; :class:`ElsewhereError` in the others.
        """
        if self.world == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        found: list[Any] = [None] * self.world
        with _meeting(self.rank):
            distributed.all_gather_object(found, (result, _sendable(error)))
        if error is not None:
            try:
                raise error
            finally:
                del error  # or this frame and the error would keep each other, and the output's lock, alive
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                if self.leads:
                    raise failed
                code = getattr(failed, "exit_code", ExitCode.FAILED)
                raise ElsewhereError(f"process {self.rank} ends: process {rank} has failed", code)
        return [result for result, _ in found]

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process; the others do not run it."""
        found: list[Any] = self.gather(lambda: work() if self.leads else None)
        result: T = found[0]
        return result

    def each(self, work: Callable[[], T]) -> T:
        """Do something in every process, where the result stays; a failure is everybody's, see :meth:`gather`."""
        kept: list[T] = []
        self.gather(lambda: kept.append(work()))
        return kept[0]

    def first(self, work: Callable[[], T]) -> T | None:
        """Do something in the first process alone, where the result stays; elsewhere ``None``."""
        return self.each(lambda: work() if self.leads else None)


ALONE = Team()


@contextmanager
def _meeting(rank: int) -> Iterator[None]:
    """Wait for all processes before a collective operation, because one may solve, evaluate or write for hours."""
    try:
        if _roll is not None:
            _roll.meet()
        yield
    except TimeoutError as error:
        raise ElsewhereError(f"process {rank} ends: {error}", ExitCode.FAILED) from error
    except RuntimeError as error:  # a process that dies breaks the others' connections
        # without gloo's source line and its guesses
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error).partition("\n")[0]).partition(". This is typically")[0]
        raise ElsewhereError(f"process {rank} ends: another one has gone ({reason})", ExitCode.FAILED) from error


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's constructor raises
        return MosaicError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def joined(device: str) -> Iterator[tuple[Team, torch.device]]:
    """The team of this process, and the device of its own that ``--device`` means in it.

    Raises:
        UsageError: no device, or one for several processes.
        EnvironmentError_: this machine has no such device, or fewer than processes.
    """
    if not launched():
        yield ALONE, resolve_device(device)
        return
    place = _own_device(device)
    if not distributed.is_initialized():
        if place.type == "cuda":
            torch.cuda.set_device(place)
        # the limit of one operation, which begins when all processes have come to it
        limit = datetime.timedelta(seconds=PATIENCE_SECONDS)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=limit)
        atexit.register(_leave)  # at exit and not before, because a second group would find the first's addresses
    global _roll
    if _roll is None:
        _roll = call_roll()
        atexit.register(_roll.close)
    logger = logging.getLogger("mosaic_kernels")
    level = logger.level
    try:
        team = Team(distributed.get_rank(), distributed.get_world_size())
        if not team.leads:
            logger.setLevel(logging.ERROR)
        yield team, place
    finally:
        logger.setLevel(level)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _own_device(device: str) -> torch.device:
    place = resolve_device(device)
    if place.type != "cuda":
        return place
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if place.index is not None and processes > 1:
        raise UsageError(f"--device {device} is one device for {processes} processes: leave it out, or say cuda")
    if processes > torch.cuda.device_count():
        raise EnvironmentError_(
            f"{processes} processes need a CUDA device each and this machine shows {torch.cuda.device_count()}: "
            "start fewer, or use --device cpu"
        )
    return torch.device("cuda", local) if place.index is None else place


def launcher() -> list[str]:
    """The words that start such a process, for the command line in the report and in the resume hint."""
    return ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"] if launched() else ["python"]

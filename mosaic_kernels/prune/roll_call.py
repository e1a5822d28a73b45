# SPDX-License-Identifier: Apache-2.0
"""Distinguishes processes that work for hours from processes that hang, were stopped, or lost their machine.

The time limit of a collective operation cannot tell them apart. So the processes first wait for each other, without a
limit, and watch each other meanwhile: a thread of every process counts up a number in torchrun's store.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from typing import Any

from torch import distributed

PATIENCE_SECONDS = 600.0  # a process without a sign for this long is given up
BEAT_SECONDS = 5.0  # the time between two signs
_LONGEST_PAUSE = 0.05  # seconds between two looks at who has come


class RollCall:
    """The other processes of a run, and whether they are alive.

    Args:
        rank: the number of this process.
        world: the number of processes.
        store: a ``torch.distributed.Store`` that all of them use.
        signs: another connection to the store, for the thread alone, because waiting for an answer blocks a connection.
    """

    def __init__(self, rank: int, world: int, store: Any, signs: Any) -> None:
        self._rank, self._world = rank, world
        self._store, self._signs = store, signs
        self._meetings = 0
        # For each process, the number of rounds in a row without a sign. Rounds are counted, not seconds: a process
        # that was stopped for a while made no rounds meanwhile, so it does not blame the others.
        self._silent = dict.fromkeys((other for other in range(world) if other != rank), 0)
        self._seen: dict[int, bytes] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True, name="mosaic-roll-call")
        self._thread.start()

    def meet(self) -> None:
        """Wait until every process has come here.

        Raises:
            TimeoutError: a process has given no sign for :data:`PATIENCE_SECONDS`.
            RuntimeError: the store is gone, and torchrun with it.
        """
        number, pause = self._meetings, 0.0005
        self._meetings += 1
        if self._rank == 0 and number > 1:  # all came to the last meeting, so all left the one before
            for word in ("come", "go"):
                self._store.delete_key(f"{word}/{number - 2}")
        if self._store.add(f"come/{number}", 1) == self._world:
            self._store.set(f"go/{number}", "1")
            return
        while not self._store.check([f"go/{number}"]):
            if (gone := self._gone()) is not None:
                minutes = PATIENCE_SECONDS / 60
                raise TimeoutError(
                    f"process {gone} has given no sign for {minutes:.3g} minutes: it hangs, it was stopped, or its "
                    "machine is gone"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Give no more signs."""
        self._end.set()
        self._thread.join(2 * BEAT_SECONDS)

    def _gone(self) -> int | None:
        rounds = PATIENCE_SECONDS / BEAT_SECONDS
        return next((other for other, silent in self._silent.items() if silent > rounds), None)

    def _give_signs(self) -> None:
        number = 0
        while True:
            number += 1
            with contextlib.suppress(RuntimeError):  # without a connection, no sign is seen in this round
                self._signs.set(f"sign/{self._rank}", str(number))
            for other in self._silent:
                self._silent[other] = 0 if self._has_changed(other) else self._silent[other] + 1
            if self._end.wait(BEAT_SECONDS):
                return

    def _has_changed(self, other: int) -> bool:
        key = f"sign/{other}"
        try:
            found = self._signs.get(key) if self._signs.check([key]) else b""
        except RuntimeError:
            return False
        before = self._seen.get(other, b"")
        self._seen[other] = found
        return found != before


def call_roll() -> RollCall:
    """Connect to the store of torchrun and begin to give signs; the process group must have been made."""
    rank, world = distributed.get_rank(), distributed.get_world_size()

    def connected() -> Any:
        limit = datetime.timedelta(seconds=PATIENCE_SECONDS)
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit,
            wait_for_workers=False,
        )  # fmt: skip
        # processes that torchrun restarts must not find the signs of earlier ones
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"mosaic/{attempt}", store)  # type: ignore[attr-defined]

    return RollCall(rank, world, connected(), connected())

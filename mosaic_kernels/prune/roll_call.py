# SPDX-License-Identifier: Apache-2.0
"""Tells a process of a team that works for hours from one that hangs, was stopped, or whose machine is gone.

A collective operation has one limit of time for both. So the processes meet before each one, without a limit, and
meanwhile watch each other: a thread of every process counts up a number in the store that torchrun keeps.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from typing import Any

from torch import distributed

PATIENCE_SECONDS = 600.0  # a process that gives no sign for so long is given up
BEAT_SECONDS = 5.0  # the time between two signs
_LONGEST_PAUSE = 0.05  # between two looks at who has come


class RollCall:
    """The other processes of a run, and whether they are alive.

    Args:
        rank: which process this is.
        world: how many there are.
        store: a ``torch.distributed.Store`` that all of them use.
        signs: another connection, for the thread alone: one that waits for an answer blocks the other's.
    """

    def __init__(self, rank: int, world: int, store: Any, signs: Any) -> None:
        self._rank, self._world = rank, world
        self._store, self._signs = store, signs
        self._meetings = 0
        # In how many rounds in a row a process gave no sign. Rounds are counted, and not seconds: a process that is
        # stopped and goes on makes no rounds meanwhile, and so blames nobody for its own absence.
        self._silent = dict.fromkeys((other for other in range(world) if other != rank), 0)
        self._seen: dict[int, bytes] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True, name="mosaic-roll-call")
        self._thread.start()

    def meet(self) -> None:
        """Wait until every process has come here.

        Raises:
            TimeoutError: one has given no sign for :data:`PATIENCE_SECONDS`.
            RuntimeError: the store is gone, and torchrun with it.
        """
        number, pause = self._meetings, 0.0005
        self._meetings += 1
        if self._rank == 0 and number > 1:  # all have come to the last meeting, so all have left the one before
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
            with contextlib.suppress(RuntimeError):  # no connection: then nobody's sign is seen in this round
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
        # processes that torchrun starts again must not find the signs of those before
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"mosaic/{attempt}", store)  # type: ignore[attr-defined]

    return RollCall(rank, world, connected(), connected())

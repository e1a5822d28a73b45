# SPDX-License-Identifier: Apache-2.0
"""The roll call of a team: it waits for who works, and gives up who is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import distributed

from mosaic_kernels.prune import roll_call
from mosaic_kernels.prune.roll_call import RollCall


@pytest.fixture
def store() -> Any:
    return distributed.HashStore()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(roll_call, "BEAT_SECONDS", 0.01)


@pytest.fixture
def pair(store: Any) -> Iterator[list[RollCall]]:
    calls = [RollCall(rank, 2, store, store) for rank in (0, 1)]
    yield calls
    for call in calls:
        call.close()


def test_nobody_passes_before_all_have_come(pair: list[RollCall]) -> None:
    passed: list[tuple[int, int]] = []

    def go(rank: int) -> None:
        for meeting in range(20):
            pair[rank].meet()
            passed.append((meeting, rank))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go, (0, 1)))
    for place, (meeting, _) in enumerate(passed):  # one may be a meeting ahead, never two
        assert abs(meeting - place // 2) <= 1
    assert sorted(passed) == [(meeting, rank) for meeting in range(20) for rank in (0, 1)]


def test_the_store_does_not_grow(pair: list[RollCall], store: Any) -> None:
    for first, last in (pair, pair[::-1]):
        for _ in range(6):
            thread = threading.Thread(target=first.meet)
            thread.start()
            last.meet()
            thread.join()
    assert store.num_keys() <= 2 + 2 * 2  # the signs, and what two meetings need


def test_who_works_longer_than_the_patience_is_waited_for(pair: list[RollCall]) -> None:
    came = threading.Event()

    def late() -> None:
        limit = time.monotonic() + 3 * roll_call.PATIENCE_SECONDS
        while time.monotonic() < limit:  # works, and gives signs
            sum(range(1000))
        came.set()
        pair[1].meet()

    thread = threading.Thread(target=late)
    thread.start()
    pair[0].meet()
    assert came.is_set()
    thread.join()


def test_who_gives_no_sign_is_given_up(pair: list[RollCall]) -> None:
    pair[1].close()  # as a process that is stopped
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="process 1 has given no sign for"):
        pair[0].meet()
    assert time.monotonic() - began >= roll_call.PATIENCE_SECONDS / 2


def test_a_store_that_is_gone_ends_the_wait(pair: list[RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def add(self, *_: Any) -> int:
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(pair[0], "_store", Gone())
    with pytest.raises(RuntimeError, match="Connection reset"):
        pair[0].meet()

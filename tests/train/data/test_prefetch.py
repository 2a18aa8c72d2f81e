"""Batches made ahead: only if the loop would wait, in order, and no thread remains."""

import threading
from collections.abc import Iterator
from time import perf_counter, sleep

import pytest

from hpc_train.train.data import prefetch
from hpc_train.train.data.prefetch import MAX_DEPTH, Prefetch


def slow(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        sleep(seconds)
        yield number


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "hpc-train-prefetch"]


def test_the_loop_stops_waiting() -> None:
    waits, found = [], []
    with Prefetch(slow(201, 0.002)) as batches:
        for number in batches:
            found.append(number)
            sleep(0.004)
            if number == 150:
                assert threads() and 1 <= batches.depth <= MAX_DEPTH
            if number > 150:
                began = perf_counter()
                found.append(next(batches))
                waits.append(perf_counter() - began)
                sleep(0.004)
    assert found == list(range(201)) and not threads()
    assert sorted(waits)[len(waits) // 2] < 0.001, "half of what making one takes"


def test_batches_that_take_no_time_need_no_thread() -> None:
    with Prefetch(iter(range(100))) as batches:
        for _ in batches:
            sleep(0.001)
            assert batches.depth == 0 and not threads()


def test_a_thread_that_makes_steps_longer_rests_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here steps become longer for another reason, with the same effect."""
    monkeypatch.setattr(prefetch, "_FIRST_PAUSE", 2)
    found, depths = [], []
    with Prefetch(slow(260, 0.002)) as batches:
        for number in batches:
            found.append(number)
            depths.append(batches.depth)
            sleep(0.003 if batches.depth == 0 or number > 120 else 0.05)
    assert found == list(range(260)) and not threads()
    first = depths.index(0, depths.index(1))
    assert first - depths.index(1) >= 3 * 15, "three windows in a row"
    assert any(depths[first:]), "it came back"


def test_one_window_of_long_steps_does_not_end_it() -> None:
    with Prefetch(slow(120, 0.002)) as batches:
        for number in batches:
            sleep(0.05 if 33 < number < 50 else 0.003)  # other work on the node, for once
            if 33 < number < 60:
                assert batches.depth and threads()


def test_an_error_comes_where_its_batch_would() -> None:
    def failing() -> Iterator[int]:
        yield from slow(60, 0.001)
        raise ValueError("damaged")

    found = []
    with Prefetch(failing()) as batches, pytest.raises(ValueError, match="damaged"):
        for number in batches:
            found.append(number)
            sleep(0.002)
    assert found == list(range(60)) and not threads()


def test_leaving_early_leaves_no_thread() -> None:
    with Prefetch(slow(10_000, 0.001)) as batches:
        for number in batches:
            sleep(0.002)
            if number == 60:
                break
        assert threads()
    assert not threads()

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_train.core.phase_clock import Clock, Phase
from hpc_train.core.timing_log import PHASES, TIMING_COLUMNS, TimingLog


def slept_ns(seconds: float) -> int:
    """Sleeps, and says how long it really was: a busy machine oversleeps."""
    began = time.perf_counter_ns()
    time.sleep(seconds)
    return time.perf_counter_ns() - began


def test_phases_and_the_rest_make_up_the_step() -> None:
    clock = Clock()
    clock.restart()
    began = time.perf_counter_ns()
    with clock.data:
        data_ns = slept_ns(0.01)
    other_ns = slept_ns(0.02)
    with clock.reduce:
        reduce_ns = slept_ns(0.005)
    record = dict(zip(TIMING_COLUMNS[:-1], clock.end_step(7, 32, warmup=True), strict=True))
    ended = time.perf_counter_ns()
    assert (record["step"], record["num_samples"], record["warmup"]) == (7, 32, 1)
    assert 0 <= record["data_ns"] - data_ns < 2e6 and 0 <= record["reduce_ns"] - reduce_ns < 2e6
    assert 0 <= record["other_ns"] - other_ns < 2e6 and record["forward_ns"] == 0
    assert abs(sum(record[f"{phase}_ns"] for phase in PHASES) - (ended - began)) < 2e6
    assert record["start_ns"] + 30e6 <= record["arrived_ns"] <= ended


def test_steps_follow_each_other_without_a_gap() -> None:
    clock = Clock()
    first, second = (dict(zip(TIMING_COLUMNS[:-1], clock.end_step(step, 1), strict=True)) for step in range(2))
    assert second["start_ns"] == first["start_ns"] + first["other_ns"]


def test_time_spent_in_a_phase_that_raises_is_counted() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError), clock.forward:
        time.sleep(0.002)
        raise ZeroDivisionError
    assert dict(zip(TIMING_COLUMNS[:-1], clock.end_step(0, 1), strict=True))["forward_ns"] >= 2e6


def test_waits_within_passes_belong_to_reduce() -> None:
    clock, waits = Clock(), Phase()
    forward, backward = clock.passes(waits)
    with forward, waits:
        first_ns = slept_ns(0.01)
    with backward:
        computed_ns = slept_ns(0.005)
        with waits:
            second_ns = slept_ns(0.01)
    with clock.reduce, waits:
        third_ns = slept_ns(0.01)
    record = dict(zip(TIMING_COLUMNS[:-1], clock.end_step(0, 1), strict=True))
    assert 0 <= record["reduce_ns"] - first_ns - second_ns - third_ns < 2e6
    assert 0 <= record["backward_ns"] - computed_ns < 2e6 and 0 <= record["forward_ns"] < 2e6


def test_a_device_is_synchronised_at_both_ends_of_a_phase() -> None:
    calls: list[int] = []
    clock = Clock(lambda: calls.append(1))
    with clock.backward:
        assert len(calls) == 1
    assert len(calls) == 2


def test_a_ranks_log_costs_under_two_microseconds_a_step(tmp_path: Path) -> None:
    """Beyond the clock reads; files and flushes included. The best of several tries: other work only adds."""
    num_steps, now = 20_000, time.perf_counter_ns

    def nanoseconds_a_step(body: Callable[[int], object], end: Callable[[], object] = lambda: None) -> float:
        began = now()
        for step in range(num_steps):
            body(step)
        end()
        return (now() - began) / num_steps

    def record(clock: Clock, log: TimingLog) -> float:
        return nanoseconds_a_step(lambda step: log.write(clock.end_step(step, 50)), log.close)

    def phases(clock: Clock) -> float:
        def five(step: int) -> None:
            with clock.data:
                pass
            with clock.forward:
                pass
            with clock.backward:
                pass
            with clock.reduce:
                pass
            with clock.optimizer:
                pass

        return nanoseconds_a_step(five)

    loop = min(nanoseconds_a_step(lambda step: None) for _ in range(9))

    def best(cost: Callable[[], float]) -> float:
        return min(cost() for _ in range(9))

    # The machine has slow seconds: rounds go on until one was undisturbed, or the cost is real.
    for attempt in range(8):
        loop = best(lambda: nanoseconds_a_step(lambda step: None))
        read = best(lambda: nanoseconds_a_step(lambda step: now())) - loop
        path = tmp_path / f"{attempt}.csv"
        records = best(lambda path=path: record(Clock(), TimingLog(path))) - loop - read
        marks = best(lambda: phases(Clock())) - loop - 10 * read
        print(f"beyond the clock reads of {read:.0f} ns: record {records:.0f} ns, five phases {marks:.0f} ns a step")
        if records < 2000 and marks < 2000:
            break
        time.sleep(1)
    assert records < 2000
    assert marks < 2000


def test_without_phases_all_of_a_step_is_other() -> None:
    clock, waits = Clock(times_phases=False), Phase()
    with clock.sync, clock.passes(waits)[0], waits:
        time.sleep(0.001)
    record = dict(zip(TIMING_COLUMNS[:-1], clock.end_step(0, 1), strict=True))
    assert record["other_ns"] >= 1e6 and record["forward_ns"] == record["reduce_ns"] == 0


def test_sync_is_a_phase_of_its_own() -> None:
    clock = Clock()
    with clock.reduce:
        began_ns = time.perf_counter_ns()
    with clock.sync:
        time.sleep(0.001)
    record = dict(zip(TIMING_COLUMNS[:-1], clock.end_step(0, 1), strict=True))
    assert record["sync_ns"] >= 1e6 > record["reduce_ns"] and record["arrived_ns"] <= began_ns
    assert dict(zip(TIMING_COLUMNS[:-1], clock.end_step(1, 1), strict=True))["sync_ns"] == 0

"""hpc_train/core/records.py: what is written is read, what is broken is named, what is missing stays missing."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_train.core.energy_records import ENERGY_COLUMNS, Energy, total_energy
from hpc_train.core.records import BadRecord, read_metrics
from hpc_train.core.run_summary import RunResult, RunShape, summarise
from hpc_train.core.timing_log import (
    NO_STEP_TIMES,
    PHASES,
    TIMING_COLUMNS,
    TimingLog,
    Timings,
    read_timings,
    step_times,
)
from tests.synthetic import energy_of

HEADER = ",".join(TIMING_COLUMNS) + "\n"
DAMAGE = [*"0-,\n\0 .x+#\u00e9", "", ",,", "\n\n", "9" * 19]


def row(step: int, start_ns: int, warmup: int = 0) -> tuple[int, ...]:
    return (step, start_ns, start_ns + 7, 1, 2, 3, 4, 5, 6, 7, 32, warmup)


def num_lines(path: Path) -> int:
    return path.read_text().count("\n")


def test_rows_stay_in_memory_until_half_a_second_has_passed(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.csv"
    log = TimingLog(path)
    now = perf_counter_ns()
    log.write(row(0, now))
    assert path.read_text() == HEADER
    log.write(row(1, now + 1_000_000_000))
    assert num_lines(path) == 3
    log.write(row(2, now + 1_000_000))
    assert num_lines(path) == 3
    log.close()
    assert read_timings(path)["step"].tolist() == [0, 1, 2]


def test_opening_a_log_again_appends_and_repeats_no_header(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.csv"
    for step in range(2):
        log = TimingLog(path)
        log.write(row(step, 100 * step))
        log.close()
    assert path.read_text().count("step") == 1
    assert read_timings(path)["start_ns"].tolist() == [0, 100]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "3,1000,1007,1,2,3,4,5,6,7,32,1,1\n")
    timings = read_timings(path)
    assert not timings.truncated
    assert timings.phases_ns.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert (timings["num_samples"][0], timings["warmup"][0], timings["arrived_ns"][0]) == (32, 1, 1007)


@pytest.mark.parametrize("tail", ["1,2000,20", "1,2000,2007,1,2,3,4,5,6,7,32,0,1", "\0\0\0\0"])
def test_a_last_line_without_its_end_is_skipped_and_said(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0,1000,1007,1,2,3,4,5,6,7,32,0,1\n" + tail)
    timings = read_timings(path)
    assert timings.truncated
    assert timings["step"].tolist() == [0]


def test_a_file_cut_within_its_header_holds_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for text in ("", "step,sta"):
        path.write_text(text)
        timings = read_timings(path)
        assert timings.truncated and timings.values.shape == (0, len(TIMING_COLUMNS))


@pytest.mark.parametrize(
    "line",
    [
        "1,2000",
        "1,2000,2007,1,2,3,4,5,6,7,32,0,1,9",
        "1,2000,2007,1,2,3,4,5,6,7,32,0,0",
        "1,2000,2007,x,2,3,4,5,6,7,32,0,1",
        "1,2000,2007,1.5,2,3,4,5,6,7,32,0,1",
        "--1,2000,2007,1,2,3,4,5,6,7,32,0,1",
        "99999999999999999999,0,0,1,2,3,4,5,6,7,32,0,1",
        "",
    ],
)
def test_any_other_bad_line_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.csv"
    good = "0,1000,1007,1,2,3,4,5,6,7,32,0,1\n"
    path.write_text(HEADER + good + good + line + "\n" + good)
    with pytest.raises(BadRecord) as error:
        read_timings(path)
    assert f"{path}:4:" in error.value.what


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 200), put=st.sampled_from(DAMAGE), cut=st.booleans())
def test_whatever_befalls_a_file_its_values_are_read_or_its_wrong_line_is_named(
    tmp_path: Path, where: int, put: str, cut: bool
) -> None:
    lines = [
        "0,1000,1007,1,2,3,4,5,6,7,32,1,1",
        "1,2000,2007,1,2,3,4,5,6,7,32,0,1",
        "1,3000,3007,10,2,3,4,5,6,0,32,0,2",
    ]
    text = HEADER + "\n".join([*lines, ""])
    where += len(HEADER) - 20
    path = tmp_path / "t.csv"
    path.write_bytes((text[:where] + put + text[where + cut :]).encode())
    try:
        read = read_timings(path)
        told: object = (read.values.tolist(), read.truncated)
    except BadRecord as error:
        told = error.what.split(": ")[0]
    assert told == read_cell_by_cell(path)


def read_cell_by_cell(path: Path) -> object:
    """(values, truncated), or path:line of the first line that is wrong."""
    lines = path.read_bytes().decode(errors="replace").split("\n")
    columns = lines[0].split(",")
    if not set(TIMING_COLUMNS) <= set(columns):
        return f"{path}:1"
    rows = []
    for number, line in enumerate(lines[1:-1], 2):
        try:
            rows.append([int(cell) for cell in line.split(",")])
            assert len(rows[-1]) == len(columns) and max(map(abs, rows[-1])) < 2**63
        except (ValueError, AssertionError):
            return f"{path}:{number}"
    most = [10**12, 2**62, 2**62, *[10**15] * len(PHASES), 10**12, 1, 10**6]
    before = 1
    for number, row in enumerate(rows, 2):
        if row[-1] < before or any(not 0 <= value <= end for value, end in zip(row, most, strict=True)):
            return f"{path}:{number}"
        before = row[-1]
    return rows, lines[-1] != ""


OLD_HEADER = HEADER.strip().replace(",sync_ns", "")
OLD_LINE = "0,1000,1007,1,2,3,4,5,6,32,0,1"


def test_a_log_of_an_earlier_version_reads_with_no_time_in_sync(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.csv"
    path.write_text(f"{OLD_HEADER}\n{OLD_LINE}\n")
    assert read_timings(path).phases_ns.tolist() == [[1, 2, 3, 4, 5, 0, 6]]


@pytest.mark.parametrize("cut", ["", "1,2000,2007,1,2,3,4"])
def test_an_attempt_appends_to_a_log_of_an_earlier_version(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "rank-00000.csv"
    path.write_text(f"{OLD_HEADER}\n{OLD_LINE}\n{cut}")
    log = TimingLog(path, attempt=2)
    log.write(row(1, 2000))
    log.close()
    timings = read_timings(path)
    assert path.read_text().startswith(HEADER) and not timings.truncated
    assert timings.phases_ns.tolist() == [[1, 2, 3, 4, 5, 0, 6], [1, 2, 3, 4, 5, 6, 7]]
    assert timings["attempt"].tolist() == [1, 2] and timings["num_samples"].tolist() == [32, 32]


def test_a_wrong_header_is_line_1(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadRecord) as error:
        read_timings(path)
    assert f"{path}:1:" in error.value.what


def test_metrics_may_have_more_columns_and_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,lr\n0,2.5,0.1\n10,nan,0.1\n")
    steps, losses = read_metrics(path)
    assert steps == [0, 10] and losses[0] == 2.5 and np.isnan(losses[1])
    path.write_text("step,loss\n0,2.5\n10,lots\n")
    with pytest.raises(BadRecord) as error:
        read_metrics(path)
    assert f"{path}:3:" in error.value.what


def test_steps_and_phases_leave_warm_up_out_but_samples_do_not() -> None:
    values = np.array([(*row(0, 0, warmup=1), 1), (*row(1, 100), 1), (*row(2, 200), 1)], dtype=np.int64)
    times = step_times(Timings(values, truncated=False))
    assert times.step_ns.tolist() == [28, 28]
    assert times.phases_ns.tolist() == [2, 4, 6, 8, 10, 12, 14]
    assert (times.num_samples, times.num_warmup) == (96, 1)


def test_times_of_ranks_add_up() -> None:
    values = np.array([(*row(0, 0, warmup=1), 1), (*row(1, 100), 1)], dtype=np.int64)
    one = step_times(Timings(values, truncated=False))
    both = one + one
    assert (both.num_ranks, both.num_samples, both.num_warmup, both.num_steps) == (2, 128, 1, 2)
    assert both.phases_ns.tolist() == [2 * spent for spent in one.phases_ns.tolist()]
    assert both.mean_step_s.tolist() == one.mean_step_s.tolist() == [28e-9]


def test_a_summary_of_no_steady_step_knows_no_speed() -> None:
    times = replace(NO_STEP_TIMES, num_samples=8, num_warmup=1, num_ranks=1)
    shape = RunShape(name="x", size=1, num_hosts=1, global_batch=8, num_attempts=1)
    summary = summarise(shape, times, Energy(), RunResult())
    assert (summary.step_s, summary.samples_per_s, summary.joules) == (None, None, None)
    assert summary.phase_share == {}


def test_a_sum_of_energies_is_no_better_than_its_worst_part() -> None:
    measured, estimated = Energy(10.0, "measured", "RAPL"), Energy(5.0, "estimated", "10 W per core")
    assert total_energy([measured, measured]) == Energy(20.0, "measured", "RAPL")
    assert total_energy([measured, estimated]) == Energy(15.0, "estimated", "10 W per core + RAPL")
    assert total_energy([measured, Energy()]) == Energy()
    assert total_energy([measured, Energy(0.0, "missing", "broken")]) == Energy(source="broken")
    assert total_energy([]) == Energy()


def test_a_meter_that_counted_nothing_while_a_run_worked_is_missing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "node.csv"
    header = ",".join(ENERGY_COLUMNS) + "\n"
    path.write_text(header + "0,nodes,0,measured,Slurm,1\n1.5,nodes,0.0,measured,Slurm,1\n")
    assert energy_of(path) == Energy(None, "missing", "Slurm counted 0 J, less than it can resolve")
    path.write_text(
        header
        + "0,cpu,0,measured,RAPL,1\n1,cpu,9,measured,RAPL,1\n0,dram,0,measured,dram,1\n1,dram,0,measured,dram,1\n"
    )
    assert energy_of(path) == Energy(None, "missing", "dram counted 0 J, less than it can resolve")
    path.write_text(header + "0,cpu,0,measured,RAPL,1\n")  # an attempt that was killed at once
    assert energy_of(path).joules is None


def test_the_energy_of_a_host_is_the_last_reading_of_each_domain(tmp_path: Path) -> None:
    path = tmp_path / "node.csv"
    header = ",".join(ENERGY_COLUMNS) + "\n"
    rows = ["0,cpu,1.0,measured,RAPL,1", "0,dram,2.0,measured,RAPL,1", "1,cpu,9.0,measured,RAPL,1", "2,cp"]
    path.write_text(header + "\n".join(rows))
    assert energy_of(path) == Energy(11.0, "measured", "RAPL")
    path.write_text(header + "0,cpu,1.0,measured,RAPL,1\n0,gpu,,missing,NVML,1\n")
    assert energy_of(path).quality == "missing"
    path.write_text(header)
    assert energy_of(path) == Energy()


@pytest.mark.parametrize("joules", ["many", "nan", "inf", "", "-1.0", "1e300"])
def test_joules_that_are_no_number_are_named(tmp_path: Path, joules: str) -> None:
    path = tmp_path / "node.csv"
    path.write_text(",".join(ENERGY_COLUMNS) + f"\n0,cpu,1.0,measured,RAPL,1\n1,cpu,{joules},measured,RAPL,1\n")
    with pytest.raises(BadRecord) as error:
        energy_of(path)
    assert f"{path}:3:" in error.value.what


def test_attempts_are_told_apart_and_their_common_steps_found(tmp_path: Path) -> None:
    for rank, killed_after in enumerate((4, 3)):
        for attempt, steps in ((1, range(killed_after)), (2, range(2, 5))):
            log = TimingLog(tmp_path / f"{rank}.csv", attempt)
            for step in steps:
                log.write(row(step, 100 * step, warmup=step == steps[0]))
            log.close()
    ranks = [read_timings(tmp_path / f"{rank}.csv") for rank in range(2)]
    counts = [timings.steps_of_attempts(2).tolist() for timings in ranks]
    assert counts == [[4, 3], [3, 3]]
    common = np.min(counts, axis=0)
    assert [timings.first(common)["step"].tolist() for timings in ranks] == [[0, 1, 2, 2, 3, 4]] * 2
    times = step_times(ranks[0].first(common))
    assert (times.num_warmup, times.num_repeated, len(times.step_ns), times.num_samples) == (2, 1, 4, 5 * 32)


def test_a_line_cut_short_by_a_crash_is_dropped_before_the_next_attempt_appends(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.csv"
    for text in ("", "step,st", HEADER, HEADER + "0,1,2,3,4,5,6,7,8,9,10,0,1\n1,2"):
        path.write_text(text)
        log = TimingLog(path, attempt=2)
        log.write(row(7, 100))
        log.close()
        timings = read_timings(path)
        assert not timings.truncated and timings["step"].tolist()[-1] == 7 and timings["attempt"].tolist()[-1] == 2


def test_an_energy_meter_starts_from_zero_in_each_attempt(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    rows = ["0,cpu,0,measured,RAPL,1", "1,cpu,5,measured,RAPL,1", "9,cpu,0,measured,RAPL,2", "10,cpu,7,measured,RAPL,2"]
    path.write_text("\n".join([",".join(ENERGY_COLUMNS), *rows, ""]))
    assert energy_of(path) == Energy(12.0, "measured", "RAPL")

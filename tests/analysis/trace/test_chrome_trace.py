"""A trace read back: it obeys the format, its slices nest, and they are the records on one clock."""

import gzip
import json
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hpc_train.analysis.runs.load import load
from hpc_train.analysis.trace.chrome_trace import write_trace
from hpc_train.cli.main import cli
from hpc_train.core.energy_records import read_traces
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.timing_log import PHASES, read_timings
from tests import jobs, laws
from tests.laws import Laws

SKEWED = Laws(ranks=8, ranks_per_host=2, noise=0.03, clock_offset_s=3.0, clock_drift=2e-5, clock_error_s=1e-6)
REQUIRED = {"X": {"name", "pid", "tid", "ts", "dur"}, "i": {"name", "pid", "tid", "ts", "s"}}
REQUIRED |= {"C": {"name", "pid", "ts", "args"}, "M": {"name", "pid", "args"}}
Event = dict[str, Any]


@dataclass(frozen=True)
class Traced:
    events: list[Event]

    def of(self, kind: str, **keys: Any) -> list[Event]:
        wanted = {"ph": kind, **keys}
        return [event for event in self.events if all(event.get(key) == value for key, value in wanted.items())]

    def threads(self) -> dict[str, list[Event]]:
        """The slices of each thread, by its name, in order of time."""
        names = {(each["pid"], each["tid"]): each["args"]["name"] for each in self.of("M", name="thread_name")}
        found = defaultdict(list)
        for event in sorted(self.of("X"), key=lambda event: (event["ts"], -event["dur"])):
            found[names[event["pid"], event["tid"]]].append(event)
        return found


def traced(run: RunDir, path: Path) -> Traced:
    write_trace(load(run), path)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    tree = json.loads(text)
    assert tree["displayTimeUnit"] in ("ms", "ns")
    trace = Traced(tree["traceEvents"])
    check_format(trace)
    return trace


def check_format(trace: Traced) -> None:
    """What the format asks for: keys, times in microseconds from zero on, and slices of a thread that nest."""
    for event in trace.events:
        assert REQUIRED[event["ph"]] <= event.keys(), event
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0, event
        if event["ph"] == "C":
            assert all(isinstance(value, float | int) for value in event["args"].values())
    for slices in trace.threads().values():
        open_until: list[float] = []
        for each in slices:
            while open_until and each["ts"] >= open_until[-1] - 5e-4:
                open_until.pop()
            end = each["ts"] + each["dur"]
            assert not open_until or end <= open_until[-1] + 5e-4, each
            open_until.append(end)


def spent_us(slices: list[Event]) -> Iterator[tuple[Event, dict[str, float]]]:
    """Each step of a thread, with the microseconds of the slices inside it by name."""
    steps = [each for each in slices if each["name"] == "step"]
    inside: list[dict[str, float]] = [defaultdict(float) for _ in steps]
    ends = np.array([step["ts"] + step["dur"] for step in steps])
    for each in slices:
        if each["name"] in PHASES:
            inside[int(np.searchsorted(ends, each["ts"] + each["dur"] / 2))][each["name"]] += each["dur"]
    return zip(steps, inside, strict=True)


def check_records(trace: Traced, run: RunDir, num_ranks: int, drift: float = 0.0) -> None:
    """Slices are the records to a microsecond; drift: by how much clocks run faster than the root's, relative."""
    threads = trace.threads()
    for rank in range(num_ranks):
        timings = read_timings(run.timings(rank))
        found = list(spent_us(threads[f"rank {rank}"]))
        assert len(found) == len(timings.values)
        for row, (step, inside) in enumerate(found):
            told = [step["args"][key] for key in ("step", "attempt", "samples", "warmup")]
            assert told == [int(timings[key][row]) for key in ("step", "attempt", "num_samples", "warmup")]
            assert step["dur"] == pytest.approx(timings.phases_ns[row].sum() / 1e3, abs=1, rel=drift)
            for index, phase in enumerate(PHASES):
                assert inside[phase] == pytest.approx(timings.phases_ns[row][index] / 1e3, abs=1, rel=drift)


def test_the_slices_are_the_records_on_aligned_clocks(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, SKEWED)
    trace = traced(run, tmp_path / "trace.json.gz")
    check_records(trace, run, SKEWED.ranks, drift=4 * SKEWED.clock_drift)
    names = {each["pid"]: each["args"]["name"] for each in trace.of("M", name="process_name")}
    assert sorted(names.values()) == ["c0", "c1", "c2", "c3", "job laws"]
    host = {each["args"]["name"]: names[each["pid"]] for each in trace.of("M", name="thread_name")}
    assert all(host[f"rank {rank}"] == SKEWED.host_of(rank) for rank in range(SKEWED.ranks))
    # All leave a reduction together; the hosts' own clocks are seconds apart.
    left = np.array(
        [
            [each["ts"] + each["dur"] for each in slices if each["name"] == "reduce"]
            for name, slices in trace.threads().items()
            if name.startswith("rank")
        ]
    )
    assert left.shape == (SKEWED.ranks, SKEWED.steps) and np.ptp(left, axis=0).max() < 10
    starts = [read_timings(run.timings(rank))["start_ns"][0] for rank in range(SKEWED.ranks)]
    assert np.ptp(starts) > 1e9


def test_joules_and_losses_are_counters(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, SKEWED)
    trace = traced(run, tmp_path / "trace.json")
    pids = {each["args"]["name"]: each["pid"] for each in trace.of("M", name="process_name")}
    for host in SKEWED.hosts:
        for meter in read_traces(run.energy(host)):
            joules = trace.of("C", name=f"energy of {meter.domain}", pid=pids[host])
            assert [each["args"]["J"] for each in joules] == meter.joules.tolist()
            watts = [each["args"]["W"] for each in trace.of("C", name=f"power of {meter.domain}", pid=pids[host])]
            assert watts[0] == pytest.approx(SKEWED.watts[meter.domain], rel=1e-3) and watts[-1] == 0
    losses = trace.of("C", name="training")
    recorded = load(run).metrics[1]
    assert [each["args"]["loss"] for each in losses] == recorded
    ends = {each["args"]["step"]: each["ts"] + each["dur"] for each in trace.threads()["rank 0"] if "args" in each}
    assert [each["ts"] for each in losses] == pytest.approx([ends[step] for step in load(run).metrics[0]], abs=5)


def test_attempts_and_checkpoints_of_a_real_run(tmp_path: Path, digits: Path) -> None:
    """The second attempt resumes the first, from a checkpoint that is removed by then."""
    settings = jobs.settings(data__file=digits, train__steps=10, run__root=tmp_path, checkpoint__every_steps=4)
    first = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *settings, cwd=tmp_path)
    assert first.code == 0, first.err
    (run,) = find([tmp_path])
    more = jobs.settings(data__file=digits, train__steps=16, run__root=tmp_path, checkpoint__every_steps=4)
    more += ["--resume", str(run.path)]
    second = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *more, cwd=tmp_path)
    assert second.code == 0, second.err
    trace = traced(run, tmp_path / "trace.json.gz")
    check_records(trace, run, 2)
    one, two = trace.threads()["attempts"]
    assert (one["name"], two["name"]) == ("attempt 1", "attempt 2") and one["args"]["hosts"] == two["args"]["hosts"]
    own = read_timings(run.timings(0))
    between_ns = own["start_ns"][10] - own["start_ns"][0]
    assert two["ts"] - one["ts"] == pytest.approx(between_ns / 1e3, abs=1), "the same clock, a restart apart"
    meta = json.loads(run.meta.read_text())
    ((host, epoch_s),) = meta["energy"]["epoch_s"].items()
    read_s = np.concatenate([meter.time_s for meter in read_traces(run.energy(host))])
    shown = sorted(each["ts"] for each in trace.events if each["ph"] == "C" and each["name"].startswith("energy"))
    at_us = (np.sort(read_s) - epoch_s) * 1e6 - own["start_ns"][0] / 1e3 + one["ts"]
    assert shown == pytest.approx(at_us.tolist(), abs=2), "the meters' time of day, on the ranks' clock"
    assert shown[0] < one["ts"] and shown[-1] > two["ts"] + two["dur"]
    saved = [each["name"] for each in trace.of("i")]
    assert saved == [f"checkpoint after step {step}" for step in (3, 7, 9, 11, 15)]


def test_a_step_that_lasts_as_long_as_a_stall_is_marked(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, replace(SKEWED, work_s=9.6, steps=12, warmup=2))  # 1.2 s, and three times as much
    run.config.write_text(run.config.read_text().replace("stall_s = 600.0", "stall_s = 2.0"))
    marked = [each["name"] for each in traced(run, tmp_path / "trace.json").of("i")]
    assert [name.partition(":")[0] for name in marked] == ["stall", "stall"] and "step 1 took" in marked[1]


def test_a_run_without_clock_offsets_begins_together(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, replace(SKEWED, told_offsets=False))
    trace = traced(run, tmp_path / "trace.json")
    begins = {slices[0]["ts"] for name, slices in trace.threads().items() if name.startswith("rank")}
    assert len(begins) == 1
    check_records(trace, run, SKEWED.ranks)


def test_one_run_is_asked_for_and_the_disk_may_refuse(tmp_path: Path) -> None:
    laws.write(tmp_path, replace(SKEWED, ranks=2, steps=20))
    run, _ = laws.write(tmp_path, replace(SKEWED, ranks=4, steps=20))
    output = ["--output", str(tmp_path / "page")]
    both = CliRunner().invoke(cli, ["report", str(tmp_path / "laws"), *output, "--trace", str(tmp_path / "t.json")])
    assert "--trace draws one run, and these are 2" in str(both.exception)
    one = CliRunner().invoke(cli, ["report", str(run.path), *output, "--trace", str(tmp_path / "t.json.gz")])
    assert one.exit_code == 0 and f"Trace: {tmp_path / 't.json.gz'}" in one.output.replace("\n", "")
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(cli, ["report", str(run.path), *output, "--trace", str(tmp_path / "file" / "t.json")])
    assert "could not be written" in str(refused.exception)
    assert not list(tmp_path.glob(".t.json*"))


def test_a_thousand_ranks_of_a_hundred_steps(tmp_path: Path) -> None:
    """Report and trace together, in seconds of a core, which other processes on the machine do not lengthen."""
    large = replace(SKEWED, ranks=1000, ranks_per_host=8, steps=100, sample_hz=1.0)
    run, _ = laws.write(tmp_path, large)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["report", run.path, "--output", tmp_path / "page", "--trace", tmp_path / "trace.json.gz"]
    command = [sys.executable, "-m", "hpc_train", *map(str, words)]
    measure = f"import resource, subprocess, sys; code = subprocess.call({command!r});"
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", measure], env=jobs.environment(), capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak_bytes = int(done.stdout.split()[-1]) * 1024
    size = (tmp_path / "trace.json.gz").stat().st_size
    print(f"1000 ranks x 100 steps: {cpu_s:.1f} s of a core, {peak_bytes / 1e6:.0f} MB, a file of {size / 1e6:.0f} MB")
    assert cpu_s < 60 and peak_bytes < 2e9
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert sum(b'"name":"step"' in line for line in file) == 1000 * 100


def test_a_reduction_that_waits_within_the_passes_nests_too(tmp_path: Path) -> None:
    """At stage 3 of `sharded` waits inside the passes count as reduce: it began before the passes ended."""
    run, _ = laws.write(tmp_path, replace(SKEWED, ranks=2))
    lines = [line.split(",") for line in run.timings(0).read_text().splitlines()]
    start, arrived = lines[0].index("start_ns"), lines[0].index("arrived_ns")
    for cells in lines[1:]:
        cells[arrived] = cells[start]
    run.timings(0).write_text("\n".join(map(",".join, lines)) + "\n")
    check_records(traced(run, tmp_path / "trace.json"), run, 2)

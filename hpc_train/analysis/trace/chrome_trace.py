"""Writes a run in Chrome's trace event format, which Perfetto reads (ui.perfetto.dev), one rank at a time.

A process is a host, a thread a rank, and a slice a step with its phases in it ("Trace Event Format", Google, 2016).
Times are microseconds with three decimals, so that no nanosecond is lost.
"""

import gzip
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from hpc_train.analysis.runs.clocks import hosts_of
from hpc_train.analysis.runs.load import Run, host_traces
from hpc_train.analysis.runs.meta_json import dict_at, positive_number, text_at
from hpc_train.analysis.runs.step_timeline import StepTimeline, timeline_of
from hpc_train.analysis.trace.trace_clock import TraceClock, entries_by_attempt, trace_clock
from hpc_train.core.energy_records import JOB_WIDE, Trace
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.records import IntArray
from hpc_train.core.timing_log import PHASES, Timings, read_timings

_JOB_PID = 1
_LEAD_NS = 10_000_000_000  # times must not be negative, and meters are read before the first step
# A step in its order. Time outside of all phases passes before the wait for data (the checkpoint after the step before,
# the log), and after the reduction began: it is drawn in two parts.
_BEFORE = ("other", "data", "forward", "backward")
_AFTER = ("reduce", "optimizer", "sync", "other")


def write_trace(run: Run, path: Path) -> None:
    """Writes the whole run to `path`, compressed if its name ends in .gz. Raises `UserError`, `BadRecord`.

    Memory grows with the steps of one rank, not with the ranks.
    """
    clock, timeline = trace_clock(run), timeline_of(run)
    if not clock.loops:
        raise UserError(f"{run.dir.path} has no recorded step to draw", "Name another run.")
    hosts = [host or f"the host of rank {rank}" for rank, host in enumerate(hosts_of(run.meta, run.size))]
    pids = {host: _JOB_PID + 1 + index for index, host in enumerate(dict.fromkeys(hosts))}
    first_tid = len(pids) + _JOB_PID + 1  # a thread with its process's number would pass as its main thread
    with _opened(path) as file:
        file.write(_head(run, clock))
        _write_events(file, _names(run, hosts, pids, first_tid))
        for rank, host in enumerate(hosts):
            if run.dir.timings(rank).is_file():
                _write_rank(file, run, rank, (pids[host], first_tid + rank), clock)
        _write_events(file, [*_job_events(run, clock, timeline), *_energy_events(run, hosts, pids, clock)])
        file.write(json.dumps(_sort_index(_JOB_PID, 0)).encode() + b"\n]}\n")  # the one event without a comma


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete. Raises `UserError` if the disk refuses."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as raw:
            if path.suffix == ".gz":  # level 1: a third larger than level 6, in a quarter of the time
                with gzip.GzipFile(path.stem, "wb", 1, raw) as file:
                    yield cast(BinaryIO, file)
            else:
                yield raw
            written = raw.tell()
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise not_written(path, error, written) from None
        raise


def _head(run: Run, clock: TraceClock) -> bytes:
    aligned = "all ranks are taken to begin a loop together" if clock.clocks is None else "the root's, measured offsets"
    about = {"run": str(run.dir.path), "started": text_at(run.meta, "started"), "clock": aligned}
    head = {"displayTimeUnit": "ms", "otherData": about}
    return (json.dumps(head)[:-1] + ', "traceEvents": [\n').encode()


def _write_events(file: BinaryIO, events: Iterable[dict[str, Any]]) -> None:
    for event in events:
        file.write(json.dumps(event).encode() + b",\n")


def _us(shown_ns: int) -> float:
    """In the file's unit, since the file's zero: exact to a nanosecond for weeks."""
    return (shown_ns + _LEAD_NS) / 1000


# ---------------------------------------------------------------------------------------------- names


def _names(run: Run, hosts: Sequence[str], pids: dict[str, int], first_tid: int) -> Iterator[dict[str, Any]]:
    yield _name("process", _JOB_PID, 0, f"job {run.summary.name}")
    for host, pid in pids.items():
        yield _name("process", pid, 0, host)
        yield _sort_index(pid, pid)
    for rank, host in enumerate(hosts):
        tid = first_tid + rank
        yield _name("thread", pids[host], tid, f"rank {rank}")
        yield {**_sort_index(pids[host], rank), "name": "thread_sort_index", "tid": tid}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _sort_index(pid: int, index: int) -> dict[str, Any]:
    return {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": index}}


# ---------------------------------------------------------------------------------------------- steps of a rank


def _write_rank(file: BinaryIO, run: Run, rank: int, ids: tuple[int, int], clock: TraceClock) -> None:
    timings = read_timings(run.dir.timings(rank))
    for attempt in np.unique(timings["attempt"]).tolist():
        if attempt not in clock.begin_ns:
            continue  # the reference rank has no step of it
        rows = Timings(timings.values[timings["attempt"] == attempt], False)
        shown_ns = clock.shown_ns(rank, rows, _boundaries_ns(rows)) + _LEAD_NS
        _write_steps(file, rows, shown_ns, ids)
        _write_phases(file, shown_ns, ids)


def _boundaries_ns(rows: Timings) -> IntArray:
    """(steps, parts + 1) when the parts of each step begin, and the end of the last, on the rank's own clock."""
    spent = dict(zip(PHASES, rows.phases_ns.T, strict=True))
    before = rows["arrived_ns"] - rows["start_ns"] - sum(spent[phase] for phase in _BEFORE[1:])
    # Waits inside the passes count as reduce (PHASES are sums): then the reduction did not begin on arrival alone.
    before = np.where((before >= 0) & (before <= spent["other"]), before, 0)
    parts = [before, *(spent[phase] for phase in (*_BEFORE[1:], *_AFTER[:-1])), spent["other"] - before]
    return np.cumsum(np.stack([rows["start_ns"], *parts], axis=1), axis=1)


def _write_steps(file: BinaryIO, rows: Timings, shown_ns: IntArray, ids: tuple[int, int]) -> None:
    line = (
        f'{{"ph":"X","name":"step","pid":{ids[0]},"tid":{ids[1]},"ts":%d.%03d,"dur":%d.%03d,'
        '"args":{"step":%d,"attempt":%d,"samples":%d,"warmup":%d}},\n'
    )
    facts = [rows[column] for column in ("step", "attempt", "num_samples", "warmup")]
    file.write(_formatted(line, shown_ns[:, 0], shown_ns[:, -1], facts))


def _write_phases(file: BinaryIO, shown_ns: IntArray, ids: tuple[int, int]) -> None:
    for index, phase in enumerate((*_BEFORE, *_AFTER)):
        begin_ns, end_ns = shown_ns[:, index], shown_ns[:, index + 1]
        entered = end_ns > begin_ns
        line = f'{{"ph":"X","name":"{phase}","pid":{ids[0]},"tid":{ids[1]},"ts":%d.%03d,"dur":%d.%03d}},\n'
        file.write(_formatted(line, begin_ns[entered], end_ns[entered], []))


def _formatted(line: str, begin_ns: IntArray, end_ns: IntArray, more: Sequence[IntArray]) -> bytes:
    """One line an event, formatted at once: a call for each takes four times as long."""
    lasted_ns = end_ns - begin_ns
    columns = np.stack([*np.divmod(begin_ns, 1000), *np.divmod(lasted_ns, 1000), *more], axis=1)
    return (line * len(columns) % tuple(columns.ravel().tolist())).encode()


# ---------------------------------------------------------------------------------------------- the job


def _job_events(run: Run, clock: TraceClock, timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    """Attempts as slices, checkpoints and stalls as instants, losses as a counter."""
    yield _name("thread", _JOB_PID, _JOB_PID, "attempts")
    entries = entries_by_attempt(run)
    for loop in clock.loops:
        begin_ns = clock.begin_ns[loop.attempt]
        facts = {key: entries.get(loop.attempt, {}).get(key) for key in ("started", "outcome", "first_step", "hosts")}
        yield {
            **{"ph": "X", "name": f"attempt {loop.attempt}", "pid": _JOB_PID, "tid": _JOB_PID},
            **{"ts": _us(begin_ns), "dur": round(loop.lasted_s * 1e9) / 1000, "args": facts},
        }
    end_ns = _step_ends_ns(clock, timeline)
    losses = dict(zip(*run.metrics, strict=True))
    lasted_s = np.diff(timeline.end_s, prepend=0.0)
    stall_s = run.config.run.stall_s
    for step, shown_ns, seconds in zip(timeline.step.tolist(), end_ns.tolist(), lasted_s.tolist(), strict=True):
        if _is_saved(run, step + 1):
            yield _instant(f"checkpoint after step {step}", shown_ns)
        if stall_s and seconds >= stall_s:
            yield _instant(f"stall: step {step} took {seconds:.0f} s", shown_ns)
        if step in losses and np.isfinite(losses[step]):
            yield _counter("training", "loss", _JOB_PID, shown_ns, losses[step])


def _step_ends_ns(clock: TraceClock, timeline: StepTimeline) -> IntArray:
    """(rows,) when each step of the reference rank ended."""
    end_ns = np.rint(timeline.end_s * 1e9).astype(np.int64)
    for loop in clock.loops:
        end_ns[timeline.attempt == loop.attempt] += clock.begin_ns[loop.attempt] - round(loop.before_s * 1e9)
    return end_ns


def _is_saved(run: Run, num_steps: int) -> bool:
    """Whether a checkpoint of the state after so many steps was due, is there, or began an attempt."""
    settings = run.config.checkpoint
    is_due = settings.keep > 0 and settings.every_steps > 0 and num_steps % settings.every_steps == 0
    resumed = [entry.get("first_step") for entry in entries_by_attempt(run).values()]
    return is_due or num_steps in resumed or run.dir.checkpoint(num_steps).exists()


def _instant(name: str, shown_ns: int) -> dict[str, Any]:
    return {"ph": "i", "s": "p", "name": name, "pid": _JOB_PID, "tid": _JOB_PID, "ts": _us(shown_ns)}


def _counter(name: str, unit: str, pid: int, shown_ns: int, value: float) -> dict[str, Any]:
    """Perfetto shows it as "name unit"."""
    return {"ph": "C", "name": name, "pid": pid, "ts": _us(shown_ns), "args": {unit: value}}


# ---------------------------------------------------------------------------------------------- energy


def _energy_events(run: Run, hosts: Sequence[str], pids: dict[str, int], clock: TraceClock) -> Iterator[dict[str, Any]]:
    """Of each meter the joules since the attempt's first reading, and the mean power between two readings."""
    epochs_s = dict_at(dict_at(run.meta, "energy"), "epoch_s")
    for host, traces in host_traces(run.dir, run.meta).items():
        for trace in traces:
            pid = _JOB_PID if trace.domain in JOB_WIDE else pids.get(host)
            if pid is None or trace.attempt not in clock.begin_ns or not len(trace.time_s):
                continue  # a host of an earlier attempt alone has no process
            shown_ns = _reading_times_ns(run, host, hosts, trace, clock, positive_number(epochs_s.get(host)))
            for at_ns, joules in zip(shown_ns.tolist(), trace.joules.tolist(), strict=True):
                yield _counter(f"energy of {trace.domain}", "J", pid, at_ns, joules)
            watts = np.diff(trace.joules) / np.maximum(np.diff(trace.time_s), 1e-9)
            for at_ns, power in zip(shown_ns.tolist(), [*watts.tolist(), 0.0], strict=True):
                yield _counter(f"power of {trace.domain}", "W", pid, at_ns, power)


def _reading_times_ns(
    run: Run, host: str, hosts: Sequence[str], trace: Trace, clock: TraceClock, epoch_s: float | None
) -> IntArray:
    """(readings,) by the clock of the host's first rank, to which epoch_s converts the meters' time of day. Without it
    the first reading is taken to be the begin of the loop: meters are read right before.
    """
    begin_ns = clock.begin_ns[trace.attempt]
    rank = hosts.index(host) if host in hosts else None
    if epoch_s is not None and rank is not None and run.dir.timings(rank).is_file():
        timings = read_timings(run.dir.timings(rank))
        rows = Timings(timings.values[timings["attempt"] == trace.attempt], False)
        if len(rows.values):
            shown_ns = clock.shown_ns(rank, rows, np.rint((trace.time_s - epoch_s) * 1e9).astype(np.int64))
            return np.maximum(shown_ns, -_LEAD_NS)
    return np.rint((trace.time_s - trace.begin_s) * 1e9).astype(np.int64) + begin_ns

"""All ranks' records of one run, reduced: each file is read, added and dropped."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.analysis.runs.clocks import Clocks, Hosts, clocks_of, hosts_of
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.analysis.runs.rank_accumulator import RankAccumulator
from hpc_train.core.formatting import amount, listed
from hpc_train.core.records import BadRecord, FloatArray, IntArray
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Reduce
from hpc_train.core.timing_log import (
    NO_STEP_TIMES,
    PHASES,
    TIMING_COLUMNS,
    StepTimes,
    Timings,
    read_timings,
    step_times,
)

LEAVE_OUT = "Move this run's folder out of the report's folder, or name the other runs one by one."
_ALIGNED = [TIMING_COLUMNS.index("step"), TIMING_COLUMNS.index("warmup")]  # equal on every rank, row by row
# Parts of a step. Clocks that disagree by more cannot order arrivals; on one host, which has one clock, no rank can
# leave a reduction after the others leave the next.
_CLOCKS_FAIL, _RECORDS_FAIL = 0.1, 1.0


@dataclass(frozen=True, eq=False)
class RankRecords:
    """All ranks' records, reduced, as far as all ranks recorded."""

    total: StepTimes  # sum over the ranks that train
    servers_ns: FloatArray  # (len(PHASES),) sums over the servers
    load_balance: LoadBalance | None  # None: no steady step
    faults: list[str]


class _Reduction:
    """Sums over ranks, added one after the other."""

    def __init__(self, num_workers: int, accumulator: RankAccumulator) -> None:
        self.accumulator = accumulator
        self.truncated: list[int] = []
        self.total, self.servers_ns = NO_STEP_TIMES, np.zeros(len(PHASES))
        self._num_workers = num_workers
        self._first: IntArray | None = None  # columns that are equal on every rank

    def add(self, rank: int, path: Path, whole: Timings, timings: Timings) -> None:
        """timings: those of the steps in `whole` that all ranks recorded. Raises `BadRecord`."""
        aligned = timings.values[:, _ALIGNED]
        self._first = aligned if self._first is None else self._first
        _check_aligned(path, whole, timings, self._first)
        if timings.truncated:
            self.truncated.append(rank)
        times = step_times(timings)
        if rank >= self._num_workers:
            self.servers_ns += times.phases_ns
            return
        self.total = self.total + times if self.total.num_ranks else times
        self.accumulator.add(rank, timings)


def waits(reduce: Reduce, num_workers: int) -> bool:
    """Whether ranks wait for each other in every step."""
    independent = reduce.strategy == "local" or (reduce.strategy == "parameter_server" and reduce.asynchronous)
    return num_workers > 1 and not independent


def reduce_ranks(run: RunDir, meta: dict[str, Any], reduce: Reduce, num_attempts: int) -> RankRecords:
    """Sums and means over ranks. A crashed run counts up to the last step of each attempt that every rank recorded.

    Raises `BadRecord` naming path:line.
    """
    size = meta["size"]
    hosts, files = hosts_of(meta, size), _files(run)
    present = [rank for rank in _by_host(hosts) if run.timings(rank).name in files]
    reader = _Reader(run, hosts, present, reduce.num_workers(size), waits(reduce, reduce.num_workers(size)))
    faults = _faults_of_files(size, present, len(files))
    clocks, common = clocks_of(meta, hosts), None
    reduction = reader.read_all(clocks)
    if reduction is None:  # ranks were killed, each after a step of its own
        common, num_last = _common_steps(run, present, num_attempts)
        if len(num_last) > 1:  # an earlier attempt that was killed is no fault of the run
            faults.append(f"ranks recorded {min(num_last)} to {max(num_last)} steps, only the common ones are used")
        reduction = reader.read(clocks, common)
    balance = reduction.accumulator.load_balance()
    unaligned = _unaligned(balance, clocks, hosts)
    if unaligned:
        reduction = reader.read(None, common)
        balance = reduction.accumulator.load_balance()
    if balance and balance.arrivals and balance.arrivals.basis == "wait":
        why = unaligned or "the run did not record how its hosts' clocks differ"
        balance = replace(balance, arrivals=replace(balance.arrivals, unaligned=why))
    if reduction.truncated:
        faults.append(f"the last line of {ranks_text(sorted(reduction.truncated))} is cut short")
    return RankRecords(reduction.total, reduction.servers_ns, balance, faults)


@dataclass(frozen=True)
class _Reader:
    """Reads each rank's file once per call."""

    run: RunDir
    hosts: Hosts
    present: list[int]  # the ranks that left records, all of a host together
    num_workers: int
    waits: bool

    def read_all(self, clocks: Clocks | None) -> _Reduction | None:
        """All steps; None once two ranks differ in how many they recorded."""
        reduction, num_steps = self._reduction(clocks), None
        for rank in self.present:
            path = self.run.timings(rank)
            timings = read_timings(path)
            own = timings.steps_of_attempts(1)
            num_steps = own if num_steps is None else num_steps
            if not np.array_equal(own, num_steps):
                return None
            reduction.add(rank, path, timings, timings)
        return reduction

    def read(self, clocks: Clocks | None, common: IntArray | None) -> _Reduction:
        """The first common[a] steps of each attempt a; None: all steps."""
        reduction = self._reduction(clocks)
        for rank in self.present:
            path = self.run.timings(rank)
            whole = read_timings(path)
            reduction.add(rank, path, whole, whole if common is None else whole.first(common))
        return reduction

    def _reduction(self, clocks: Clocks | None) -> _Reduction:
        return _Reduction(self.num_workers, RankAccumulator(self.hosts, clocks, self.waits))


def _files(run: RunDir) -> set[str]:
    """The names of the ranks' files. A pipe is none: reading it would block. Raises OSError, which glob would hide."""
    entries = [entry for entry in os.scandir(run.timings_dir) if fnmatch(entry.name, "rank-*.csv")]
    return {entry.name for entry in entries if entry.is_file()}


def _by_host(hosts: Hosts) -> list[int]:
    """All ranks, ordered so that those of a host are together."""
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return sorted(range(len(hosts)), key=lambda rank: (first[hosts[rank]], rank))


def _faults_of_files(size: int, present: list[int], num_files: int) -> list[str]:
    faults = []
    if missing := sorted(set(range(size)) - set(present)):
        faults.append(f"no timings of {ranks_text(missing)}")
    if num_files > len(present):
        faults.append(f"timings/ holds {num_files} files of a run of {size} ranks: some are another run's")
    return faults


def _common_steps(run: RunDir, present: list[int], num_attempts: int) -> tuple[IntArray, set[int]]:
    """((attempts,) numbers of steps that all ranks recorded, the numbers of single ranks in the last attempt)."""
    counts = [read_timings(run.timings(rank)).steps_of_attempts(num_attempts) for rank in present]
    longest = max(map(len, counts))
    padded = np.stack([np.pad(count, (0, longest - len(count))) for count in counts])
    return padded.min(axis=0), set(padded[:, -1].tolist())


def _unaligned(balance: LoadBalance | None, clocks: Clocks | None, hosts: Hosts) -> str | None:
    """Which rank's clock is plainly wrong, in words: reductions end for all ranks at once, so all leave together."""
    if balance is None or balance.arrivals is None or clocks is None:
        return None
    one_host = len(set(hosts)) == 1
    arrivals = balance.arrivals
    worst = int(np.argmax(arrivals.clock_error_s))
    error_s = float(arrivals.clock_error_s[worst])
    if error_s < (_RECORDS_FAIL if one_host else _CLOCKS_FAIL) * arrivals.whole_s / arrivals.num_steps:
        return None
    host = f" on {balance.hosts[worst]}" if balance.hosts[worst] is not None else ""
    return (
        f"rank {balance.ranks[worst]}{host} would leave reductions {amount(error_s, 's')} before or after the others:"
        f" {'' if one_host else 'its clock jumped, or '}its records are another run's"
    )


def _check_aligned(path: Path, whole: Timings, timings: Timings, aligned: IntArray) -> None:
    """Raises `BadRecord` for a row of another step than the first rank's: all ranks take the same steps."""
    wrong = np.flatnonzero((timings.values[:, _ALIGNED] != aligned).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        step, attempt = timings["step"][row], timings["attempt"][row]
        line = int(np.flatnonzero((whole["step"] == step) & (whole["attempt"] == attempt))[0]) + 2
        raise BadRecord(
            f"{path}:{line}: step {step} of attempt {attempt} where the first rank has step {aligned[row, 0]}"
            " (or one of them counts it as warm-up)",
            LEAVE_OUT,
        )


def ranks_text(ranks: Sequence[int]) -> str:
    """[0, 3] -> "ranks 0, 3"; a long list ends with the number of others."""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {listed(list(map(str, ranks)), 5)}"

"""All ranks' records of one run: each file is read once, reduced, and dropped."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.analysis.runs.clocks import Clocks, Hosts, clocks_of, hosts_of
from hpc_train.analysis.runs.load_balance import LoadBalance, RankAccumulator
from hpc_train.core.formatting import amount, listed
from hpc_train.core.records import PHASES, TIMING_COLUMNS, BadRecord, FloatArray, IntArray
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Reduce
from hpc_train.core.timings import NO_STEP_TIMES, StepTimes, Timings, read_timings, step_times

LEAVE_OUT = "Move this run's folder out of the report's folder, or name the other runs one by one."
_ALIGNED = [TIMING_COLUMNS.index("step"), TIMING_COLUMNS.index("warmup")]  # equal on every rank, row by row
# Parts of a step. Clocks that disagree by more say nothing about who came when; on one host, which has one clock, no
# rank can leave a reduction after the others leave the next.
_CLOCKS_FAIL, _RECORDS_FAIL = 0.1, 1.0


@dataclass(frozen=True, eq=False)
class Ranks:
    """What the records of all ranks come to, as far as all of them recorded."""

    total: StepTimes  # sum over the ranks that train
    servers_ns: FloatArray  # (len(PHASES),) sums over the servers
    balance: LoadBalance | None  # None: no steady step
    faults: list[str]


class _Sums:
    """Over ranks, while they are read."""

    def __init__(self, num_workers: int, tally: RankAccumulator) -> None:
        self.tally = tally
        self.truncated: list[int] = []
        self._most_workers = num_workers
        self._first: IntArray | None = None  # columns that are equal on every rank
        self._total, self._servers_ns = NO_STEP_TIMES, np.zeros(len(PHASES))

    def add(self, rank: int, path: Path, whole: Timings, timings: Timings) -> None:
        """timings: those of the steps in `whole` that all ranks recorded. Raises `BadRecord`."""
        aligned = timings.values[:, _ALIGNED]
        self._first = aligned if self._first is None else self._first
        _check_aligned(path, whole, timings, self._first)
        if timings.truncated:
            self.truncated.append(rank)
        times = step_times(timings)
        if rank >= self._most_workers:
            self._servers_ns += times.phases_ns
            return
        self._total = self._total + times if self._total.num_ranks else times
        self.tally.add(rank, timings)

    def ranks(self, balance: LoadBalance | None, faults: list[str]) -> Ranks:
        cut = [f"the last line of {ranks_text(sorted(self.truncated))} is cut short"] if self.truncated else []
        return Ranks(self._total, self._servers_ns, balance, faults + cut)


def waits(reduce: Reduce, num_workers: int) -> bool:
    """Whether ranks wait for each other in every step."""
    alone = reduce.strategy == "local" or (reduce.strategy == "parameter_server" and reduce.asynchronous)
    return num_workers > 1 and not alone


def reduce_ranks(run: RunDir, meta: dict[str, Any], reduce: Reduce, num_attempts: int) -> Ranks:
    """Sums and means over ranks. A crashed run counts up to the last step of each attempt that every rank recorded.

    Raises `BadRecord` naming path:line.
    """
    size = meta["size"]
    num_workers, hosts = reduce.num_workers(size), hosts_of(meta, size)
    found = _files(run)
    present = [rank for rank in _by_host(hosts) if run.timings(rank).name in found]
    faults = _faults_of_files(size, present, len(found))

    def read(clocks: Clocks | None, common: IntArray | None = None) -> _Sums | None:
        sums = _Sums(num_workers, RankAccumulator(hosts, clocks, waits(reduce, num_workers)))
        return sums if _read(run, present, sums, common) else None

    clocks, common = clocks_of(meta, hosts), None
    sums = read(clocks)
    if sums is None:  # ranks were killed, each after a step of its own
        common, ends = _common_steps(run, present, num_attempts)
        if len(ends) > 1:  # an earlier attempt that was killed is no fault of the run
            faults.append(f"ranks recorded {min(ends)} to {max(ends)} steps, only the common ones are used")
        sums = read(clocks, common)
    assert sums is not None
    balance = sums.tally.balance()
    if unaligned := _unaligned(balance, clocks, hosts):
        sums = read(None, common)
        assert sums is not None
        balance = sums.tally.balance()
    if balance and balance.arrivals and balance.arrivals.basis == "wait":
        why = unaligned or "the run did not record how its hosts' clocks differ"
        balance = replace(balance, arrivals=replace(balance.arrivals, unaligned=why))
    return sums.ranks(balance, faults)


def _files(run: RunDir) -> set[str]:
    """The names of the ranks' files. A pipe is none, and would be waited for. Raises OSError, which glob swallows."""
    entries = [entry for entry in os.scandir(run.timings_dir) if fnmatch(entry.name, "rank-*.csv")]
    return {entry.name for entry in entries if entry.is_file()}


def _by_host(hosts: Hosts) -> list[int]:
    """All ranks, those of a host together."""
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return sorted(range(len(hosts)), key=lambda rank: (first[hosts[rank]], rank))


def _faults_of_files(size: int, present: list[int], num_files: int) -> list[str]:
    faults = []
    if missing := sorted(set(range(size)) - set(present)):
        faults.append(f"no timings of {ranks_text(missing)}")
    if num_files > len(present):
        faults.append(f"timings/ holds {num_files} files of a run of {size} ranks: some are another run's")
    return faults


def _read(run: RunDir, present: list[int], sums: _Sums, common: IntArray | None) -> bool:
    """Adds every rank. common: the steps of each attempt that count; None: all, and False once ranks differ in them."""
    counts: IntArray | None = None
    for rank in present:
        path = run.timings(rank)
        whole = read_timings(path)
        if common is None:
            own = whole.steps_of_attempts(1)
            counts = own if counts is None else counts
            if not np.array_equal(own, counts):
                return False
        sums.add(rank, path, whole, whole if common is None else whole.first(common))
    return True


def _common_steps(run: RunDir, present: list[int], num_attempts: int) -> tuple[IntArray, set[int]]:
    """(attempts,) steps that all ranks recorded, and how many each did in the last attempt."""
    counts = [read_timings(run.timings(rank)).steps_of_attempts(num_attempts) for rank in present]
    longest = max(map(len, counts))
    padded = np.stack([np.pad(count, (0, longest - len(count))) for count in counts])
    return padded.min(axis=0), set(padded[:, -1].tolist())


def _unaligned(balance: LoadBalance | None, clocks: Clocks | None, hosts: Hosts) -> str | None:
    """Which rank's clock is plainly wrong, in words: by when it leaves reductions, which end for all at once."""
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
    """Every rank takes the same steps in each attempt: a row of another step than the first rank's is no record."""
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
    """[0, 3] -> "ranks 0, 3"; a long list is told by its length."""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(list(map(str, ranks)), 5)}"

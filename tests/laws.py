"""Run directories that obey stated laws: what the analysis must recover from them, for 1 to tens of thousands of ranks.

A step of rank i: it waits for input, computes, arrives at the reduction, leaves it when the last rank has arrived and
the exposed part of the ring all-reduce is over, updates, and goes on. Where `tests/synthetic.py` gives every rank the
same step, here ranks differ, wait for each other and have clocks of their own. Memory grows with the steps, not with
the ranks: the work of a rank is drawn twice from its own seed, once to find out who is last, once to write.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import lfilter

from hpc_train.core import config, records, timing_log
from hpc_train.core.energy_records import ENERGY_COLUMNS
from hpc_train.core.records import FloatArray
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config

PARTS = {"forward": 0.3, "backward": 0.6, "optimizer": 0.07, "other": 0.03}  # of the useful time


@dataclass(frozen=True)
class Slow:
    """`rank` takes `factor` times as long in every step, or in each with a probability; by input: it waits instead."""

    rank: int
    factor: float = 1.5
    probability: float = 1.0
    input_stall: bool = False


@dataclass(frozen=True)
class Laws:
    """What a run shall obey. Times are of a steady step."""

    ranks: int = 8
    ranks_per_host: int = 4
    steps: int = 210
    warmup: int = 10
    name: str = "laws"
    stamp: str = "20261123T210000Z"
    seed: int = 0
    # Useful time of a step: strong scaling work_s * (serial + (1 - serial) / ranks) (Amdahl), weak scaling work_s.
    work_s: float = 0.080
    serial: float = 0.0
    weak: bool = False
    batch: int = 4096  # global (strong), per rank (weak)
    noise: float = 0.0  # standard deviation of each rank's useful time in each step, relative; independent of others
    autocorrelation: float = 0.0  # of that noise from one step to the next (first-order autoregressive)
    run_noise: float = 0.0  # standard deviation of the whole run's useful time, relative: how repeats differ
    bursts: float = 0.0  # probability that 20 slow steps of a rank, 1.5 times as long, begin in a step
    slow: tuple[Slow, ...] = ()
    input_s: float = 0.0005  # in every step, on every rank
    # Ring: 2 (N - 1) alpha + 2 (N - 1) / N message_bytes beta; from two hosts on with the costs between them.
    message_bytes: float = 4e6
    alpha_s: float = 2e-6
    beta_s_per_byte: float = 1e-10
    alpha_between_s: float | None = None
    beta_between_s_per_byte: float | None = None
    overlap: float = 0.0  # share of the backward pass behind which the ring hides
    # Clocks of hosts: standard deviation of their offsets and rates; error: of each measurement of an offset.
    clock_offset_s: float = 0.0
    clock_drift: float = 0.0
    clock_error_s: float = 0.0
    told_offsets: bool = True  # False: meta.json has none
    watts: dict[str, float] = field(
        default_factory=lambda: {"package-0": 150.0, "dram": 20.0}
    )  # per host; {}: no meter
    idle_w: dict[str, float] = field(default_factory=dict)  # per host
    sample_hz: float = 10.0
    complete: bool = True
    reduce: dict[str, Any] = field(default_factory=dict)  # keys of [reduce] besides the strategy
    meta: dict[str, Any] = field(default_factory=dict)  # put over what is written otherwise

    @property
    def hosts(self) -> list[str]:
        return [f"c{index}" for index in range(-(-self.ranks // self.ranks_per_host))]

    def host_of(self, rank: int) -> str:
        return f"c{rank // self.ranks_per_host}"

    @property
    def useful_s(self) -> float:
        """Of a rank that is neither slow nor disturbed, by the law of Amdahl."""
        return self.work_s if self.weak else self.work_s * (self.serial + (1 - self.serial) / self.ranks)

    @property
    def ring_s(self) -> float:
        """The whole all-reduce, hidden part included."""
        far = len(self.hosts) > 1
        alpha = self.alpha_between_s if far and self.alpha_between_s is not None else self.alpha_s
        beta = (
            self.beta_between_s_per_byte if far and self.beta_between_s_per_byte is not None else self.beta_s_per_byte
        )
        others = self.ranks - 1
        return 2 * others * alpha + 2 * others / self.ranks * self.message_bytes * beta

    @property
    def exposed_s(self) -> float:
        """What is left of it once the last rank has arrived. Asking alone takes a microsecond, on one rank, too."""
        return max(1e-6, self.ring_s - self.overlap * PARTS["backward"] * self.useful_s)

    def parts(self, rank: int) -> dict[str, float]:
        """The phases' shares of a rank's useful time."""
        return PARTS

    def work(self, rank: int) -> tuple[FloatArray, FloatArray]:
        """(useful time, wait for input) of every step of a rank in seconds, each (steps,)."""
        draws = np.random.default_rng([self.seed, self.ranks, rank])
        useful = self.useful_s * np.maximum(0.05, 1 + self.noise * self._settled_noise(draws))
        useful *= np.exp(self.run_noise * np.random.default_rng([self.seed, self.ranks, 1 << 31]).standard_normal())
        if self.bursts:
            begins = draws.random(self.steps) < self.bursts
            useful[np.convolve(begins, np.ones(20))[: self.steps] > 0] *= 1.5
        useful[: self.warmup] *= 3  # would show in any mean that counts it
        stall = np.full(self.steps, self.input_s)
        for slow in self.slow:
            if slow.rank == rank:
                hit = draws.random(self.steps) < slow.probability
                more = useful * (slow.factor - 1) * hit
                if slow.input_stall:
                    stall += more
                else:
                    useful += more
        return useful, stall

    def _settled_noise(self, draws: np.random.Generator) -> FloatArray:
        """(steps,) of standard deviation 1."""
        series = draws.standard_normal(self.steps)
        if not self.autocorrelation:
            return series
        series[1:] *= (1 - self.autocorrelation**2) ** 0.5
        return np.asarray(lfilter([1.0], [1.0, -self.autocorrelation], series))


@dataclass(frozen=True, eq=False)
class Truth:
    """What was drawn, over the steady steps: the exact values that an estimate is held against."""

    laws: Laws
    useful_s: FloatArray  # (ranks,) sums
    input_s: FloatArray  # (ranks,) sums
    whole_s: float  # from the begin of the first steady step to the end of the last, mean over ranks
    ideal_s: float  # sum over the stretches between reductions of the slowest rank's useful time
    ideal_input_s: float  # the same of useful time and waits for input together

    @cached_property
    def load_balance(self) -> float:
        return float(self.useful_s.mean() / self.useful_s.max())

    @cached_property
    def serialisation(self) -> float:
        return float(self.useful_s.max() / self.ideal_s)

    @property
    def input(self) -> float:
        return self.ideal_s / self.ideal_input_s

    @property
    def transfer(self) -> float:
        return self.ideal_input_s / self.whole_s

    @property
    def parallel(self) -> float:
        return float(self.useful_s.mean()) / self.whole_s


def write(root: Path, laws: Laws) -> tuple[RunDir, Truth]:
    """Writes one run directory below `root`; returns it and what is true of it."""
    run = RunDir(root / laws.name / f"{laws.stamp}-np{laws.ranks}")
    run.timings_dir.mkdir(parents=True)
    run.energy_dir.mkdir()
    settings = _write_config(root, run, laws)
    leave_s, truth = _reductions(laws)
    clocks = _Clocks(laws, float(leave_s[-1]))
    share = _shares(settings.global_batch(laws.ranks), laws.ranks)
    header = (",".join(timing_log.TIMING_COLUMNS) + "\n").encode()
    line = ",".join(["%d"] * len(timing_log.TIMING_COLUMNS)) + "\n"
    for rank in range(laws.ranks):
        rows = _rows(laws, rank, leave_s, clocks, share[rank])
        run.timings(rank).write_bytes(header + (line * laws.steps % tuple(rows.ravel().tolist())).encode())
    run.meta.write_text(json.dumps(_meta(laws, clocks, settings), indent=1))
    _write_energy(run, laws, float(leave_s[-1]))
    losses = 0.3 + 2.0 * 0.97 ** np.arange(0, laws.steps, 10)
    lines = "".join(f"{index * 10},{loss:.9g}\n" for index, loss in enumerate(losses.tolist()))
    run.metrics.write_text(",".join(records.METRIC_COLUMNS) + "\n" + lines)
    if laws.complete:
        run.summary.write_text(json.dumps({"loss": float(losses[-1]), "complete": True, "schema": records.SCHEMA}))
    return run, truth


def rows(laws: Laws) -> Iterator[FloatArray]:
    """The records of each rank in turn, (steps, len(TIMING_COLUMNS)), as `write` writes them."""
    leave_s, _ = _reductions(laws)
    clocks = _Clocks(laws, float(leave_s[-1]))
    share = _shares(laws.batch, laws.ranks)
    for rank in range(laws.ranks):
        yield _rows(laws, rank, leave_s, clocks, share[rank])


def study(root: Path, laws: Laws, sizes: tuple[int, ...]) -> dict[int, tuple[RunDir, Truth]]:
    """The same laws on several numbers of ranks."""
    return {size: write(root, replace(laws, ranks=size)) for size in sizes}


def _before_and_after(laws: Laws, rank: int, useful_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Useful time before the reduction of a step, and after it."""
    parts = laws.parts(rank)
    before = useful_s * (parts["forward"] + parts["backward"])
    return before, useful_s - before


def _reductions(laws: Laws) -> tuple[FloatArray, Truth]:
    """When every reduction ends, in seconds since the loop began, and what is true of the steady steps.

    All leave together, so a reduction ends `exposed_s` after the longest stretch of work since the one before.
    """
    longest, ideal, ideal_input = (np.zeros(laws.steps) for _ in range(3))
    sums = np.zeros((4, laws.ranks))  # useful, input, what follows the first reduction before, what follows the last
    ends = 0.0  # the slowest rank's work after the last reduction
    first = laws.warmup
    for rank in range(laws.ranks):
        useful, stall = laws.work(rank)
        before, after = _before_and_after(laws, rank, useful)
        stretch = before.copy()
        stretch[1:] += after[:-1]
        np.maximum(longest, stretch + stall, out=longest)
        stretch[first] = before[first]
        np.maximum(ideal, stretch, out=ideal)
        np.maximum(ideal_input, stretch + stall, out=ideal_input)
        sums[:, rank] = useful[first:].sum(), stall[first:].sum(), after[first - 1] if first else 0.0, after[-1]
        ends = max(ends, float(after[-1]))
    leave_s = np.cumsum(longest + laws.exposed_s)
    began = (leave_s[first - 1] if first else 0.0) + sums[2].mean()
    truth = Truth(
        laws,
        useful_s=sums[0],
        input_s=sums[1],
        whole_s=float(leave_s[-1] + sums[3].mean() - began),
        ideal_s=float(ideal[first:].sum()) + ends,
        ideal_input_s=float(ideal_input[first:].sum()) + ends,
    )
    return leave_s, truth


class _Clocks:
    """What each host's clock shows, and what ping-pongs at both ends of the loop tell of it."""

    def __init__(self, laws: Laws, end_s: float) -> None:
        draws = np.random.default_rng([laws.seed, laws.ranks, 0, 1])
        num_hosts = len(laws.hosts)
        self.offset_s = 100.0 + laws.clock_offset_s * draws.standard_normal(num_hosts)
        self.rate = 1 + laws.clock_drift * draws.standard_normal(num_hosts)
        host = np.arange(laws.ranks) // laws.ranks_per_host
        self.told_ns = {}
        for moment, true_s in (("start", 0.0), ("end", end_s)):
            shown = (self.offset_s + self.rate * true_s)[host]
            error = laws.clock_error_s * draws.standard_normal(laws.ranks)
            error[0] = 0.0
            self.told_ns[moment] = ((shown - shown[0] + error) * 1e9).astype(int).tolist()

    def shown_ns(self, host: int, true_s: FloatArray) -> FloatArray:
        return np.rint((self.offset_s[host] + self.rate[host] * true_s) * 1e9)


def _rows(laws: Laws, rank: int, leave_s: FloatArray, clocks: _Clocks, num_samples: int) -> FloatArray:
    """(steps, len(TIMING_COLUMNS)) the records of a rank, by its own clock."""
    useful, stall = laws.work(rank)
    before, after = _before_and_after(laws, rank, useful)
    began = np.concatenate([[0.0], leave_s[:-1] + after[:-1]])
    forward = useful * laws.parts(rank)["forward"]
    moments = [began, began + stall, began + stall + forward, began + stall + before]  # data, forward, backward end
    updated = leave_s + useful * laws.parts(rank)["optimizer"]
    moments += [leave_s, updated, updated, leave_s + after]  # reduce, optimizer, sync (none), other
    shown = clocks.shown_ns(rank // laws.ranks_per_host, np.stack(moments))
    shown[-1, :-1] = shown[0, 1:]  # steps follow each other without a gap
    steps = np.arange(laws.steps)
    alike = (np.full(laws.steps, num_samples), steps < laws.warmup, np.ones(laws.steps))
    return np.stack([steps, shown[0], shown[3], *np.diff(shown, axis=0), *alike], axis=1).astype(np.int64)


def _shares(batch: int, ranks: int) -> list[int]:
    return [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]


def _write_config(root: Path, run: RunDir, laws: Laws) -> Config:
    job = root / f"{laws.name}.toml"
    reduce = {"strategy": "horovod", **laws.reduce}
    job.write_text(
        f'name = "{laws.name}"\n[data]\nfile = "data/laws.h5"\n[train]\nsteps = {laws.steps}\n'
        f"{'batch_per_rank' if laws.weak else 'global_batch'} = {laws.batch}\nwarmup_steps = {laws.warmup}\n[reduce]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in reduce.items())
    )
    loaded = config.load(job)
    job.unlink()
    run.config.write_text(config.dumps(loaded))
    return loaded.config


def _meta(laws: Laws, clocks: _Clocks, settings: Config) -> dict[str, Any]:
    places = [
        {"rank": rank, "host": laws.host_of(rank), "local_rank": rank % laws.ranks_per_host, "pid": 1 + rank}
        | {"cores": [rank % laws.ranks_per_host], "threads": 1}
        for rank in range(laws.ranks)
    ]
    meters = [{"domain": domain, "source": f"RAPL {domain}", "quality": "measured"} for domain in laws.watts]
    energy: dict[str, Any] = {"assumption": None, "meters": {host: meters for host in laws.hosts}}
    if laws.idle_w:
        energy |= {"idle_w": {host: laws.idle_w for host in laws.hosts}, "idle_quality": "measured"}
    return {
        "schema": records.SCHEMA,
        "hpc_train": "0.1.0",
        "name": laws.name,
        "started": datetime.strptime(laws.stamp, "%Y%m%dT%H%M%SZ").strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ended": "2026-11-23T21:00:09Z",
        "outcome": "complete",
        "size": laws.ranks,
        "hosts": laws.hosts,
        "ranks": places,
        "cpu_model": "AMD EPYC 7763 64-Core Processor",
        "global_batch": settings.global_batch(laws.ranks),
        "num_train_samples": 50_000,
        "num_parameters": int(laws.message_bytes / 4),
        "versions": {"python": "3.12.4", "torch": "2.10.0", "mpi4py": "4.1.0", "horovod": "0.28.1"},
        "mpi": {"version": "Open MPI v4.1.4", "library": "/usr/lib/libmpi.so.40"},
        "git": {"commit": "b0f1e82c0ffee0000000000000000000000000ab", "dirty": False},
        "slurm": {},
        "energy": energy,
        **({"clock_offsets_ns": clocks.told_ns} if laws.told_offsets else {}),
        **laws.meta,
    }


def _write_energy(run: RunDir, laws: Laws, end_s: float) -> None:
    """A constant draw of `watts`, sampled until the loop ends."""
    if not laws.watts:
        return
    text = "\n".join([",".join(ENERGY_COLUMNS), *_samples(laws, end_s), ""])
    for host in laws.hosts:
        run.energy(host).write_text(text)


def _samples(laws: Laws, end_s: float) -> Iterator[str]:
    for time_s in [*np.arange(0.0, end_s, 1 / laws.sample_hz).tolist(), end_s]:
        for domain, watts in laws.watts.items():
            yield f"{time_s:.6f},{domain},{watts * time_s:.6f},measured,RAPL {domain},1"

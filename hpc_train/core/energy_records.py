"""energy/<host>.csv: what the meters of a run read, and what the readings add up to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from hpc_train.core.records import FloatArray, bad_line, read_csv

ENERGY_COLUMNS = ("time_s", "domain", "joules", "quality", "source", "attempt")
Quality = Literal["measured", "estimated", "missing"]
NO_METER = "no meter"
_NODE_SHARED = "(node shared)"
COUNTED_NOTHING = "counted 0 J, less than it can resolve"
# Domains that Slurm counts over all hosts together; only one host's file holds them.
JOB_WIDE = ("nodes", "packages")
OWN_CORES = "cores"  # the domain of the estimate from this job's cores alone: other jobs' consumption is not in it

_PACKAGES = ("package-", "dram")
_CONTAINS = {"node": ("",), "nodes": ("",), "packages": _PACKAGES, "psys": _PACKAGES}  # domain -> prefixes of others
_MOST_S, _MOST_J = 1e12, 1e18  # a larger number is damage


@dataclass(frozen=True)
class Energy:
    """Joules of a run, None if nothing was read. `quality` never mixes: one estimate makes a sum an estimate.

    source: the meters; of a missing figure, why it is missing.
    """

    joules: float | None = None
    quality: Quality = "missing"
    source: str = NO_METER

    @property
    def is_shared(self) -> bool:
        """Whether other jobs may have drawn some of it."""
        return _NODE_SHARED in self.source

    def __str__(self) -> str:
        if self.joules is None:
            return f"energy {self.quality} ({self.source})"
        return f"{self.joules:,.4g} J {self.quality} ({self.source})"


class DomainEnergy(NamedTuple):
    """The energy of one domain of a host during one attempt."""

    domain: str
    energy: Energy


@dataclass(frozen=True, eq=False)
class Trace:
    """The readings of one domain of a host during one attempt: joules counted from the attempt's first reading.

    end_s: time of the last line, which is later than time_s[-1] if the meter had stopped answering by then.
    """

    domain: str
    attempt: int
    source: str
    quality: Quality  # of the last reading: joules are cumulative, so a doubt stays
    time_s: FloatArray  # (readings,) seconds of the host's clock, never decreasing
    joules: FloatArray  # (readings,)
    begin_s: float
    end_s: float

    @property
    def stopped(self) -> bool:
        """Whether the last line had no joules: consumption after the last reading is missing."""
        return not len(self.time_s) or self.end_s > self.time_s[-1]

    @property
    def counted_nothing(self) -> bool:
        """Whether it read 0 J while a run worked. Every device draws some power: it is less than the meter resolves."""
        return self.end_s > self.begin_s and len(self.joules) > 0 and not self.joules[-1] > 0

    @property
    def energy(self) -> Energy:
        if self.stopped:
            return Energy()
        if self.counted_nothing:
            return Energy(source=f"{self.source} {COUNTED_NOTHING}")
        return Energy(float(self.joules[-1]), self.quality, self.source)


# ------------------------------------------------------------------------------------------------ reading


class _Reading(NamedTuple):
    """A line of the file. joules: None if missing."""

    time_s: float
    domain: str
    joules: float | None
    quality: Quality
    source: str
    attempt: int


def read_traces(path: Path) -> list[Trace]:
    """Every domain of every attempt in energy/<host>.csv. Raises `BadRecord` naming path:line."""
    by_domain: dict[tuple[int, str], list[_Reading]] = {}
    for number, row in enumerate(read_csv(path, ENERGY_COLUMNS).rows, 2):
        try:
            reading = _parse(row)
        except ValueError:
            raise bad_line(path, number, ",".join(row)) from None
        by_domain.setdefault((reading.attempt, reading.domain), []).append(reading)
    return [_trace(readings) for readings in by_domain.values()]


def _parse(row: list[str]) -> _Reading:
    """Raises ValueError for a damaged number."""
    time_s, domain, joules, text, source, attempt = row[: len(ENERGY_COLUMNS)]
    quality = _quality(text)
    reading = _Reading(
        float(time_s), domain, None if quality == "missing" else float(joules), quality, source, int(attempt)
    )
    if not abs(reading.time_s) < _MOST_S or not 0 <= (reading.joules or 0.0) < _MOST_J:
        raise ValueError("out of range")
    return reading


def _trace(readings: list[_Reading]) -> Trace:
    """The readings of one domain and attempt."""
    # If the time of day was set back during the run, time stays constant until it has caught up.
    time_s = np.maximum.accumulate([reading.time_s for reading in readings])
    is_known = np.array([reading.joules is not None for reading in readings])
    known = [reading for reading in readings if reading.joules is not None]
    joules = np.array([reading.joules for reading in known], dtype=float)
    last = (known or readings)[-1]
    begin_s, end_s = float(time_s[0]), float(time_s[-1])
    return Trace(last.domain, last.attempt, last.source, last.quality, time_s[is_known], joules, begin_s, end_s)


def _quality(text: str) -> Quality:
    return "measured" if text == "measured" else "estimated" if text == "estimated" else "missing"


# ------------------------------------------------------------------------------------------------ sums


def total_energy(parts: Iterable[Energy]) -> Energy:
    """The sum over hosts or domains. Any missing part makes it missing, any estimated part an estimate.

    A sum of 0 J is missing, because ratios to it would mean nothing.
    """
    known = list(parts)
    if lacking := [part.source for part in known if part.joules is None or part.quality == "missing"]:
        return Energy(source=" + ".join(sorted(set(lacking))))
    quality: Quality = "estimated" if any(part.quality == "estimated" for part in known) else "measured"
    source, joules = " + ".join(sorted({part.source for part in known})), sum(part.joules or 0.0 for part in known)
    if not joules > 0:
        return Energy(source=f"{source} {COUNTED_NOTHING}") if known else Energy()
    return Energy(joules, quality, source)


def container(domain: str, others: Iterable[str]) -> str | None:
    """Which of the other domains of its host, or of all hosts, already counts this one's joules; None: none does."""
    for other in others:
        reaches = other in JOB_WIDE or domain not in JOB_WIDE
        if other != domain and reaches and domain.startswith(_CONTAINS.get(other, ())):
            return other
    return None


class _Part(Protocol):
    """A `Trace` or a `DomainEnergy`."""

    @property
    def domain(self) -> str: ...

    @property
    def energy(self) -> Energy: ...


T = TypeVar("T", bound=_Part)


def disjoint(by_host: Mapping[str, Sequence[T]]) -> dict[str, list[T]]:
    """Those of each host whose joules may be added up: no other of its host, or of all hosts, contains them."""
    job_wide = {part.domain for parts in by_host.values() for part in parts if part.domain in JOB_WIDE}
    return {host: _disjoint_beside(job_wide, parts) for host, parts in by_host.items()}


def _disjoint_beside(job_wide: set[str], parts: Sequence[T]) -> list[T]:
    domains = job_wide | {part.domain for part in parts}
    return [part for part in parts if not container(part.domain, domains)]


def energy_of_run(by_host: Mapping[str, Sequence[T]], hosts: Iterable[str], is_shared: bool) -> Energy:
    """The sum over all hosts of any attempt.

    hosts: those of the last attempt. One without readings makes the sum missing, unless a job-wide meter counts it.
    is_shared: other jobs may have used a node, so that its meters counted more than this run.
    """
    parts = [part for of_host in disjoint(by_host).values() for part in of_host]
    if not all(by_host.get(host) for host in hosts) and not any(part.domain in JOB_WIDE for part in parts):
        return Energy()
    total = total_energy(part.energy for part in parts)
    if is_shared and total.joules is not None and any(part.domain != OWN_CORES for part in parts):
        return replace(total, source=f"{total.source} {_NODE_SHARED}")
    return total

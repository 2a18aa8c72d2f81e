"""What one run drew: all of it and above idle, in its loop, by node, by rank, by phase, and until any of its steps."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount, between, peak_w, whole
from hpc_train.analysis.runs.load import Run, host_traces
from hpc_train.analysis.runs.meta_json import attempts, dict_at, positive_number
from hpc_train.analysis.runs.step_timeline import EMPTY_TIMELINE, StepTimeline, timeline_of
from hpc_train.core.energy_records import JOB_WIDE, OWN_CORES, Trace, disjoint
from hpc_train.core.formatting import listed
from hpc_train.core.records import PHASES

_MOST_HOSTS = 3  # named one by one
ALL_NODES = "all nodes together"  # the host of a count that Slurm keeps for a whole step


@dataclass(frozen=True)
class Place:
    """Where a rank ran, as meta.json says."""

    rank: int
    host: str
    local_rank: int
    cores: frozenset[int]


@dataclass(frozen=True, eq=False)
class _Reading:
    """One domain during one attempt, on its host."""

    host: str
    trace: Trace
    lead_s: float  # from the trace's first line to the begin of the loop
    loop_s: float  # how long the loop lasted; 0 where no step was recorded
    shared: bool

    @cached_property
    def gross(self) -> EnergyAmount:
        return whole(self.trace, self.host, self.shared, self.lead_s + self.loop_s if self.loop_s else 0.0)

    def of_loop(self, seconds: float) -> EnergyAmount:
        """Of the first `seconds` of the loop."""
        return between(self.trace, self.lead_s, self.lead_s + seconds, self.host, self.shared)

    @property
    def known_s(self) -> float:
        """From the first line to the last joules read."""
        times = self.trace.time_s
        return float(times[-1] - self.trace.begin_s) if len(times) else 0.0


@dataclass(frozen=True, eq=False)
class RunEnergy:
    """Joules of one run. Made by `energy_of`.

    gross: of the attempts, each from its meters' first reading to their last, which lie right before and after its
    loop; starting up and reading data before that is not metered. loop: of the steps, warm-up included.
    """

    run: Run
    timeline: StepTimeline
    readings: tuple[_Reading, ...]
    unread: tuple[str, ...]  # hosts without any reading in an attempt that took steps
    places: tuple[Place, ...]
    notes: tuple[str, ...]

    @cached_property
    def gross(self) -> EnergyAmount:
        return self._whole(reading.gross for reading in self.readings)

    @cached_property
    def loop(self) -> EnergyAmount:
        return self._whole(reading.of_loop(reading.loop_s) for reading in self.readings if reading.loop_s)

    def until(self, row: int) -> EnergyAmount:
        """Of the loops until the end of the step in a row of the course."""
        ended = int(self.timeline.attempt[row])
        lasted = {loop.attempt: loop.lasted_s for loop in self.timeline.loops if loop.attempt < ended}
        before_s = sum(lasted.values())
        lasted[ended] = float(self.timeline.end_s[row]) - before_s
        taken = [reading for reading in self.readings if reading.trace.attempt in lasted]
        return self._whole(reading.of_loop(lasted[reading.trace.attempt]) for reading in taken)

    def _whole(self, parts: Iterable[EnergyAmount]) -> EnergyAmount:
        lacking = self.unread or (() if self.readings else ("no meter",))
        total = sum(parts, EnergyAmount(lacking=lacking))
        return total if total.known > 0 or total.lacking else total + EnergyAmount(lacking=("all meters (0 J)",))

    @cached_property
    def net(self) -> EnergyAmount:
        """gross less what the domains draw at rest (meta.json energy.idle_w) for as long. An idle draw that was given
        and not measured makes it an estimate, an unknown one makes it missing.
        """
        facts = dict_at(self.run.meta, "energy")
        idle = {host: part for host, part in dict_at(facts, "idle_w").items() if isinstance(part, dict)}
        given = facts.get("idle_quality") != "measured"
        total = EnergyAmount(lacking=self.gross.lacking)
        by_host: dict[tuple[str, int], list[_Reading]] = defaultdict(list)
        for reading in self.readings:
            by_host[reading.host, reading.trace.attempt].append(reading)
        for (host, _), readings in by_host.items():
            draws = _of_all(idle) if host == ALL_NODES else idle.get(host, {})
            total += _above_idle(readings, draws, given)
        return total

    @property
    def metered_s(self) -> float:
        """The attempts' time under the meters, of hosts together."""
        longest: dict[int, float] = defaultdict(float)
        for reading in self.readings:
            longest[reading.trace.attempt] = max(longest[reading.trace.attempt], reading.known_s)
        return sum(longest.values())

    @property
    def mean_w(self) -> float | None:
        return self.gross.total / self.metered_s if self.gross.total is not None and self.metered_s else None

    @cached_property
    def peak(self) -> tuple[float, float] | None:
        """(watts, seconds of which they are the mean): the most that all domains drew at once."""
        numbers = {reading.trace.attempt for reading in self.readings}
        found = [peak_w([each.trace for each in self.readings if each.trace.attempt == number]) for number in numbers]
        known = [each for each in found if each is not None]
        return max(known) if known and not self.gross.lacking else None

    @cached_property
    def nodes(self) -> dict[str, EnergyAmount]:
        """gross by host; a host without readings is missing."""
        found: dict[str, EnergyAmount] = {}
        for reading in self.readings:
            found[reading.host] = found.get(reading.host, NONE) + reading.gross
        for host in self.unread:
            found[host] = found.get(host, NONE) + EnergyAmount(lacking=(host,))
        return found

    @cached_property
    def ranks(self) -> dict[int, EnergyAmount]:
        """gross by rank; {} where it is not known where ranks ran. A GPU's joules are those of the ranks that use it,
        the rest of a node is divided among its ranks (`shares_rest`), which makes a share an estimate.
        """
        found: dict[int, EnergyAmount] = defaultdict(EnergyAmount)
        for reading in self.readings:
            here = self._places_on[reading.host]
            owners = _owners(reading, here, self._num_gpus[reading.host]) or here
            for place, weight in zip(owners, rest_weights(owners), strict=True):
                part = reading.gross * weight
                found[place.rank] += part if len(owners) == 1 else part.attributed()
        for host in self.unread:
            for place in self._places_on[host]:
                found[place.rank] += EnergyAmount(lacking=(host,))
        return dict(sorted(found.items()))

    @cached_property
    def _places_on(self) -> dict[str, list[Place]]:
        found: dict[str, list[Place]] = defaultdict(list, {ALL_NODES: list(self.places)})
        for place in self.places:
            found[place.host].append(place)
        return found

    @cached_property
    def _num_gpus(self) -> dict[str, int]:
        """By host; none where ranks compute on processors."""
        used = self.run.meta.get("device") not in (None, "cpu")
        seen = {(each.host, each.trace.domain) for each in self.readings if used and _gpu(each) is not None}
        return defaultdict(int, Counter(host for host, _ in seen))

    @property
    def rest_rule(self) -> str:
        """How the part of a node that is no rank's own is divided among its ranks."""
        by_cores = any(len(set(rest_weights(places))) > 1 for places in self._places_on.values() if places)
        return "by the number of their cores" if by_cores else "equally"

    @cached_property
    def phases(self) -> dict[str, EnergyAmount]:
        """loop of the ranks that train, attributed to phases by their share of the time in steady steps: phases last
        milliseconds and samples seconds, so no meter tells them apart. Assumes equal power in all phases.
        """
        shares = self.run.summary.phase_share
        return {phase: (self.loop * self._workers_part * share).attributed() for phase, share in shares.items()}

    @cached_property
    def servers(self) -> dict[str, EnergyAmount]:
        """The same of the servers' part; {} where there are none."""
        spent_s, total_s = self.run.servers_s, float(self.run.servers_s.sum())
        part = (self.loop * (1 - self._workers_part)).attributed()
        known = zip(PHASES, spent_s.tolist(), strict=True)
        return {phase: part * (spent / total_s) for phase, spent in known if spent} if total_s else {}

    @property
    def _workers_part(self) -> float:
        """The share of the ranks that train in the joules: by ranks where these are known."""
        num_workers = self.run.size - self.run.num_servers
        if num_workers == self.run.size:
            return 1.0
        known = {rank: joules.known for rank, joules in self.ranks.items()}
        total = sum(known.values())
        workers = sum(joules for rank, joules in known.items() if rank < num_workers)
        return workers / total if total else num_workers / self.run.size

    @property
    def outside(self) -> EnergyAmount:
        """gross before and after the steps."""
        rest = self.gross - self.loop
        return (
            rest if abs(rest.known) > 1e-9 * self.gross.known else rest * 0.0
        )  # sums of floats differ in the last bits


def energy_of(run: Run) -> RunEnergy:
    """Reads the run's energy files. Raises `BadRecord` naming path:line."""
    course, places = timeline_of(run), places_of(run)
    every = host_traces(run.dir, run.meta)
    added = disjoint(every)
    lead_s = _lead_s(run, course, added, places)
    shared = dict_at(dict_at(run.meta, "energy"), "shared")
    loops = {loop.attempt: loop for loop in course.loops}
    readings = []
    for host, traces in added.items():
        for trace in traces:
            loop, is_wide = loops.get(trace.attempt), trace.domain in JOB_WIDE
            others = any(was is True for was in shared.values()) if is_wide else shared.get(host) is True
            reading = _Reading(
                ALL_NODES if is_wide else host,
                trace,
                lead_s.get(trace.attempt, 0.0),
                loop.lasted_s if loop else 0.0,
                others and trace.domain != OWN_CORES,
            )
            readings.append(reading)
    wide = {reading.trace.attempt for reading in readings if reading.host == ALL_NODES}
    unread = [
        host
        for number in loops
        for host in _hosts_of(run.meta, number)
        if number not in wide and not any(trace.attempt == number for trace in added.get(host, []))
    ]
    left_out = sorted({trace.domain for host in every for trace in every[host] if trace not in added[host]})
    notes = _notes(readings, left_out, shared, max(lead_s.values(), default=0.0))
    return RunEnergy(run, course, tuple(readings), tuple(dict.fromkeys(unread)), places, tuple(notes))


def unknown_energy(run: Run, why: str) -> RunEnergy:
    """That of a run of which it could not be found out."""
    return RunEnergy(run, EMPTY_TIMELINE, (), ("all meters",), (), (why,))


def places_of(run: Run) -> tuple[Place, ...]:
    """Where every rank ran; () where meta.json does not say it of all, or attempts ran on different hosts."""
    told = run.meta["ranks"] if isinstance(run.meta.get("ranks"), list) else []
    if len({frozenset(_hosts_of(run.meta, number)) for number in range(1, run.summary.num_attempts + 1)}) > 1:
        return ()
    try:
        places = [
            Place(int(one["rank"]), str(one["host"]), int(one["local_rank"]), frozenset(map(int, one.get("cores", []))))
            for one in told
        ]
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        return ()
    return tuple(places) if sorted(place.rank for place in places) == list(range(run.size)) else ()


def rest_weights(places: list[Place]) -> list[float]:
    """Shares of what a node's ranks divide, summing to 1: by cores where no two may use the same one, else equal."""
    num_cores = [len(place.cores) for place in places]
    if all(num_cores) and len(frozenset().union(*(place.cores for place in places))) == sum(num_cores):
        return [count / sum(num_cores) for count in num_cores]
    return [1 / len(places)] * len(places)


def _gpu(reading: _Reading) -> int | None:
    """The number of the GPU that a domain is."""
    kind, _, number = reading.trace.domain.partition("-")
    return int(number) if kind == "gpu" and number.isdecimal() else None


def _owners(reading: _Reading, here: list[Place], num_gpus: int) -> list[Place]:
    """The ranks that compute on the GPU that a domain is: ranks take GPUs in turn (train/device.py)."""
    index = _gpu(reading)
    return [place for place in here if num_gpus and index is not None and place.local_rank % num_gpus == index]


def _hosts_of(meta: dict[str, Any], attempt: int) -> list[str]:
    """The hosts of one attempt; of a run that does not tell them apart, its hosts."""
    for told in attempts(meta):
        if told.get("attempt") == attempt and isinstance(told.get("hosts"), list):
            return [str(host) for host in told["hosts"]]
    return list(meta["hosts"])


def _lead_s(
    run: Run, course: StepTimeline, traces: dict[str, list[Trace]], places: tuple[Place, ...]
) -> dict[int, float]:
    """Seconds from a trace's first line to the begin of its attempt's loop; an attempt without an entry: none known.

    meta.json energy.epoch_s turns the timings' clock into the traces', of the last attempt. It is taken on the host of
    the rank that the course is of, for all: samplers begin right before a barrier, so hosts' clocks need not agree.
    """
    host = next((place.host for place in places if place.rank == course.rank), run.meta["hosts"][0])
    epoch_s = positive_number(dict_at(dict_at(run.meta, "energy"), "epoch_s").get(host))
    if epoch_s is None or not course.loops:
        return {}
    loop = course.loops[-1]
    for trace in traces.get(host, []):
        lead_s = loop.begin_ns / 1e9 + epoch_s - trace.begin_s
        if trace.attempt == loop.attempt and 0 < lead_s <= trace.end_s - trace.begin_s:
            return {loop.attempt: lead_s}
    return {}


def _of_all(idle: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The idle draw of all nodes together, where each node's is known."""
    watts = [positive_number(draws.get("node")) for draws in idle.values()]
    return {"node": sum(w for w in watts if w is not None)} if watts and None not in watts else {}


def _above_idle(readings: list[_Reading], draws: dict[str, Any], given: bool) -> EnergyAmount:
    """What one host's domains drew above idle during one attempt."""
    everything, node_w = positive_number(draws.get("node")), None
    if everything is not None and not any(reading.trace.domain == "node" for reading in readings):
        node_w = everything  # given for all of a node's meters together
    if node_w is not None:
        total = sum((reading.gross for reading in readings), NONE).attributed()
        return total - EnergyAmount(estimated=node_w * max(reading.known_s for reading in readings))
    above = NONE
    for reading in readings:
        gross, watts = reading.gross, positive_number(draws.get(reading.trace.domain))
        if watts is None:
            above += EnergyAmount(lacking=(f"{reading.host} {reading.trace.domain} at rest",), shared=gross.shared)
            continue
        idle_j = watts * reading.known_s
        is_estimate = given or gross.estimated is not None
        gross = gross.attributed() if is_estimate else gross
        above += gross - (EnergyAmount(estimated=idle_j) if is_estimate else EnergyAmount(measured=idle_j))
    return above


def _notes(readings: list[_Reading], left_out: list[str], shared: dict[str, Any], lead_s: float) -> list[str]:
    metered = {reading.host for reading in readings if reading.trace.domain != OWN_CORES}
    notes = []
    if left_out:
        notes.append(f"Not added, since another domain of the node holds their joules: {', '.join(left_out)}")
    if with_others := sorted({reading.host for reading in readings if reading.shared}):
        there = listed(with_others, _MOST_HOSTS)
        notes.append(
            f"Shared: others may have used {there} meanwhile, and the joules of a node are not this job's alone"
        )
    unknown = sorted(host for host in metered - {ALL_NODES} if shared.get(host) is None)
    if unknown:
        notes.append(f"Whether others used {listed(unknown, _MOST_HOSTS)} meanwhile is not known")
    if lead_s > 1:
        notes.append(f"The meters ran {lead_s:.1f} s before the loop, which count in the whole and not in the loop")
    return notes

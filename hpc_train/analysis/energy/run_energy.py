"""The energy of one run: all of it, above idle, of its loop, by node, by rank, by phase, until any of its steps."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount, peak_w
from hpc_train.analysis.energy.readings import ALL_NODES, Reading, read_readings
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import dict_at, positive_number
from hpc_train.analysis.runs.placement import RankPlacement, placements
from hpc_train.analysis.runs.step_timeline import EMPTY_TIMELINE, StepTimeline, timeline_of
from hpc_train.core.timing_log import PHASES

VALIDATION = "validation"  # a phase of the energy alone: no step has it
_ROUNDING = 1e-9  # of the gross energy: sums of floats differ by this much


@dataclass(frozen=True, eq=False)
class RunEnergy:
    """The energy of one run. Made by `energy_of`.

    gross: of the attempts, each from its meters' first reading to their last, right before and after its loop; starting
    up and reading data before that is not metered. loop: of the steps, warm-up included.
    """

    run: Run
    timeline: StepTimeline
    readings: tuple[Reading, ...] = ()
    unread_hosts: tuple[str, ...] = ()
    contained_domains: tuple[str, ...] = ()
    placements: tuple[RankPlacement, ...] = ()
    failure: str = ""  # why it could not be computed

    @cached_property
    def gross(self) -> EnergyAmount:
        return self._sum(reading.gross for reading in self.readings)

    @cached_property
    def loop(self) -> EnergyAmount:
        return self._sum(reading.of_loop(reading.loop_s) for reading in self.readings if reading.loop_s)

    @cached_property
    def _validations(self) -> tuple[EnergyAmount, EnergyAmount]:
        """Of the validations: (between steps, and so within loop; after the last step). NONE without any."""
        within = after = NONE
        loop_s = {loop.attempt: loop.lasted_s for loop in self.timeline.loops}
        record = self.run.validation
        for step, seconds in zip(record.steps, record.seconds, strict=True) if record else ():
            found = self.timeline.after_step(step - 1, seconds)
            if found is None:
                continue
            attempt, begin_s, end_s = found
            taken = [reading for reading in self.readings if reading.trace.attempt == attempt]
            if any(reading.lead_s + end_s > reading.trace.end_s - reading.trace.begin_s for reading in taken):
                continue  # an attempt was killed in it, and a later one made it
            part = sum((reading.of_part(begin_s, end_s) for reading in taken), NONE)
            if part.lacking:  # shorter than a meter resolves
                part = (self.loop * ((end_s - begin_s) / self.timeline.loop_s)).attributed()
            if begin_s < loop_s[attempt]:
                within += part
            else:
                after += part
        return within, after

    @property
    def outside(self) -> EnergyAmount:
        """gross before and after the steps, less a validation after the last one."""
        rest = self.gross - self.loop - self._validations[1]
        return rest if abs(rest.known) > _ROUNDING * self.gross.known else rest * 0.0

    def until(self, row: int) -> EnergyAmount:
        """The energy of the loops until the end of the step in a row of the timeline."""
        attempt = int(self.timeline.attempt[row])
        loop_s = {loop.attempt: loop.lasted_s for loop in self.timeline.loops if loop.attempt < attempt}
        loop_s[attempt] = float(self.timeline.end_s[row]) - sum(loop_s.values())
        taken = [reading for reading in self.readings if reading.trace.attempt in loop_s]
        return self._sum(reading.of_loop(loop_s[reading.trace.attempt]) for reading in taken)

    def _sum(self, parts: Iterable[EnergyAmount]) -> EnergyAmount:
        lacking = self.unread_hosts or (() if self.readings else ("no meter",))
        total = sum(parts, EnergyAmount(lacking=lacking))
        return total if total.known > 0 or total.lacking else total + EnergyAmount(lacking=("all meters (0 J)",))

    @cached_property
    def net(self) -> EnergyAmount:
        """gross less what the domains draw at idle (meta.json energy.idle_w) for as long. An idle draw that was given
        rather than measured makes it an estimate, an unknown one makes it missing.
        """
        facts = dict_at(self.run.meta, "energy")
        idle = {host: draws for host, draws in dict_at(facts, "idle_w").items() if isinstance(draws, dict)}
        is_given = facts.get("idle_quality") != "measured"
        by_attempt: dict[tuple[str, int], list[Reading]] = defaultdict(list)
        for reading in self.readings:
            by_attempt[reading.host, reading.trace.attempt].append(reading)
        total = EnergyAmount(lacking=self.gross.lacking)
        for (host, _), readings in by_attempt.items():
            draws_w = _all_nodes_idle_w(idle) if host == ALL_NODES else idle.get(host, {})
            total += _above_idle(readings, draws_w, is_given)
        return total

    @property
    def metered_s(self) -> float:
        """The attempts' time under the meters."""
        longest_s: dict[int, float] = defaultdict(float)
        for reading in self.readings:
            longest_s[reading.trace.attempt] = max(longest_s[reading.trace.attempt], reading.known_s)
        return sum(longest_s.values())

    @property
    def mean_w(self) -> float | None:
        return self.gross.total / self.metered_s if self.gross.total is not None and self.metered_s else None

    @cached_property
    def peak(self) -> tuple[float, float] | None:
        """(watts, seconds over which they are a mean): the most that all domains drew at the same time."""
        if self.gross.lacking:
            return None
        by_attempt: dict[int, list[Reading]] = defaultdict(list)
        for reading in self.readings:
            by_attempt[reading.trace.attempt].append(reading)
        peaks = [peak_w([reading.trace for reading in readings]) for readings in by_attempt.values()]
        return max((peak for peak in peaks if peak is not None), default=None)

    @cached_property
    def nodes(self) -> dict[str, EnergyAmount]:
        """gross by host; a host without readings is missing."""
        found: dict[str, EnergyAmount] = defaultdict(EnergyAmount)
        for reading in self.readings:
            found[reading.host] += reading.gross
        for host in self.unread_hosts:
            found[host] += EnergyAmount(lacking=(host,))
        return dict(found)

    @cached_property
    def ranks(self) -> dict[int, EnergyAmount]:
        """gross by rank; {} if it is unknown where ranks ran. A GPU's energy is that of the ranks that use it, the rest
        of a node is divided among its ranks (`rest_weights`), which makes a rank's part an estimate.
        """
        found: dict[int, EnergyAmount] = defaultdict(EnergyAmount)
        for reading in self.readings:
            owners = self._owners(reading)
            for placement, weight in zip(owners, rest_weights(owners), strict=True):
                part = reading.gross * weight
                found[placement.rank] += part if len(owners) == 1 else part.attributed()
        for host in self.unread_hosts:
            for placement in self._placements_on[host]:
                found[placement.rank] += EnergyAmount(lacking=(host,))
        return dict(sorted(found.items()))

    def _owners(self, reading: Reading) -> list[RankPlacement]:
        """The ranks that share a domain: ranks take GPUs in turn (train/device.py), all ranks share the rest."""
        here, num_gpus = self._placements_on[reading.host], self._num_gpus[reading.host]
        if num_gpus and reading.gpu is not None:
            return [each for each in here if each.local_rank % num_gpus == reading.gpu] or here
        return here

    @cached_property
    def _placements_on(self) -> dict[str, list[RankPlacement]]:
        found: dict[str, list[RankPlacement]] = defaultdict(list, {ALL_NODES: list(self.placements)})
        for placement in self.placements:
            found[placement.host].append(placement)
        return found

    @cached_property
    def _num_gpus(self) -> dict[str, int]:
        """By host; none if ranks compute on processors."""
        if self.run.meta.get("device") in (None, "cpu"):
            return defaultdict(int)
        gpus = {(reading.host, reading.gpu) for reading in self.readings if reading.gpu is not None}
        return defaultdict(int, Counter(host for host, _ in gpus))

    @property
    def divided_by_cores(self) -> bool:
        """Whether the part of a node that is no rank's own is divided by cores; else equally."""
        return any(len(set(rest_weights(here))) > 1 for here in self._placements_on.values() if here)

    @cached_property
    def phases(self) -> dict[str, EnergyAmount]:
        """loop of the ranks that train, attributed to phases by their share of the time in steady steps: phases last
        milliseconds and samples seconds, so no meter resolves them. Assumes equal power in all phases. Validations,
        which belong to no step, are as the meters show them.
        """
        shares, (within, after) = self.run.summary.phase_share, self._validations
        steps = self.loop - within
        found = {phase: (steps * self._workers_share * share).attributed() for phase, share in shares.items()}
        return found | ({VALIDATION: within + after} if within != NONE or after != NONE else {})

    @cached_property
    def servers(self) -> dict[str, EnergyAmount]:
        """The same of the servers' part; {} without servers."""
        spent_s, total_s = self.run.servers_s, float(self.run.servers_s.sum())
        if not total_s:
            return {}
        part = (self.loop * (1 - self._workers_share)).attributed()
        return {phase: part * (spent / total_s) for phase, spent in zip(PHASES, spent_s.tolist(), strict=True) if spent}

    @property
    def _workers_share(self) -> float:
        """The part of the energy that is of the ranks that train: by rank if known, else by their number."""
        num_workers = self.run.size - self.run.num_servers
        if num_workers == self.run.size:
            return 1.0
        known = {rank: amount.known for rank, amount in self.ranks.items()}
        total = sum(known.values())
        workers = sum(amount for rank, amount in known.items() if rank < num_workers)
        return workers / total if total else num_workers / self.run.size


def energy_of(run: Run) -> RunEnergy:
    """Reads the run's energy files. Raises `BadRecord` naming path:line."""
    timeline, where = timeline_of(run), placements(run)
    found = read_readings(run, timeline, where)
    return RunEnergy(run, timeline, found.readings, found.unread_hosts, found.contained_domains, where)


def unknown_energy(run: Run, why: str) -> RunEnergy:
    """For a run whose energy could not be computed."""
    return RunEnergy(run, EMPTY_TIMELINE, unread_hosts=("all meters",), failure=why)


def rest_weights(here: Sequence[RankPlacement]) -> list[float]:
    """How ranks of one node divide what they share; sums to 1. By cores if no two ranks may use the same core."""
    num_cores = [len(placement.cores) for placement in here]
    distinct = frozenset().union(*(placement.cores for placement in here))
    if all(num_cores) and len(distinct) == sum(num_cores):
        return [count / sum(num_cores) for count in num_cores]
    return [1 / len(here)] * len(here)


def _all_nodes_idle_w(idle: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The idle draw of all nodes together, if each node's is known."""
    watts = [positive_number(draws.get("node")) for draws in idle.values()]
    known = [each for each in watts if each is not None]
    return {"node": sum(known)} if known and len(known) == len(watts) else {}


def _above_idle(readings: Sequence[Reading], draws_w: dict[str, Any], is_given: bool) -> EnergyAmount:
    """What one host's domains drew above idle during one attempt. draws_w: by domain, or of the whole node."""
    node_w = positive_number(draws_w.get("node"))
    if node_w is not None and not any(reading.trace.domain == "node" for reading in readings):
        total = sum((reading.gross for reading in readings), NONE).attributed()
        return total - EnergyAmount(estimated=node_w * max(reading.known_s for reading in readings))
    return sum((_domain_above_idle(each, draws_w, is_given) for each in readings), NONE)


def _domain_above_idle(reading: Reading, draws_w: dict[str, Any], is_given: bool) -> EnergyAmount:
    gross, idle_w = reading.gross, positive_number(draws_w.get(reading.trace.domain))
    if idle_w is None:
        return EnergyAmount(lacking=(f"{reading.host} {reading.trace.domain} when idle",), shared=gross.shared)
    idle_j = idle_w * reading.known_s
    if is_given or gross.estimated is not None:
        return gross.attributed() - EnergyAmount(estimated=idle_j)
    return gross - EnergyAmount(measured=idle_j)

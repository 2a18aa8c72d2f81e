"""The meters' readings of one run, set against its loop: which domains add up, and when the loop began in each."""

from dataclasses import dataclass
from functools import cached_property

from hpc_train.analysis.energy.energy_amount import EnergyAmount, between, whole
from hpc_train.analysis.runs.load import Run, host_traces
from hpc_train.analysis.runs.meta_json import dict_at, positive_number
from hpc_train.analysis.runs.placement import RankPlacement, hosts_of_attempt
from hpc_train.analysis.runs.step_timeline import StepTimeline
from hpc_train.core.energy_records import JOB_WIDE, OWN_CORES, Trace, disjoint

ALL_NODES = "all nodes together"  # the host of a domain that Slurm counts for a whole job step


@dataclass(frozen=True, eq=False)
class Reading:
    """One domain of a host during one attempt."""

    host: str
    trace: Trace
    lead_s: float  # from the trace's first line to the start of the loop
    loop_s: float  # duration of the loop; 0 if no step was recorded
    shared: bool  # whether other jobs may have used the host

    @cached_property
    def gross(self) -> EnergyAmount:
        least_s = self.lead_s + self.loop_s if self.loop_s else 0.0
        return whole(self.trace, self.host, self.shared, least_s)

    def of_loop(self, seconds: float) -> EnergyAmount:
        """The energy of the first `seconds` of the loop."""
        return between(self.trace, self.lead_s, self.lead_s + seconds, self.host, self.shared)

    def of_part(self, begin_s: float, end_s: float) -> EnergyAmount:
        """The energy from `begin_s` to `end_s` after the start of the loop."""
        return between(self.trace, self.lead_s + begin_s, self.lead_s + end_s, self.host, self.shared)

    @property
    def known_s(self) -> float:
        """From the first line to the last joules read."""
        times = self.trace.time_s
        return float(times[-1] - self.trace.begin_s) if len(times) else 0.0

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that the domain is, None if it is none."""
        kind, _, number = self.trace.domain.partition("-")
        return int(number) if kind == "gpu" and number.isdecimal() else None


@dataclass(frozen=True, eq=False)
class Readings:
    """The readings that add up to a run's energy. Made by `read_readings`."""

    readings: tuple[Reading, ...]
    unread_hosts: tuple[str, ...]  # without any reading in an attempt that took steps
    contained_domains: tuple[str, ...]  # not added, since another domain of their host contains them


def read_readings(run: Run, timeline: StepTimeline, placements: tuple[RankPlacement, ...]) -> Readings:
    """Reads the run's energy files. Raises `BadRecord` naming path:line."""
    traces = host_traces(run.dir, run.meta)
    added = disjoint(traces)
    lead_s = _lead_s(run, timeline, added, placements)
    loop_s = {loop.attempt: loop.lasted_s for loop in timeline.loops}
    readings = [
        Reading(
            ALL_NODES if trace.domain in JOB_WIDE else host,
            trace,
            lead_s.get(trace.attempt, 0.0),
            loop_s.get(trace.attempt, 0.0),
            _is_shared(run, host, trace.domain),
        )
        for host, of_host in added.items()
        for trace in of_host
    ]
    contained = {trace.domain for host in traces for trace in traces[host] if trace not in added[host]}
    unread = _unread_hosts(run, timeline, readings, added)
    return Readings(tuple(readings), tuple(dict.fromkeys(unread)), tuple(sorted(contained)))


def _is_shared(run: Run, host: str, domain: str) -> bool:
    if domain == OWN_CORES:
        return False
    shared = dict_at(dict_at(run.meta, "energy"), "shared")
    return True in shared.values() if domain in JOB_WIDE else shared.get(host) is True


def _unread_hosts(
    run: Run, timeline: StepTimeline, readings: list[Reading], traces: dict[str, list[Trace]]
) -> list[str]:
    job_wide_attempts = {reading.trace.attempt for reading in readings if reading.host == ALL_NODES}
    unread = []
    for attempt in (loop.attempt for loop in timeline.loops):
        if attempt in job_wide_attempts:
            continue
        for host in hosts_of_attempt(run.meta, attempt):
            if not any(trace.attempt == attempt for trace in traces.get(host, [])):
                unread.append(host)
    return unread


def _lead_s(
    run: Run, timeline: StepTimeline, traces: dict[str, list[Trace]], placements: tuple[RankPlacement, ...]
) -> dict[int, float]:
    """Seconds from a trace's first line to the start of its attempt's loop; {} if unknown.

    meta.json energy.epoch_s converts the timings' clock to the traces', for the last attempt. The host of the rank that
    the timeline is of decides for all: samplers start right before a barrier, so hosts' clocks need not agree.
    """
    first_host = run.meta["hosts"][0]
    host = next((each.host for each in placements if each.rank == timeline.rank), first_host)
    epoch_s = positive_number(dict_at(dict_at(run.meta, "energy"), "epoch_s").get(host))
    if epoch_s is None or not timeline.loops:
        return {}
    loop = timeline.loops[-1]
    for trace in traces.get(host, []):
        lead_s = loop.begin_ns / 1e9 + epoch_s - trace.begin_s
        if trace.attempt == loop.attempt and 0 < lead_s <= trace.end_s - trace.begin_s:
            return {loop.attempt: lead_s}
    return {}

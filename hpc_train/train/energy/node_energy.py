"""The energy of a run: one rank of each node reads the node's meters, and meta.json records what the joules rest on."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import monotonic, perf_counter, sleep, time
from typing import Any, TypeVar

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.settings import Energy
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement
from hpc_train.train.energy.sensors import sharing
from hpc_train.train.energy.sensors.choose import choose_meters, estimate_meter
from hpc_train.train.energy.sensors.meter import Meter
from hpc_train.train.energy.sensors.sampler import Sampler, idle_watts
from hpc_train.train.energy.sensors.slurm import find_step, step_meter

_SETTLE_S = 1.0  # between the last work and the measurement of idle power

T = TypeVar("T")


@dataclass(frozen=True)
class _MeterEntry:
    """A meter in meta.json."""

    domain: str
    source: str
    quality: str


@dataclass(frozen=True)
class _NodeAtStart:
    """What a node's reading rank knows before the loop."""

    meters: list[_MeterEntry]
    unreadable: list[str]  # meters that exist and cannot be read
    idle_w: dict[str, float]  # by domain
    has_part_of_node: bool | None
    epoch_s: float  # epoch of the node's `perf_counter`


@dataclass(frozen=True)
class _Usage:
    """Processor time on a node while the loop ran, as one rank saw it."""

    passed_s: float
    busy_s: float | None  # of all cores of the node
    own_s: float  # of this rank


class NodeEnergy:
    """The meters of this rank's node. `meters` is empty on ranks that read none."""

    def __init__(
        self, settings: Energy, context: Context, places: list[RankPlacement], log: Callable[[str], None]
    ) -> None:
        """Collective. Finds the meters and, with `energy.idle_s`, measures them while all ranks sleep.

        This must precede everything that runs beside the loop: Horovod's thread, for one, never idles.
        """
        self._settings, self._context = settings, context
        world = context.world
        self._neighbours = [place for place in places if place.host == world.host]
        self._num_hosts = len({place.host for place in places})
        self._reads = world.local_rank == 0
        self.meters, self._unreadable = self._find()
        self._has_part_of_node = sharing.has_part_of_node(JobEnvironment.current()) if self._reads else None
        self._idle_w = self._idle_power(log)
        self._epoch_s = time() - perf_counter()
        self._usage: _Usage | None = None
        max_period_s = min((meter.max_period_s for meter in self.meters), default=inf)
        if world.is_root and 1 / settings.sample_hz > max_period_s:
            log(
                f"energy.sample_hz = {settings.sample_hz:g}: a counter may wrap around twice between two samples, and "
                f"its joules are then an estimate; set it to {1 / max_period_s:.2g} or more"
            )

    @contextmanager
    def recorded(self, path: Path, attempt: int, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Samples the meters into `path` inside the block; does nothing on ranks without meters.

        check: called before each write; raises UserError if this job may write nothing any more.
        """
        sampler: AbstractContextManager[None] = nullcontext()
        if self.meters:
            sampler = Sampler(self.meters, path, self._settings.sample_hz, self._epoch_s, attempt, check)
        with sampler:
            began_s, busy_s, own_s = monotonic(), sharing.busy_s(), sharing.own_s()
            try:
                yield
            finally:
                now_busy_s = sharing.busy_s()
                node_s = None if busy_s is None or now_busy_s is None else now_busy_s - busy_s
                self._usage = _Usage(monotonic() - began_s, node_s, sharing.own_s() - own_s)

    def metadata_at_start(self) -> dict[str, Any]:
        """Collective. Entries of meta.json on the meters and their nodes; complete on the root alone.

        epoch_s, by host: add it to the timings' clock of that host to get the time of the energy files.
        """
        meters = [_MeterEntry(meter.domain, meter.source, meter.quality) for meter in self.meters]
        node = _NodeAtStart(meters, self._unreadable, self._idle_w, self._has_part_of_node, self._epoch_s)
        nodes = self._gather_nodes(node)
        idle_w = {host: node.idle_w for host, node in nodes.items() if node.idle_w}
        idle = {"idle_w": idle_w, "idle_quality": "given" if self._settings.idle_w else "measured"} if idle_w else {}
        return {
            "assumption": self._assumption(nodes),
            "meters": {host: [asdict(meter) for meter in node.meters] for host, node in nodes.items()},
            "unreadable": {host: node.unreadable for host, node in nodes.items() if node.unreadable},
            "shared": {host: node.has_part_of_node for host, node in nodes.items()},
            "epoch_s": {host: node.epoch_s for host, node in nodes.items()},
            **idle,
        }

    def _assumption(self, nodes: dict[str, _NodeAtStart]) -> str | None:
        qualities = {meter.quality for node in nodes.values() for meter in node.meters}
        if "estimated" not in qualities:
            return None
        return (
            "no meter of the processors can be read: every core that ranks compute on is taken to draw "
            f"{self._settings.watts_per_core:g} W (energy.watts_per_core) while the loop runs; "
            "memory, network and cooling are not included"
        )

    def metadata_at_end(self) -> dict[str, Any]:
        """Collective, after `recorded`. Whether others used the nodes, and how many cores worked for them."""
        own_s_of_ranks = self._context.gather((self._context.world.host, self._usage.own_s if self._usage else 0.0))
        nodes = self._gather_nodes((self._usage, self._has_part_of_node, os.cpu_count() or 1))
        shared, foreign_cores, num_cpus = {}, {}, {}
        for host, (usage, has_part, num_threads) in nodes.items():
            own_s = sum(seconds for name, seconds in own_s_of_ranks if name == host)
            foreign = sharing.foreign_cores(usage.busy_s, own_s, usage.passed_s) if usage else None
            own_cores = own_s / usage.passed_s if usage else 0.0
            shared[host] = sharing.is_shared(has_part, foreign, own_cores, num_threads)
            foreign_cores[host] = None if foreign is None else round(foreign, 3)
            num_cpus[host] = num_threads
        return {"shared": shared, "foreign_cores": foreign_cores, "num_cpus": num_cpus}

    def _gather_nodes(self, value: T) -> dict[str, T]:
        """Collective. On the root: the values of the ranks that read for their node, by host; {} elsewhere."""
        own = (self._context.world.host, value) if self._reads else None
        return dict(each for each in self._context.gather(own) if each)

    def _find(self) -> tuple[list[Meter], list[str]]:
        """Collective. (this rank's meters, those that cannot be read).

        If the processors of some node have no readable meter, Slurm's count of the whole step replaces those of all
        nodes; without it an estimate does, because meters of GPUs alone would omit the cores.
        """
        choice = choose_meters() if self._reads else None
        is_lacking = any(self._context.all_gather(choice is not None and not choice.has_processors))
        num_hosts = self._num_hosts
        step = self._context.on_root(lambda: find_step(num_hosts, JobEnvironment.current())) if is_lacking else None
        if choice is None:
            return [], []
        meters = choice.meters
        if step:
            gpus = [meter for meter in meters if meter.domain.startswith("gpu-")]
            meters = [] if step.whole_nodes else gpus
            meters += [step_meter(step)] if self._context.world.is_root else []
        elif not choice.has_processors:
            cores = {core for place in self._neighbours for core in place.cores}
            num_used = min(len(cores), sum(place.threads for place in self._neighbours))
            meters = [*meters, estimate_meter(num_used, self._settings.watts_per_core)]
        return meters, choice.unreadable

    def _idle_power(self, log: Callable[[str], None]) -> dict[str, float]:
        """Collective. Idle watts by domain of this rank's node; {} if unknown."""
        idle_s = self._settings.idle_s
        if self._settings.idle_w is not None and self._reads:
            return {"node": self._settings.idle_w}
        if not idle_s:
            return {}
        if self._context.world.is_root:
            log(f"Measuring for {idle_s:g} s what the nodes draw at rest")
        self._context.barrier()
        # Sleep, because a barrier of MPI waits by spinning.
        sleep(min(_SETTLE_S, idle_s))
        idle_w: dict[str, float] = {}
        if self._reads and self.meters:
            idle_w = idle_watts(self.meters, idle_s)
        else:
            sleep(idle_s)
        self._context.barrier()
        return idle_w

"""Joules of a run: one rank of each node reads for the whole node, and the root writes down what they rest on."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from time import monotonic, perf_counter, sleep, time
from typing import Any

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.settings import Energy
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement
from hpc_train.train.energy.sensors import sharing
from hpc_train.train.energy.sensors.choose import choose_meters, estimate_meter
from hpc_train.train.energy.sensors.meter import Meter
from hpc_train.train.energy.sensors.sampler import Sampler, idle_watts
from hpc_train.train.energy.sensors.slurm import find_step, step_meter

_SETTLE_S = 1.0  # of rest, before rest is measured


class NodeEnergy:
    """The meters of this rank's node, and what is known of that node. `meters` is empty on ranks that read none."""

    def __init__(
        self, settings: Energy, context: Context, places: list[RankPlacement], say: Callable[[str], None]
    ) -> None:
        """Collective. Finds the meters and, with `energy.idle_s`, measures what they read while all ranks sleep.

        `say` tells the root's user. It is done before anything runs beside the loop: Horovod's thread never rests.
        """
        self._settings, self._context = settings, context
        world = context.world
        self._neighbours = [place for place in places if place.host == world.host]
        self._num_hosts = len({place.host for place in places})
        self._reads = world.local_rank == 0
        self.meters, self._faults = self._find()
        self._part = sharing.has_part_of_node(JobEnvironment.current()) if self._reads else None
        self._idle_w = self._rest(say)
        self._epoch_s = time() - perf_counter()  # what makes the timings' clock the energy files' time
        self._worked: dict[str, Any] = {}
        max_period_s = min((meter.max_period_s for meter in self.meters), default=inf)
        if world.is_root and 1 / settings.sample_hz > max_period_s:
            say(
                f"energy.sample_hz = {settings.sample_hz:g}: a counter may go round twice between two samples, and its "
                f"joules are an estimate then; set it to {1 / max_period_s:.2g} or more"
            )

    @contextmanager
    def recorded(self, path: Path, attempt: int, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Writes the meters' joules to `path` until the end; on all ranks, of which most have no meter.

        check: raises UserError where nothing may be written any more; asked before each line.
        """
        with ExitStack() as stack:
            if self.meters:
                hz = self._settings.sample_hz
                stack.enter_context(Sampler(self.meters, path, hz, self._epoch_s, attempt, check))
            began_s, busy_s, own_s = monotonic(), sharing.busy_s(), sharing.own_s()
            try:
                yield
            finally:
                ended_busy_s = sharing.busy_s()
                self._worked = {
                    "passed_s": monotonic() - began_s,
                    "busy_s": None if busy_s is None or ended_busy_s is None else ended_busy_s - busy_s,
                    "own_s": sharing.own_s() - own_s,
                    "num_threads": os.cpu_count() or 1,
                }

    def metadata_at_start(self) -> dict[str, Any]:
        """Collective. What meta.json says of the meters and their nodes; of no use but on the root.

        epoch_s, by host: add it to the timings' clock of that host to have the energy files' time.
        """
        settings = self._settings
        nodes = self._gathered(
            {
                "meters": [(meter.domain, meter.source, meter.quality) for meter in self.meters],
                "faults": self._faults,
                "idle_w": self._idle_w,
                "part": self._part,
                "epoch_s": self._epoch_s,
            }
        )
        fields = ("domain", "source", "quality")
        idle = {host: node["idle_w"] for host, node in nodes.items() if node["idle_w"]}
        idle_facts = {"idle_w": idle, "idle_quality": "given" if settings.idle_w else "measured"} if idle else {}
        estimated = any(quality == "estimated" for node in nodes.values() for *_, quality in node["meters"])
        assumption = (
            "no meter of the processors can be read: every core that ranks compute on is taken to draw "
            f"{settings.watts_per_core:g} W (energy.watts_per_core) while the loop runs; "
            "memory, network and cooling are left out"
        )
        return {
            "assumption": assumption if estimated else None,
            "meters": {h: [dict(zip(fields, each, strict=True)) for each in n["meters"]] for h, n in nodes.items()},
            "unreadable": {host: node["faults"] for host, node in nodes.items() if node["faults"]},
            "shared": {host: node["part"] for host, node in nodes.items()},
            "epoch_s": {host: node["epoch_s"] for host, node in nodes.items()},
            **idle_facts,
        }

    def metadata_at_end(self) -> dict[str, Any]:
        """Collective, after `recorded` has ended. Whether others used the nodes, and how many cores worked for them."""
        of_ranks = self._context.gather((self._context.world.host, self._worked.get("own_s", 0.0)))
        nodes = self._gathered({"worked": self._worked, "part": self._part})
        shared, foreign_cores = {}, {}
        for host, node in nodes.items():
            worked = node["worked"]
            own_s = sum(each for where, each in of_ranks if where == host)
            foreign = sharing.foreign_cores(worked["busy_s"], own_s, worked["passed_s"]) if worked else None
            own = own_s / worked["passed_s"] if worked else 0.0
            shared[host] = sharing.is_shared(node["part"], foreign, own, worked.get("num_threads", 1))
            foreign_cores[host] = None if foreign is None else round(foreign, 3)
        return {"shared": shared, "foreign_cores": foreign_cores}

    def _gathered(self, mine: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Collective. On the root: what the ranks that read for their node know of it, by host."""
        return dict(
            each for each in self._context.gather((self._context.world.host, mine) if self._reads else None) if each
        )

    def _find(self) -> tuple[list[Meter], list[str]]:
        """Collective. This rank's meters. Where a node's processors have none that can be read, Slurm's count of the
        whole step stands for all nodes, if there is one; else an estimate, since GPUs alone leave out the cores.
        """
        choice = choose_meters() if self._reads else None
        lacks = any(self._context.all_gather(choice is not None and not choice.has_processors))
        num_hosts = self._num_hosts
        step = self._context.on_root(lambda: find_step(num_hosts, JobEnvironment.current())) if lacks else None
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
        return meters, choice.faults

    def _rest(self, say: Callable[[str], None]) -> dict[str, float]:
        """Collective. Watts at rest by domain, of this rank's node; {} where they are unknown.

        Ranks sleep rather than wait in a barrier: MPI waits by spinning.
        """
        idle_s = self._settings.idle_s
        if self._settings.idle_w is not None and self._reads:
            return {"node": self._settings.idle_w}
        if not idle_s:
            return {}
        if self._context.world.is_root:
            say(f"Measuring for {idle_s:g} s what the nodes draw at rest")
        self._context.barrier()
        sleep(min(_SETTLE_S, idle_s))
        idle_w: dict[str, float] = {}
        if self._reads and self.meters:
            idle_w = idle_watts(self.meters, idle_s)
        else:
            sleep(idle_s)
        self._context.barrier()
        return idle_w

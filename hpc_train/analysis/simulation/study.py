"""From measured runs to simulated sizes: which job, which machine, and how well it tells what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np

from hpc_train.analysis.models.measurements import Measurements, from_group
from hpc_train.analysis.models.mechanistic_model import input_s
from hpc_train.analysis.planning.budget import benchmark_name, newest_benchmark
from hpc_train.analysis.runs.placement import crowded_hosts, shared_hosts
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.analysis.simulation.collectives import ALGORITHMS, Algorithm
from hpc_train.analysis.simulation.machine import Link, Machine
from hpc_train.analysis.simulation.network import Links, read_links
from hpc_train.analysis.simulation.noise import Noise, measured_noise
from hpc_train.analysis.simulation.simulate import SimulatedStep, simulate
from hpc_train.analysis.simulation.step import Job, Stage
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.timing_log import COMMUNICATION

# As training sends: small gradients together in messages of about so many bytes (train/reduce/buckets.py). At stage 3 a
# block of weights that was found by size has an eighth of them (train/reduce/shard_blocks.py).
_MESSAGE_BYTES, _NUM_BLOCKS = 4 << 20, 8
_NEEDED = ("forward", "backward", "optimizer")
_USUAL_SIZES = (1024, 4096, 16384, 65536)
_BISECTIONS = 12  # of the overlap: to 1/4096


@dataclass(frozen=True)
class Wanted:
    """What the user changes of what was measured; None leaves it."""

    network: Path | None = None
    latency_s: float | None = None  # of the links between nodes
    bytes_per_s: float | None = None
    ranks_per_node: int | None = None
    batch_per_rank: int | None = None
    stage: Stage | None = None
    algorithm: Algorithm | None = None


@dataclass(frozen=True)
class Check:
    """A measured size, simulated like any other, from the computation of the largest one."""

    measured_s: float
    measured_exposed_s: float
    simulated: SimulatedStep

    @property
    def ranks(self) -> int:
        return self.simulated.ranks

    @property
    def error(self) -> float:
        """Relative, of the step; positive where the simulation is too slow."""
        return self.simulated.step_s / self.measured_s - 1


@dataclass(frozen=True, eq=False)
class Simulation:
    """checks: of the measured sizes, as they were run; of one rank alone if the links between ranks were not measured.

    measurements: without the sizes that were left out. disturbed: sizes whose ranks waited for cores, since ranks
    shared them or other programs kept them busy; left out unless `only_disturbed`. baseline: of the efficiencies, the
    smallest measured size, simulated on the same machine. by_algorithm: at the largest size asked for; empty where
    weights are divided.
    """

    measurements: Measurements
    disturbed: tuple[Row, ...]
    only_disturbed: bool
    baseline: SimulatedStep
    steps: tuple[SimulatedStep, ...]  # by ranks
    checks: tuple[Check, ...]
    by_algorithm: dict[Algorithm, SimulatedStep]
    job: Job  # at the largest measured size
    machine: Machine
    noise: Noise
    links_source: str
    overlap_source: str
    assumed: tuple[str, ...]
    batch_per_rank: int | None = None  # in place of the measured one


def simulate_group(group: Group, sizes: Sequence[int], wanted: Wanted, seed: int = 0) -> Simulation:
    """Simulates a step of this job on other numbers of ranks; by default on some up to 65,536.

    Raises `UserError` if what drives it was not measured.
    """
    all_rows = [row for row in group.rows if row.step_s and not row.incomplete]
    used = _least_disturbed(all_rows)
    group = replace(group, rows=tuple(used or group.rows))
    measurements = from_group(group)
    source = _JobSource(group, measurements)
    if not wanted.batch_per_rank:
        sizes = sizes or _usual_sizes(measurements)
        _check_sizes(measurements, sizes)
    sizes = sizes or _USUAL_SIZES
    stage = source.stage if wanted.stage is None else wanted.stage
    algorithm = wanted.algorithm or source.usual_algorithm(stage)
    path = wanted.network or newest_benchmark(group)
    links = None if path is None else read_links(path, source.strategy(stage), algorithm)
    machine, links_source, assumed = _machine(links, measurements, wanted, max(sizes))
    if stage and group.keys.get("reduce.shard_within", "job") != "job":
        assumed = (*assumed, "all ranks share one copy of the weights")
    if wanted.batch_per_rank:
        assumed = (*assumed, "each sample takes as long as in the measured batch")
    noise, error = measured_noise(source.row.runs), float(measurements.error[-1])
    as_run = _machine_as_run(source, measurements, path)
    overlap, overlap_source = _overlap(source, as_run, noise)

    def at(
        ranks: int, machine: Machine, stage: Stage, algorithm: Algorithm, batch_per_rank: int | None = None
    ) -> SimulatedStep:
        job = source.at(ranks, stage, algorithm, overlap, batch_per_rank)
        samples = ranks * batch_per_rank if batch_per_rank else float(measurements.samples(np.array([ranks]))[0])
        return replace(simulate(job, machine, ranks, noise, error, seed), samples=samples)

    def wanted_at(ranks: int, algorithm: Algorithm) -> SimulatedStep:
        return at(ranks, machine, stage, algorithm, wanted.batch_per_rank)

    def check(row: Row, machine: Machine) -> Check:
        told = at(row.size, machine, source.stage, source.usual_algorithm(source.stage))
        return Check(float(row.step_s or 0.0), row.exposed_s, told)

    steps = tuple(wanted_at(ranks, algorithm) for ranks in sorted(set(sizes)))
    others: dict[Algorithm, SimulatedStep] = {}
    if not stage:
        most = steps[-1].ranks
        others = {each: steps[-1] if each == algorithm else wanted_at(most, each) for each in ALGORITHMS}
    return Simulation(
        measurements,
        tuple(row for row in all_rows if _is_disturbed(row)),
        any(map(_is_disturbed, used)),
        wanted_at(int(measurements.ranks[0]), algorithm),
        steps,
        tuple(check(row, as_run or machine) for row in source.rows if as_run or row.size == 1),
        others,
        source.at(measurements.largest, stage, algorithm, overlap, wanted.batch_per_rank),
        machine,
        noise,
        links_source,
        overlap_source,
        assumed,
        wanted.batch_per_rank,
    )


def _least_disturbed(rows: Sequence[Row]) -> Sequence[Row]:
    """Those whose ranks had cores of their own, of these those without other programs, unless there are none."""
    uncrowded = [row for row in rows if not _is_crowded(row)] or rows
    return [row for row in uncrowded if not _is_shared(row)] or uncrowded


def _is_disturbed(row: Row) -> bool:
    return _is_crowded(row) or _is_shared(row)


def _is_crowded(row: Row) -> bool:
    return any(map(crowded_hosts, row.runs))


def _is_shared(row: Row) -> bool:
    return any(map(shared_hosts, row.runs))


def _usual_sizes(measurements: Measurements) -> list[int]:
    """In strong scaling no more ranks than samples."""
    most = _USUAL_SIZES[-1] if measurements.weak else int(measurements.batch)
    return [size for size in _USUAL_SIZES if size <= most] or [most]


def _check_sizes(measurements: Measurements, sizes: Sequence[int]) -> None:
    if not measurements.weak and (too_many := [size for size in sizes if size > measurements.batch > 1]):
        raise UserError(
            f"--ranks {too_many[0]}: the global batch is {measurements.batch:g}",
            "Give no more ranks than samples, or a batch that grows with the ranks: --batch-per-rank 1, say.",
        )


# ---------------------------------------------------------------------------------------------- the job


class _JobSource:
    """The measured job, as a rank does it on any number of ranks."""

    def __init__(self, group: Group, measurements: Measurements) -> None:
        self.rows = [row for row in group.rows if row.step_s and not row.incomplete]
        self.row = self.rows[-1]
        self._group, self._keys, self._measurements = group, group.keys, measurements
        if group.keys.get("reduce.strategy") == "parameter_server":
            raise UserError(
                "a parameter server is not simulated", "Give runs of the strategies horovod, mpi or sharded."
            )
        missing = [phase for phase in _NEEDED if not self.row.phase_s.get(phase)]
        if missing:
            raise UserError(
                f"{group.label}: the phase {missing[0]} was not timed, so nothing is known of what overlaps",
                'Give runs that hpc-train train made, on GPUs with train.timing = "phases".',
            )
        if measurements.gradient_bytes is None:
            raise UserError(f"{group.label}: the runs do not state how many parameters the model has", "Run it again.")

    @property
    def stage(self) -> Stage:
        return self._keys.get("reduce.stage", 1) if self._keys.get("reduce.strategy") == "sharded" else 0

    def strategy(self, stage: Stage) -> str:
        """As `hpc-train bench allreduce` calls it."""
        return "sharded" if stage else benchmark_name(self._group)

    def usual_algorithm(self, stage: Stage) -> Algorithm:
        """As the libraries do it: Horovod and NCCL around a ring, MPI as `train/comm/startup.py` asks of it."""
        if self._keys.get("reduce.strategy") == "horovod" and not stage:
            return "ring"
        return "rabenseifner"

    def at(
        self, ranks: int, stage: Stage, algorithm: Algorithm, overlap: float, batch_per_rank: int | None = None
    ) -> Job:
        measurements, phase_s = self._measurements, self.row.phase_s
        share, was = (float(measurements.share(np.array([each]))[0]) for each in (ranks, self.row.size))
        waits_s = float(input_s(measurements, np.array([ranks]))[0])
        if batch_per_rank:
            wanted_share = batch_per_rank * measurements.ranks[0] / measurements.samples(measurements.ranks[:1])[0]
            waits_s, share = waits_s * wanted_share / share, wanted_share
        divides = ranks if stage else 1
        divided = self.row.size if self.stage else 1
        optimizer_s = phase_s["optimizer"] * divided / divides
        gradient_bytes = measurements.gradient_bytes or 0.0
        num_weights = self.row.stated("num_parameters") or 0.0
        is_half = stage == 3 and self._keys.get("train.precision") in ("fp16", "bf16")
        return Job(
            input_s=waits_s,
            forward_s=phase_s["forward"] * share / was,
            backward_s=phase_s["backward"] * share / was,
            own_s=optimizer_s + phase_s.get("other", 0.0),
            gradient_bytes=gradient_bytes,
            weight_bytes=num_weights * (2 if is_half else 4),
            num_messages=_NUM_BLOCKS if stage == 3 else max(1, ceil(4 * num_weights / _MESSAGE_BYTES)),
            algorithm=algorithm,
            stage=stage,
            overlap=overlap,
        )


# ---------------------------------------------------------------------------------------------- the machine


def _machine(
    links: Links | None, measurements: Measurements, wanted: Wanted, most_ranks: int
) -> tuple[Machine, str, tuple[str, ...]]:
    """(the machine, where its links are from, what was assumed)"""
    per_node = wanted.ranks_per_node or measurements.ranks_per_node or 1
    inside, between = (links.inside, links.between) if links else (None, None)
    sources = [links.source] if links else []
    if wanted.latency_s is not None or wanted.bytes_per_s is not None:
        between = _given_link(wanted, between)
        sources.append("the links between nodes as given")
    if most_ranks > per_node and between is None:
        raise UserError(
            f"{plural(most_ranks, 'rank')} need several nodes, and nothing is known of the links between them",
            "Give them: --latency 2us --bandwidth 12.5GB/s; or measure them on 2 nodes: hpc-train bench allreduce.",
        )
    used = inside or between
    if used is None:
        raise UserError(
            "nothing is known of the cost of a message", "Measure it: hpc-train bench allreduce, and --network FILE."
        )
    assumed = []
    if inside is None and per_node > 1:
        assumed.append("messages within a node cost as much as those between nodes")
    if inside and between and between.s_per_byte < inside.s_per_byte:
        assumed.append("messages between nodes are no faster than those within one")
    machine = Machine(per_node, used, between or used, links.overhead_s if links else 0.0)
    return machine, ", ".join(sources), tuple(assumed)


def _machine_as_run(source: "_JobSource", measurements: Measurements, path: Path | None) -> Machine | None:
    """The machine of the measured runs; None if its links were not measured."""
    if path is None:
        return None
    links = read_links(path, source.strategy(source.stage), source.usual_algorithm(source.stage))
    per_node = measurements.ranks_per_node or 1
    if (links.inside is None and per_node > 1) or (links.between is None and source.row.size > per_node):
        return None
    return _machine(links, measurements, Wanted(), source.row.size)[0]


def _given_link(wanted: Wanted, measured: Link | None) -> Link:
    if (wanted.latency_s is None or wanted.bytes_per_s is None) and measured is None:
        raise UserError("a link needs both its latency and its bandwidth", "Give --latency and --bandwidth.")
    latency_s = wanted.latency_s if wanted.latency_s is not None else measured.latency_s if measured else 0.0
    s_per_byte = 1 / wanted.bytes_per_s if wanted.bytes_per_s else measured.s_per_byte if measured else 0.0
    return Link(latency_s, s_per_byte)


# ---------------------------------------------------------------------------------------------- the overlap


def _overlap(source: _JobSource, machine: Machine | None, noise: Noise) -> tuple[float, str]:
    """(at what share of its rate communication proceeds beside backward, where that is from).

    Such that the simulation tells the exposed communication of the largest measured size, as far as any does.
    """
    row = source.row
    if machine is None or row.size == 1 or not any(row.phase_s.get(phase) for phase in COMMUNICATION):
        return 1.0, "assumed: communication proceeds at its full rate beside backward"

    def exposed_s(overlap: float) -> float:
        job = source.at(row.size, source.stage, source.usual_algorithm(source.stage), overlap)
        return simulate(job, machine, row.size, noise).exposed_s

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if exposed_s(middle) > row.exposed_s else (low, middle)
    return high, f"fitted to the exposed communication on {row.size} ranks"

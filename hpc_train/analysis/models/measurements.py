"""Step times by number of ranks: what a model is fitted to. `measurement_table.py` reads them from a CSV file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import dict_at, positive_number
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.errors import UserError
from hpc_train.core.records import FloatArray, IntArray

# The backward pass takes two of three operations of a step, and communication can hide behind it: Horovod and DDP send
# each gradient as soon as it is ready. Used if the phases were not measured.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Network:
    """The measured cost of an all-reduce: T = 2(N-1) alpha + 2(N-1)/N S beta for S bytes on N ranks.

    None if nobody measured ranks that share a node (inside), or ranks on several nodes (between).
    """

    alpha_inside_s: float | None
    beta_inside_s_per_byte: float | None
    alpha_between_s: float | None
    beta_between_s_per_byte: float | None
    source: str


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measured step times of one job at n numbers of ranks, ascending. None is unknown."""

    label: str
    ranks: IntArray  # (n,)
    step_s: FloatArray  # (n,)
    error: FloatArray  # (n,) relative standard error of step_s, 0 if unknown
    weak: bool  # weak scaling: the batch of each rank is constant; else the global batch is
    batch: float  # per rank (weak) or global (strong); 1 if a table does not state it
    ranks_per_node: int | None
    joules_per_step: FloatArray  # (n,) of all nodes, nan if missing
    input_s: FloatArray | None = None  # (n,) wait for input per step
    computing_s: FloatArray | None = None  # (n,) of a step, neither waiting for input nor for other ranks
    num_runs: IntArray | None = None  # (n,) of which step_s is the mean; None is one each
    accumulate: IntArray | None = None  # (n,) micro-batches of a rank in a step; None is one each
    job: Mapping[str, Any] | None = None  # what decides how long a step takes (`config.comparable`)
    noise: float | None = None  # relative standard deviation over ranks of a step's useful time
    overlap: float = BACKWARD_SHARE  # the share of computation that communication can hide behind
    gradient_bytes: float | None = None
    network: Network | None = None
    idle_w: float | None = None  # of one node
    energy_quality: str = "measured"
    # What a table states: steps without their batch are "steps", rates without it "rates", of which step_s is the time
    # of one sample (strong) or of one of each rank (weak).
    stated: Literal["both", "steps", "rates"] = "both"
    assumed: tuple[str, ...] = ()  # what a table did not state and the answer depends on
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        return int(self.ranks[-1])

    @property
    def has_no_network(self) -> bool:
        """Whether these sizes say nothing about the cost of communication between nodes."""
        return len(self.ranks) == 1 or not bool((self.nodes(self.ranks) > 1).any())

    def samples(self, ranks: FloatArray | IntArray) -> FloatArray:
        """Samples that all ranks together process in one step."""
        return np.asarray(ranks * self.batch if self.weak else np.full(len(ranks), self.batch), dtype=float)

    def share(self, ranks: FloatArray | IntArray) -> FloatArray:
        """Samples of the fullest rank in a step, relative to those at the smallest measured size."""
        return np.asarray(self._per_rank(ranks) / self._per_rank(self.ranks[:1]))

    def _per_rank(self, ranks: FloatArray | IntArray) -> FloatArray:
        per_rank = self.samples(ranks) / ranks
        # A batch that does not divide evenly gives some ranks a sample more, and all wait for these.
        return np.ceil(per_rank - 1e-9) if self.batch > 1 and not self.weak else per_rank

    def micro_batches(self, ranks: FloatArray | IntArray) -> FloatArray:
        """(n,) of a rank in a step: as measured, else of as many samples as one has at the largest measured size."""
        if self.accumulate is None:
            return np.ones(len(ranks))
        samples = self._per_rank(self.ranks[-1:])[0] / self.accumulate[-1]
        found = np.maximum(np.round(self._per_rank(ranks) / samples), 1.0)
        measured = dict(zip(self.ranks.tolist(), self.accumulate.tolist(), strict=True))
        return np.array([measured.get(size, count) for size, count in zip(ranks.tolist(), found.tolist(), strict=True)])

    @property
    def most_whole_micro_batches(self) -> float:
        """The most ranks whose micro-batches have as many samples as those of the largest measured size."""
        if self.weak or self.accumulate is None:
            return float("inf")
        return self.largest * float(self.accumulate[-1])

    def nodes(self, ranks: FloatArray | IntArray) -> IntArray:
        """Nodes that so many ranks occupy; every rank counts as a node if ranks_per_node is unknown."""
        return np.asarray(-(-np.asarray(ranks, dtype=int) // (self.ranks_per_node or 1)))

    def place(self, ranks: int) -> int | None:
        """The index of a measured size; None if it was not measured."""
        found = np.flatnonzero(self.ranks == ranks)
        return int(found[0]) if len(found) else None

    def repeats(self, index: int) -> int:
        return 1 if self.num_runs is None else int(self.num_runs[index])

    def smallest(self, count: int) -> "Measurements":
        """The `count` smallest sizes alone, to fit a model that has not seen the others."""
        return replace(
            self,
            ranks=self.ranks[:count],
            step_s=self.step_s[:count],
            error=self.error[:count],
            joules_per_step=self.joules_per_step[:count],
            input_s=None if self.input_s is None else self.input_s[:count],
            computing_s=None if self.computing_s is None else self.computing_s[:count],
            num_runs=None if self.num_runs is None else self.num_runs[:count],
            accumulate=None if self.accumulate is None else self.accumulate[:count],
        )


def from_group(group: Group) -> Measurements:
    """The complete rows of a group that have steady steps. Raises `UserError` if there are none."""
    rows = [row for row in group.rows if row.step_s and not row.incomplete]
    if not rows:
        raise UserError(f"{group.label}: no complete run has steady steps", "Plan from runs that reached their end.")
    runs = [run for row in rows for run in row.runs]
    on_several_nodes = _ranks_per_node(run for run in runs if run.summary.num_hosts > 1)
    waits = [row.phase_s.get("data") for row in rows]
    return Measurements(
        label=group.label,
        ranks=np.array([row.size for row in rows]),
        step_s=np.array([row.step_s for row in rows], dtype=float),
        error=np.array([row.step.relative_error if row.step else 0.0 for row in rows]),
        weak=group.weak,
        batch=rows[0].global_batch / rows[0].size if group.weak else rows[0].global_batch,
        # A full node has as many ranks as any run had on one host; a run on a single host may not fill it.
        ranks_per_node=max(on_several_nodes or _ranks_per_node(runs)),
        joules_per_step=np.array([_joules_per_step(row) for row in rows]),
        input_s=None if None in waits else np.array(waits, dtype=float),
        computing_s=_computing_s(rows),
        num_runs=np.array([len(row.runs) for row in rows]),
        accumulate=np.array([row.runs[0].config.train.accumulate for row in rows]),
        job=group.keys,
        noise=_noise(runs),
        overlap=_overlap(rows),
        gradient_bytes=_gradient_bytes(group, rows),
        idle_w=_idle_w(runs),
        energy_quality="estimated" if any(row.energy.quality == "estimated" for row in rows) else "measured",
        notes=tuple(_notes(rows, on_several_nodes)),
    )


def _computing_s(rows: Sequence[Row]) -> FloatArray | None:
    """None if a size did not time its communication, as a recorded loop."""
    if any(row.exposed_share is None and row.size > 1 for row in rows):
        return None
    return np.array([(row.step_s or 0.0) - row.exposed_s - row.phase_s.get("data", 0.0) for row in rows])


def _ranks_per_node(runs: Iterable[Run]) -> list[int]:
    return sorted({-(-run.size // run.summary.num_hosts) for run in runs})


def _joules_per_step(row: Row) -> float:
    return float("nan") if row.joules_per_sample is None else row.joules_per_sample * row.global_batch


def _noise(runs: Sequence[Run]) -> float | None:
    """The mean over the runs on several ranks that know it."""
    measured = [run.load_balance.noise for run in runs if run.size > 1 and run.load_balance is not None]
    known = [value for value in map(positive_number, measured) if value is not None]
    return fmean(known) if known else None


def _overlap(rows: Sequence[Row]) -> float:
    """The backward pass's share of the computation, at the smallest size that timed both passes."""
    for row in rows:
        forward, backward = row.phase_share.get("forward"), row.phase_share.get("backward")
        if forward and backward:
            return backward / (1 - (row.exposed_share or 0.0) - row.phase_share.get("data", 0.0))
    return BACKWARD_SHARE


def _gradient_bytes(group: Group, rows: Sequence[Row]) -> float | None:
    num_parameters = {row.stated("num_parameters") for row in rows}
    count = num_parameters.pop() if len(num_parameters) == 1 else None
    bytes_per_value = 2 if group.keys.get("reduce.compression") in ("fp16", "bf16") else 4
    return None if count is None else count * bytes_per_value


def _idle_w(runs: Sequence[Run]) -> float | None:
    """Watts of an idle node: the mean over the hosts all of whose domains are known."""
    hosts = [domains for run in runs for domains in dict_at(dict_at(run.meta, "energy"), "idle_w").values()]
    totals = []
    for domains in hosts:
        watts = [positive_number(value) for value in domains.values()] if isinstance(domains, dict) else []
        known = [value for value in watts if value is not None]
        if known and len(known) == len(watts):
            totals.append(sum(known))
    return fmean(totals) if totals else None


def _notes(rows: Sequence[Row], on_several_nodes: Sequence[int]) -> list[str]:
    notes = []
    if len(on_several_nodes) > 1:
        counts = " and ".join(map(str, on_several_nodes))
        most = max(on_several_nodes)
        notes.append(f"Runs with {counts} ranks per node are taken together: nodes count {most} each.")
    if any(row.num_servers for row in rows):
        notes.append("A parameter server's ranks are counted with its servers, and the models' rings are not its law.")
    return notes

"""What a prediction starts from: the step time at each number of ranks, out of runs or out of a table."""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import listed, plural
from hpc_train.core.paths import read_text
from hpc_train.core.records import FloatArray, IntArray

# Of forward and backward pass, which take one and two times the same operations, the part that sends can hide behind:
# Horovod and DDP send a gradient as soon as the backward pass has it. Used where the phases were not measured.
BACKWARD_SHARE = 2 / 3
COLUMNS = ("ranks", "step_s", "samples_per_s", "ranks_per_node", "scaling", "joules", "global_batch")
_BOUNDS = {  # of what can be measured
    "ranks": (1, 1e7),
    "step_s": (1e-9, 1e7),
    "samples_per_s": (1e-9, 1e15),
    "ranks_per_node": (1, 1e5),
    "joules": (1e-9, 1e15),
    "global_batch": (1e-3, 1e12),
}
_MOST_SIZES = 256  # leaving each out of a fit in turn is quadratic
_MOST_TABLE_BYTES = 1 << 28
_NEEDED = "A table has the columns ranks and step_s or samples_per_s, one line per number of ranks."


@dataclass(frozen=True)
class Network:
    """What an all-reduce costs, measured: T = 2(N-1) alpha + 2(N-1)/N S beta for S bytes on N ranks.

    None where no measurement was made of ranks that share a node, or of ranks on several.
    """

    alpha_inside_s: float | None
    beta_inside_s_per_byte: float | None
    alpha_between_s: float | None
    beta_between_s_per_byte: float | None
    source: str


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measured step times of one job, by growing number of ranks. None is unknown."""

    label: str
    ranks: IntArray  # (n,)
    step_s: FloatArray  # (n,)
    error: FloatArray  # (n,) relative standard error of step_s, 0 where it is unknown
    weak: bool  # the batch of each rank stays; else the global batch does
    batch: float  # per rank (weak) or global (strong); 1 where a table does not say
    ranks_per_node: int | None
    joules_per_step: FloatArray  # (n,) of all nodes, nan where missing
    input_s: FloatArray | None = None  # (n,) waiting for input in each step
    noise: float | None = None  # standard deviation over ranks of a step's useful time, relative
    overlap: float = BACKWARD_SHARE  # share of the computation behind which communication can hide
    gradient_bytes: float | None = None
    network: Network | None = None
    idle_w: float | None = None  # of one node
    energy_quality: str = "measured"
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        return int(self.ranks[-1])

    @property
    def tells_no_network(self) -> bool:
        """Whether the sizes alone say nothing of what reducing between nodes costs."""
        return len(self.ranks) == 1 or not bool((self.nodes(self.ranks) > 1).any())

    def samples(self, ranks: FloatArray | IntArray) -> FloatArray:
        """Samples that all ranks together train in one step."""
        return np.asarray(ranks * self.batch if self.weak else np.full(len(ranks), self.batch), dtype=float)

    def share(self, ranks: FloatArray | IntArray) -> FloatArray:
        """Samples of one rank in a step, relative to those at the smallest measured size."""
        per_rank = self.samples(ranks) / ranks
        return np.asarray(per_rank / (self.samples(self.ranks[:1])[0] / self.ranks[0]))

    def nodes(self, ranks: FloatArray | IntArray) -> IntArray:
        """Nodes that so many ranks fill; every rank is one where ranks_per_node is unknown."""
        return np.asarray(-(-np.asarray(ranks, dtype=int) // (self.ranks_per_node or 1)))

    def first(self, count: int) -> "Measurements":
        """The `count` smallest sizes alone: what the largest are held out from."""
        inputs = None if self.input_s is None else self.input_s[:count]
        return replace(
            self,
            ranks=self.ranks[:count],
            step_s=self.step_s[:count],
            error=self.error[:count],
            joules_per_step=self.joules_per_step[:count],
            input_s=inputs,
        )


# ---------------------------------------------------------------------------------------------- from runs


def from_group(group: Group) -> Measurements:
    """The complete rows of a group with steady steps. Raises `UserError` where there are none."""
    rows = [row for row in group.rows if row.step_s and not row.incomplete]
    if not rows:
        raise UserError(f"{group.label}: no complete run has steady steps", "Plan from runs that reached their end.")
    timed = [row.step_s or 0.0 for row in rows]
    per_node, notes = _ranks_per_node(rows)
    if any(row.num_servers for row in rows):
        notes.append("A parameter server's ranks are counted with its servers, and the models' rings are not its law.")
    parameters = {row.stated("num_parameters") for row in rows}
    num_parameters = parameters.pop() if len(parameters) == 1 else None
    waits = [row.phase_s.get("data") for row in rows]
    return Measurements(
        label=group.label,
        ranks=np.array([row.size for row in rows]),
        step_s=np.array(timed),
        error=np.array([_relative_error(row) for row in rows]),
        weak=group.weak,
        batch=rows[0].global_batch / rows[0].size if group.weak else rows[0].global_batch,
        ranks_per_node=per_node,
        joules_per_step=np.array([_joules_per_step(row) for row in rows]),
        input_s=None if None in waits else np.array(waits, dtype=float),
        noise=_noise([run for row in rows for run in row.runs]),
        overlap=_overlap(rows),
        gradient_bytes=None if num_parameters is None else num_parameters * _bytes_per_value(group),
        idle_w=_idle_w([run for row in rows for run in row.runs]),
        energy_quality="estimated" if any(row.energy.quality == "estimated" for row in rows) else "measured",
        notes=tuple(notes),
    )


def _relative_error(row: Row) -> float:
    if row.step_interval_s is None or not row.step_s:
        return 0.0
    low, high = row.step_interval_s
    return (high - low) / (2 * 1.96 * row.step_s)


def _ranks_per_node(rows: Sequence[Row]) -> tuple[int | None, list[str]]:
    """How many ranks a full node carries: the most that any run had on one host."""
    seen = {-(-row.size // run.summary.num_hosts) for row in rows for run in row.runs}
    several = {-(-row.size // run.summary.num_hosts) for row in rows for run in row.runs if run.summary.num_hosts > 1}
    if len(several) > 1:
        told = " and ".join(map(str, sorted(several)))
        return max(several), [f"Runs with {told} ranks per node are taken together: nodes count {max(several)} each."]
    return max(several or seen), []


def _joules_per_step(row: Row) -> float:
    if row.joules_per_sample is None:
        return float("nan")
    return row.joules_per_sample * row.global_batch


def _noise(runs: Sequence[Run]) -> float | None:
    """The mean over runs on several ranks of what the balance of their ranks says, where it was computed."""
    known = [positive_number(run.load_balance.noise) for run in runs if run.size > 1 and run.load_balance is not None]
    values = [value for value in known if value is not None]
    return fmean(values) if values else None


def _overlap(rows: Sequence[Row]) -> float:
    """The backward pass's share of the computation, at the smallest size that marked both passes."""
    for row in rows:
        forward, backward = row.phase_share.get("forward"), row.phase_share.get("backward")
        if forward and backward:
            return backward / (1 - (row.exposed_share or 0.0) - row.phase_share.get("data", 0.0))
    return BACKWARD_SHARE


def _bytes_per_value(group: Group) -> int:
    return 2 if group.keys.get("reduce.compression") in ("fp16", "bf16") else 4


def _idle_w(runs: Sequence[Run]) -> float | None:
    """Watts of an idle node, mean over the hosts of which it is known; domains of a host add up."""
    watts = []
    for run in runs:
        energy = run.meta.get("energy")
        by_host = energy.get("idle_w") if isinstance(energy, dict) else None
        for domains in by_host.values() if isinstance(by_host, dict) else ():
            values = [positive_number(value) for value in domains.values()] if isinstance(domains, dict) else []
            if values and None not in values:
                watts.append(sum(value or 0.0 for value in values))
    return fmean(watts) if watts else None


# ---------------------------------------------------------------------------------------------- from a table


def read_table(path: Path, ranks_per_node: int | None = None, network: Network | None = None) -> Measurements:
    """Measurements made elsewhere, as CSV with `COLUMNS`. Lines of one size are averaged, which a note says.

    `ranks_per_node`, where given, stands for the column. Raises `UserError` naming the line and the column.
    """
    rows = _read_rows(path)
    per_node = {int(row["ranks_per_node"]) for row in rows if "ranks_per_node" in row}
    if len(per_node) > 1:
        told = ", ".join(map(str, sorted(per_node)))
        raise UserError(f"{path}: ranks_per_node differs ({told})", "Keep the lines of one kind of node.")
    scaling = {str(row.get("scaling") or "weak") for row in rows}
    if len(scaling) > 1:
        raise UserError(f"{path}: weak and strong scaling in one table", "Make a table of each.")
    weak = scaling == {"weak"}
    layout = ranks_per_node or next(iter(per_node), None)
    batch = _batch(path, rows, weak)
    notes = _table_notes(rows, layout, any("scaling" in row for row in rows))
    lines: dict[int, list[dict[str, str | float]]] = defaultdict(list)
    for row in rows:
        lines[int(row["ranks"])].append(row)
    sizes = sorted(lines)
    if len(sizes) > _MOST_SIZES:
        raise UserError(
            f"{path}: {len(sizes):,} numbers of ranks, and models are fitted to {_MOST_SIZES} at most",
            "Keep the lines of fewer sizes: powers of two, say.",
        )
    by_size = [lines[size] for size in sizes]
    total = [batch * size if weak else batch for size in sizes]
    steps = [[_step_s(row, whole) for row in same] for same, whole in zip(by_size, total, strict=True)]
    joules = [[float(row.get("joules", "nan")) for row in same] for same in by_size]
    return Measurements(
        label=path.name,
        ranks=np.array(sizes),
        step_s=np.array([fmean(each) for each in steps]),
        error=np.array([np.std(each, ddof=1) / fmean(each) / len(each) ** 0.5 if each[1:] else 0.0 for each in steps]),
        weak=weak,
        batch=batch,
        ranks_per_node=layout,
        joules_per_step=np.array([fmean(each) for each in joules]),
        network=network,
        notes=tuple(notes),
    )


def _read_rows(path: Path) -> list[dict[str, str | float]]:
    text = read_text(path, "Give the path of a CSV file.", _MOST_TABLE_BYTES)
    kept = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    if len(kept) < 2:
        raise UserError(f"{path}: no line of measurements", _NEEDED)
    header = [name.strip() for name in _cells(path, *kept[0])]
    if twice := [name for name, num in Counter(header).items() if num > 1 and name in COLUMNS]:
        raise UserError(f"{path}: two columns {twice[0]}", "Keep one of them.")
    if "ranks" not in header:
        raise UserError(f"{path}: no column ranks among {listed(header, 20)}", _NEEDED)
    if "step_s" not in header and "samples_per_s" not in header:
        raise UserError(f"{path}: neither a column step_s nor samples_per_s among {listed(header, 20)}", _NEEDED)
    return [_row(path, number, header, _cells(path, number, line)) for number, line in kept[1:]]


def _cells(path: Path, number: int, line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"{path}:{number} is not a line of CSV: {error}", "Correct the line.") from None


def _row(path: Path, number: int, header: list[str], cells: list[str]) -> dict[str, str | float]:
    if len(cells) != len(header):
        raise UserError(f"{path}:{number}: {len(cells)} cells under {len(header)} columns", "Mend the line.")
    row: dict[str, str | float] = {}
    for name, cell in zip(header, map(str.strip, cells), strict=True):
        if name == "scaling" and cell not in ("weak", "strong", ""):
            raise UserError(f"{path}:{number}: scaling = {cell!r}", "Write weak or strong.")
        if name == "scaling" or name not in COLUMNS or not cell:
            row |= {name: cell} if name == "scaling" else {}
            continue
        row[name] = _number(path, number, name, cell)
    if "ranks" not in row or not ("step_s" in row or "samples_per_s" in row):
        raise UserError(f"{path}:{number}: an empty cell where a measurement is needed", "Fill it, or drop the line.")
    return row


def _number(path: Path, number: int, name: str, cell: str) -> float:
    """A number that can be measured. One beyond is damage, or in another unit."""
    least, most = _BOUNDS[name]
    whole = name in ("ranks", "ranks_per_node")
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not value > 0 or not isfinite(value) or (whole and value != int(value)):
        kind = "a whole number above 0" if whole else "a number above 0"
        raise UserError(
            f"{path}:{number}: {name} = {cell[:40]}, which is not {kind}", "Mend the cell, or drop the line."
        )
    if not least <= value <= most:
        told = f"{path}:{number}: {name} = {cell[:40]}, which is not between {least:g} and {most:g}"
        raise UserError(told, "Mend the cell, or drop the line.")
    return value


def _batch(path: Path, rows: list[dict[str, str | float]], weak: bool) -> float:
    """Samples per rank (weak) or in all (strong); 1 where nothing says."""
    known = ["global_batch" in row for row in rows]
    if not any(known):
        if any("joules" in row for row in rows) and not all("step_s" in row for row in rows):
            raise UserError(
                f"{path}: joules are those of one step, and nothing says how many samples that has",
                "Add a column global_batch, or state step_s.",
            )
        return 1.0
    each = {float(row.get("global_batch", 0.0)) / (float(row["ranks"]) if weak else 1.0) for row in rows}
    if len(each) > 1:
        kept = "per rank (weak scaling)" if weak else "in all (strong scaling)"
        raise UserError(f"{path}: global_batch is not the same {kept} on every line", "State it on every line.")
    return each.pop()


def _step_s(row: dict[str, str | float], samples: float) -> float:
    return float(row["step_s"]) if "step_s" in row else samples / float(row["samples_per_s"])


def _table_notes(rows: list[dict[str, str | float]], layout: int | None, says_scaling: bool) -> list[str]:
    notes = []
    sizes = Counter(int(row["ranks"]) for row in rows)
    for size, num_lines in sorted(sizes.items()):
        if num_lines > 1:
            notes.append(f"{plural(size, 'rank')}: {num_lines} lines, of which the mean is taken.")
    if not says_scaling:
        notes.append("Taken as weak scaling (no column scaling): the batch of each rank stays as ranks are added.")
    if layout is None:
        notes.append(
            "No ranks_per_node: every rank counts as a node, and the cost of leaving a node is not told apart."
            " Add the column, or --ranks-per-node."
        )
    elif uneven := sorted({size for size in sizes if size > layout and size % layout}):
        told = ", ".join(map(str, uneven))
        notes.append(f"{told} ranks do not fill whole nodes of {layout}: the last node is counted whole.")
    return notes

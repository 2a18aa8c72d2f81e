"""Measurements made elsewhere: a CSV table with one line per run, for `hpc-train plan --table`.

The standard library reads it. pyarrow would cost 0.1 s of import (csv: 6 ms) and 170 MB of install for at most a
few hundred lines, and its errors name a block of the file where ours name the line and the column.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from hpc_train.analysis.models.measurements import Measurements, Network
from hpc_train.analysis.stats.repeats import relative_standard_error
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import listed, plural, significant
from hpc_train.core.paths import read_text


@dataclass(frozen=True)
class _Column:
    """A column of numbers. A value outside of [least, most] is damage, or has another unit."""

    name: str
    least: float
    most: float
    is_count: bool = False

    def value(self, cell: str, where: str) -> float:
        """The number in a cell. Raises `UserError` naming `where`, the column and the cell."""
        try:
            value = float(cell)
        except ValueError:
            value = nan
        problem = None
        if not (isfinite(value) and value > 0) or (self.is_count and value != int(value)):
            problem = f"not a {'whole ' if self.is_count else ''}number above 0"
        elif not self.least <= value <= self.most:
            problem = f"not between {self.least:g} and {self.most:g}"
        if problem:
            raise UserError(
                f"{where}: {self.name} = {cell[:40]}, which is {problem}", "Fix the cell, or drop the line."
            )
        return value


NUMBERS = (
    _Column("ranks", 1, 1e7, is_count=True),
    _Column("step_s", 1e-9, 1e7),
    _Column("samples_per_s", 1e-9, 1e15),
    _Column("ranks_per_node", 1, 1e5, is_count=True),
    _Column("joules", 1e-9, 1e15),  # of one step, all nodes; of a whole run beside joules_per_sample
    _Column("joules_per_sample", 1e-12, 1e12),
    _Column("global_batch", 1e-3, 1e12),
    _Column("accumulate", 1, 1e6, is_count=True),
)
_SERIES = "series"  # not read, but a table of several is refused
SCALING = "scaling"  # a column of words: weak or strong
COLUMNS = (*(column.name for column in NUMBERS), SCALING)
_NEEDED = "A table has the columns ranks and step_s or samples_per_s, one line per number of ranks."
_MOST_SIZES = 256  # leaving each out of a fit in turn takes time quadratic in their number
_MOST_BYTES = 1 << 28
# samples_per_s and global_batch / step_s may differ by rounding and by how each was averaged, not by more than this.
_TOLERANCE = 0.05
# The shortest step over that of the smallest size: more ranks with as many samples each are hardly faster, and ranks
# that share a batch are. Between the two nobody can tell.
_LEAST_WEAK, _MOST_STRONG = 0.95, 0.7


@dataclass(frozen=True)
class _Line:
    """One line of the table; None is an empty cell or an absent column."""

    where: str  # path:number
    ranks: int
    step_s: float | None
    samples_per_s: float | None
    ranks_per_node: int | None
    joules: float | None
    global_batch: float | None
    accumulate: int
    scaling: str | None


def read_table(path: Path, ranks_per_node: int | None = None, network: Network | None = None) -> Measurements:
    """Measurements from a CSV file with `COLUMNS`. Lines with the same number of ranks are averaged.

    `ranks_per_node` overrides the column. Raises `UserError` naming the line and the column.
    """
    lines = _read_lines(path)
    weak, assumed = _scaling(path, lines)
    per_node = ranks_per_node or _ranks_per_node(path, lines)
    batch = _batch(path, lines, weak)
    stated = _stated(path, lines)
    if stated == "rates" and network is not None:
        raise UserError(
            f"{path}: --network tells the cost of a step, and nothing says how many samples that has",
            "Add a column global_batch or step_s.",
        )
    by_ranks: dict[int, list[_Line]] = defaultdict(list)
    for line in lines:
        by_ranks[line.ranks].append(line)
    if len(by_ranks) > _MOST_SIZES:
        raise UserError(
            f"{path}: {len(by_ranks):,} numbers of ranks, and models are fitted to {_MOST_SIZES} at most",
            "Keep the lines of fewer sizes: powers of two, say.",
        )
    ranks = sorted(by_ranks)
    times = [_step_times(by_ranks[size], batch * size if weak else batch) for size in ranks]
    return Measurements(
        label=path.name,
        ranks=np.array(ranks),
        step_s=np.array([fmean(each) for each in times]),
        error=np.array([relative_standard_error(each) for each in times]),
        weak=weak,
        batch=batch,
        ranks_per_node=per_node,
        joules_per_step=np.array([_mean_joules(by_ranks[size]) for size in ranks]),
        num_runs=np.array([len(by_ranks[size]) for size in ranks]),
        accumulate=np.array([_accumulate(by_ranks[size]) for size in ranks]),
        network=network,
        stated=stated,
        assumed=(
            *assumed,
            *(() if weak or stated == "both" else ("any number of ranks divides the batch (no column global_batch)",)),
            *(() if per_node else ("every rank is a node (the column ranks_per_node, or --ranks-per-node, says it)",)),
        ),
        notes=tuple(_notes(lines, per_node)),
    )


# ---------------------------------------------------------------------------------------------- lines


def _read_lines(path: Path) -> list[_Line]:
    text = read_text(path, "Give the path of a CSV file.", _MOST_BYTES)
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    if len(numbered) < 2:
        raise UserError(f"{path}: no line of measurements", _NEEDED)
    (number, header), *rest = numbered
    names = _cells(f"{path}:{number}", header)
    _check_header(path, names)
    _check_series(path, names, [_cells(f"{path}:{number}", text) for number, text in rest])
    return [_line(f"{path}:{number}", names, text) for number, text in rest]


def _check_header(path: Path, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1 and name in COLUMNS:
            raise UserError(f"{path}: two columns {name}", "Keep one of them.")
    if "ranks" not in names:
        raise UserError(f"{path}: no column ranks among {listed(names, 20)}", _NEEDED)
    if "step_s" not in names and "samples_per_s" not in names:
        raise UserError(f"{path}: neither a column step_s nor samples_per_s among {listed(names, 20)}", _NEEDED)


def _check_series(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raises `UserError` for a table of several series, as a column of that name tells them."""
    if _SERIES not in names:
        return
    column = names.index(_SERIES)
    found = sorted({row[column] for row in rows if len(row) > column})
    if len(found) > 1:
        raise UserError(
            f"{path}: the column {_SERIES} names {len(found)} of them ({listed(found, 3)}), and a table is one",
            "Copy the header and the lines of one series into a file of its own.",
        )


def _cells(where: str, line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))]
    except csv.Error as error:
        raise UserError(f"{where} is not a line of CSV: {error}", "Correct the line.") from None


def _line(where: str, names: list[str], text: str) -> _Line:
    cells = _cells(where, text)
    if len(cells) != len(names):
        raise UserError(f"{where}: {len(cells)} cells under {len(names)} columns", "Fix the line.")
    filled = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    numbers = {column.name: column.value(filled[column.name], where) for column in NUMBERS if column.name in filled}
    scaling = filled.get(SCALING)
    if scaling not in ("weak", "strong", None):
        raise UserError(f"{where}: scaling = {scaling!r}", "Write weak or strong.")
    if "ranks" not in numbers or not ("step_s" in numbers or "samples_per_s" in numbers):
        raise UserError(f"{where}: an empty cell where a measurement is needed", "Fill it, or drop the line.")
    per_node = numbers.get("ranks_per_node")
    line = _Line(
        where,
        ranks=int(numbers["ranks"]),
        step_s=numbers.get("step_s"),
        samples_per_s=numbers.get("samples_per_s"),
        ranks_per_node=None if per_node is None else int(per_node),
        joules=_step_joules(numbers),
        global_batch=numbers.get("global_batch"),
        accumulate=int(numbers.get("accumulate", 1)),
        scaling=scaling,
    )
    _check_rate(line)
    return line


def _step_joules(numbers: dict[str, float]) -> float | None:
    """Joules of a step. The scaling.csv of a report has joules_per_sample, and its joules are those of a whole run."""
    if "joules_per_sample" not in numbers:
        return numbers.get("joules")
    batch = numbers.get("global_batch")
    return None if batch is None else numbers["joules_per_sample"] * batch


def _check_rate(line: _Line) -> None:
    """Raises `UserError` if a line states a rate that its step time and batch contradict."""
    if line.step_s is None or line.samples_per_s is None or line.global_batch is None:
        return
    expected = line.global_batch / line.step_s
    if abs(line.samples_per_s / expected - 1) > _TOLERANCE:
        raise UserError(
            f"{line.where}: samples_per_s = {significant(line.samples_per_s, 4)}, but global_batch / step_s ="
            f" {line.global_batch:g} / {line.step_s:g} = {significant(expected, 4)}",
            "Correct the wrong one of the three, or remove its column. global_batch counts the samples of all ranks.",
        )


# ---------------------------------------------------------------------------------------------- the table as a whole


def _scaling(path: Path, lines: Sequence[_Line]) -> tuple[bool, tuple[str, ...]]:
    """(whether it is weak, what was assumed): as stated, or as the batches tell, or as the times look.

    Raises `UserError` for both kinds in one table, and for times that look like neither.
    """
    stated = {line.scaling for line in lines if line.scaling}
    if len(stated) > 1:
        raise UserError(f"{path}: weak and strong scaling in one table", "Make a table of each.")
    if stated:
        return stated == {"weak"}, ()
    ranks = np.array([line.ranks for line in lines], dtype=float)
    batches = np.array([_samples_of_a_step(line) for line in lines])
    if np.ptp(ranks) > 0 and not np.isnan(batches).any():
        for weak, alike in ((True, batches / ranks), (False, batches)):
            if np.ptp(alike) <= _TOLERANCE * alike.min():
                return weak, ()
    step_s = np.array([line.step_s or nan for line in lines])
    if np.ptp(ranks) == 0 or np.isnan(step_s).any():
        return True, ("weak scaling (the column scaling says it; rates alone do not)",)
    first_s = step_s[ranks == ranks.min()].mean()
    shortest = min(step_s[ranks == size].mean() for size in np.unique(ranks)) / first_s
    if _MOST_STRONG < shortest < _LEAST_WEAK:
        raise UserError(
            f"{path}: the shortest step is {significant(100 * shortest)}% of that on"
            f" {plural(int(ranks.min()), 'rank')}, which may be weak or strong scaling",
            "Add a column scaling with the word weak (each rank keeps its batch) or strong (all share one batch).",
        )
    weak = shortest >= _LEAST_WEAK
    looks = "steps do not get shorter on more ranks" if weak else "steps get shorter on more ranks"
    return weak, (f"{'weak' if weak else 'strong'} scaling, since {looks} (the column scaling says it)",)


def _samples_of_a_step(line: _Line) -> float:
    """As stated, or as rate and time imply; nan if the line tells neither."""
    if line.global_batch is not None:
        return line.global_batch
    return nan if line.step_s is None or line.samples_per_s is None else line.step_s * line.samples_per_s


def _ranks_per_node(path: Path, lines: Sequence[_Line]) -> int | None:
    known = sorted({line.ranks_per_node for line in lines if line.ranks_per_node is not None})
    if len(known) > 1:
        raise UserError(
            f"{path}: ranks_per_node differs ({', '.join(map(str, known))})", "Keep the lines of one kind of node."
        )
    return known[0] if known else None


def _stated(path: Path, lines: Sequence[_Line]) -> Literal["both", "steps", "rates"]:
    """See `Measurements.stated`. Raises `UserError` for steps on some lines and rates on others, without a batch."""
    if not all(isnan(_samples_of_a_step(line)) for line in lines):
        return "both"
    without = next((line for line in lines if line.step_s is None), None)
    if without is None:
        return "steps"
    if all(line.step_s is None for line in lines):
        return "rates"
    raise UserError(
        f"{without.where}: samples_per_s where other lines have step_s, and nothing says how many samples a step has",
        "Add a column global_batch, or state one of the two on every line.",
    )


def _batch(path: Path, lines: Sequence[_Line], weak: bool) -> float:
    """Samples per rank (weak scaling) or of all ranks (strong scaling), as stated or as steps and rates imply.

    1 if the table tells none. Raises `UserError` if its lines contradict each other.
    """
    batch = _told_batch(path, lines, weak)
    crowded = next((line for line in lines if not weak and batch is not None and line.ranks > batch), None)
    if crowded is not None:
        raise UserError(
            f"{crowded.where}: {plural(crowded.ranks, 'rank')} share a global batch of {significant(batch)}",
            "Correct one of them: a rank needs a sample in every step. global_batch counts the samples of all ranks.",
        )
    return batch or 1.0


def _told_batch(path: Path, lines: Sequence[_Line], weak: bool) -> float | None:
    if all(line.global_batch is None for line in lines):
        has_joules = any(line.joules is not None for line in lines)
        if has_joules and any(line.step_s is None for line in lines):
            raise UserError(
                f"{path}: joules are those of one step, and nothing says how many samples that has",
                "Add a column global_batch, or state step_s.",
            )
        return _implied_batch(lines, weak)
    batches = {(line.global_batch or 0.0) / (line.ranks if weak else 1) for line in lines}
    if len(batches) > 1:
        kept = "per rank (weak scaling)" if weak else "in all (strong scaling)"
        raise UserError(f"{path}: global_batch is not the same {kept} on every line", "State it on every line.")
    return batches.pop()


def _implied_batch(lines: Sequence[_Line], weak: bool) -> float | None:
    """Of step_s x samples_per_s, on the lines that have both; None if none has."""
    implied = [(line, _samples_of_a_step(line) / (line.ranks if weak else 1)) for line in lines]
    known = [(line, batch) for line, batch in implied if not isnan(batch)]
    if not known:
        return None
    first, batch = known[0]
    for line, other in known[1:]:
        if abs(other / batch - 1) > 2 * _TOLERANCE:
            each, kind = (" on each rank", "weak") if weak else ("", "strong")
            raise UserError(
                f"{line.where}: step_s x samples_per_s are {significant(other)} samples{each}, and {significant(batch)}"
                f" in {first.where}, which {kind} scaling keeps",
                "Correct the wrong column, or remove it. samples_per_s counts the samples of all ranks.",
            )
    mean = fmean(batch for _, batch in known)
    return mean if weak else max(float(round(mean)), 1.0)


def _accumulate(lines: Sequence[_Line]) -> int:
    """Micro-batches of a step at one number of ranks. Raises `UserError` if its lines differ."""
    first, *others = lines
    for line in others:
        if line.accumulate != first.accumulate:
            raise UserError(
                f"{line.where}: accumulate = {line.accumulate}, and {first.accumulate} in {first.where}, both on"
                f" {plural(line.ranks, 'rank')}",
                "Keep the lines of one of them.",
            )
    return first.accumulate


def _step_times(lines: Sequence[_Line], num_samples: float) -> list[float]:
    return [line.step_s if line.step_s is not None else num_samples / (line.samples_per_s or nan) for line in lines]


def _mean_joules(lines: Sequence[_Line]) -> float:
    """nan if any line states none."""
    return fmean(nan if line.joules is None else line.joules for line in lines)


def _notes(lines: Sequence[_Line], per_node: int | None) -> list[str]:
    """What was assumed, and which lines were averaged."""
    num_lines = Counter(line.ranks for line in lines)
    notes = [
        f"{plural(size, 'rank')}: {count} lines, of which the mean is taken."
        for size, count in sorted(num_lines.items())
        if count > 1
    ]
    if per_node is None:
        notes.append(
            "No ranks_per_node: the cost of communication between nodes cannot be separated from that within one."
        )
        return notes
    uneven = sorted(size for size in num_lines if size > per_node and size % per_node)
    if uneven:
        sizes = ", ".join(map(str, uneven))
        notes.append(f"{sizes} ranks do not fill whole nodes of {per_node}: the last node is counted whole.")
    return notes

"""validation.csv: the measures of a model on held-out samples, a line for each validation."""

import csv
import io
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path

from hpc_train.core.errors import not_written
from hpc_train.core.rundir import write_atomic

# Ends of the names of measures of which more is better, in small letters, of torchmetrics, too.
_SCORES = ("accuracy", "r2", "skill", "f1", "auroc", "precision", "recall", "score", "kappa", "coef", "index")
_FIRST = ("step", "seconds")  # after so many steps; what it took. A column for each measure follows


def append_validation(path: Path, num_steps: int, measures: dict[str, float], seconds: float) -> None:
    """Adds a line, and the header before the first one. Raises UserError if the disk refuses."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow((*_FIRST, *measures))
    writer.writerow((num_steps, f"{seconds:.6g}", *(f"{value:.9g}" for value in measures.values())))
    try:
        with path.open("a", encoding="ascii") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise not_written(path, error, len(text.getvalue())) from None


def read_validation(path: Path) -> list[dict[str, float]]:
    """The lines, oldest first; lines that a crash cut are left out. Empty if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="ascii", errors="replace", newline="") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    found = []
    for row in rows:
        try:
            found.append(dict(zip(names, map(float, row), strict=True)))
        except ValueError:  # cut, or damaged
            continue
    return found


def best_of(rows: Sequence[dict[str, float]], measure: str) -> dict[str, float]:
    """The first of the rows with the best value: the highest of scores (`_SCORES`), the lowest of losses and errors."""
    sign = -1 if is_score(measure) else 1
    return min(rows, key=lambda row: sign * row[measure] if isfinite(row[measure]) else inf)


def is_score(measure: str) -> bool:
    """Whether more of the measure is better."""
    return measure.lower().endswith(_SCORES)


def keep_validation_until(path: Path, num_steps: int) -> None:
    """Removes what an attempt that is continued from an earlier step wrote after it. Raises UserError."""
    rows = read_validation(path)
    kept = [row for row in rows if row["step"] <= num_steps]
    if len(kept) == len(rows):
        return
    lines = [",".join(rows[0]), *(",".join(f"{value:.9g}" for value in row.values()) for row in kept)]
    write_atomic(path, "\n".join([*lines, ""]))

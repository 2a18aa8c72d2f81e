"""What a run measured on held-out samples while it trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.validation_log import best_of, is_score, read_validation

_LARGEST = 1e30  # a larger number is damage


@dataclass(frozen=True, eq=False)
class RunValidation:
    """The validations of one run, oldest first.

    steps: (V,) after how many steps each was made. seconds: (V,) what it took. values: (V,) of `measure`, which decides
    which state is the best: that of checkpoint.keep_best, else the loss. losses: (V,); () if no loss was measured.
    """

    measure: str
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> tuple[int, float]:
        """(after how many steps, value) of the best; the first of equals."""
        rows = [{"step": step, self.measure: value} for step, value in zip(self.steps, self.values, strict=True)]
        row = best_of(rows, self.measure)
        return int(row["step"]), row[self.measure]

    @property
    def last(self) -> float:
        return self.values[-1]

    @property
    def more_is_better(self) -> bool:
        return is_score(self.measure)


def validation_of(run: RunDir, config: Config) -> RunValidation | None:
    """From validation.csv, without damaged lines; None if the run made none."""
    rows = [row for row in read_validation(run.validation) if _is_sound(row)]
    measure = (config.checkpoint.keep_best or "validation.loss").removeprefix("validation.")
    names = [name for name in (rows[-1] if rows else {}) if name not in ("step", "seconds")]
    if not names:
        return None
    measure = measure if measure in names else names[0]
    rows = [row for row in rows if measure in row]
    return RunValidation(
        measure,
        tuple(int(row["step"]) for row in rows),
        tuple(row["seconds"] for row in rows),
        tuple(row[measure] for row in rows),
        tuple(row["loss"] for row in rows) if all("loss" in row for row in rows) else (),
    )


def best_run(runs: Sequence[RunValidation]) -> RunValidation | None:
    """The run with the best value of the measure that the first one goes by; None without runs."""
    alike = [run for run in runs if run.measure == runs[0].measure]
    sign = -1 if alike and alike[0].more_is_better else 1
    return min(alike, key=lambda run: sign * run.best[1], default=None)


def _is_sound(row: dict[str, float]) -> bool:
    step, seconds = row.get("step", -1.0), row.get("seconds", -1.0)
    return isfinite(step) and isfinite(seconds) and 0 <= step < _LARGEST and 0 <= seconds < _LARGEST

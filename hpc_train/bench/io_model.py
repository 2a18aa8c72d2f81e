"""The measurements of `bench io`, and how well the storage model T_r = T_w + T_c predicts them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import median
from typing import Any

import numpy as np


@dataclass
class Row:
    """Seconds of each repetition. is_cold: the file was not in the page cache before any read."""

    layout: str
    mode: str
    written: str
    ranks: int
    is_cold: bool = True
    write_s: list[float] = field(default_factory=list)
    transfer_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)


def model(rows: Sequence[Row]) -> dict[str, Any]:
    """How far the model is from the measurements: `model_factor`, and `model_words` that explain it.

    The factor of a row is max(r, 1/r) with r = median T_r / (median T_w + median T_c); `model_factor` is the geometric
    median of all rows. 1: the model is exact.
    """
    ranked = sorted(rows, key=_model_factor)
    factor = exp(median(log(_model_factor(row)) for row in rows))
    num_below = sum(model_ratio(row) < 1 for row in rows)
    words = (
        f"T_r = T_w + T_c is off by a factor of {factor:.1f} in the median of {len(rows)} rows: from "
        f"{_factor_text(ranked[0])} to {_factor_text(ranked[-1])}. Reading took less than that sum in {num_below} rows "
        f"and more in {len(rows) - num_below}."
    )
    return {"model_factor": factor, "model_words": words}


def _model_factor(row: Row) -> float:
    return exp(abs(log(model_ratio(row))))


def _factor_text(row: Row) -> str:
    return f"{_model_factor(row):.1f} ({row.layout}, {row.mode}, ranks: {row.ranks})"


def model_ratio(row: Row) -> float:
    """Measured T_r over T_w + T_c."""
    return median(row.read_s) / (median(row.write_s) + median(row.transfer_s))


def speed_over(row: Row, rows: Sequence[Row], layout: str, what: str) -> float | None:
    """The speed of `row` over that of `layout` on as many ranks in its fastest mode; the median of repetitions.

    what: "write_s" or "read_s".
    """
    raw = [getattr(other, what) for other in rows if other.layout == layout and other.ranks == row.ranks]
    ratios = [median(np.divide(seconds, getattr(row, what)).tolist()) for seconds in raw]
    return min(ratios, default=None)


def spread(seconds: Sequence[float]) -> float:
    """Half the interquartile range, relative to the median."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return float((high - low) / 2 / middle)

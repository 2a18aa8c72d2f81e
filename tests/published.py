"""Published scaling series, of which the models' constants were estimated and on which they are tested."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.core.records import FloatArray, IntArray

FOLDER = Path(__file__).parent / "scaling"
# The sources in two parts, so that constants are chosen on one and judged on the other.
PART_A = ("ramses", "PyTorch/", "MxNet/", "dlperf")
PARTS = ("A", "B")


@dataclass(frozen=True, eq=False)
class Series:
    """Step times of one job at several sizes, in units of its own."""

    name: str
    source: str
    weak: bool
    ranks_per_node: int
    ranks: IntArray
    step_s: FloatArray
    joules: FloatArray

    @property
    def origin(self) -> str:
        """The repository and the first folder: series of one origin are alike."""
        return self.source[:40]

    @property
    def kind(self) -> str:
        what = "other HPC codes" if self.name.startswith("hpc:") else "training"
        return f"{what}, {'weak' if self.weak else 'strong'}"

    @property
    def part(self) -> str:
        return "A" if any(name in self.source for name in PART_A) else "B"

    @cached_property
    def measurements(self) -> Measurements:
        return Measurements(
            label=self.name,
            ranks=self.ranks,
            step_s=self.step_s,
            error=np.zeros(len(self.ranks)),
            weak=self.weak,
            batch=1.0,
            ranks_per_node=self.ranks_per_node,
            joules_per_step=self.joules,
        )

    def num_up_to(self, share: float) -> int:
        """How many sizes are at most this share of the largest."""
        return int((self.ranks <= share * self.ranks[-1] + 1e-9).sum())


def all_series() -> list[Series]:
    return [*_published(), *_weak("horovod-azure", 4), *_weak("dlperf", 8)]


def rows(name: str) -> Iterator[dict[str, str]]:
    lines = (FOLDER / f"{name}.csv").read_text().splitlines()
    return csv.DictReader(line for line in lines if not line.startswith("#"))


def _published() -> list[Series]:
    """Of many sources."""
    by_name: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows("published"):
        by_name[row["series"]].append(row)
    found = []
    for name, lines in by_name.items():
        lines.sort(key=lambda row: int(row["ranks"]))
        weak = lines[0]["scaling"] == "weak"
        times = [_step_s(row, int(row["ranks"]) if weak else 1) for row in lines]
        joules = [float(row["joules"] or "nan") for row in lines]
        ranks, per_node = [int(row["ranks"]) for row in lines], int(lines[0]["ranks_per_node"])
        source = lines[0]["source"]
        found.append(Series(name, source, weak, per_node, np.array(ranks), np.array(times), np.array(joules)))
    return found


def _step_s(row: dict[str, str], samples: int) -> float:
    return float(row["step_s"]) if row["step_s"] else samples / float(row["samples_per_s"])


def _weak(source: str, ranks_per_node: int) -> list[Series]:
    by_key: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in rows(source):
        *key, ranks, samples_per_s = row.values()
        by_key[tuple(key)][int(ranks)] = float(samples_per_s)
    found = []
    for names, rates in by_key.items():
        ranks = np.array(sorted(rates))
        times = np.array([size / rates[size] for size in ranks])
        name = f"train:{source} {' '.join(names)}"
        found.append(Series(name, source, True, ranks_per_node, ranks, times, np.full(len(ranks), np.nan)))
    return found

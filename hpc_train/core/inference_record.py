"""RUN/inference/<utc>-<kind>/record.json: what a trained model was used for, how fast, and at what energy."""

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hpc_train.core.energy_records import NO_METER, Energy, Quality
from hpc_train.core.records import BadRecord
from hpc_train.core.rundir import RunDir, write_atomic

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one start of the command did. num_rows: those whose results were kept. ended: None if it was killed."""

    began: str
    ended: str | None
    num_ranks: int
    hosts: list[str]
    device: str
    num_rows: int
    seconds: float  # from the first row read to the last result kept


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What a caller waits for `batch` predictions: from samples in memory to results in memory."""

    batch: int
    num_threads: int | None  # that compute one call; None on a GPU
    num_calls: int
    p50_s: float
    p95_s: float
    p99_s: float
    samples_per_s: float
    joules_per_sample: float | None
    energy_quality: Quality


@dataclass(frozen=True, kw_only=True)
class InferenceRecord:
    """One use of a trained model. kind: evaluate, predict or latency."""

    kind: str
    run: str
    step: int  # of the checkpoint
    data: str  # the file or the pattern of files
    inputs: str  # the data set
    rows: list[int]  # [first, one after the last] of those that were asked for
    batch: int  # rows that are computed at once
    role: str = ""  # of the rows of an evaluation in training: "trained on", "held out" from it, or ""
    work: list[Work] = field(default_factory=list)
    complete: bool = False
    num_without: int = 0  # rows that have no prediction, since values are missing in them
    measures: dict[str, float | None] = field(default_factory=dict)
    num_measured: int = 0  # rows, or tokens, behind the measures
    num_targets_missing: int = 0  # values, which the measures leave out
    output: str | None = None
    latencies: list[Latency] = field(default_factory=list)
    joules: float | None = None
    energy_quality: Quality = "missing"
    energy_source: str = NO_METER
    program: str = ""
    schema: int = SCHEMA

    @property
    def energy(self) -> Energy:
        return Energy(self.joules, self.energy_quality, self.energy_source)

    @property
    def num_rows(self) -> int:
        """Rows whose results were kept."""
        return sum(each.num_rows for each in self.work)

    @property
    def samples_per_s(self) -> float | None:
        seconds = sum(each.seconds for each in self.work)
        return self.num_rows / seconds if seconds > 0 and self.num_rows else None

    @property
    def joules_per_sample(self) -> float | None:
        return None if self.joules is None or not self.num_rows else self.joules / self.num_rows

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the quantities that follow from the others; numbers that are not finite become None."""
        derived = {"num_rows": self.num_rows, "samples_per_s": self.samples_per_s}
        measures = {
            name: value if value is not None and isfinite(value) else None for name, value in self.measures.items()
        }
        return asdict(self) | {"measures": measures} | derived | {"joules_per_sample": self.joules_per_sample}


_RECORD = TypeAdapter(InferenceRecord)


def write_record(folder: Path, record: InferenceRecord) -> None:
    """Raises UserError if the disk refuses."""
    write_atomic(folder / "record.json", json.dumps(record.as_dict(), indent=1) + "\n")


def read_records(run: RunDir) -> list[InferenceRecord]:
    """Of every use of the run, the oldest first. Raises `BadRecord` naming a file that is damaged."""
    return [_read(path) for path in sorted(run.inference_dir.glob("*/record.json"))]


def _read(path: Path) -> InferenceRecord:
    try:
        return _RECORD.validate_python(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise BadRecord(f"{path} is no record: {why:.100}", "Remove it, or restore it.") from None

"""Run directories to values: what the comparison and the report start from, crashed runs too."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train import config, rundir
from hpc_train.config import Config
from hpc_train.errors import UserError
from hpc_train.records import (
    PHASES,
    SCHEMA,
    TIMING_COLUMNS,
    BadRecord,
    Energy,
    FloatArray,
    IntArray,
    RunSummary,
    Timings,
    read_energy,
    read_metrics,
    read_timings,
    step_times,
    summarise,
    total_energy,
)
from hpc_train.rundir import RunDir

_LEAVE_OUT = "Move this run's folder out of the report's folder, or name the other runs one by one."
_MOST_RANKS = 10_000_000  # a number beyond is damage, not a run
_ALIGNED = [TIMING_COLUMNS.index("step"), TIMING_COLUMNS.index("warmup")]  # equal on every rank, row by row


@dataclass(frozen=True, eq=False)
class Run:
    """One run as it was recorded. `incomplete` says in words why it is not whole, None when it is."""

    dir: RunDir
    config: Config
    meta: dict[str, Any]
    summary: RunSummary
    step_s: FloatArray  # (steady steps,) the ranks' mean duration of each step
    phases_s: FloatArray  # (len(PHASES),) sums over ranks and steady steps
    metrics: tuple[list[int], list[float]]  # (steps, losses), empty where none were written
    incomplete: str | None

    @property
    def size(self) -> int:
        return self.summary.size

    @property
    def label(self) -> str:
        """The last two parts of the directory's path: the job's name and the stamp of the run."""
        return "/".join(self.dir.path.resolve().parts[-2:])

    @property
    def assumption(self) -> str | None:
        """What the energy estimate rests on, as the run wrote it down."""
        text = section(self.meta, "energy").get("assumption")
        return str(text) if text else None


def section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of meta.json, or {} where the run did not write it."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def load_all(paths: Sequence[Path]) -> list[Run]:
    """The runs at or below `paths`, each once. Raises `UserError` for a path with none and for a bad record.

    A folder that an earlier report was written to is passed over, so that `runs/*` may be given twice.
    """
    wanted = [path for path in paths if not _is_report(path)]
    return [load(run) for run in rundir.find(wanted or list(paths))]


def _is_report(path: Path) -> bool:
    return (path / "report.html").is_file() and not rundir.is_run(path)


def load(run: RunDir) -> Run:
    """Reads one run directory, one rank's records at a time.

    The summary is rebuilt from the timings as the ranks themselves make it: each step's mean over ranks, phases
    summed over them. A crashed run counts up to the last step that every rank recorded. Raises `UserError`
    naming the file, `BadRecord` naming path:line.
    """
    meta = _read_meta(run)
    settings = _read_config(run)
    written = _read_json(run.summary) if run.summary.is_file() else None
    step_ns, phases_ns, num_samples, num_warmup, faults = _reduce_ranks(run, meta["size"])
    if written is None:
        faults.insert(0, "no summary.json, the run did not reach its end or is still running")
    elif not written.get("complete"):
        faults.insert(0, "summary.json says that the run did not reach its end")
    num_steps = len(step_ns) + num_warmup
    if faults:
        faults.append(f"{num_steps} of {settings.train.steps} steps can be used")
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else ([], [])
    loss = _number((written or {}).get("loss"))
    summary = summarise(
        name=str(meta.get("name", settings.name)),
        size=meta["size"],
        num_hosts=len(meta["hosts"]),
        global_batch=settings.train.batch_size(meta["size"]),
        step_ns=step_ns,
        phases_ns=phases_ns,
        num_samples=num_samples,
        num_warmup=num_warmup,
        energy=_energy(run, meta["hosts"]),
        loss=loss if loss is not None else next(iter(metrics[1][-1:]), None),
        test_accuracy=_number((written or {}).get("test_accuracy")),
        complete=not faults,
    )
    why = "; ".join(faults) or None
    return Run(run, settings, meta, summary, step_ns / 1e9, phases_ns / 1e9, metrics, why)


def _reduce_ranks(run: RunDir, size: int) -> tuple[FloatArray, IntArray, int, int, list[str]]:
    """(step_ns, phases_ns, num_samples, num_warmup, faults) over ranks and their common steps."""
    present = [rank for rank in range(size) if run.timings(rank).is_file()]
    missing = sorted(set(range(size)) - set(present))
    faults = [f"no timings of {_ranks(missing)}"] if missing else []
    counts = [_num_rows(run.timings(rank)) for rank in present]
    common = min(counts, default=0)
    if counts and max(counts) > common:
        faults.append(f"ranks recorded {common} to {max(counts)} steps, only the common ones are used")
    aligned: IntArray | None = None
    total = np.zeros(0, np.int64)
    phases = np.zeros(len(PHASES), np.int64)
    num_samples, num_warmup, cut_short = 0, 0, []
    for rank in present:
        whole = read_timings(run.timings(rank))
        timings = Timings(whole.values[:common], whole.truncated)
        if timings.truncated:
            cut_short.append(rank)
        if aligned is None:
            aligned = timings.values[:, _ALIGNED]
        _check_aligned(run.timings(rank), timings, aligned)
        times = step_times(timings)
        total = total + times.step_ns if len(total) else times.step_ns
        phases += times.phases_ns
        num_samples += times.num_samples
        num_warmup = times.num_warmup
    if cut_short:
        faults.append(f"the last line of {_ranks(cut_short)} is cut short")
    return total / max(1, len(present)), phases, num_samples, num_warmup, faults


def _num_rows(path: Path) -> int:
    """Whole lines after the header."""
    with path.open("rb") as file:
        num_lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return max(num_lines - 1, 0)


def _check_aligned(path: Path, timings: Timings, aligned: IntArray) -> None:
    """Every rank takes the same steps: a row of another step than the first rank's is no record."""
    wrong = np.flatnonzero((timings.values[:, _ALIGNED] != aligned).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        raise BadRecord(
            f"{path}:{row + 2}: step {timings['step'][row]} where the first rank has step {aligned[row, 0]}"
            " (or one of them counts it as warm-up)",
            _LEAVE_OUT,
        )


def _ranks(ranks: list[int]) -> str:
    """[0, 3] -> "ranks 0, 3"; a long list is told by its length."""
    named = ", ".join(str(rank) for rank in ranks[:5])
    named += f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def _energy(run: RunDir, hosts: list[str]) -> Energy:
    """The sum over hosts; a host without a file (or with a name that is no file name) makes it missing."""
    readable = [Path(host).name == host and run.energy(host).is_file() for host in hosts]
    return total_energy(read_energy(run.energy(host)) for host in hosts) if all(readable) else Energy()


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}", _LEAVE_OUT) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no JSON object", _LEAVE_OUT)
    return tree


def _read_config(run: RunDir) -> config.Config:
    try:
        return config.load(run.config).config
    except UserError as error:
        raise UserError(f"{run.config}: {error.what}", _LEAVE_OUT) from None


def _read_meta(run: RunDir) -> dict[str, Any]:
    """meta.json with a usable `size` and `hosts`."""
    meta = _read_json(run.meta)
    schema, size, hosts = meta.get("schema"), meta.get("size"), meta.get("hosts")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{run.meta}: schema = {schema!r}, and this hpc-train reads up to {SCHEMA}",
            "Make the report with a newer hpc-train.",
        )
    if not isinstance(size, int) or not 1 <= size <= _MOST_RANKS:
        raise UserError(f"{run.meta}: size = {size!r} is no number of ranks", _LEAVE_OUT)
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) for host in hosts):
        raise UserError(f"{run.meta}: hosts = {hosts!r} is no list of names", _LEAVE_OUT)
    return meta

"""Reads run directories, crashed runs too: what comparisons and reports start from."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.analysis.runs.meta_json import attempts, dict_at, text_at
from hpc_train.analysis.runs.rank_records import LEAVE_OUT, reduce_ranks
from hpc_train.analysis.runs.validation import RunValidation, validation_of
from hpc_train.core import config, rundir
from hpc_train.core.energy_records import Energy, Trace, energy_of_run, read_traces
from hpc_train.core.errors import UserError
from hpc_train.core.paths import read_text
from hpc_train.core.records import SCHEMA, FloatArray, read_metrics
from hpc_train.core.run_summary import RunResult, RunShape, RunSummary, summarise
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import UNKNOWN_STEPS, Config
from hpc_train.core.timing_log import StepTimes

# Larger numbers are damage.
_MOST_RANKS = 10_000_000
_MOST_LACKING, _MOST_LACKING_SHARE = 10_000, 100  # ranks without records, and for each with some
_MOST_COUNTED = 10**15  # steps, samples
_MOST_JSON_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Run:
    """One run as it was recorded."""

    dir: RunDir
    config: Config
    meta: dict[str, Any]
    summary: RunSummary
    step_s: FloatArray  # (steady steps,) the mean duration of each step over the ranks that train
    phases_s: FloatArray  # (len(PHASES),) sums over the ranks that train and steady steps
    servers_s: FloatArray  # (len(PHASES),) the same over the servers, zeros without servers
    metrics: tuple[list[int], list[float]]  # (steps, losses), empty if none were logged
    incomplete: str | None  # why it is incomplete, in words; None if it is complete
    load_balance: LoadBalance | None = None  # None without a steady step
    validation: RunValidation | None = None  # None: the run made none
    copies: tuple[Path, ...] = ()  # other folders with the same run

    @property
    def size(self) -> int:
        return self.summary.size

    @property
    def num_servers(self) -> int:
        """The number of a parameter server's servers: the last ranks, which hold weights and do not train."""
        return self.size - self.config.reduce.num_workers(self.size)

    @property
    def label(self) -> str:
        """The last two parts of the directory's path: the job's name and the stamp of the run."""
        return "/".join(self.dir.path.resolve().parts[-2:])

    @property
    def assumption(self) -> str | None:
        """What the energy estimate assumes, as the run recorded it."""
        text = dict_at(self.meta, "energy").get("assumption")
        return str(text) if text else None


def load_all(paths: Sequence[Path]) -> list[Run]:
    """The runs at or below `paths`, each once. Raises `UserError` for a path without runs or an unreadable run."""
    found = rundir.search(_without_reports(paths))
    return [replace(load(run), copies=tuple(copy.path for copy in copies)) for run, *copies in _originals(found.runs)]


def load_known(paths: Sequence[Path], guard: SectionGuard) -> tuple[list[Run], list[str]]:
    """(the readable runs at or below `paths`, sentences on what was skipped and why).

    Raises `UserError` if no run is readable.
    """
    found = rundir.search(_without_reports(paths))
    runs: list[Run] = []
    errors: list[UserError] = []
    for candidates in _originals(found.runs):
        run, copies = candidates[0], tuple(copy.path for copy in candidates[1:])
        loaded = guard.call(f"the run {run.path}", lambda why: UserError(why, LEAVE_OUT), _tried, run)
        if isinstance(loaded, UserError):
            errors.append(loaded)
        else:
            runs.append(replace(loaded, copies=copies))
    if not runs:
        more = f"\n  (and {len(errors) - 1} more runs that cannot be read)" if len(errors) > 1 else ""
        raise UserError(errors[0].what, errors[0].remedy + more)
    notes = [f"Left out, since it cannot be read: {error.what}." for error in errors]
    inside = {run.path for run in found.runs}  # `load` reports unreadable files in these, if it needs them
    notes += [
        f"Left out: {folder} cannot be looked into: {why}."
        for folder, why in found.unreadable.items()
        if inside.isdisjoint(folder.parents)
    ]
    notes += [f"Passed over: {path} has no meta.json or no timings." for path in found.fragments]
    return runs, notes


def _tried(run: RunDir) -> Run | UserError:
    try:
        return load(run)
    except UserError as error:
        return error


def _without_reports(paths: Sequence[Path]) -> list[Path]:
    """Skips folders of earlier reports, so that `runs/*` may be given again."""
    return [path for path in paths if not _is_report(path)] or list(paths)


def _originals(runs: Sequence[RunDir]) -> list[list[RunDir]]:
    """Each run followed by its copies, which are not read."""
    same: dict[tuple[bytes, bytes], list[RunDir]] = defaultdict(list)
    for run in runs:
        same[_identity(run)].append(run)
    return list(same.values())


def _identity(run: RunDir) -> tuple[bytes, bytes]:
    """Equal for copies only: the metadata, and the first rank's times in nanoseconds."""
    first = run.timings(0)
    try:
        return run.meta.read_bytes(), first.read_bytes() if first.is_file() else bytes(run.path)
    except OSError:  # `load` says why
        return b"", bytes(run.path)


def _is_report(path: Path) -> bool:
    try:
        return (path / "report.html").is_file() and not rundir.is_run(path)
    except (OSError, ValueError):  # `rundir.search` says why
        return False


def load(run: RunDir) -> Run:
    """Reads one run directory, one rank's records at a time.

    The summary is rebuilt from the timings as the ranks compute it: each step's mean over the ranks that train, phases
    summed over them. A crashed run counts up to the last step that every rank recorded. Raises `UserError`
    naming the file, `BadRecord` naming path:line.
    """
    try:
        return _load(run)
    except OSError as error:
        raise UserError(f"{error.filename or run.path} cannot be read: {error.strerror}", LEAVE_OUT) from None


def _load(run: RunDir) -> Run:
    meta = _read_meta(run)
    settings = _read_config(run, meta)
    written = _read_json(run.summary) if run.summary.is_file() else None
    num_attempts = max(1, len(attempts(meta)))
    ranks = reduce_ranks(run, meta, settings.reduce, num_attempts)
    times, faults = ranks.total, ranks.faults
    if written is None:
        outcome = str(meta.get("outcome", ""))  # of an attempt that ended by itself
        stopped = outcome if outcome.startswith("stopped") else "the run did not reach its end or is still running"
        faults.insert(0, f"no summary.json, {stopped}")
    elif not written.get("complete"):
        fault = written.get("fault") or "the run did not reach its end"
        faults.insert(0, f"summary.json says that {fault}")
    elif not faults and (told := _count_of(written, "num_steps")) and times.num_steps < told:
        faults.append(f"the timings of all ranks end early: summary.json counts {told} steps")
    planned = settings.train.steps
    if faults and times.num_steps < planned:
        faults.append(f"{times.num_steps}{'' if planned == UNKNOWN_STEPS else f' of {planned}'} steps can be used")
    if faults:
        times = replace(
            times, num_samples=_num_samples(times, written or {}, settings.reduce.num_workers(meta["size"]))
        )
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else ([], [])
    loss = _number((written or {}).get("loss"))
    shape = RunShape(
        name=text_at(meta, "name") or settings.name,
        size=meta["size"],
        num_hosts=len(meta["hosts"]),
        global_batch=settings.global_batch(meta["size"]),
        num_attempts=num_attempts,
    )
    result = RunResult(
        loss=loss if loss is not None else next(iter(metrics[1][-1:]), None),
        test=_test(written or {}),
        complete=not faults,
    )
    return Run(
        run,
        settings,
        meta,
        summarise(shape, times, _energy(run, meta), result),
        times.mean_step_s,
        times.phases_ns / 1e9,
        ranks.servers_ns / 1e9,
        metrics,
        "; ".join(faults) or None,
        ranks.load_balance,
        validation_of(run, settings),
    )


def _num_samples(times: StepTimes, written: dict[str, Any], num_workers: int) -> int:
    """The samples that an incomplete run's energy was spent on: meters count what ranks without records do, too."""
    if told := _count_of(written, "num_samples"):
        return max(told, times.num_samples)
    return round(times.num_samples * num_workers / max(1, times.num_ranks))


def _count_of(written: dict[str, Any], key: str) -> int | None:
    """A plausible count of a summary."""
    value = written.get(key)
    return value if type(value) is int and 0 < value < _MOST_COUNTED else None


def _test(written: dict[str, Any]) -> dict[str, float]:
    """The test measures of a summary; before schema 3 accuracy was the only one."""
    measures = written.get("test", {"accuracy": written.get("test_accuracy")})
    found = {str(name): _number(value) for name, value in measures.items()} if isinstance(measures, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def host_traces(run: RunDir, meta: dict[str, Any]) -> dict[str, list[Trace]]:
    """The meters' traces of each host of any attempt; [] for a host without a file or with an invalid name."""
    others = [each.get("hosts") for each in attempts(meta)]
    hosts = [*meta["hosts"], *(host for some in others if isinstance(some, list) for host in some)]
    return {
        host: read_traces(run.energy(host)) if Path(host).name == host and run.energy(host).is_file() else []
        for host in dict.fromkeys(map(str, hosts))
    }


def _energy(run: RunDir, meta: dict[str, Any]) -> Energy:
    is_shared = True in dict_at(dict_at(meta, "energy"), "shared").values()
    return energy_of_run(host_traces(run, meta), meta["hosts"], is_shared)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, LEAVE_OUT, _MOST_JSON_BYTES)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", LEAVE_OUT) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no JSON object", LEAVE_OUT)
    return tree


def _read_config(run: RunDir, meta: dict[str, Any]) -> Config:
    """config.toml, its epochs in steps. Raises `UserError` unless at least one of the ranks trains."""
    size = meta["size"]
    try:
        settings = config.load(run.config).config
    except UserError as error:
        raise UserError(f"{run.config}: {error.what}", LEAVE_OUT) from None
    if settings.train.epochs is not None:
        settings = settings.with_num_steps(_count_of(meta, "num_steps") or UNKNOWN_STEPS)
    if settings.reduce.num_workers(size) < 1:
        raise UserError(
            f"{run.config}: reduce.servers = {settings.reduce.servers} leaves none of {size} ranks to train", LEAVE_OUT
        )
    for key, value in (("train.steps", settings.train.steps), ("the global batch", settings.global_batch(size))):
        if value > _MOST_COUNTED:
            raise UserError(f"{run.config}: {key} = {value:.3g} is too large", LEAVE_OUT)
    return settings


def _read_meta(run: RunDir) -> dict[str, Any]:
    """meta.json with a usable `size` and `hosts`."""
    meta = _read_json(run.meta)
    schema, size, hosts = meta.get("schema"), meta.get("size"), meta.get("hosts")
    if type(schema) is not int or not 0 < schema <= SCHEMA:
        raise UserError(
            f"{run.meta}: schema = {_short(schema)}, and this hpc-train reads up to {SCHEMA}",
            "Make the report with a newer hpc-train.",
        )
    if type(size) is not int or not 1 <= size <= _MOST_RANKS:
        raise UserError(f"{run.meta}: size = {_short(size)} is no number of ranks", LEAVE_OUT)
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) for host in hosts):
        raise UserError(f"{run.meta}: hosts = {_short(hosts)} is no list of names", LEAVE_OUT)
    num_files = sum(1 for entry in os.scandir(run.timings_dir) if entry.name.startswith("rank-"))
    if size > _MOST_LACKING + _MOST_LACKING_SHARE * num_files:
        raise UserError(f"{run.meta}: size = {size}, and {run.timings_dir} holds records of {num_files}", LEAVE_OUT)
    return meta


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."

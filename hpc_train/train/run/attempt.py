"""Where a job works: in a new run directory, or in the one that an earlier attempt left unfinished."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_train.core import lock, resume_rules, rundir
from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.lock import Lease
from hpc_train.core.paths import expanded
from hpc_train.core.resume_rules import Change, Rule
from hpc_train.core.rundir import RunDir, is_complete
from hpc_train.core.sampling import Order
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.run.checkpoint.retention import checkpoints, remove_unfinished
from hpc_train.train.run.cleanup import remove_stale_runs, remove_unbegun
from hpc_train.train.run.meta_reader import read_meta


@dataclass(frozen=True)
class Attempt:
    """One job's work on a run. `number` counts from 1; `meta` is what earlier attempts wrote ({} if there were none).

    source: the run whose newest checkpoint is resumed from; another run if the number of ranks changed. changes: the
    keys that differ from that run's. lease: on the run directory; check it before writes that matter.
    """

    run: RunDir
    number: int
    meta: dict[str, Any]
    source: RunDir | None
    changes: list[Change]
    lease: Lease


@contextmanager
def open_attempt(loaded: Loaded, context: Context, resume: str) -> Iterator[Attempt]:
    """Collective. The run directory to work in, created or found, and locked by the root inside the block.

    resume: "never" for a new run; "auto" for the newest unfinished run of this configuration on as many ranks, or else
    a new one; or the path of a run directory. Raises UserError.
    """
    leases: list[Lease] = []  # on the root: the one that sends heartbeats
    with ExitStack() as stack:

        def open_on_root() -> Attempt:
            choice = _choose(loaded.config, context.world.size, resume)
            if choice.source is not None:
                rundir.require_regular_files(choice.source)
            stack.callback(remove_unbegun, choice.run)  # once the lock is released
            leases.append(stack.enter_context(lock.hold(choice.run.lock, log)))
            return _begin(choice, leases[0])

        attempt = context.on_root(open_on_root)
        lease = leases[0] if leases else Lease(attempt.lease.path, attempt.lease.token)
        yield replace(attempt, lease=lease)


def log(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class _Choice:
    """The run to work in, the run to resume from if any, and what differs from that one."""

    run: RunDir
    source: RunDir | None = None
    changes: tuple[Change, ...] = ()


def _begin(choice: _Choice, lease: Lease) -> Attempt:
    """Tidies up after earlier attempts and reads what they wrote. The lock is held."""
    run, source = choice.run, choice.source
    remove_stale_runs(run)
    rundir.make_folders(run)
    rundir.remove_temporaries(run)
    remove_unfinished(run)
    meta = read_meta(run)
    earlier = meta.get("attempts", [])
    if source == run and earlier and earlier[0].get("continues") and not checkpoints(run):
        source = _first_source(run, earlier[0])
    return Attempt(run, len(earlier) + 1, meta, source, list(choice.changes), lease)


def _first_source(run: RunDir, first: dict[str, Any]) -> RunDir:
    """The other run that `run` resumed from, if it was stopped before it had a checkpoint of its own."""
    source = RunDir(Path(first["continues"]))
    if first["first_step"] and not checkpoints(source):
        raise UserError(
            f"{run.path} continues {source.path} from step {first['first_step']}, which holds no checkpoint any more",
            "Restore the checkpoint, or begin another run: --resume never",
        )
    return source


# ------------------------------------------------------------------------------------------------ the directory


def _choose(config: Config, size: int, resume: str) -> _Choice:
    root = expanded(config.run.root)
    if resume == "auto":
        run = _newest_unfinished(root / config.name, config, size)
        return _Choice(run, run) if run else _Choice(_new(root, config, size))
    if resume == "never":
        return _Choice(_new(root, config, size))
    source, changes = resumed(config, expanded(resume))
    is_same_size = _size(source) in (size, None)
    return _Choice(source if is_same_size else _new(root, config, size), source, tuple(changes))


def resumed(config: Config, path: Path) -> tuple[RunDir, list[Change]]:
    """The run in `path`, or the newest below it, and how `config` differs. Raises UserError for what may not differ."""
    below = [] if (path / "config.toml").exists() or not path.is_dir() else rundir.search([path]).runs
    source = max(below, key=_name_of, default=RunDir(path))
    theirs = read_config(source)
    if theirs is None:
        raise UserError(
            f"--resume {source.path} is no run directory: it holds no readable config.toml",
            "Name a folder runs/<name>/<stamp>-np<N>, or say auto or never.",
        )
    return source, resume_rules.check(theirs, config, source.path)


def _newest_unfinished(folder: Path, config: Config, size: int) -> RunDir | None:
    """The newest unfinished run of this very job on `size` ranks. If there is none, logs why others do not count."""
    # Names begin with the time of the start.
    runs = sorted((RunDir(meta.parent) for meta in folder.glob("*/meta.json")), key=_name_of, reverse=True)
    refused = []
    for run in runs:
        why = resume_rules.why_not(run, read_config(run), config, _size(run), size)
        if why is None:
            return run
        refused.append((run.summary.exists(), f"{run.path} is not continued: {why}"))
    if refused:
        log(min(refused, key=lambda each: each[0])[1])  # the newest unfinished one rather than a complete one
        log(f"A new run begins{f' ({len(refused) - 1} more are not continued)' if len(refused) > 1 else ''}")
    return None


def _name_of(run: RunDir) -> str:
    return run.path.name


def _new(root: Path, config: Config, size: int) -> RunDir:
    return rundir.create(root, config.name, size, datetime.now(UTC), JobEnvironment.current().job_id)


def read_config(run: RunDir) -> Config | None:
    """The run's configuration; None if there is none that this version reads."""
    try:
        return load(run.config).config
    except UserError:
        return None


def _size(run: RunDir) -> int | None:
    """The number of ranks of the run; None if no attempt has begun it."""
    return read_meta(run).get("size")


# ------------------------------------------------------------------------------------------------ resuming


def require_first_start(run: RunDir) -> None:
    """For a run without a checkpoint: logs that it starts at step 0. Raises UserError if it is complete."""
    if is_complete(run):
        raise UserError(
            f"{run.path} is complete, but holds no checkpoint to continue from",
            "Restore its folder checkpoints/, or start another run: --resume never",
        )
    log(f"{run.path} holds no checkpoint: training starts at step 0")


_DATA_REMEDIES = {
    "num_samples": "Name the data set that the run began with in data.file, or begin another run.",
    "global_batch": "Set train.global_batch to it (train.batch_per_rank makes it grow with the ranks).",
    "order": "Set data.shuffle_chunks to it, and read the same files (data.memory_mb also decides it).",
}


def check_resumes(manifest: dict[str, Any], expected: dict[str, Any], attempt: Attempt, num_steps: int) -> None:
    """Raises UserError if a checkpoint is of other data or global batches, so that its steps would be other ones, or if
    the run already has the `num_steps` that are asked for and changed keys would have no effect.
    """
    assert attempt.source is not None
    path, step = attempt.source.path, manifest["step"]
    known = {"order": str(Order(0))} | manifest  # older checkpoints do not state it
    for key, remedy in _DATA_REMEDIES.items():
        if known.get(key) != expected[key]:
            raise UserError(f"{key} is {expected[key]} here, and was {known.get(key)} in {path}", remedy)
    if step > num_steps:
        raise UserError(
            f"{num_steps} steps are asked for, and {path} has taken {step} steps already",
            "Set train.steps (or train.epochs) to as many or more, or begin another run: --resume never",
        )
    ignored = _changes_without_effect(attempt.changes, is_complete(attempt.source)) if step == num_steps else []
    if ignored:
        raise UserError(
            f"{path} is complete: {num_steps} steps, and {ignored[0].values} would change nothing",
            f"Set {ignored[0].key} back, raise train.steps or train.epochs to continue with it, or begin another run: "
            "--resume never",
        )


def _changes_without_effect(changes: list[Change], is_tested: bool) -> list[Change]:
    """Those that a run without further steps ignores."""
    has_effect = {Rule.TEST} if not is_tested else set()
    reported = resume_rules.said(changes)
    return [change for change in reported if change.key not in resume_rules.LENGTHS and change.rule not in has_effect]

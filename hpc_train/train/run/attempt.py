"""Where a job works: in a new run directory, or in the one that an earlier attempt left unfinished."""

import json
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
from hpc_train.core.paths import expanded, read_text
from hpc_train.core.resume_rules import Change, Rule
from hpc_train.core.rundir import RunDir
from hpc_train.core.sampling import Order
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.run.checkpoint.retention import checkpoints, remove_unfinished
from hpc_train.train.run.cleanup import remove_stale_runs

_MOST_META_BYTES = 1 << 30  # of thousands of ranks


@dataclass(frozen=True)
class Attempt:
    """One job's work on a run. `number` counts from 1; `meta` is what earlier attempts wrote down ({} if none did).

    source: the run whose newest checkpoint is continued from; another one after a change of the number of ranks.
    changes: the keys that differ from that run's. lease: on the run directory, to be asked before what counts.
    """

    run: RunDir
    number: int
    meta: dict[str, Any]
    source: RunDir | None
    changes: list[Change]
    lease: Lease


@contextmanager
def open_attempt(loaded: Loaded, context: Context, wanted: str) -> Iterator[Attempt]:
    """Collective. The run directory to work in, made or found, and locked by the root until the end.

    wanted: "never" for a new run; "auto" for the newest unfinished run of this configuration on as many ranks, or else
    a new one; or the path of a run directory. Raises UserError.
    """
    held: list[Lease] = []
    with ExitStack() as stack:

        def choose() -> Attempt:
            run, source, changes = _choose(loaded.config, context.world.size, wanted)
            if source is not None:
                rundir.require_regular_files(source)
            lease = stack.enter_context(lock.hold(run.lock, say))
            held.append(lease)
            remove_stale_runs(run)
            rundir.make_folders(run)
            remove_unfinished(run)
            meta = read_meta(run)
            earlier = meta.get("attempts", [])
            if source == run and earlier and earlier[0].get("continues") and not checkpoints(run):
                source = RunDir(Path(earlier[0]["continues"]))  # stopped before it had a checkpoint of its own
                if (first := earlier[0]["first_step"]) and not checkpoints(source):
                    raise UserError(
                        f"{run.path} continues {source.path} from step {first}, and that holds no checkpoint any more",
                        "Restore the checkpoint, or begin another run: --resume never",
                    )
            return Attempt(run, len(earlier) + 1, meta, source, changes, lease)

        attempt = context.on_root(choose)
        yield replace(attempt, lease=held[0] if held else Lease(attempt.lease.path, attempt.lease.token))


def say(line: str) -> None:
    print(line, flush=True)


def _choose(config: Config, size: int, wanted: str) -> tuple[RunDir, RunDir | None, list[Change]]:
    """(the run to work in, the run to continue from or None, what differs from that one)."""
    root = expanded(config.run.root)
    if wanted == "auto":
        run = _newest_unfinished(root / config.name, config, size)
        return (run, run, []) if run else (_new(root, config, size), None, [])
    if wanted == "never":
        return _new(root, config, size), None, []
    run = RunDir(expanded(wanted))
    theirs = read_config(run)
    if theirs is None:
        raise UserError(
            f"--resume {run.path} is no run directory: it holds no readable config.toml",
            "Name a folder runs/<name>/<stamp>-np<N>, or say auto or never.",
        )
    changes = resume_rules.check(theirs, config, run.path)
    return (run if _size(run) in (size, None) else _new(root, config, size)), run, changes


def _newest_unfinished(folder: Path, config: Config, size: int) -> RunDir | None:
    """The newest unfinished run of this very job on `size` ranks. Where there is none, says why others are not."""
    passed = []
    # In the order of their names, which is that of their beginning, the newest first.
    for run in sorted((RunDir(meta.parent) for meta in folder.glob("*/meta.json")), key=_name_of, reverse=True):
        why = resume_rules.why_not(run, read_config(run), config, _size(run), size)
        if why is None:
            return run
        passed.append((run.summary.exists(), f"{run.path} is not continued: {why}"))
    if passed:
        say(min(passed, key=lambda each: each[0])[1])  # the newest unfinished one rather than a complete one
        say(f"A new run begins{f' ({len(passed) - 1} more are not continued)' if len(passed) > 1 else ''}")
    return None


def _name_of(run: RunDir) -> str:
    return run.path.name


def _new(root: Path, config: Config, size: int) -> RunDir:
    return rundir.create(root, config.name, size, datetime.now(UTC), JobEnvironment.current().job_id)


def read_meta(run: RunDir) -> dict[str, Any]:
    """meta.json, {} where no attempt has written it yet. Raises UserError for a damaged entry that is needed."""
    remedy = "Repair it if you know what it held (JSON), or begin another run: --resume never"
    if not run.meta.exists():
        return {}
    try:
        meta = json.loads(read_text(run.meta, remedy, _MOST_META_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{run.meta} cannot be read: {error}", remedy) from None
    if not isinstance(meta, dict):
        raise UserError(f"{run.meta} holds {meta!r:.60}, and no object", remedy)
    for entry, value in _wrong_entries(meta):
        raise UserError(f"{run.meta}: {entry} is {value!r:.60}", remedy)
    return meta


def _wrong_entries(meta: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries that a further attempt works with, and cannot."""
    for entry, kind, default in (("size", int, 1), ("started", str, ""), ("attempts", list, []), ("energy", dict, {})):
        if not isinstance(meta.get(entry, default), kind):
            yield entry, meta[entry]
            return
    for number, attempt in enumerate(meta.get("attempts", [])):
        first = attempt.get("first_step") if isinstance(attempt, dict) else None
        if type(first) is not int or first < 0:
            yield f"attempts[{number}]", attempt
        elif not isinstance(attempt.get("continues"), str | None):
            yield f"attempts[{number}].continues", attempt["continues"]
    for entry in ("meters", "unreadable", "shared", "epoch_s", "idle_w", "foreign_cores"):
        if not isinstance(meta.get("energy", {}).get(entry), dict | None):
            yield f"energy.{entry}", meta["energy"][entry]


def is_complete(run: RunDir) -> bool:
    """Whether the run has a summary that names no fault; one that cannot be read is made again."""
    try:
        summary = json.loads(run.summary.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and not summary.get("fault")


def require_first_start(run: RunDir) -> None:
    """Says that a run without a checkpoint starts at step 0. Raises UserError if it was complete: it had one."""
    if is_complete(run):
        raise UserError(
            f"{run.path} is complete, and it holds no checkpoint to continue from",
            "Restore its folder checkpoints/, or start another run: --resume never",
        )
    say(f"{run.path} holds no checkpoint: training starts at step 0")


def read_config(run: RunDir) -> Config | None:
    """The run's configuration; None where there is none that this version reads."""
    try:
        return load(run.config).config
    except UserError:
        return None


def _size(run: RunDir) -> int | None:
    """The number of ranks of the run; None where none has begun it."""
    return read_meta(run).get("size")


def check_resumes(stated: dict[str, Any], expected: dict[str, Any], attempt: Attempt, num_steps: int) -> None:
    """Raises UserError where a checkpoint was made from other data or global batches, so that its step would mean
    others, and where the `num_steps` that are asked for are taken already and what has changed would change nothing.
    """
    assert attempt.source is not None
    path = attempt.source.path
    remedy = {
        "num_samples": "Name the data set that the run began with in data.file, or begin another run.",
        "global_batch": "Set train.global_batch to it (train.batch_per_rank asks for more on more ranks).",
        "order": "Set data.shuffle_chunks to it, and read the same files (data.memory_mb decides it, too).",
    }
    facts = {"order": str(Order(0))} | stated  # older checkpoints do not state it
    for key, words in remedy.items():
        if facts.get(key) != expected[key]:
            raise UserError(f"{key} is {expected[key]} here, and was {facts.get(key)} in {path}", words)
    if stated["step"] > num_steps:
        raise UserError(
            f"train.steps = {num_steps}, and {path} has taken {stated['step']} steps already",
            "Set train.steps to as many or more, or begin another run: --resume never",
        )
    is_tested = is_complete(attempt.source)
    ignored = [
        change
        for change in resume_rules.said(attempt.changes)
        if change.key != "train.steps" and (is_tested or change.rule is not Rule.TEST)
    ]
    if stated["step"] == num_steps and ignored:
        raise UserError(
            f"{path} is complete: {num_steps} steps, and {ignored[0].values} would change nothing",
            f"Set {ignored[0].key} back, raise train.steps to continue with it, or begin another run: --resume never",
        )

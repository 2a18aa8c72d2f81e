"""Where a job works: in a new run directory, or in the one that an earlier attempt left unfinished."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_train import lock, rundir
from hpc_train.config import Config, Loaded, load, same_job, trajectory
from hpc_train.errors import UserError
from hpc_train.partition import Order
from hpc_train.paths import expanded
from hpc_train.rundir import RunDir
from hpc_train.train import checkpoint
from hpc_train.train.context import Context


@dataclass(frozen=True)
class Attempt:
    """One job's work on a run. `number` counts from 1; `meta` is what earlier attempts wrote down ({} if none did).

    source: the run whose newest checkpoint is continued from; another one after a change of the number of ranks.
    """

    run: RunDir
    number: int
    meta: dict[str, Any]
    source: RunDir | None


@contextmanager
def open_attempt(loaded: Loaded, context: Context, resume: str) -> Iterator[Attempt]:
    """Collective. The run directory to work in, made or found, and locked by the root until the end.

    resume: "never" for a new run; "auto" for the newest unfinished run of this configuration on as many ranks, or else
    a new one; or the path of a run directory. Raises UserError.
    """
    with ExitStack() as stack:

        def choose() -> Attempt:
            run, source = _choose(loaded.config, context.world.size, resume)
            stack.enter_context(lock.held(run.lock, say))
            rundir.make_folders(run)
            checkpoint.clean(run)
            meta = read_meta(run)
            earlier = meta.get("attempts", [])
            if source == run and earlier and earlier[0]["continues"] and not checkpoint.found(run):
                source = RunDir(Path(earlier[0]["continues"]))  # stopped before it had a checkpoint of its own
            return Attempt(run, len(earlier) + 1, meta, source)

        yield context.on_root(choose)


def say(line: str) -> None:
    print(line, flush=True)


def _choose(config: Config, size: int, resume: str) -> tuple[RunDir, RunDir | None]:
    """(the run to work in, the run to continue from or None)."""
    root = expanded(config.run.root)
    if resume == "auto":
        candidates = [run for run in _unfinished(root / config.name) if same_job(read_config(run), config)]
        same = [run for run in candidates if _size(run) == size]
        if same:
            return same[-1], same[-1]
        for run in candidates[-1:]:
            say(f"{run.path} is unfinished on {_size(run)} ranks; to continue it on {size}: --resume {run.path}")
    elif resume != "never":
        run = RunDir(expanded(resume))
        _check_same(run, config)
        if _size(run) in (size, None):
            return run, run
        return _new(root, config, size), run
    return _new(root, config, size), None


def _new(root: Path, config: Config, size: int) -> RunDir:
    return rundir.create(root, config.name, size, datetime.now(UTC), os.environ.get("SLURM_JOB_ID"))


def _unfinished(folder: Path) -> list[RunDir]:
    """Runs below `folder` without a summary, in the order of their names, which is that of their beginning."""
    runs = [RunDir(meta.parent) for meta in folder.glob("*/meta.json")]
    return sorted((run for run in runs if not run.summary.exists()), key=lambda run: run.path.name)


def read_meta(run: RunDir) -> dict[str, Any]:
    """meta.json, {} where no attempt has written it yet. Raises UserError where it is damaged."""
    try:
        meta = json.loads(run.meta.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{run.meta} cannot be read: {error}", "Begin another run: --resume never") from None
    assert isinstance(meta, dict), f"{run.meta} is no object"
    return meta


def read_config(run: RunDir) -> Config | None:
    """The run's configuration; None where there is none that this version reads."""
    try:
        return load(run.config).config
    except UserError:
        return None


def _size(run: RunDir) -> int | None:
    """The number of ranks of the run; None where none has begun it."""
    return read_meta(run).get("size")


def _check_same(run: RunDir, config: Config) -> None:
    """Raises UserError where `run` is no run, or one that another configuration began."""
    theirs = read_config(run)
    if theirs is None:
        raise UserError(
            f"--resume {run.path} is no run directory: it holds no readable config.toml",
            "Name a folder runs/<name>/<stamp>-np<N>, or say auto or never.",
        )
    old, new = trajectory(theirs), trajectory(config)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{key} = {new.get(key)!r}, and {run.path} was begun with {old.get(key)!r}",
                "A run keeps what it trains and on what: set it back, or begin another run (--resume never).",
            )


def check_continues(facts: dict[str, Any], expected: dict[str, Any], source: RunDir) -> None:
    """Raises UserError where a checkpoint was made from other data or global batches: its step would mean others."""
    remedy = {
        "num_samples": "Name the data set that the run began with in data.file, or begin another run.",
        "global_batch": "Set train.global_batch to it (train.batch_per_rank asks for more on more ranks).",
        "order": "Set data.shuffle_chunks to it, and read the same files (data.memory_mb decides it, too).",
    }
    facts = {"order": str(Order(0))} | facts  # older checkpoints do not state it
    for key, words in remedy.items():
        if facts.get(key) != expected[key]:
            raise UserError(f"{key} is {expected[key]} here, and was {facts.get(key)} in {source.path}", words)

"""Which checkpoints a run has, which of them stay, and how one is removed without being seen half-removed."""

import os
import shutil
from pathlib import Path

from hpc_train.core.rundir import RunDir


def checkpoints(run: RunDir) -> list[Path]:
    """The checkpoint folders of a run, the newest first. Only reading one shows whether it is intact."""
    folders = run.checkpoints_dir.glob("step-*")
    return sorted((each for each in folders if each.name[5:].isdecimal()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def remove_old(run: RunDir, num_kept: int, step: int) -> None:
    """Keeps the newest `num_kept` checkpoints up to `step`.

    Later ones were refused when the run resumed from before them: they neither count nor are removed.
    """
    for folder in [each for each in checkpoints(run) if step_of(each) <= step][num_kept:]:
        hidden = hidden_name(folder)  # renamed first: a folder that is half removed must not carry its final name
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def hidden_name(folder: Path) -> Path:
    """Where a checkpoint is moved before it is removed."""
    return folder.with_name(f".{folder.name}.old")


def remove_unfinished(run: RunDir) -> None:
    """Removes what a killed job left half-written or half-removed. Only for the holder of the run's lock."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for folder in run.checkpoints_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def newest_in_words(run: RunDir) -> str:
    """What an error message says of the checkpoints that remain."""
    existing = checkpoints(run)
    return f"The newest checkpoint is still {existing[0].name}." if existing else "There is no older checkpoint."

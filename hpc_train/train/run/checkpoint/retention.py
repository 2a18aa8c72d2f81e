"""Which checkpoints a run has, which of them stay, and how one is removed without being seen half-removed."""

import os
import shutil
from pathlib import Path

from hpc_train.core.rundir import RunDir


def checkpoints(run: RunDir) -> list[Path]:
    """The checkpoints of a run, the newest first: files, and the folders of earlier versions.

    Only reading one shows whether it is intact.
    """
    found = [each for each in run.checkpoints_dir.glob("step-*") if _number(each).isdecimal()]
    return sorted(found, key=lambda path: (step_of(path), path.suffix), reverse=True)


def path_of(run: RunDir, step: int) -> Path:
    """The checkpoint of this step, in whichever format there is one; where it would be if there is none."""
    return next((each for each in checkpoints(run) if step_of(each) == step), run.checkpoint(step))


def step_of(path: Path) -> int:
    return int(_number(path))


def _number(path: Path) -> str:
    return path.name[5:].removesuffix(".h5")


def remove_old(run: RunDir, num_kept: int, step: int, best_step: int | None = None) -> None:
    """Keeps the newest `num_kept` checkpoints up to `step`, and that of `best_step`.

    Later ones were refused when the run resumed from before them: they neither count nor are removed.
    """
    others = [each for each in checkpoints(run) if step_of(each) <= step and step_of(each) != best_step]
    for path in others[num_kept:]:
        remove(path)


def remove(path: Path) -> None:
    """Removes a checkpoint."""
    if not path.is_dir():
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}.old")  # a folder that is half removed must not carry its final name
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(run: RunDir) -> None:
    """Removes what a killed job left half-written or half-removed. Only for the holder of the run's lock."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for path in run.checkpoints_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def newest_in_words(run: RunDir) -> str:
    """What an error message says of the checkpoints that remain."""
    existing = checkpoints(run)
    return f"The newest checkpoint is still {existing[0].name}." if existing else "There is no older checkpoint."

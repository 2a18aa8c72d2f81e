"""Whether data lie on as many servers as they should, and whether the checkpoints of a job will fit."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system, stripe_count
from hpc_train.core.formatting import binary_size
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.doctor.check import Answer, Finding, Subject, Values
from hpc_train.train.comm.context import Context

_STRIPED_BYTES = 1 << 30  # smaller files gain little from more servers
_MODEL_S = 8.0
# ---------------------------------------------------------------------------------------- stripes


def look_stripes(subject: Subject) -> Values:
    """The root's: over how many servers of a Lustre file system the data are spread."""
    data = subject.data_file
    if data is None or not subject.context.world.is_root:
        return {}
    place = next(each for each in (data, *data.parents) if each.exists())
    num_bytes = place.stat().st_size if place.is_file() else None
    kind = file_system(place)
    stripes = stripe_count(place) if kind == "lustre" else None
    return {"place": str(place), "file_system": kind, "stripes": stripes, "bytes": num_bytes}


def judge_stripes(answers: Sequence[Answer]) -> Finding:
    """Whether large data lie on several servers."""
    values = answers[0].values
    if not values:
        return Finding("n/a", "no data file named: hpc-train doctor CONFIG")
    where = f"{values['place']} ({values['file_system']})"
    if values["file_system"] != "lustre":
        return Finding("n/a", f"{where}: nothing to set by users")
    if values["stripes"] is None:
        return Finding(
            "warn",
            f"{where}: lfs does not say over how many servers it is spread",
            "module load lustre   # puts lfs on PATH",
        )
    seen = f"{where}: over {values['stripes']} server{'s' * (values['stripes'] != 1)}"
    if (
        values["stripes"] != 1
        or len(answers) == 1
        or (values["bytes"] is not None and values["bytes"] < _STRIPED_BYTES)
    ):
        return Finding("ok", seen)
    if values["bytes"] is None:
        return Finding(
            "warn",
            f"{seen}, and data are yet to be written there",
            f"lfs setstripe -c 8 {values['place']}   # before hpc-train prepare",
        )
    return Finding(
        "warn",
        f"{seen}, and {len(answers)} ranks read its {binary_size(values['bytes'])}",
        f"lfs migrate -c 8 {values['place']}",
    )


# ---------------------------------------------------------------------------------------- room for checkpoints


def look_room(subject: Subject) -> Values:
    """The root's: bytes of a checkpoint of this job, how many there are at once, and what is free."""
    if subject.config is None or not subject.context.world.is_root:
        return {}
    values: Values = {
        "folder": str(subject.folder),
        "keep": subject.config.checkpoint.keep,
        "error": None,
        "bytes": None,
    }
    disk = os.statvfs(subject.folder)
    values["free"] = disk.f_bavail * disk.f_frsize
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_try_bytes(subject.config)), daemon=True)
    thread.start()
    thread.join(_MODEL_S)
    if found:
        values["bytes"], values["error"], values["remedy"] = found[0]
    return values


def _try_bytes(config: Config | None) -> tuple[int | None, str | None, str]:
    assert config is not None
    try:
        return checkpoint_bytes(config), None, ""
    except UserError as error:
        return None, error.what, error.remedy
    except Exception as error:  # noqa: BLE001  a user's task may raise what it likes: the check failed, not the doctor
        return None, f"{type(error).__name__}: {error}", "Mend task.kind or its model."


def checkpoint_bytes(config: Config) -> int:
    """Of the model's parameters and buffers and the optimizer's state, without making their numbers."""
    import torch
    from torch.overrides import TorchFunctionMode

    from hpc_train.train.tasks import open_task

    class NoNumbers(TorchFunctionMode):
        """Leaves out what changes tensors in place: torch imports its compiler, 2 s, to draw numbers that are none."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            return args[0] if name.endswith("_") and not name.endswith("__") and args else func(*args, **(kwargs or {}))

    task = open_task(config, Context(World()))
    with torch.device("meta"), NoNumbers():
        model = task.model()
    num_bytes = sum(each.nbytes for each in model.state_dict().values())
    train = config.train
    copies = {"sgd": int(train.momentum > 0), "lars": 1, "lamb": 2, "adamw": 2}[train.optimizer]
    return num_bytes + copies * sum(each.nbytes for each in model.parameters())


def judge_room(answers: Sequence[Answer]) -> Finding:
    """Whether the job's checkpoints fit."""
    values = answers[0].values
    if not values:
        return Finding("n/a", "no job named: hpc-train doctor CONFIG")
    if values["error"]:
        return Finding("fail", f"the job would not start: {values['error']}", values["remedy"])
    if values["bytes"] is None:
        return Finding(
            "warn",
            f"the model was not made within {_MODEL_S:g} s: how large a checkpoint is, is not known",
            "hpc-train data info FILE   # how fast it reads",
        )
    if not values["keep"]:
        return Finding("n/a", "checkpoint.keep = 0: none is written")
    needed = values["bytes"] * (values["keep"] + 1)
    one, total, free = (binary_size(num_bytes) for num_bytes in (values["bytes"], needed, values["free"]))
    seen = f"{values['keep']} checkpoints of {one} and one being written: {total}; {free} free on {values['folder']}"
    if needed > values["free"]:
        return Finding("fail", seen, "--set run.root=FOLDER   # with more room, or --set checkpoint.keep=1")
    if needed > values["free"] / 2:
        return Finding(
            "warn", f"{seen}: little more", "--set run.root=FOLDER   # with more room; a quota may be lower still"
        )
    return Finding("ok", seen)

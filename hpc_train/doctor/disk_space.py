"""Disk space for the checkpoints of a job."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import binary_size
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.doctor.check import Answer, Finding, Subject, Values, fail, not_applicable, ok, warn
from hpc_train.train.comm.context import Context

_MODEL_S = 8.0


def probe_disk_space(subject: Subject) -> Values:
    """On the root: bytes of a checkpoint of this job, how many are kept, and free bytes."""
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
    except Exception as error:  # noqa: BLE001  a user's task may raise anything
        return None, f"{type(error).__name__}: {error}", "Fix task.kind or its model."


def checkpoint_bytes(config: Config) -> int:
    """Bytes of parameters, buffers and optimizer state, from a model without data (torch's meta device)."""
    import torch
    from torch.overrides import TorchFunctionMode

    from hpc_train.train.tasks import open_task

    class SkipInPlace(TorchFunctionMode):
        """Skips in-place operations: to initialise meta tensors, torch would import its compiler, which takes 2 s."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            return args[0] if name.endswith("_") and not name.endswith("__") and args else func(*args, **(kwargs or {}))

    task = open_task(config, Context(World()))
    with torch.device("meta"), SkipInPlace():
        model = task.model()
    num_bytes = sum(each.nbytes for each in model.state_dict().values())
    train = config.train
    copies = {"sgd": int(train.momentum > 0), "lars": 1, "lamb": 2, "adamw": 2}.get(train.optimizer, 2)
    return num_bytes + copies * sum(each.nbytes for each in model.parameters())


def evaluate_disk_space(answers: Sequence[Answer]) -> Finding:
    """Whether the job's checkpoints fit."""
    values = answers[0].values
    if not values:
        return not_applicable("no job named: hpc-train doctor CONFIG")
    if values["error"]:
        return fail(f"the job would not start: {values['error']}", values["remedy"])
    if values["bytes"] is None:
        return warn(
            f"the model was not created within {_MODEL_S:g} s, so the size of a checkpoint is unknown",
            "hpc-train data info FILE   # how fast the data are read",
        )
    if not values["keep"]:
        return not_applicable("checkpoint.keep = 0: no checkpoints")
    needed = values["bytes"] * (values["keep"] + 1)
    one, total, free = (binary_size(num_bytes) for num_bytes in (values["bytes"], needed, values["free"]))
    seen = f"{values['keep']} checkpoints of {one} and one in progress: {total}; {free} free on {values['folder']}"
    if needed > values["free"]:
        return fail(seen, "--set run.root=FOLDER   # with more room, or --set checkpoint.keep=1")
    if needed > values["free"] / 2:
        return warn(f"{seen}: hardly more", "--set run.root=FOLDER   # with more room; a quota may be lower still")
    return ok(seen)

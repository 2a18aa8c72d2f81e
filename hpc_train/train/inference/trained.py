"""A run's model as it was trained: which checkpoint, on which device."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import RECORDED, Config
from hpc_train.core.validation_log import best_of, read_validation
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.comm.placement import RankPlacement, crowding_warnings, place_ranks
from hpc_train.train.device import autocast, open_device
from hpc_train.train.run.checkpoint.restore import Plan, Replicated, check_fits, load_newest, plan_model
from hpc_train.train.run.checkpoint.retention import checkpoints, step_of

Log = Callable[[str], None]
ROW_KINDS = ("classification", "regression")  # of tasks that predict something of each row
_AS_TRAINED = (
    *("seed", "task.kind", "task.model", "task.options", "task.num_classes"),
    *("data.normalize", "data.hold_out", "data.hold_out_by"),
)
_READ = ("train.device", "train.precision", "train.threads")


@dataclass(frozen=True)
class Place:
    """Where this rank computes. num_at_once: blocks, each by one thread, so that its bits depend on no other."""

    device: torch.device
    num_at_once: int
    autocast: Callable[[], AbstractContextManager[Any]]
    placements: list[RankPlacement]

    @property
    def name(self) -> str:
        if self.device.type == "cpu":
            return f"cpu, {plural(self.num_at_once, 'thread')} a rank"
        return torch.cuda.get_device_name(self.device)


def open_run(path: Path, overrides: tuple[str, ...]) -> tuple[RunDir, Config]:
    """The newest run at or below `path` and its configuration. Raises UserError."""
    if path.is_file():
        raise UserError(
            f"{path} is a file; RUN is a run directory",
            "Name the run first, then its data: hpc-train predict RUN DATA, hpc-train evaluate RUN --data FILE.",
        )
    run = max(rundir.find([path]), key=lambda run: run.path.name)
    _require_usable(run, overrides, load(run.config).config)
    config = load(run.config, overrides).config
    if config.task.kind == RECORDED:
        raise UserError(
            f"{run.path} recorded the loop of another program, which keeps its model itself",
            "Name a run of hpc-train train.",
        )
    return run, config


def _require_usable(run: RunDir, overrides: tuple[str, ...], config: Config) -> None:
    """Raises UserError for a key that would change what was trained, and for one that nothing reads here."""
    if config.task.kind not in (*ROW_KINDS, "language"):
        return  # other tasks read any key for their tests
    for override in overrides:
        key = override.partition("=")[0].strip()
        if any(key == each or key.startswith(f"{each}.") for each in _AS_TRAINED):
            raise UserError(
                f"--set {key}: a model is used as it was trained, and {run.path} says how", f"Leave --set {key} out."
            )
        section = key.partition(".")[0]
        if config.task.kind in ROW_KINDS and section in ("train", "rl", "reduce", "validation") and key not in _READ:
            raise UserError(
                f"--set {key} has no effect on a trained model",
                f"Leave it out; of train.*, these are read: {', '.join(each.partition('.')[2] for each in _READ)}.",
            )


def open_place(config: Config, context: Context, log: Log) -> Place:
    """Collective. Raises UserError if the device is not there."""
    placements = place_ranks(context, config.train.threads)
    for warning in crowding_warnings(placements):
        log(warning)
    device = context.on_all(partial(open_device, config.train, context.world))
    num = placements[context.world.rank].threads if device.type == "cpu" else 1
    return Place(device, num, autocast(config.train, device), placements)


def choose_step(run: RunDir, config: Config, choice: str | None) -> int | None:
    """The step of the checkpoint to use; None for the newest that is intact. Raises UserError.

    choice: "best", "newest", a number of steps; None for the best if the run keeps one, else the newest.
    """
    there = [step_of(path) for path in checkpoints(run)]
    if not there:
        raise UserError(f"{run.path} has no checkpoint", "It was not saved: train again, with checkpoint.keep = 1.")
    if choice == "newest":
        return None
    if choice in ("best", None):
        keeps_best = config.checkpoint.keep_best
        rows = read_validation(run.validation) if keeps_best else []
        best = int(best_of(rows, keeps_best.removeprefix("validation."))["step"]) if keeps_best and rows else None
        if choice is None:
            return best if best in there else None
        if best is None:
            raise UserError(
                f"--checkpoint best: {run.path} kept no best checkpoint",
                "It needs validation.every_steps and checkpoint.keep_best. Use --checkpoint newest.",
            )
        choice = str(best)
    if not choice.isdecimal() or int(choice) not in there:
        steps = ", ".join(map(str, sorted(there)))
        raise UserError(
            f"--checkpoint {choice}: {run.path} has no such checkpoint",
            f"Say best, newest, or one of the steps {steps}.",
        )
    return int(choice)


def load_model(run: RunDir, model: nn.Module, step: int | None, place: Place, context: Context, log: Log) -> int:
    """Collective. Loads the checkpoint after `step` steps, or the newest intact one; the model is then ready to
    predict, whole on every rank's device. Each rank reads a part of the file. Returns the step. Raises UserError.
    """

    def plan(state: dict[str, Any]) -> Plan:
        wanted, finish = plan_model(model, state["model"])
        return Plan([Replicated(context, wanted)], finish)

    try:
        stated = load_newest(run, context, lambda state, _: check_fits(state, model), plan, log, step)
    except UserError as error:
        raise joint(UserError(error.what, "Name another step (--checkpoint), or another run.")) from None
    if not stated:
        raise joint(UserError(f"{run.path} has no checkpoint of step {step} any more", "Use --checkpoint newest."))
    model.to(place.device).eval()
    return int(stated["step"])

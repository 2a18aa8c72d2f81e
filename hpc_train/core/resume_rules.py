"""What may change between a run and its continuation: a rule for every key of a job file."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hpc_train.core.config import as_dict, flatten
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config, Train


class Rule(Enum):
    """What happens when a run is resumed with another value of a key."""

    REFUSED = "the steps taken so far would belong to another training"
    COMPARED = "the resulting batches are compared with those of the checkpoint"
    UPDATES = "updates from now on use the new value"
    SPEED = "steps may take a different time from now on, and sums be rounded differently; a report mixes them"
    TEST = "the test at the end uses the new value"
    FREE = "no step depends on it"


# The longest prefix of a key decides.
_RULES = {
    "name": Rule.FREE,
    "seed": Rule.REFUSED,
    "data.file": Rule.UPDATES,  # the same file in another folder, such as scratch, is free: see `_rule`
    "data.dataset": Rule.UPDATES,
    "data.options": Rule.UPDATES,  # the same files in another folder, too
    "data.threads": Rule.SPEED,
    "data.inputs": Rule.REFUSED,
    "data.targets": Rule.REFUSED,
    "data.offsets": Rule.REFUSED,
    "data.hold_out": Rule.REFUSED,
    "data.validation_": Rule.FREE,
    "data.missing": Rule.REFUSED,
    "data.normalize": Rule.REFUSED,
    "data.test_": Rule.TEST,
    "data.read": Rule.SPEED,
    "data.memory_mb": Rule.COMPARED,
    "data.shuffle_chunks": Rule.COMPARED,
    "task.": Rule.REFUSED,
    "train.steps": Rule.UPDATES,  # refused if a schedule ends with them: see `_rule`
    "train.epochs": Rule.UPDATES,  # the same
    "train.stop_after": Rule.FREE,
    "train.init_from": Rule.REFUSED,  # what it named is not read again once there is a checkpoint
    "train.freeze": Rule.REFUSED,
    "train.rates": Rule.UPDATES,
    "train.global_batch": Rule.COMPARED,
    "train.batch_per_rank": Rule.COMPARED,
    "train.accumulate": Rule.SPEED,
    "train.optimizer": Rule.REFUSED,
    "train.lr": Rule.UPDATES,
    "train.schedule": Rule.UPDATES,
    "train.momentum": Rule.UPDATES,
    "train.betas": Rule.UPDATES,
    "train.weight_decay": Rule.UPDATES,
    "train.clip_norm": Rule.UPDATES,
    "train.precision": Rule.UPDATES,
    "train.activation_checkpointing": Rule.SPEED,
    "train.compile": Rule.SPEED,
    "train.device": Rule.SPEED,
    "train.timing": Rule.SPEED,
    "train.peak_tflops": Rule.FREE,
    "train.log_every": Rule.FREE,
    "train.warmup_steps": Rule.SPEED,
    "train.threads": Rule.SPEED,
    "train.on_nonfinite": Rule.FREE,  # every skipped update is printed when it happens
    "train.check_weights_every": Rule.SPEED,
    "rl.": Rule.REFUSED,
    "rl.test_episodes": Rule.TEST,
    "reduce.": Rule.SPEED,
    "reduce.compression": Rule.UPDATES,
    "reduce.adasum": Rule.UPDATES,
    "reduce.asynchronous": Rule.UPDATES,
    "reduce.autotune_log_file": Rule.FREE,
    "validation.": Rule.FREE,
    "test.": Rule.TEST,
    "checkpoint.": Rule.FREE,
    "energy.": Rule.FREE,
    "run.": Rule.FREE,
}
LENGTHS = ("train.steps", "train.epochs")
_PRINTED = (Rule.UPDATES, Rule.SPEED, Rule.TEST)


@dataclass(frozen=True)
class Change:
    """A key that differs between the run and the job that resumes it. None: not set."""

    key: str
    before: Any
    now: Any
    rule: Rule

    @property
    def values(self) -> str:
        return f"{self.key} = {self.now!r} here, {self.before!r} in the run"

    def __str__(self) -> str:
        return f"{self.values}: {self.rule.value}"


def changes(before: Config, now: Config) -> list[Change]:
    """Every key that differs, with its rule, sorted by name."""
    old, new = flatten(as_dict(before)), flatten(as_dict(now))
    return [
        Change(key, old.get(key), new.get(key), _rule(key, before, now))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _rule(key: str, before: Config, now: Config) -> Rule:
    if key in LENGTHS and before.train.schedule == now.train.schedule != "constant":
        return Rule.REFUSED
    if key == "data.file" and Path(before.data.file or "").name == Path(now.data.file or "").name:
        return Rule.FREE
    return _RULES[max((each for each in _RULES if key.startswith(each)), key=len)]


def said(all_changes: list[Change]) -> list[Change]:
    """The changes to print: the run resumes, and behaves differently from now on."""
    return [change for change in all_changes if change.rule in _PRINTED]


def same_job(before: Config, now: Config) -> bool:
    """Whether resuming one with the other changes nothing. The data may be in another folder, such as scratch."""
    return before.name == now.name and all(change.rule is Rule.FREE for change in changes(before, now))


def check(before: Config, now: Config, run: Path) -> list[Change]:
    """The changes with which the run in `run` resumes. Raises `UserError` for a change that is refused."""
    found = changes(before, now)
    for change in found:
        if change.rule is Rule.REFUSED:
            raise UserError(f"{run}: {change}", _remedy(change, before))
    return found


def why_not(run: RunDir, before: Config | None, now: Config, size_before: int | None, size: int) -> str | None:
    """Why --resume auto does not resume `run` with the job `now` on `size` ranks; None if it does.

    before: the run's own job; None if it cannot be read.
    """
    state = "complete" if run.summary.exists() else "unfinished"
    if before is None:
        return f"it is {state}, and its config.toml cannot be read. Look at it: hpc-train config show {run.config}"
    differing = [change for change in changes(before, now) if change.rule is not Rule.FREE]
    if differing:
        is_possible = all(change.rule is not Rule.REFUSED for change in differing)
        is_possible &= state == "unfinished" or _is_as_long(before.train, now.train)
        remedy = (
            f"To continue it so: hpc-train train with --resume {run.path}"
            if is_possible
            else "It continues only with its own values"
        )
        return f"it is {state}, and {', '.join(change.values for change in differing)}. {remedy}"
    if state == "complete":
        return "it is complete"
    if size_before != size:
        remedy = f"To continue it on {size}: hpc-train train with --resume {run.path}"
        return f"it is unfinished on {size_before} ranks. {remedy}"
    return None


def _is_as_long(before: Train, now: Train) -> bool:
    """Whether a job trains as long as before; nobody knows how steps compare with epochs before the data are opened."""
    if (before.epochs is None) != (now.epochs is None):
        return True
    return now.steps >= before.steps and (now.epochs or 0) >= (before.epochs or 0)


def _remedy(change: Change, before: Config) -> str:
    anew = "or begin another run: --resume never"
    if change.key in LENGTHS:
        return (
            f"train.schedule = '{before.train.schedule}' ends at {change.key}, and the steps so far led there. "
            f"Set {change.key} back; name what comes after it (--set train.schedule=constant and train.lr); {anew}"
        )
    return f"Set {change.key} back to {change.before!r}, {anew}"

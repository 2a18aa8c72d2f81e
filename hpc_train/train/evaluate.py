"""The measures of a model on samples that it was not trained on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from hpc_train.core.errors import UserError, out_of_memory
from hpc_train.core.import_path import at_user_line, is_import_path
from hpc_train.core.progress import StepProgress
from hpc_train.core.signals import StopRequest
from hpc_train.train.comm.context import Context
from hpc_train.train.data.device_queue import moved
from hpc_train.train.metrics import Sums, add, finished, is_state, tables, total
from hpc_train.train.reduce.reducer import Lockstep, Reducer, broadcast_tensors
from hpc_train.train.setup import Job


@dataclass(frozen=True)
class Measured:
    """The means of a task's measures; {} without samples.

    num_done: the samples of all ranks that count. num_samples: how many were to count, of num_stored; None if the task
    does not say. is_whole: whether all of them do: not after a request to stop. tables: what figures show of them.
    """

    measures: dict[str, float]
    num_done: int
    num_samples: int | None
    num_stored: int | None
    is_whole: bool
    tables: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in self.measures.items())
        of_all = "" if self.num_samples is None else f" of {self.num_samples:,}"
        return f"{self.num_done:,}{of_all} samples" + f": {told}" * bool(told)


@dataclass(frozen=True)
class Watch:
    """Who follows a measurement: a request to stop it, and what makes its progress, told the number of samples."""

    stop: StopRequest | None = None
    progress: Callable[[int | None], StepProgress] | None = None


def evaluate(job: Job, reducer: Reducer, watch: Watch | None = None) -> Measured:
    """Collective. The task's measures on the test samples, each counted once."""
    if not reducer.lockstep:  # a parameter server's workers may be a step apart
        broadcast_tensors(job.model.parameters(), job.context)
    return measure(job, reducer, job.task.test_batches(job.context.world), watch)


def measure(job: Job, reducer: Reducer, batches: Iterable[Any], watch: Watch | None = None) -> Measured:
    """Collective. The task's measures over the `batches` of all ranks. After a signal to any rank it ends early.

    The buffers are the root's afterwards, which the checkpoint holds: running statistics (batch norm) differ between
    ranks.
    """
    broadcast_tensors(job.model.buffers(), job.context)
    rounds = _Rounds(batches, job.context, reducer.lockstep, watch or Watch())
    is_training = job.model.training
    job.model.eval()
    count, sums = 0, Sums()
    with torch.no_grad(), job.autocast():
        for batch in rounds:
            num_counted, measures = _tested(job, moved(batch, job.device))
            count += num_counted
            add(sums, measures)
    job.model.train(is_training)
    everyone = job.context.all_gather((count, sums))
    num_counted, whole = sum(num for num, _ in everyone), total(theirs for _, theirs in everyone)
    measures = job.context.on_all(partial(finished, whole, num_counted))
    num_done = num_counted if rounds.num_samples is None else rounds.num_done
    num_stored = getattr(batches, "num_stored", None)
    return Measured(measures, num_done, rounds.num_samples, num_stored, rounds.is_whole, tables(whole))


def _tested(job: Job, batch: Any) -> tuple[int, dict[str, Any]]:
    """What the task says of a test batch. Raises UserError if a task of the user's own fails or says something else."""
    kind = job.config.task.kind
    if not is_import_path(kind):
        return job.task.test(job.model, batch)
    remedy = "Task.test(model, batch) returns (number of samples, {name: sum over them})."
    try:
        found: Any = job.task.test(job.model, batch)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        told = f"{type(error).__name__}: {error}{at_user_line(error)}"
        raise out_of_memory(error) or UserError(f"task.kind = '{kind}': its test fails: {told}", remedy) from None
    is_pair = isinstance(found, tuple | list) and len(found) == 2
    if not is_pair or not hasattr(found[0], "__index__") or not isinstance(found[1], Mapping):
        said = ", ".join(type(each).__name__ for each in found) if is_pair else type(found).__name__
        raise UserError(f"task.kind = '{kind}': its test returned {said}", remedy)
    for name, value in found[1].items():
        if not (hasattr(value, "__float__") or is_state(value)):
            raise UserError(f"task.kind = '{kind}': its test returned {name} = {value!r:.200}", remedy)
    return found[0], dict(found[1])


@dataclass
class _Rounds:
    """This rank's batches, one in each round of all ranks, until all ranks have had theirs or one is asked to stop.

    num_done: samples of all ranks, and is_whole: whether none is left; both after the last round.
    """

    batches: Iterable[Any]
    context: Context
    lockstep: Lockstep | None
    watch: Watch
    num_done: int = 0
    is_whole: bool = False
    num_samples: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = getattr(self.batches, "num_samples", None)

    def __iter__(self) -> Iterator[Any]:
        """Collective."""
        progress = self.watch.progress(self.num_samples) if self.watch.progress else None
        batches, nothing, before = iter(self.batches), object(), 0
        try:
            while True:
                mine = getattr(batches, "num_done", 0)
                batch = next(batches, nothing)
                state = [batch is not nothing, bool(self.watch.stop), mine]
                num_left, num_stops, self.num_done = self.context.sum(np.array(state, np.int64)).tolist()
                if progress:
                    progress.advance(self.num_done, self.num_done - before, perf_counter_ns())
                    before = self.num_done
                self.is_whole = not num_left
                if self.is_whole or num_stops:
                    return
                if batch is not nothing:
                    yield batch
                elif self.lockstep:
                    self.lockstep.join_forward()
        finally:
            if progress:
                progress.close()

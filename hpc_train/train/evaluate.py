"""The measures of a model on samples that it was not trained on."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hpc_train.train.data.device_queue import moved
from hpc_train.train.reduce.reducer import Lockstep, Reducer, broadcast_tensors
from hpc_train.train.setup import Job


def evaluate(job: Job, reducer: Reducer) -> dict[str, float]:
    """Collective. The means of the task's measures, each test sample counted once; {} without test samples."""
    if not reducer.lockstep:  # a parameter server's workers may be a step apart
        broadcast_tensors(job.model.parameters(), job.context)
    return measure(job, reducer, job.task.test_batches(job.context.world))


def measure(job: Job, reducer: Reducer, batches: Iterable[Any]) -> dict[str, float]:
    """Collective. The means of the task's measures over the `batches` of all ranks; {} if there are none.

    The buffers are the root's afterwards, which the checkpoint holds: running statistics (batch norm) differ between
    ranks.
    """
    broadcast_tensors(job.model.buffers(), job.context)
    is_training = job.model.training
    job.model.eval()
    count, sums = 0, dict[str, float]()
    with torch.no_grad(), job.autocast():
        for batch in _in_lockstep(iter(batches), job, reducer.lockstep) if reducer.lockstep else batches:
            num_counted, measures = job.task.test(job.model, moved(batch, job.device))
            count += num_counted
            sums = {name: sums.get(name, 0.0) + value for name, value in measures.items()}
    job.model.train(is_training)
    return _mean(job.context.all_gather((count, sums)))


def _in_lockstep(batches: Iterator[Any], job: Job, lockstep: Lockstep) -> Iterator[Any]:
    """Collective. The batches of this rank, which then joins the passes of ranks that have more of them."""
    nothing = object()
    while True:
        batch = next(batches, nothing)
        if not any(job.context.all_gather(batch is not nothing)):
            return
        if batch is nothing:
            lockstep.join_forward()
        else:
            yield batch


def _mean(everyone: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """everyone: (count, sums by measure) of each rank, {} on a rank that had no test sample."""
    total = sum(count for count, _ in everyone)
    names = dict.fromkeys(name for _, sums in everyone for name in sums)
    return {name: sum(sums.get(name, 0.0) for _, sums in everyone) / total for name in names} if total else {}

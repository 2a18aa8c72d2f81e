"""The test of a trained model."""

import torch

from hpc_train.train.data.device_queue import moved
from hpc_train.train.reduce.reducer import broadcast_model
from hpc_train.train.setup import Job


def evaluate(job: Job) -> dict[str, float]:
    """Collective. The means of the task's measures, each test sample counted once; {} without test samples."""
    # The root's model, which the checkpoint holds: running statistics (batch norm) differ between ranks.
    broadcast_model(job.model, job.context)
    job.model.eval()
    count, sums = 0, dict[str, float]()
    with torch.no_grad(), job.autocast():
        for batch in job.task.test_batches(job.context.world):
            num_counted, measures = job.task.test(job.model, moved(batch, job.device))
            count += num_counted
            sums = {name: sums.get(name, 0.0) + value for name, value in measures.items()}
    return _mean(job.context.all_gather((count, sums)))


def _mean(everyone: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """everyone: (count, sums by measure) of each rank, {} on a rank that had no test sample."""
    total = sum(count for count, _ in everyone)
    names = dict.fromkeys(name for _, sums in everyone for name in sums)
    return {name: sum(sums.get(name, 0.0) for _, sums in everyone) / total for name in names} if total else {}

"""Validation: the model on samples held out of the training, every so many steps."""

from time import perf_counter_ns

from hpc_train.train.evaluate import measure
from hpc_train.train.reduce.reducer import Reducer
from hpc_train.train.run.recorder import Recorder
from hpc_train.train.setup import Job


class Validation:
    """Called after each step. What it takes belongs to no step, and it changes nothing that training depends on."""

    def __init__(self, job: Job, reducer: Reducer, recorder: Recorder) -> None:
        self._job, self._reducer, self._recorder = job, reducer, recorder
        self._every = job.config.validation.every_steps

    def is_due_after(self, num_steps: int) -> bool:
        return bool(self._every) and num_steps % self._every == 0

    def run(self, num_steps: int) -> None:
        """Collective. Measures the model after `num_steps` steps, and writes a line of validation.csv."""
        began_ns = perf_counter_ns()
        buffers = [buffer.clone() for buffer in self._job.model.buffers()]
        measures = measure(self._job, self._reducer, self._job.task.validation_batches(self._job.context.world))
        for buffer, kept in zip(self._job.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)  # running statistics: each rank continues with its own
        self._recorder.validated(num_steps, measures, (perf_counter_ns() - began_ns) / 1e9)

"""Validation: the model on samples held out of the training, every so many steps; the best state, and when to stop."""

from functools import partial
from time import perf_counter_ns

from hpc_train.core.errors import UserError
from hpc_train.core.validation_log import best_of, read_validation
from hpc_train.train.comm.context import joint
from hpc_train.train.evaluate import Watch, measure
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.run.recorder import Recorder
from hpc_train.train.training_state import TrainingState


class Validation:
    """Called after each step. What it takes belongs to no step, and it changes nothing that training depends on.

    is_over: whether train.stop_after validations in a row were no better than the best.
    """

    def __init__(self, training: TrainingState, recorder: Recorder, saver: Saver) -> None:
        """Collective. After `Recorder.start`: earlier attempts' validations count, those that they repeat do not."""
        config = training.job.config
        self._training, self._recorder, self._saver = training, recorder, saver
        self._every, self._stop_after = config.validation.every_steps, config.train.stop_after
        self._keeps_best = config.checkpoint.keep_best is not None
        self._measure = (config.checkpoint.keep_best or "validation.loss").removeprefix("validation.")
        self._rows = training.job.context.on_root(lambda: read_validation(recorder.run.validation))
        if self._keeps_best and self._rows:
            saver.best_step = self._best_step
        self.is_over = False

    def is_due_after(self, num_steps: int) -> bool:
        return bool(self._every) and num_steps % self._every == 0

    def run(self, num_steps: int) -> None:
        """Collective. Measures the model after `num_steps` steps; saves it if it is the best so far and to be kept."""
        job, began_ns = self._training.job, perf_counter_ns()
        buffers = [buffer.clone() for buffer in job.model.buffers()]
        watch = Watch(progress=partial(self._recorder.measuring, "validation"))
        batches = job.task.validation_batches(job.context.world)
        measures = measure(job, self._training.reducer, batches, watch).measures
        for buffer, kept in zip(job.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)  # running statistics: each rank continues with its own
        if self._measure not in measures:
            raise joint(
                UserError(
                    f"checkpoint.keep_best = 'validation.{self._measure}': there is no such measure",
                    f"Set it to one of {', '.join(f'validation.{name}' for name in measures)}.",
                )
            )
        self._rows.append({"step": num_steps, **measures})
        self._recorder.validated(num_steps, measures, (perf_counter_ns() - began_ns) / 1e9)
        if self._keeps_best and self._best_step == num_steps:
            self._recorder.flush()
            self._saver.best_step = num_steps
            self._saver.save_now(num_steps, self._training.share())
            self._recorder.clock.restart()
        self._end_if_over()

    @property
    def _best_step(self) -> int:
        return int(best_of(self._rows, self._measure)["step"])

    def _end_if_over(self) -> None:
        since_best = [row for row in self._rows if row["step"] > self._best_step]
        if self._stop_after and len(since_best) >= self._stop_after:
            self.is_over = True
            if self._training.job.context.world.is_root:
                self._recorder.log(
                    f"Training ends: no better {self._measure} in {len(since_best)} validations, the best was after "
                    f"{self._best_step} steps"
                )

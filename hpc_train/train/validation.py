"""Validation: the model on samples that it is not trained on, every so often; the best state, and when to stop."""

from fractions import Fraction
from functools import partial
from time import perf_counter_ns

from hpc_train.core.errors import UserError
from hpc_train.core.signals import StopRequest
from hpc_train.core.validation_log import best_of, read_validation
from hpc_train.train.comm.context import joint
from hpc_train.train.evaluate import Watch, measure
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.run.recorder import Recorder
from hpc_train.train.training_state import TrainingState


class Validation:
    """Called after each step. What it takes belongs to no step, and it changes nothing that training depends on.

    is_over: whether train.stop_after validations in a row were no better than the best. was_stopped: by a signal.
    """

    def __init__(self, training: TrainingState, recorder: Recorder, saver: Saver, stop: StopRequest) -> None:
        """Collective. After `Recorder.start`: earlier attempts' validations count, those that they repeat do not."""
        config = training.job.config
        self._training, self._recorder, self._saver, self._stop = training, recorder, saver, stop
        epochs = Fraction(str(config.validation.every_epochs)) * training.job.steps_per_epoch
        by_epochs = int(epochs) if epochs.denominator == 1 else max(epochs, Fraction(1))
        self._every = config.validation.every_steps or by_epochs
        self._stop_after = config.train.stop_after
        self._keeps_best = config.checkpoint.keep_best is not None
        self._measure = (config.checkpoint.keep_best or "validation.loss").removeprefix("validation.")
        self._rows = training.job.context.on_root(lambda: read_validation(recorder.run.validation))
        if self._keeps_best and self._rows:
            saver.best_step = self._best_step
        self.is_over = self.was_stopped = False

    def is_due_after(self, num_steps: int) -> bool:
        """Of parts of an epoch: after the step that completes one."""
        return bool(self._every) and num_steps // self._every > (num_steps - 1) // self._every

    def catch_up(self, num_steps: int) -> None:
        """Collective. Before the first step: the validation that a stop or a crash has kept from its end."""
        if num_steps and self.is_due_after(num_steps) and all(row["step"] != num_steps for row in self._rows):
            self.run(num_steps)
        else:
            self._end_if_over()

    def run(self, num_steps: int) -> None:
        """Collective. Measures the model after `num_steps` steps; saves it if it is the best so far and to be kept.

        A signal ends it without a result: the attempt that resumes has it again.
        """
        job, began_ns = self._training.job, perf_counter_ns()
        buffers = [buffer.clone() for buffer in job.model.buffers()]
        watch = Watch(self._stop, partial(self._recorder.measuring, "validation"))
        measured = measure(job, self._training.reducer, job.task.validation_batches(job.context.world), watch)
        for buffer, kept in zip(job.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)  # running statistics: each rank continues with its own
        if not measured.is_whole:
            self.was_stopped = True
            self._recorder.clock.restart()
            return
        measures = measured.measures
        if self._measure not in measures:
            raise joint(self._no_measure(list(measures)))
        self._rows.append({"step": num_steps, **measures})
        self._recorder.validated(num_steps, measures, (perf_counter_ns() - began_ns) / 1e9)
        if self._keeps_best and self._best_step == num_steps:
            self._recorder.flush()
            self._saver.best_step = num_steps
            self._saver.save_now(num_steps, self._training.share())
            self._recorder.clock.restart()
        self._end_if_over()

    def _no_measure(self, known: list[str]) -> UserError:
        config = self._training.job.config
        if not known:
            return UserError(
                f"{config.validation.in_words}: validation_batches of task.kind = '{config.task.kind}' gives none",
                "Let it give samples to validate on, or leave the key out.",
            )
        return UserError(
            f"checkpoint.keep_best = 'validation.{self._measure}': there is no such measure",
            f"Set it to one of {', '.join(f'validation.{name}' for name in known)}.",
        )

    @property
    def _best_step(self) -> int:
        return int(best_of(self._rows, self._measure)["step"])

    def _end_if_over(self) -> None:
        if not (self._stop_after and self._rows):
            return
        if self._rows[-1]["step"] >= self._training.job.config.train.steps:
            return  # training ends in any case
        since_best = [row for row in self._rows if row["step"] > self._best_step]
        if len(since_best) >= self._stop_after:
            self.is_over = True
            if self._training.job.context.world.is_root:
                self._recorder.log(
                    f"Training ends: no better {self._measure} in {len(since_best)} validations, the best was after "
                    f"{self._best_step} steps"
                )

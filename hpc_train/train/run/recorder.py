"""Writes a run down while it runs: the run directory as the training half sees it."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from hpc_train.core.config import Loaded, dumps
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.output import lost_streams
from hpc_train.core.phase_clock import Clock
from hpc_train.core.progress import StepProgress
from hpc_train.core.records import METRIC_COLUMNS, read_intact_metrics, read_metrics
from hpc_train.core.run_summary import RunResult, RunShape, RunSummary
from hpc_train.core.rundir import sync, write_atomic
from hpc_train.core.settings import UNKNOWN_STEPS
from hpc_train.core.timing_log import TimingLog
from hpc_train.core.validation_log import append_validation, keep_validation_until
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement
from hpc_train.train.energy.node_energy import NodeEnergy
from hpc_train.train.run.attempt import Attempt
from hpc_train.train.run.gather_summary import gather_summary
from hpc_train.train.run.gpu_use import GpuUse
from hpc_train.train.run.meta_writer import MetaWriter, now
from hpc_train.train.run.process_use import ProcessUse, seconds_since_start

_USED = ("time_s", "cpu_s", "read_bytes", "written_bytes")


class Recorder:
    """Times, losses and energy of one attempt at a run, on every rank. Use as a context manager around the loop:

    `start`; in each step the phases of `clock` and `end_step`; after the last step `stop` and, if the run is at its
    end, `finish`. `start`, `stop` and `finish` are collective.
    """

    def __init__(
        self,
        loaded: Loaded,
        context: Context,
        places: list[RankPlacement],
        attempt: Attempt,
        clock: Clock,
        device: torch.device,
    ) -> None:
        """Collective. Takes `energy.idle_s` seconds. device: this rank's, whose use is recorded if it is a GPU."""
        self._loaded, self._context, self._attempt = loaded, context, attempt
        self._train, self.run = loaded.config.train, attempt.run
        self._losses: list[tuple[int, float | torch.Tensor]] = []  # (step, loss), not yet written
        self.num_steps_done = 0  # of the run, earlier attempts included
        self._validation_note = ""  # on the bar, behind the loss
        self._meta = MetaWriter(attempt, context, places)
        self._stack = ExitStack()
        total = None if self._train.steps == UNKNOWN_STEPS else self._train.steps
        self._progress = StepProgress(loaded.config.name, total, loaded.config.run.progress, context.world.is_root)
        self.log = self._progress.log
        self._energy = NodeEnergy(loaded.config.energy, context, places, self.log)
        self._gpu = GpuUse(device)
        self.clock = clock

    def __enter__(self) -> Self:
        self._stack.callback(self._progress.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(UserError) if error else nullcontext():  # the error matters more than a full disk after it
            self._stack.close()

    def start(self, first_step: int, model: nn.Module | None, metadata: dict[str, Any]) -> None:
        """Collective. Writes config.toml and meta.json, starts the meters and, on all ranks together, the first step.

        metadata: entries of meta.json; `global_batch` is required.
        """
        self.num_steps_done = self._first_step = first_step
        self._num_warmup = min(self._train.warmup_steps, (self._train.steps - first_step) // 2)
        self._global_batch = metadata["global_batch"]
        self._context.on_root(self._open_logs)
        facts = {
            "name": self._loaded.config.name,
            "started": self._attempt.meta.get("started", now()),
            "num_parameters": None if model is None else sum(p.numel() for p in model.parameters()),
            **metadata,
        }
        self._meta.write_start(first_step, self._energy.metadata_at_start(), facts)
        rank, host, number = self._context.world.rank, self._context.world.host, self._attempt.number
        self._timings = TimingLog(self.run.timings(rank), number)
        self._stack.callback(self._close_timings)  # after any error, too: recorded steps are kept
        # On other ranks a lease is renewed by their steps, so a thread beside them must not check it.
        check = self._attempt.lease.check if rank == 0 else None
        self._stack.enter_context(self._energy.recorded(self.run.energy(host), number, check))
        self._stack.enter_context(self._gpu)
        self._progress.begin(first_step)
        self._context.barrier()
        self._start_up_s = seconds_since_start()
        self._use_before = ProcessUse.now()
        self.clock.restart()

    def _close_timings(self) -> None:
        if self._attempt.lease.is_lost:
            self._timings.discard()
        self._timings.close()

    def end_step(self, step: int, loss: float | torch.Tensor | None, num_samples: int, num_global: int) -> None:
        """Ends the step's timing and keeps its loss, the global mean; None: unknown.

        A tensor is read only when it is written: each reading makes a GPU's loop wait.
        """
        self._attempt.lease.check()
        record = self.clock.end_step(step, num_samples, warmup=step < self._first_step + self._num_warmup)
        self._timings.write(record)
        if loss is not None:
            self._losses.append((step, loss))
        self.num_steps_done = step + 1
        if step % self._train.log_every == 0:
            self.flush()
            self.log(f"Step {step}" if loss is None else f"Step {step}, Loss: {loss:.5f}")
            self._progress.note = "" if loss is None else f"loss {loss:.5f}{self._validation_note}"
        start_ns = record[1]
        self._progress.advance(step + 1, num_global, start_ns)

    def flush(self) -> None:
        """Writes the steps so far. Before a checkpoint, so that the attempt that resumes from it finds all of them."""
        self._attempt.lease.check()
        self._timings.flush()
        if self._context.world.is_root and self._losses:
            self._attempt.lease.confirm()
            text = _metric_lines(self._losses)
            try:
                with self.run.metrics.open("a", encoding="ascii") as file:
                    file.write(text)
            except OSError as error:
                raise not_written(self.run.metrics, error, len(text)) from None
        self._losses.clear()

    def validated(self, num_steps: int, measures: dict[str, float], seconds: float) -> None:
        """Keeps the measures of the model after `num_steps` steps. The time since the last step belongs to none."""
        self._attempt.lease.check()
        if self._context.world.is_root and measures:
            self._attempt.lease.confirm()
            append_validation(self.run.validation, num_steps, measures, seconds)
            told = ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in measures.items())
            self.log(f"Validation after {num_steps} steps: {told}")
            self._validation_note = f", val. {next(iter(measures.values())):.4g}"
        self.clock.restart()

    def measuring(self, what: str, num_samples: int | None) -> StepProgress:
        """The progress of a measurement of the model, "validation" or "test": beside that of the steps, if they go on.

        num_samples: on how many; None if unknown.
        """
        mode, is_root = self._loaded.config.run.progress, self._context.world.is_root
        above = self._progress if self._progress.is_open else None
        return StepProgress(what, num_samples, mode, is_root, counted="samples", above=above)

    def sync_records(self) -> None:
        """Waits until flushed records are on disk. Raises UserError if another job has the run, or the disk refuses.

        The thread that writes a checkpoint calls it before the checkpoint gets its name: no checkpoint is newer than
        its records.
        """
        self._attempt.lease.confirm()
        for path in (self.run.metrics, self.run.timings(self._context.world.rank)):
            if path.exists():
                sync(path)

    def stop(self, outcome: str, **metadata: Any) -> None:
        """Collective. Closes the logs, stops the meters and records how the attempt ended.

        What follows counts neither as the loop's time nor as its energy.
        """
        self.flush()
        used = self._context.gather(ProcessUse.now().since(self._use_before))
        start_up_s = self._context.gather(self._start_up_s)
        self._stack.close()
        gpu_busy = self._context.gather(self._gpu.busy)
        gpu_used_bytes = self._context.gather(self._gpu.used_bytes)
        lost = {str(rank): streams for rank, streams in enumerate(self._context.gather(lost_streams())) if streams}
        facts = {"outcome": outcome, "last_step": self.num_steps_done - 1, "ended": now(), **metadata}
        facts |= {"output_lost": lost} if lost else {}
        # Of each rank: from the start of its process to this attempt's first step, and from there to the loop's end.
        facts |= {"start_up_s": start_up_s} | {f"loop_{name}": [getattr(rank, name) for rank in used] for name in _USED}
        facts |= {"loop_gpu_busy": gpu_busy, "loop_gpu_used_bytes": gpu_used_bytes}
        self._meta.write_end(self._energy.metadata_at_end(), facts)

    def test_stopped(self, outcome: str, measures: dict[str, float], num_done: int) -> None:
        """Collective, after `stop`. For a test that was stopped on request: meta.json keeps what it found so far."""
        part = {"num_samples": num_done, **measures}
        self._context.on_root(lambda: self._meta.amend({"outcome": outcome, "test_until_stop": part}))

    def finish(
        self, test: dict[str, float], fault: str | None = None, tables: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Collective, after `stop`. Writes summary.json; fault: why a run that reached its end did not succeed.

        tables: of the test's counts, each in a file test_NAME.csv, a row for each class or bin of the true values.
        """
        context, config = self._context, self._loaded.config
        losses = read_metrics(self.run.metrics)[1] if context.world.is_root else []
        shape = RunShape(
            name=config.name,
            size=context.world.size,
            num_hosts=len(self._meta.content.get("hosts", [])),
            global_batch=self._global_batch,
            num_attempts=self._attempt.number,
        )
        loss = losses[-1] if losses else None
        result = RunResult(loss=loss, test=test, complete=fault is None, fault=fault)
        num_workers = config.reduce.num_workers(context.world.size)
        summary = gather_summary(self.run, self._meta.content, shape, result, num_workers, context)
        if summary is not None:
            self._attempt.lease.confirm()
            for name, table in (tables or {}).items():
                header = ",".join(["true", *map(str, range(table.shape[1]))])
                rows = (",".join(map(str, [number, *row])) for number, row in enumerate(table.tolist()))
                write_atomic(self.run.test_table(name), "\n".join([header, *rows, ""]))
            write_atomic(self.run.summary, summary.to_json() + "\n")
            _print_summary(summary, self.run.path)

    def _open_logs(self) -> None:
        """Writes config.toml, and ends metrics.csv before this attempt's first step: each step has one line."""
        self._attempt.lease.confirm()
        self.run.summary.unlink(missing_ok=True)  # of a complete run that is trained further
        self.rewrite(self._loaded, self._losses_so_far())

    def _losses_so_far(self) -> list[tuple[int, float]]:
        """(step, loss) of every step before this attempt's first, each once; warns if some were lost."""
        attempts = self._attempt.meta.get("attempts", [])
        steps = range(attempts[0]["first_step"] if attempts else self.num_steps_done, self.num_steps_done)
        losses = read_intact_metrics(self.run.metrics)
        missing = [step for step in steps if step not in losses]
        if missing:
            self.log(
                f"warning: {self.run.metrics} was cut or damaged: the losses of {len(missing)} steps from "
                f"{missing[0]} to {missing[-1]} are lost. The weights are not: the checkpoint is whole."
            )
        return [(step, losses[step]) for step in steps if step in losses]

    def rewrite(self, loaded: Loaded, losses: Iterable[tuple[int, float]]) -> None:
        """Replaces config.toml and metrics.csv. Only on the root."""
        self._attempt.lease.confirm()
        write_atomic(self.run.config, dumps(loaded))
        keep_validation_until(self.run.validation, self.num_steps_done)
        write_atomic(self.run.metrics, ",".join(METRIC_COLUMNS) + "\n" + _metric_lines(losses))


def _metric_lines(losses: Iterable[tuple[int, float | torch.Tensor]]) -> str:
    return "".join(f"{step},{loss:.9g}\n" for step, loss in losses)


def _print_summary(summary: RunSummary, path: Path) -> None:
    for measure, value in summary.test.items():
        is_usual = value == 0 or 1e-3 <= abs(value) < 1e6
        print(f"Test {measure.replace('_', ' ')}: {value:{'.4f' if is_usual else '.4g'}}")
    if summary.step_s and summary.samples_per_s:
        speed = f"{summary.samples_per_s:,.0f} samples/s"
        print(f"Mean step {summary.step_s * 1e3:.3g} ms, {speed}, {summary.energy}")
    print(f"Run directory: {path}", flush=True)

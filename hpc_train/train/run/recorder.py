"""Writes a run down while it runs: the run directory, seen from the training half."""

import json
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from hpc_train.core.clock import Clock
from hpc_train.core.config import Loaded, dumps
from hpc_train.core.energy_records import DomainEnergy, energy_of_run, read_traces
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.output import lost_streams
from hpc_train.core.progress import StepProgress
from hpc_train.core.records import METRIC_COLUMNS, read_intact_metrics, read_metrics, timing_log
from hpc_train.core.resume_rules import said
from hpc_train.core.run_summary import RunResult, RunShape, summarise
from hpc_train.core.rundir import sync, write_atomic
from hpc_train.core.settings import UNKNOWN_STEPS
from hpc_train.core.timings import StepTimes, read_timings, step_times
from hpc_train.train.comm.clocks import clock_offsets_ns
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement
from hpc_train.train.energy.meters import NodeEnergy
from hpc_train.train.run.attempt import Attempt
from hpc_train.train.run.metadata import run_metadata


class Recorder:
    """Times, losses and joules of one attempt at a run, on every rank. Use as a context manager around the loop:

    `start`, then for each step phases of `clock` and `end_step`, after the last one `stop` and, at the run's end,
    `finish`. `start`, `stop` and `finish` are collective.
    """

    def __init__(
        self, loaded: Loaded, context: Context, places: list[RankPlacement], attempt: Attempt, clock: Clock
    ) -> None:
        """Collective. Takes `energy.idle_s` seconds."""
        self._loaded, self._context, self._places, self._attempt = loaded, context, places, attempt
        self._train, self._run = loaded.config.train, attempt.run
        self._losses: list[tuple[int, float | torch.Tensor]] = []  # (step, loss)
        self.num_steps_done = 0  # of the run, earlier attempts included
        self._meta: dict[str, Any] = dict(attempt.meta)
        self._stack = ExitStack()
        total = None if self._train.steps == UNKNOWN_STEPS else self._train.steps
        self._progress = StepProgress(loaded.config.name, total, loaded.config.run.progress, context.world.is_root)
        self.log = self._progress.log
        self._energy = NodeEnergy(loaded.config.energy, context, places, self.log)
        self.clock = clock

    def __enter__(self) -> Self:
        self._stack.callback(self._progress.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(UserError) if error else nullcontext():  # a full disk, after what has ended the run
            self._stack.close()

    def start(self, first_step: int, model: nn.Module | None, facts: dict[str, Any]) -> None:
        """Collective. Writes the configuration and meta.json, starts the meters and, on all ranks, the first step."""
        self.num_steps_done = first_step
        self._num_warmup = min(self._train.warmup_steps, (self._train.steps - first_step) // 2)
        self._batch_size = facts["global_batch"]
        self._context.on_root(self._open_logs)
        self._write_meta(
            "start",
            name=self._loaded.config.name,
            started=self._attempt.meta.get("started", _now()),
            num_parameters=None if model is None else sum(p.numel() for p in model.parameters()),
            **facts,
        )
        rank, host, number = self._context.world.rank, self._context.world.host, self._attempt.number
        self._timings = timing_log(self._run.timings(rank), number)
        self._stack.callback(self._close_timings)  # whatever happens, what was recorded is kept
        # Another rank's lease is renewed by its steps, and not by what a thread beside them writes.
        check = self._attempt.lease.check if rank == 0 else _nothing
        self._stack.enter_context(self._energy.recorded(self._run.energy(host), number, check))
        self._first_step = first_step
        self._progress.begin(first_step)
        self._context.barrier()
        self.clock.restart()

    def _close_timings(self) -> None:
        if self._attempt.lease.is_lost:
            self._timings.discard()
        self._timings.close()

    def end_step(self, step: int, loss: float | torch.Tensor | None, num_samples: int, num_global: int) -> None:
        """Ends the step's timing and keeps its loss, the global mean; None: not known.

        A tensor of one number is read when it is written: each reading makes a GPU's loop wait.
        """
        self._attempt.lease.check()
        record = self.clock.end_step(step, num_samples, warmup=step < self._first_step + self._num_warmup)
        self._timings.write(record)
        if loss is not None:
            self._losses.append((step, loss))
        self.num_steps_done = step + 1
        if step % self._train.log_every == 0:
            self.flush()
            self._progress.log(f"Step {step}" if loss is None else f"Step {step}, Loss: {loss:.5f}")
            self._progress.note = "" if loss is None else f"loss {loss:.5f}"
        self._progress.advance(step + 1, num_global, record[1])

    def flush(self) -> None:
        """Writes the steps so far: before a checkpoint, so that the attempt that continues from it finds them all."""
        self._attempt.lease.check()
        self._timings.flush()
        if self._context.world.is_root and self._losses:
            self._attempt.lease.confirm()
            text = "".join(f"{step},{loss:.9g}\n" for step, loss in self._losses)
            try:
                with self._run.metrics.open("a", encoding="ascii") as file:
                    file.write(text)
            except OSError as error:
                raise not_written(self._run.metrics, error, len(text)) from None
        self._losses.clear()

    def sync_records(self) -> None:
        """What was flushed is on the disk, once this returns. Called before a checkpoint comes to have its name, from
        the thread that writes it: no checkpoint is newer than its records. Raises UserError where the run is another
        job's, or the disk refuses.
        """
        self._attempt.lease.confirm()
        for path in (self._run.metrics, self._run.timings(self._context.world.rank)):
            if path.exists():
                sync(path)

    def stop(self, outcome: str, **facts: Any) -> None:
        """Collective. Closes the logs and stops the meters, and notes how the attempt ended: what follows is not the
        loop's time or energy.
        """
        self.flush()
        self._stack.close()
        dropped = {str(rank): streams for rank, streams in enumerate(self._context.gather(lost_streams())) if streams}
        facts |= {"output_lost": dropped} if dropped else {}
        self._write_meta("end", outcome=outcome, last_step=self.num_steps_done - 1, ended=_now(), **facts)

    def finish(self, test: dict[str, float], fault: str | None = None) -> None:
        """Collective, after `stop`. Writes summary.json; fault: why a run that reached its end did not succeed."""
        times = self._times_of_all_ranks()
        by_host = self._energy_of_all_hosts()
        if not self._context.world.is_root:
            return
        losses = read_metrics(self._run.metrics)[1]
        shape = RunShape(
            name=self._loaded.config.name,
            size=self._context.world.size,
            num_hosts=len(self._meta["hosts"]),
            global_batch=self._batch_size,
            num_attempts=self._attempt.number,
        )
        energy = energy_of_run(by_host, self._meta["hosts"], True in self._meta["energy"]["shared"].values())
        result = RunResult(losses[-1] if losses else None, test, complete=fault is None, fault=fault)
        summary = summarise(shape, times, energy, result)
        self._attempt.lease.confirm()
        write_atomic(self._run.summary, summary.to_json() + "\n")
        for measure, value in test.items():
            print(f"Test {measure.replace('_', ' ')}: {value:.4f}")
        if summary.step_s and summary.samples_per_s:
            speed = f"{summary.samples_per_s:,.0f} samples/s"
            print(f"Mean step {summary.step_s * 1e3:.3g} ms, {speed}, {summary.energy}")
        print(f"Run directory: {self._run.path}", flush=True)

    def _times_of_all_ranks(self) -> StepTimes:
        """Collective. The sum over the ranks that train: servers wait most of the time, a step is a worker's step."""
        context = self._context
        timings = read_timings(self._run.timings(context.world.rank))
        common = -context.max(-timings.steps_of_attempts(self._attempt.number))  # killed ranks recorded unequal numbers
        own = step_times(timings.first(common))
        num_workers = self._loaded.config.reduce.num_workers(context.world.size)
        trains = context.world.rank < num_workers
        return replace(
            own,
            step_ns=context.sum(own.step_ns * trains),
            phases_ns=context.sum(own.phases_ns * trains),
            num_samples=sum(context.gather(own.num_samples)),
            num_ranks=num_workers,
        )

    def _energy_of_all_hosts(self) -> dict[str, list[DomainEnergy]]:
        """Collective. On the root: what each host's file holds, read on that host; on the root, those of hosts that
        only earlier attempts used.
        """
        host = self._context.world.host
        mine = _domain_energies(self._run.energy(host)) if self._energy.meters else None
        found = {host: parts for host, parts in self._context.gather((host, mine)) if parts is not None}
        if self._context.world.is_root:
            earlier = {host for attempt in self._meta["attempts"] for host in attempt.get("hosts") or []}
            found |= {host: _domain_energies(self._run.energy(host)) for host in earlier - set(found)}
        return found

    def _open_logs(self) -> None:
        """Writes config.toml, and makes metrics.csv end before this attempt's first step: one line a step, for ever."""
        self._attempt.lease.confirm()
        self._run.summary.unlink(missing_ok=True)  # of a run that is prolonged
        self.rewrite(self._loaded, self._losses_so_far())

    def _losses_so_far(self) -> list[tuple[int, float]]:
        """(step, loss) of every step before this attempt's first, each once; says so where some were lost."""
        attempts = self._meta.get("attempts", [])
        steps = range(attempts[0]["first_step"] if attempts else self.num_steps_done, self.num_steps_done)
        losses = read_intact_metrics(self._run.metrics)
        missing = [step for step in steps if step not in losses]
        if missing:
            self.log(
                f"warning: {self._run.metrics} was cut or damaged: the losses of {len(missing)} steps from "
                f"{missing[0]} to {missing[-1]} are lost. The weights are not: the checkpoint is whole."
            )
        return [(step, losses[step]) for step in steps if step in losses]

    def rewrite(self, loaded: Loaded, losses: Iterable[tuple[int, float]]) -> None:
        """Writes config.toml and metrics.csv anew, whole. The root only."""
        self._attempt.lease.confirm()
        write_atomic(self._run.config, dumps(loaded))
        lines = [",".join(METRIC_COLUMNS), *(f"{step},{loss:.9g}" for step, loss in losses)]
        write_atomic(self._run.metrics, "\n".join(lines) + "\n")

    def _write_meta(self, moment: str, **facts: Any) -> None:
        """Collective. Adds facts to meta.json, and measures how the ranks' clocks differ now."""
        offsets = clock_offsets_ns(self._context)
        energy = self._energy.metadata_at_start() if moment == "start" else self._energy.metadata_at_end()

        def write() -> None:
            self._attempt.lease.confirm()
            if moment == "start":
                for key in ("outcome", "ended", "clock_offsets_ns", "output_lost"):  # of the attempt before
                    self._meta.pop(key, None)
                self._meta.update(run_metadata(self._context, self._places))
                self._meta["energy"] = _of_all_attempts(self._meta.get("energy", {}), energy)
                self._meta.setdefault("attempts", []).append(
                    {
                        "attempt": self._attempt.number,
                        "first_step": self.num_steps_done,
                        "started": _now(),
                        "hosts": self._meta["hosts"],
                        "slurm": self._meta["slurm"],
                        "continues": str(self._attempt.source.path.resolve()) if self._attempt.source else None,
                        "changed": {each.key: [each.before, each.now] for each in said(self._attempt.changes)},
                    }
                )
            self._meta.update(facts)
            self._meta.setdefault("clock_offsets_ns", {})[moment] = offsets
            if moment == "end":
                self._meta["energy"] = _of_all_attempts(self._meta["energy"], energy)
                self._meta["attempts"][-1].update(facts)
            write_atomic(self._run.meta, json.dumps(self._meta, indent=1) + "\n")

        self._context.on_root(write)


def _domain_energies(path: Path) -> list[DomainEnergy]:
    return [DomainEnergy(trace.domain, trace.energy) for trace in read_traces(path)] if path.is_file() else []


def _nothing() -> None:
    pass


def _of_all_attempts(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Facts of energy by host: those of hosts that only earlier attempts had stay; a host shared once is shared."""
    facts = dict(earlier)
    for key, value in now.items():
        if not isinstance(value, dict):
            facts[key] = value
            continue
        before = earlier.get(key) or {}
        facts[key] = {**before, **value}
        if key == "shared":
            facts[key].update({host: True for host, was in before.items() if was is True})
    return facts


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

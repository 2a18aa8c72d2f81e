"""Writes a run down while it runs: the run directory, seen from the training half."""

import json
import os
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from hpc_train import rundir
from hpc_train.clock import Clock
from hpc_train.config import Loaded, dumps
from hpc_train.records import (
    METRIC_COLUMNS,
    Energy,
    Quality,
    read_energy,
    read_timings,
    step_times,
    summarise,
    timing_log,
    total_energy,
)
from hpc_train.rundir import RunDir, write_atomic
from hpc_train.train import sensors
from hpc_train.train.context import Context, clock_offsets_ns
from hpc_train.train.metadata import RankPlace, describe
from hpc_train.train.progress import StepProgress


class Recorder:
    """Times, losses and joules of one run, on every rank. Use as a context manager around the loop:

    `start`, then for each step phases of `clock` and `end_step`, after the last one `stop` and `finish`. Entering,
    `start` and `finish` are collective; `end_step` is on every `train.log_every`th step.
    """

    def __init__(self, loaded: Loaded, context: Context, places: list[RankPlace]) -> None:
        self._loaded, self._context, self._places = loaded, context, places
        self._train = loaded.config.train
        self._num_warmup = min(self._train.warmup_steps, self._train.steps // 2)
        self._losses: list[torch.Tensor] = []
        self._last_loss: float | None = None
        self._meta: dict[str, Any] = {}
        self._stack = ExitStack()
        self.clock = Clock()

    def __enter__(self) -> Self:
        """Collective. Makes the run directory, with the configuration in it."""
        config, world = self._loaded.config, self._context.world
        self._run = self._context.on_root(self._make_directory)
        self._meters = self._meters_of_this_rank()
        self._progress = StepProgress(config.name, self._train.steps, config.run.progress, world.is_root)
        self._stack.callback(self._progress.close)
        self._timings = timing_log(self._run.timings(world.rank))
        self._stack.callback(self._timings.close)  # whatever happens, what was recorded is kept
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, batch_size: int, num_train_samples: int, model: nn.Module) -> None:
        """Collective. Writes meta.json, starts the meters and, on all ranks together, the first step."""
        self._batch_size = batch_size
        self._write_meta(
            name=self._loaded.config.name,
            started=_now(),
            global_batch=batch_size,
            num_train_samples=num_train_samples,
            num_parameters=sum(p.numel() for p in model.parameters()),
        )
        if self._meters:
            path = self._run.energy(self._context.world.host)
            self._stack.enter_context(sensors.Sampler(self._meters, path, self._loaded.config.energy.sample_hz))
        self._context.barrier()
        self.clock.restart()

    def end_step(self, step: int, loss: torch.Tensor, num_samples: int, num_global: int) -> None:
        """Ends the step's timing and keeps its loss (this rank's share of the global mean) without reading it yet."""
        record = self.clock.lap(step, num_samples, warmup=step < self._num_warmup)
        self._timings.write(record)
        self._losses.append(loss.detach())
        if step % self._train.log_every == 0 or step + 1 == self._train.steps:
            self._log_losses(step)
        self._progress.advance(step + 1, num_global, record[1])

    def _log_losses(self, step: int) -> None:
        """Collective. Sums over ranks every loss since the last time: in between no step waits for a loss."""
        losses = self._context.sum(torch.stack(self._losses).to(torch.float64).numpy())
        self._losses.clear()
        self._last_loss = float(losses[-1])
        if self._context.world.is_root:
            first = step + 1 - len(losses)
            with self._run.metrics.open("a", encoding="ascii") as file:
                file.write("".join(f"{first + i},{loss:.9g}\n" for i, loss in enumerate(losses)))
            self._progress.note = f"loss {self._last_loss:.5f}"
            if step % self._train.log_every == 0:
                self._progress.say(f"Step {step}, Loss: {self._last_loss:.5f}")

    def stop(self) -> None:
        """Closes the logs and stops the meters: what follows is not the loop's time or energy."""
        self._stack.close()

    def finish(self, test_accuracy: float | None) -> None:
        """Collective, after `stop`. Writes summary.json from sums over all ranks."""
        context, config = self._context, self._loaded.config
        self._write_meta(ended=_now())
        own = step_times(read_timings(self._run.timings(context.world.rank)))
        step_ns, phases_ns = context.sum(own.step_ns) / context.world.size, context.sum(own.phases_ns)
        num_samples = sum(context.gather(own.num_samples))
        energies = context.gather(read_energy(self._run.energy(context.world.host)) if self._meters else None)
        if not context.world.is_root:
            return
        summary = summarise(
            name=config.name,
            size=context.world.size,
            num_hosts=len({place.host for place in self._places}),
            global_batch=self._batch_size,
            step_ns=step_ns,
            phases_ns=phases_ns,
            num_samples=num_samples,
            num_warmup=own.num_warmup,
            energy=total_energy(part for part in energies if part is not None),
            loss=self._last_loss,
            test_accuracy=test_accuracy,
            complete=True,
        )
        write_atomic(self._run.summary, summary.to_json() + "\n")
        if test_accuracy is not None:
            print(f"Test accuracy: {test_accuracy:.4f}")
        if summary.step_s and summary.samples_per_s:
            energy = Energy(summary.joules, summary.energy_quality, summary.energy_source)
            print(f"Median step {summary.step_s * 1e3:.3g} ms, {summary.samples_per_s:,.0f} samples/s, {energy}")
        print(f"Run directory: {self._run.path}", flush=True)

    def _make_directory(self) -> RunDir:
        config, size = self._loaded.config, self._context.world.size
        run = rundir.create(
            Path(config.run.root).expanduser(), config.name, size, datetime.now(UTC), os.environ.get("SLURM_JOB_ID")
        )
        write_atomic(run.config, dumps(self._loaded))
        run.metrics.write_text(",".join(METRIC_COLUMNS) + "\n", encoding="ascii")
        return run

    def _meters_of_this_rank(self) -> list[sensors.Meter]:
        """The node's meters for its first rank, none for the others: one reader a node."""
        world = self._context.world
        if world.local_rank != 0:
            return []
        neighbours = [place for place in self._places if place.host == world.host]
        cores = {core for place in neighbours for core in place.cores}
        num_used = min(len(cores), sum(place.threads for place in neighbours))
        meters = sensors.find_meters()
        if not any(meter.source == "RAPL" for meter in meters):  # GPUs alone leave out the cores that compute
            meters.append(sensors.estimate_meter(num_used, self._loaded.config.energy.watts_per_core))
        return meters

    def _write_meta(self, **facts: Any) -> None:
        """Collective. Adds facts to meta.json, and measures how the ranks' clocks differ now."""
        moment = "end" if "ended" in facts else "start"
        offsets = clock_offsets_ns(self._context)
        meters = self._context.gather(
            (self._context.world.host, [(m.domain, m.source, m.quality) for m in self._meters])
            if self._meters
            else None
        )

        def write() -> None:
            if not self._meta:
                self._meta.update(describe(self._context, self._places))
                self._meta["energy"] = _energy_facts(
                    [each for each in meters if each], self._loaded.config.energy.watts_per_core
                )
            self._meta.update(facts)
            self._meta.setdefault("clock_offsets_ns", {})[moment] = offsets
            write_atomic(self._run.meta, json.dumps(self._meta, indent=1) + "\n")

        self._context.on_root(write)


def _energy_facts(meters: list[tuple[str, list[tuple[str, str, Quality]]]], watts_per_core: float) -> dict[str, Any]:
    estimated = any(quality == "estimated" for _, parts in meters for _, _, quality in parts)
    assumption = (
        "no meter of the processors can be read: every core that ranks compute on is taken to draw "
        f"{watts_per_core:g} W (energy.watts_per_core) while the loop runs; memory, network and cooling are left out"
    )
    fields = ("domain", "source", "quality")
    return {
        "assumption": assumption if estimated else None,
        "meters": {host: [dict(zip(fields, part, strict=True)) for part in parts] for host, parts in meters},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""The summary of a run from what its ranks recorded: each reads its own file, so that the root need not read them all.

The analysis makes the same summary from all ranks' files, with the same functions of `core`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_train.core.energy_records import DomainEnergy, energy_of_run, read_traces
from hpc_train.core.run_summary import RunResult, RunShape, RunSummary, summarise
from hpc_train.core.rundir import RunDir
from hpc_train.core.timing_log import StepTimes, read_timings, step_times
from hpc_train.train.comm.context import Context


def gather_summary(
    run: RunDir, meta: dict[str, Any], shape: RunShape, result: RunResult, num_workers: int, context: Context
) -> RunSummary | None:
    """Collective. The run's summary on the root, None elsewhere. meta: meta.json, of use on the root alone."""
    times = _sum_of_times(run, shape.num_attempts, num_workers, context)
    by_host = _energies_by_host(run, meta, context)
    if not context.world.is_root:
        return None
    energy = energy_of_run(by_host, meta["hosts"], is_shared=True in meta["energy"]["shared"].values())
    return summarise(shape, times, energy, result)


def _sum_of_times(run: RunDir, num_attempts: int, num_workers: int, context: Context) -> StepTimes:
    """Collective. The sum over the ranks that train. Servers wait most of the time: a step is what workers take."""
    timings = read_timings(run.timings(context.world.rank))
    # In an attempt that was killed, ranks recorded unequal numbers of steps: the common ones count.
    common = -context.max(-timings.steps_of_attempts(num_attempts))
    own = step_times(timings.first(common))
    trains = context.world.rank < num_workers
    return replace(
        own,
        step_ns=context.sum(own.step_ns * trains),
        phases_ns=context.sum(own.phases_ns * trains),
        num_samples=sum(context.gather(own.num_samples)),
        num_ranks=num_workers,
    )


def _energies_by_host(run: RunDir, meta: dict[str, Any], context: Context) -> dict[str, list[DomainEnergy]]:
    """Collective. On the root: each host's energies. It reads only the files of hosts that earlier attempts used."""
    host = context.world.host
    own = _read_domains(run.energy(host)) if context.world.local_rank == 0 else None
    by_host = {host: parts for host, parts in context.gather((host, own)) if parts is not None}
    if context.world.is_root:
        earlier = {host for attempt in meta["attempts"] for host in attempt.get("hosts") or []} - set(by_host)
        by_host |= {host: _read_domains(run.energy(host)) for host in earlier}
    return by_host


def _read_domains(path: Path) -> list[DomainEnergy]:
    return [DomainEnergy(trace.domain, trace.energy) for trace in read_traces(path)] if path.is_file() else []

"""Run directories whose speed, phases and joules are known, written through the functions of real runs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core import config, records, timing_log
from hpc_train.core.energy_records import ENERGY_COLUMNS, Energy, read_traces, total_energy
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.timing_log import PHASES

SHARES = {"data": 0.1, "forward": 0.3, "backward": 0.4, "reduce": 0.1, "optimizer": 0.05, "other": 0.05}


@dataclass
class Recipe:
    """What a run shall look like. `step_s` is the true median step time of every rank."""

    size: int = 1
    step_s: float = 0.010
    noise: float = 0.02  # standard deviation of a step, relative
    steps: int = 210
    warmup: int = 10
    name: str = "softmax-mnist"
    stamp: str = "20261123T210000Z"
    global_batch: int | None = 120
    batch_per_rank: int | None = None
    accumulate: int = 1
    strategy: str = "horovod"
    reduce: dict[str, Any] = field(default_factory=dict)  # further keys of [reduce]
    servers: int = 0  # of a parameter server: the last ranks
    servers_busy: float = 0.25  # share of their time in which they update weights
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))  # of the ranks that train
    joules: float | None = 120.0  # per host; None: no meter
    quality: str = "measured"
    source: str = "RAPL package-0"
    assumption: str | None = None
    hosts: tuple[str, ...] = ("node01",)
    complete: bool = True  # False: no summary.json, as after a crash
    loss: float = 0.31
    test: dict[str, float] = field(default_factory=lambda: {"accuracy": 0.91})
    meta: dict[str, Any] = field(default_factory=dict)  # put over what is written otherwise


def write_run(root: Path, recipe: Recipe) -> RunDir:
    """Writes one run directory below `root` and returns it."""
    run = RunDir(root / recipe.name / f"{recipe.stamp}-np{recipe.size}")
    run.timings_dir.mkdir(parents=True)
    run.energy_dir.mkdir()
    job = root / f"{recipe.name}.toml"
    batch = "" if recipe.global_batch is None else f"global_batch = {recipe.global_batch}"
    batch = batch if recipe.batch_per_rank is None else f"batch_per_rank = {recipe.batch_per_rank}"
    job.write_text(
        f'name = "{recipe.name}"\n[data]\nfile = "data/mnist.h5"\n[train]\nsteps = {recipe.steps}\n{batch}\n'
        f'warmup_steps = {recipe.warmup}\naccumulate = {recipe.accumulate}\n[reduce]\nstrategy = "{recipe.strategy}"\n'
        + (f"servers = {recipe.servers}\n" if recipe.servers else "")
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.reduce.items())
    )
    loaded = config.load(job)
    job.unlink()
    run.config.write_text(config.dumps(loaded))
    run.meta.write_text(json.dumps(_meta(recipe, loaded.config), indent=2))
    _write_timings(run, recipe, loaded.config.global_batch(recipe.size))
    _write_energy(run, recipe)
    losses = [recipe.loss + 2.0 * 0.97**step for step in range(0, recipe.steps - 1, 10)] + [recipe.loss]
    rows = "".join(f"{index * 10},{loss}\n" for index, loss in enumerate(losses))
    run.metrics.write_text(",".join(records.METRIC_COLUMNS) + "\n" + rows)
    if recipe.complete:
        said = {"loss": recipe.loss, "test": recipe.test, "complete": True}
        run.summary.write_text(json.dumps({**said, "schema": records.SCHEMA}))
    return run


def _meta(recipe: Recipe, settings: Config) -> dict[str, Any]:
    ranks = [
        {
            "rank": rank,
            "host": recipe.hosts[rank % len(recipe.hosts)],
            "local_rank": rank,
            "pid": 1 + rank,
            "cores": [rank],
            "threads": 1,
        }
        for rank in range(recipe.size)
    ]
    meter = {"domain": "package-0", "source": recipe.source, "quality": recipe.quality}
    return {
        "schema": records.SCHEMA,
        "hpc_train": "0.1.0",
        "name": recipe.name,
        "started": "2026-11-23T21:00:00Z",
        "ended": "2026-11-23T21:00:09Z",
        "size": recipe.size,
        "hosts": list(recipe.hosts),
        "ranks": ranks,
        "cpu_model": "AMD EPYC 7763 64-Core Processor",
        "global_batch": settings.global_batch(recipe.size),
        "num_train_samples": 5000,
        "num_parameters": 7850,
        "versions": {"python": "3.12.4", "torch": "2.10.0", "mpi4py": "4.1.0", "horovod": "0.28.1"},
        "mpi": {"version": "Open MPI v4.1.4", "library": "/usr/lib/libmpi.so.40"},
        "git": {"commit": "b0f1e82c0ffee0000000000000000000000000ab", "dirty": False},
        "slurm": {},
        "energy": {"assumption": recipe.assumption, "meters": {host: [meter] for host in recipe.hosts}},
        **recipe.meta,
    }


def _write_timings(run: RunDir, recipe: Recipe, batch: int) -> None:
    """Every rank takes the same time for a step, so that their mean is known."""
    draws = np.random.default_rng(7 * recipe.size + len(recipe.stamp) + sum(map(ord, recipe.stamp)))
    steps_ns = (recipe.step_s * 1e9 * (1 + recipe.noise * draws.standard_normal(recipe.steps))).astype(int)
    steps_ns[: recipe.warmup] *= 5  # a warm-up that would show in any mean or median that counts it
    num_workers = recipe.size - recipe.servers
    serving = dict.fromkeys(PHASES, 0.0) | {"reduce": 1 - recipe.servers_busy, "optimizer": recipe.servers_busy}
    for rank in range(recipe.size):
        shares = recipe.shares if rank < num_workers else serving
        log = timing_log.TimingLog(run.timings(rank))
        begin = 1_000_000
        share = batch // num_workers + (rank < batch % num_workers) if rank < num_workers else 0
        for step, whole in enumerate(steps_ns.tolist()):
            spent = [int(whole * shares.get(phase, 0.0)) for phase in PHASES[:-1]]
            arrived = begin + sum(spent[: PHASES.index("reduce")])
            log.write((step, begin, arrived, *spent, whole - sum(spent), share, int(step < recipe.warmup)))
            begin += whole
        log.close()


def _write_energy(run: RunDir, recipe: Recipe) -> None:
    if recipe.joules is None:
        return
    for host in recipe.hosts:
        end = f"{recipe.quality},{recipe.source}"
        lines = [f"{time},package-0,{recipe.joules * time / 2},{end},1" for time in (0, 1, 2)]
        run.energy(host).write_text("\n".join([",".join(ENERGY_COLUMNS), *lines, ""]))


def energy_of(path: Path) -> Energy:
    """The sum over the domains and attempts of one host's file."""
    return total_energy(trace.energy for trace in read_traces(path))

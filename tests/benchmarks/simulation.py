"""Measures steps on 2 to 64 ranks of this machine against `hpc-train simulate`; a Markdown table.

    python -m tests.benchmarks.simulation [--ranks 2,4,8,16,32,64] [--work DIR]

Ranks sleep where they would compute, so that those that share a core do not slow each other's computation. They still
share it for their messages, and so `bench allreduce` measures the links anew on each number of ranks. All else (times
of the phases, noise, overlap) is from the run on the fewest ranks. A step adds up 5.3 MB over MPI.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import load_known
from hpc_train.analysis.scaling.compare import compare
from hpc_train.analysis.simulation.machine import Machine
from hpc_train.analysis.simulation.network import read_links
from hpc_train.analysis.simulation.simulate import simulate
from hpc_train.analysis.simulation.study import Wanted, simulate_group
from tests import jobs

STEPS, MOST_S = 16, 900
HEADER = ("ranks", "step, measured (ms)", "simulated", "error", "exposed, measured (ms)", "simulated")


@click.command(help=__doc__)
@click.option("--ranks", default="2,4,8,16,32,64", show_default=True, help="The fewest drive the simulation.")
@click.option("--work", default=Path("/tmp"), type=click.Path(path_type=Path), show_default=True, help="For a while.")
def main(ranks: str, work: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="hpc-train-simulation-", dir=work))
    try:
        measure(folder, sorted(map(int, ranks.split(","))))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, sizes: Sequence[int]) -> None:
    job = folder / "sleeping.toml"
    job.write_text(
        'name = "sleeping"\n[task]\nkind = "tests.benchmarks.sleeping_task:Sleeping"\n'
        f'[train]\nsteps = {STEPS}\nwarmup_steps = 4\nbatch_per_rank = 1\n[reduce]\nstrategy = "mpi"\n'
        "[checkpoint]\nkeep = 0\n"
    )
    print(f"| {' | '.join(HEADER)} |\n| {' | '.join(['---'] * len(HEADER))} |", flush=True)
    driver = None
    for size in sizes:
        network = folder / f"allreduce-{size}.json"
        words = ["--max", "4M", "--repeat", 5, "--strategies", "mpi", "--output", network]
        _run(size, folder, "bench", "allreduce", *words)
        _run(size, folder, "train", job)
        known, _ = load_known([folder / "runs"], SectionGuard())
        (group,) = compare(known).groups
        (row,) = [each for each in group.rows if each.size == size]
        if driver is None:
            driver = simulate_group(group, [size], Wanted(network=network))
        links = read_links(network, "mpi", driver.job.algorithm)
        assert links.inside is not None and row.step_s is not None
        machine = Machine(size, links.inside, links.inside, links.overhead_s)
        told = simulate(replace(driver.job), machine, size, driver.noise)
        cells = (row.step_s, told.step_s, row.exposed_s, told.exposed_s)
        measured, simulated, exposed, told_exposed = (f"{1e3 * each:.1f}" for each in cells)
        error = f"{told.step_s / row.step_s - 1:+.0%}"
        print(f"| {size} | {measured} | {simulated} | {error} | {exposed} | {told_exposed} |", flush=True)


def _run(size: int, folder: Path, *words: object) -> None:
    ended = jobs.run(size, *words, cwd=folder, timeout_s=MOST_S, PYTHONPATH=str(jobs.ROOT), OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err


if __name__ == "__main__":
    main()

"""Measures reading and writing of HDF5 against its bounds and against peers; prints a Markdown table.

    python -m tests.benchmarks.io [--samples N] [--repeat N] [--work DIR] [--no-peers] [--quick]

Every contender has a process of its own; they take turns, one epoch each, forwards and backwards, and a ratio is the
median of the ratios of each turn (behind it, the quartiles). Data lie in memory (--work), and are removed at the end.
The exit code is 1 where a bound is missed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click
import numpy as np

from hpc_train.core.rundir import find
from hpc_train.core.timing_log import read_timings
from tests import jobs
from tests.benchmarks.io_peers import install, last_line
from tests.benchmarks.io_readers import SHAPE, packed_budget_mb
from tests.benchmarks.io_tasks import edge

ROOT = Path(__file__).parents[2]
HEADER = ("what", "result", "required", "met")
OWN = ("ours", "np.take", "np.take, one buffer", "DataLoader+h5py", "DataLoader+h5py, 2 workers", "DataLoader+memmap")
PACKED = ("ours, gzip", "decompressor")
BOUND_PEERS = ("DataLoader+h5py", "DataLoader+h5py, 2 workers", "WebDataset", "mosaicml-streaming", "litdata")
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Line:
    """A row of the table: values of each turn, and the bound that their median must keep; None: for information."""

    what: str
    values: np.ndarray
    relation: str = ""
    bound: float | None = None

    @property
    def is_met(self) -> bool:
        middle = float(np.median(self.values))
        return self.bound is None or (middle >= self.bound if self.relation == ">=" else middle < self.bound)

    def cells(self) -> tuple[str, ...]:
        low, middle, high = np.quantile(self.values, [0.25, 0.5, 0.75])
        spread = f" ({low:.3g} to {high:.3g})" if len(self.values) > 1 else ""
        required = "" if self.bound is None else f"{self.relation} {self.bound:g}"
        met = "" if self.bound is None else "yes" if self.is_met else "NO"
        return self.what, f"{middle:.3g}{spread}", required, met


@click.command(help=__doc__)
@click.option("--samples", default=8192, type=click.IntRange(64), show_default=True, help="Pictures of 48 KiB.")
@click.option("--repeat", default=7, type=click.IntRange(1), show_default=True, help="Turns that count.")
@click.option("--work", default=Path("/dev/shm"), type=click.Path(path_type=Path), show_default=True, help="In memory.")
@click.option(
    "--venv", default=Path("runs/bench-io-peers"), type=click.Path(path_type=Path), help="Of the peers; kept."
)
@click.option("--peers/--no-peers", default=True, help="Without: DataLoader alone.")
@click.option(
    "--quick", is_flag=True, help="A trial of everything but the peers, in seconds: its figures mean nothing."
)
def main(samples: int, repeat: int, work: Path, venv: Path, peers: bool, quick: bool) -> None:
    if quick:
        samples, repeat, peers = 128, 1, False
    block = 3 if quick else 24  # steps
    peer_pythons = install(venv.absolute(), say) if peers else {}
    folder = Path(tempfile.mkdtemp(prefix="hpc-train-io-", dir=work))
    try:
        cores = len(os.sched_getaffinity(0))
        say(f"{samples} pictures of 48 KiB in {folder}, batches of 32, {repeat} turns, {cores} cores")
        subprocess.run([sys.executable, "-m", "tests.benchmarks.io_data", folder, str(samples)], check=True, cwd=ROOT)
        lines = [
            *reading(folder, repeat, OWN[:4] if quick else OWN, peer_pythons),
            *packed(folder, repeat),
            stall("resnet-fashion", "Pictures", folder, folder / "contiguous.h5", repeat, block),
            stall("gpt-text", "Text", folder, folder / "tokens.h5", 3 * repeat, block),
            writing(folder, max(2, samples * 48 >> 10), repeat),
            *memory(folder, samples),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cells = [HEADER, ("---",) * len(HEADER), *(line.cells() for line in lines)]
    print("\n".join(["", *(f"| {' | '.join(row)} |" for row in cells)]), flush=True)
    sys.exit(not quick and not all(line.is_met for line in lines))


# ------------------------------------------------------------------------------------------------- reading


def reading(folder: Path, repeat: int, own: tuple[str, ...], peers: dict[str, Path]) -> Iterator[Line]:
    found = take_turns([(name, Path(sys.executable)) for name in own] + list(peers.items()), folder, repeat)
    mine = np.array(found["ours"])
    yield Line("contiguous, one rank: samples/s over np.take on a raw memmap", found["np.take"] / mine, ">=", 0.9)
    yield Line("the same over np.take into one buffer again and again", found["np.take, one buffer"] / mine)
    best = min((name for name in BOUND_PEERS if name in found), key=lambda name: np.median(found[name]))
    yield Line(f"contiguous, over the best peer, {best}", found[best] / mine, ">=", 4)
    for name in found:
        if name not in ("ours", best) and not name.startswith("np.take"):
            yield Line(f"contiguous, over {name}", found[name] / mine)


def packed(folder: Path, repeat: int) -> Iterator[Line]:
    found = take_turns([(name, Path(sys.executable)) for name in PACKED], folder, repeat)
    ratios = np.divide(found["decompressor"], found["ours, gzip"])
    yield Line("gzip-4 chunks, one rank: samples/s over the decompressor alone on as many threads", ratios, ">=", 0.9)


def take_turns(contenders: list[tuple[str, Path]], folder: Path, repeat: int) -> Seconds:
    """Seconds of `repeat` epochs of each contender; one that fails and is not ours is left out, and it is said why."""
    with ExitStack() as stack:
        children = {}
        for name, python in contenders:
            say(f"opening {name}")
            if ask := stack.enter_context(contender(name, python, folder)):
                children[name] = ask
        found: Seconds = {name: [] for name in children}
        for turn in range(repeat + 1):  # the first does not count
            for name in list(children)[:: 1 if turn % 2 else -1]:
                seconds = children[name]()
                if turn:
                    found[name].append(seconds)
    for name, seconds in found.items():
        say(f"  {name}: {np.median(seconds):.4g} s an epoch")
    return found


@contextmanager
def contender(name: str, python: Path, folder: Path) -> Iterator[Callable[[], float] | None]:
    """A function that has it go through an epoch and returns the seconds; None where it did not start."""
    words = [python, "-m", "tests.benchmarks.io_readers", name, folder]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with (folder / "said.txt").open("w+") as said:
        child = subprocess.Popen(
            words, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            is_there = answer(child, said) == "ready"
            yield (lambda: float(ask(child, said))) if is_there else None
        except EOFError as error:
            if python == Path(sys.executable):
                raise click.ClickException(f"{name}: {error}") from None
            say(f"{name} is left out: {error}")
            yield None
        finally:
            assert child.stdin
            child.stdin.close()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()


def ask(child: subprocess.Popen[str], said: IO[str]) -> str:
    assert child.stdin
    child.stdin.write("go\n")
    child.stdin.flush()
    return answer(child, said)


def answer(child: subprocess.Popen[str], said: IO[str]) -> str:
    """Its next line. Raises `EOFError` where it has ended, with its last words."""
    assert child.stdout
    line = child.stdout.readline().strip()
    if not line:
        child.wait(20)
        said.seek(0)
        raise EOFError(last_line(said.read()))
    return line


# ------------------------------------------------------------------------------------------------- training


def stall(job: str, task: str, folder: Path, data: Path, pairs: int, block: int) -> Line:
    """Trains a shipped job on 2 ranks, by turns from the file and from memory, in one run."""
    say(f"training {job}")
    keys = jobs.settings(
        data__file=data,
        task__kind=f"tests.benchmarks.io_tasks:{task}",
        train__steps=2 * block * (pairs + 1),  # the first pair does not count
        train__global_batch=8 if block > 3 else 2,
        train__log_every=block,
        train__lr=0.001,
        checkpoint__keep=0,
        run__root=folder / "runs",
        name=job,
    )
    done = jobs.run(2, "train", jobs.CONFIGS / f"{job}.toml", *keys, cwd=ROOT, timeout_s=600)
    if done.code:
        raise click.ClickException(f"{job}: {done.err}")
    (run,) = find([folder / "runs" / job])
    phases = [read_timings(run.timings(rank)).phases_ns for rank in range(2)]
    steps = np.mean([each.sum(1) for each in phases], axis=0).reshape(-1, 2, block)
    waits = phases[0][:, 0].reshape(steps.shape)
    middle = slice(edge(block), block - edge(block))
    read, made = (np.median(steps[1:, kind, middle], axis=1) for kind in (0, 1))
    share = waits[1:, 0, middle].sum() / steps[1:, 0, middle].sum()
    what = f"input stall of {job}, 2 ranks ({np.median(read) / 1e6:.3g} ms a step, of which {share:.2%} wait for data)"
    return Line(what, 1 - made / read, "<", 0.01)


# ------------------------------------------------------------------------------------------------- writing, memory


def writing(folder: Path, size_mb: int, repeat: int) -> Line:
    say(f"writing {size_mb} MiB on 2 ranks")
    mpirun = ["mpirun", "--quiet", "-n", "2", "--oversubscribe", "--bind-to", "none"]
    words = [sys.executable, "-m", "mpi4py", "-m", "tests.benchmarks.io_write", str(folder), str(size_mb), str(repeat)]
    found = json.loads(output([*mpirun, *words]))
    raw = min((name for name in found if name.startswith("raw")), key=lambda name: np.median(found[name]))
    ratios = np.divide(found[raw], found["contiguous, collective"])
    return Line(f"parallel write, 2 ranks: contiguous HDF5 over {raw}", ratios, ">=", 0.9)


def memory(folder: Path, samples: int) -> Iterator[Line]:
    """Growth over an epoch, as a share of the budget."""
    budget, size_mb = packed_budget_mb(samples), samples * int(np.prod(SHAPE)) >> 20
    for name, kind, words in (("gzip", "all", ""), ("contiguous", "own", ", the page cache's pages not counted")):
        say(f"memory of reading {name}")
        python = [sys.executable, "-m", "tests.benchmarks.io_memory", str(folder / f"{name}.h5"), str(budget)]
        grown = json.loads(output(python))[kind]
        what = f"resident growth over an epoch of {size_mb} MiB, {name}{words}, over the budget of {budget} MiB"
        yield Line(what, np.array([grown / budget]), "<", 1)


def output(words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=jobs.environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words[-4:])}: {last_line(done.stderr)}")
    return done.stdout


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()

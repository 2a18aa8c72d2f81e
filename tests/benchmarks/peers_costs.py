"""What single things cost: marks of the clock, samples of energy, sums over ranks, starting."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from time import monotonic, perf_counter, perf_counter_ns

import h5py
import numpy as np

from hpc_train.core.phase_clock import Clock
from tests import jobs
from tests.benchmarks.io_peers import last_line
from tests.benchmarks.peers_table import Line, Section
from tests.benchmarks.peers_tasks import FIRST_STEP
from tests.benchmarks.peers_turns import ROOT, Failed
from tests.benchmarks.peers_work import RANKS

_STEP_S = 0.01  # of which logging is to be a small share
Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------- logging


def logging(turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """A phase mark against two readings of the clock, and all that is recorded of a step against 10 ms."""
    say("logging")
    calls = 2_000 if quick else 100_000
    found = np.array([[loop(calls) for loop in (_nothing, _two_reads, _marks)] for _ in range(turns)]) / calls
    nothing, reads, marks = found.T
    steps = np.array([_recorded(calls // 10, folder) for _ in range(turns)]) / (calls // 10)
    reads_ns, marks_ns = 1e9 * np.median(reads - nothing), 1e9 * np.median(marks - nothing)
    what = f"a phase mark ({marks_ns:.0f} ns) over two clock reads ({reads_ns:.0f} ns)"
    lines = [
        Line(what, ((marks - nothing) / (reads - nothing)).tolist(), "<=", 2, (reads - nothing).tolist()),
        Line(
            f"all that is recorded of a step ({1e6 * np.median(steps):.2g} us), share of 10 ms",
            (steps / _STEP_S).tolist(),
            *("<", 0.001),
            is_percent=True,
        ),
    ]
    return Section("logging", lines)


def _nothing(calls: int) -> float:
    began = perf_counter()
    for _ in range(calls):
        pass
    return perf_counter() - began


def _two_reads(calls: int) -> float:
    began = perf_counter()
    for _ in range(calls):
        perf_counter_ns()
        perf_counter_ns()
    return perf_counter() - began


def _marks(calls: int) -> float:
    forward = Clock().forward
    began = perf_counter()
    for _ in range(calls):
        with forward:
            pass
    return perf_counter() - began


def _recorded(steps: int, folder: Path) -> float:
    """Empty steps, recorded in a real run directory: five marks, the step's line and its loss, the progress."""
    from hpc_train.train.recording import recording

    with (
        open("/dev/null", "w") as nowhere,
        redirect_stdout(nowhere),
        tempfile.TemporaryDirectory(dir=folder) as root,
        recording("bench", global_batch=1, root=root) as recorder,
    ):
        began = perf_counter()
        for _ in range(steps):
            with recorder.step() as step:
                with recorder.data:
                    pass
                with recorder.forward:
                    pass
                with recorder.backward:
                    pass
                with recorder.reduce:
                    pass
                with recorder.optimizer:
                    pass
                step.loss = 1.0
        return perf_counter() - began


# ------------------------------------------------------------------------------------------------- energy


def energy(perun: Path | None, turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """Share of one core that sampling at 1 Hz takes beside the same loop."""
    seconds = 2 if quick else 20
    say(f"energy sampling: {turns} turns of {seconds} s")
    script = ROOT / "tests/benchmarks/peers_meters.py"
    ways: dict[str, list[object]] = {"bare": [sys.executable, script, "bare"], "ours": [sys.executable, script, "ours"]}
    if perun is not None:
        results = folder / "perun"
        ways["perun"] = [
            perun,
            "-m",
            "perun",
            "monitor",
            "--sampling-period",
            "1",
            "--data-out",
            results,
            script,
            "perun",
        ]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            place = Path(tempfile.mkdtemp(dir=folder))
            output([*ways[name], seconds, place], new_session=True)
            found[name].append(float((place / "share").read_text()))
    bare = np.array(found["bare"])
    ours = np.array(found["ours"]) - bare
    notes = ["ours reads four RAPL counters of a recorded tree; the share of the loop alone is taken off"]
    if perun is None:
        notes.append("perun is not there: nothing to compare with")
        return Section("energy", [Line("share of one core at 1 Hz", ours.tolist(), is_percent=True)], notes)
    theirs = np.array(found["perun"]) - bare
    notes.append("perun reads what it finds on this machine (psutil: load, memory, disks, network)")
    bound = float(np.median(theirs))
    # What varies is perun's own share: it is what ours is held against.
    line = Line(
        "share of one core at 1 Hz, against perun's", ours.tolist(), "<", bound, theirs.tolist(), is_percent=True
    )
    return Section("energy", [line], notes)


# ------------------------------------------------------------------------------------------------- all-reduce


def all_reduce(turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """Plain MPI_Allreduce of the same bytes over this program's strategies, by `hpc-train bench allreduce`."""
    lines = []
    for size in ("64K",) if quick else ("64K", "64M"):
        say(f"all-reduce of {size}iB")
        path = folder / f"allreduce-{size}.json"
        words = ["bench", "allreduce", "--min", size, "--max", size, "--repeat", 2 * turns + 2]
        output(jobs.command(RANKS, *words, "--strategies", "horovod,mpi,plain_mpi", "--output", path))
        samples = {row["strategy"]: np.array(row["samples_s"]) for row in json.loads(path.read_text())["rows"]}
        plain = samples["plain_mpi"]
        for name in ("mpi", "horovod"):
            what = f"all-reduce of {size}iB: MPI_Allreduce ({1e3 * np.median(plain):.3g} ms) over `{name}`"
            lines.append(Line(what, (plain / samples[name]).tolist(), ">=", 0.9, plain.tolist()))
    return Section("all-reduce", lines)


# ------------------------------------------------------------------------------------------------- start


def start(turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """From mpirun to the first step of a shipped job on 2 ranks, less what importing torch takes there."""
    say(f"start: {turns} turns")
    data = folder / "start.h5"
    with h5py.File(data, "w") as file:
        noise = np.random.default_rng(0)
        file["train/inputs"] = noise.integers(0, 256, (1000, 28, 28), np.uint8)
        file["train/targets"] = noise.integers(0, 10, 1000)
    keys = jobs.settings(
        data__file=data,
        task__kind="tests.benchmarks.peers_tasks:Started",
        train__steps=2,
        checkpoint__keep=0,
        run__root=folder / "runs",
    )
    train = jobs.command(RANKS, "train", jobs.CONFIGS / "mlp-mnist.toml", *keys)
    python = "from time import perf_counter as s; t = s(); import torch; print(f'{s() - t}\\n', end='')"
    load = [*jobs.command(RANKS)[:-1], sys.executable, "-c", python]
    first, imports = [], []
    for turn in range(turns + 1):
        loaded_s = float(np.mean([float(line) for line in output(load).split()]))
        began_s = first_step_s(train, folder / "first", RANKS)
        if turn:  # the first reads what the next ones find in memory
            first.append(began_s)
            imports.append(loaded_s)
    what = f"start: seconds from mpirun to the first step ({np.median(first):.2f}) beyond importing torch"
    values = np.subtract(first, imports)
    return Section("start", [Line(f"{what} ({np.median(imports):.2f})", values.tolist(), "<", 2, imports)])


def first_step_s(words: Sequence[object], stamp: Path, ranks: int) -> float:
    """Runs a job; seconds from its start to the first step of the rank that came last."""
    began_s = monotonic()
    output(words, **{FIRST_STEP: str(stamp)})
    stamps = [stamp.with_name(f"{stamp.name}-{rank}") for rank in range(ranks)]
    last_s = max(float(each.read_text()) for each in stamps)
    for each in stamps:
        each.unlink()
    return last_s - began_s


def output(words: Sequence[object], new_session: bool = False, **more: str) -> str:
    """What a command prints. Raises `Failed`."""
    env = jobs.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **more)
    done = subprocess.run(
        list(map(str, words)),
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        start_new_session=new_session,
    )
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words[-4:]))}: {last_line(done.stderr or done.stdout)}")
    return done.stdout

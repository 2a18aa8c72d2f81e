"""Chains of kills: a training completes although its ranks or mpirun receive any signal at any moment.

`python -m tests.faults.kills --minutes 30` runs one chain after the other, each identified by its seed;
`--chains 1 --seed S` repeats one, as far as timing can be repeated.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from tests import jobs
from tests.faults.harness import STEPS, Job

_SIGNALS = [
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGUSR2,
    signal.SIGQUIT,
    signal.SIGSTOP,
]
_MARK = "HPC_TRAIN_KILLS"  # an environment variable of all processes of a chain
_STALL_S = 6.0
_HANG_S = 90.0
_ALONE_S = 30.0  # processes may outlive mpirun by this
_MOST_KILLS = 6


class Wrong(AssertionError):
    """A chain ended in a state that is not allowed."""


@dataclass(frozen=True)
class Kill:
    """Signal `number` to a rank, or to mpirun (None), at_s seconds after that process began. A stop lasts stop_s."""

    at_s: float
    victim: int | None
    number: signal.Signals
    stop_s: float

    def __str__(self) -> str:
        whom = "mpirun" if self.victim is None else f"rank {self.victim}"
        lasts = f" for {self.stop_s:.1f} s" if self.number == signal.SIGSTOP else ""
        return f"{self.number.name} to {whom} at {self.at_s:.3f} s{lasts}"


def kills(seed: int, most: int) -> tuple[int, list[Kill]]:
    """(number of ranks, one kill for each attempt but the last) of this chain."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 2, 3])
    moments = [lambda: rng.uniform(0.001, 10.0), lambda: 10 ** rng.uniform(-3, 1)]
    told = [
        Kill(
            rng.choice(moments)(),
            rng.choice([None, *range(ranks)]),
            rng.choice(_SIGNALS),
            rng.choice([0.2, 1.5, 2 * _STALL_S]),
        )
        for _ in range(rng.randint(1, most))
    ]
    return ranks, told


def play(seed: int, folder: Path, digits: Path, reference: Job, most: int = _MOST_KILLS) -> str:
    """Runs a chain to its end in `folder`, and returns a description of it. Raises `Wrong`.

    reference: an undisturbed run on the same number of ranks.
    """
    ranks, planned = kills(seed, most)
    assert ranks == reference.ranks
    told, kept = [f"chain {seed}, {ranks} ranks"], -1
    for kill in [*planned, None]:
        newest = _newest(folder)
        if newest < kept:
            raise Wrong(f"{'; '.join(told)}: the checkpoint of step {kept} is lost, the newest is {newest}")
        kept, before = newest, len(_attempts(folder))
        marks = {_MARK: f"{os.getpid()}-{seed}", "TRACE_DELAY": "0.2"}
        job = Job(ranks, folder, digits, "--resume", "auto", "--set", f"run.stall_s={_STALL_S}", cold=True, **marks)
        try:
            told.append(_disturb(job, kill, marks[_MARK]) if kill else "nothing")
            ended = _ended(job, told)
            told[-1] += f" -> {ended.code}"
            _await_orphans(marks[_MARK], told)
        finally:
            for pid in _processes(marks[_MARK]):
                os.kill(pid, signal.SIGKILL)
        if "Traceback (most recent call last)" in ended.err:
            raise Wrong(f"{'; '.join(told)}: a traceback\n{ended.err[-3000:]}")
        if kill is None and ended.code != 0:
            raise Wrong(f"{'; '.join(told)}: nobody disturbed it\n{ended.err[-3000:]}")
        began = [attempt.get("first_step", kept) for attempt in _attempts(folder)[before:]]
        if any(step != kept for step in began):
            raise Wrong(f"{'; '.join(told)}: it went on at step {began}, and there was a checkpoint of step {kept}")
        if ended.code == 0:
            break  # it completed before the signal, or in spite of it
    _compare(job, reference, told)
    return "; ".join(told)


def _disturb(job: Job, kill: Kill, mark: str) -> str:
    """Sends the signal at its moment, and returns a description of it."""
    pid = job.process.pid if kill.victim is None else None
    while pid is None and job.process.poll() is None:
        pid = _rank(kill.victim, mark)
    sleep(kill.at_s)
    if pid is None or job.process.poll() is not None:
        return f"{kill}: too late"
    try:
        os.kill(pid, kill.number)
        if kill.number == signal.SIGSTOP:
            sleep(kill.stop_s)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return f"{kill}: it was gone"
    return str(kill)


def _ended(job: Job, told: list[str]) -> jobs.Ended:
    try:
        return job.end(timeout_s=_HANG_S)
    except subprocess.TimeoutExpired:
        raise Wrong(f"{'; '.join(told)}: no end within {_HANG_S:g} s") from None


# ------------------------------------------------------------------------------------------------ processes


def _processes(mark: str) -> list[int]:
    """All processes of the chain: mpirun and its descendants."""
    return [pid for pid, environ in _environments() if f"{_MARK}={mark}".encode() in environ]


def _rank(number: int, mark: str) -> int | None:
    """The process that mpirun started as this rank; None before that."""
    words = (f"{_MARK}={mark}".encode(), f"OMPI_COMM_WORLD_RANK={number}".encode())
    found = [pid for pid, environ in _environments() if all(word in environ for word in words)]
    return min(found, default=None)  # its own children come after it


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = path.read_bytes().split(b"\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            yield int(path.parent.name), environ


def _await_orphans(mark: str, told: list[str]) -> None:
    end_s = monotonic() + _ALONE_S
    while left := _processes(mark):
        if monotonic() > end_s:
            raise Wrong(f"{'; '.join(told)}: {len(left)} processes are left {_ALONE_S:g} s after mpirun ended")
        sleep(0.1)


# ------------------------------------------------------------------------------------------------ what is left


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint, or 0."""
    found = [int(path.name[5:]) for path in folder.glob("softmax-mnist/*/checkpoints/step-*")]
    return max(found, default=0)


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts that meta.json records."""
    metas = sorted(folder.glob("softmax-mnist/*/meta.json"))
    return json.loads(metas[-1].read_text()).get("attempts", []) if metas else []


def _compare(job: Job, reference: Job, told: list[str]) -> None:
    faults = []
    if job.run.metrics.read_bytes() != reference.run.metrics.read_bytes():
        faults.append("metrics.csv differs from that of a run that nobody disturbed")
    ours, theirs = job.weights(STEPS), reference.weights(STEPS)
    if not all(torch.equal(ours[name], theirs[name]) for name in theirs):
        faults.append("the weights differ from those of a run that nobody disturbed")
    runs = sorted(path.name for path in (job.runs / "softmax-mnist").iterdir())
    if len(runs) != 1:
        faults.append(f"run directories are left: {runs}")
    left = [path.name for path in job.run.path.rglob("*") if path.name == "lock" or path.name.startswith(".")]
    if left:
        faults.append(f"files are left: {left}")
    if faults:
        raise Wrong(f"{'; '.join(told)}: {'; '.join(faults)}")


# ------------------------------------------------------------------------------------------------ many


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first chain")
    parser.add_argument("--chains", type=int, default=10**6, help="at most that many")
    asked = parser.parse_args()
    until_s, wrong, number = monotonic() + 60 * asked.minutes, 0, 0
    with tempfile.TemporaryDirectory(prefix="hpc-train-kills-") as name:
        digits, references = Path(name) / "mnist-5k.h5", dict[int, Job]()
        assert jobs.run(0, "prepare", "mnist-5k", digits, cwd=Path(name)).code == 0
        for ranks in (2, 3):
            references[ranks] = Job(ranks, Path(name) / f"reference-{ranks}", digits)
            ended = references[ranks].end()
            assert ended.code == 0, ended
        while number < asked.chains and monotonic() < until_s:
            seed = asked.seed + number
            number += 1
            folder = Path(name) / f"chain-{seed}"
            try:
                print(play(seed, folder, digits, references[kills(seed, 1)[0]]), flush=True)
            except Wrong as error:
                wrong += 1
                print(f"WRONG: {error}\n  again: python -m tests.faults.kills --chains 1 --seed {seed}", flush=True)
    print(f"{number} chains, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

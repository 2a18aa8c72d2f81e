"""Disturbs running jobs, and reads their results for comparison."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import torch

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir
from hpc_train.core.sampling import BatchSampler, Order, Shares
from hpc_train.train.run.checkpoint.retention import checkpoints as checkpoints_of
from hpc_train.train.run.checkpoint.retention import step_of
from tests import checkpoints, jobs

STEPS, BATCH, SAMPLES, SEED = 24, 400, 4000, 0


def until(true: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Waits until `true()` returns a true value, and returns that."""
    end = monotonic() + timeout_s
    while not (value := true()):
        assert monotonic() < end, "the wait timed out"
        sleep(0.01)
    return value


class Job:
    """A training that runs in the background in its own folder, under mpirun unless `ranks` is 0.

    cold: start it without the warm server (tests/warm), because the test disturbs its start.
    """

    def __init__(
        self,
        ranks: int,
        root: Path,
        digits: Path,
        *words: str,
        runs: Path | None = None,
        cold: bool = False,
        **env: str,
    ) -> None:
        root.mkdir(exist_ok=True)
        self.root, self.ranks, self.runs = root, ranks, runs or root
        (root / "trace").mkdir(exist_ok=True)
        keys = {
            "data.file": digits,
            "task.kind": "tests.faults.traced:Traced",
            "train.steps": STEPS,
            "train.global_batch": BATCH,
            "train.lr": 0.1,
            "train.threads": 1,
            "train.log_every": 7,
            "checkpoint.every_steps": 5,
            "run.root": self.runs,
            "reduce.strategy": "horovod" if ranks else "local",
        }
        settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        self._before = len(self.meta().get("attempts", []))
        self._lines = self.num_traced()
        self._began_s, self._began_at_s = monotonic(), time()
        self.process = subprocess.Popen(
            jobs.command(ranks, "train", jobs.CONFIGS / "softmax-mnist.toml", *settings, *words, warm=not cold),
            cwd=root,
            env=jobs.environment(TRACE=str(root / "trace"), PYTHONPATH=str(jobs.ROOT), **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    # ------------------------------------------------------------------------------ while it runs

    def num_traced(self) -> int:
        """The number of steps that rank 0 has begun, in all attempts."""
        return sum(len(path.read_text().splitlines()) for path in (self.root / "trace").glob("*-rank0.txt"))

    def wait_for_step(self, number: int) -> "Job":
        """Waits until this attempt has begun `number` steps."""
        until(lambda: self.num_traced() - self._lines >= number or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()
        return self

    def wait_for_checkpoint(self, step: int) -> "Job":
        """Waits until the checkpoint of `step` has its final name: it is written while training goes on."""
        until(lambda: self.run.checkpoint(step).exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()
        return self

    def pid(self, rank: int) -> int:
        until(lambda: len(self.meta().get("attempts", [])) > self._before)
        return int(self.meta()["ranks"][rank]["pid"])

    def signal(self, number: signal.Signals) -> "Job":
        self.process.send_signal(number)
        return self

    def end(self, timeout_s: float = 90) -> jobs.Ended:
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return jobs.Ended(self.process.returncode, out, err, monotonic() - self._began_s)

    # ------------------------------------------------------------------------------ what it left

    @property
    def run(self) -> RunDir:
        return RunDir(sorted((self.runs / "softmax-mnist").glob("*-np*"))[-1])

    def meta(self) -> dict[str, Any]:
        found = sorted(self.runs.glob("softmax-mnist/*/meta.json"))
        return json.loads(found[-1].read_text()) if found else {}

    def weights(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        return checkpoints.weights(self.run.checkpoint(step))

    def newest(self) -> int:
        return step_of(checkpoints_of(self.run)[0])

    def losses(self) -> dict[int, float]:
        steps, losses = read_metrics(self.run.metrics)
        assert len(set(steps)) == len(steps), "metrics.csv has a step twice"
        return dict(zip(steps, losses, strict=True))

    def rows(self, rank: int) -> list[list[str]]:
        """The rows that this rank received in each attempt, one line per step."""
        paths = sorted((self.root / "trace").glob(f"*-rank{rank}.txt"))
        return [[line.partition(":")[2] for line in path.read_text().splitlines()] for path in paths]

    def seconds_to_first_step(self) -> float:
        """Seconds from the start of this job to its first step."""
        newest = max((self.root / "trace").glob("*-rank0.txt"))
        return int(newest.read_text().partition(":")[0]) / 1e9 - self._began_at_s


def assert_continuous(job: Job, reference: Job) -> None:
    """Asserts that step numbers, sample order, losses and weights equal those of the undisturbed run bit for bit."""
    attempts = job.meta()["attempts"]
    size = max(1, job.ranks)
    assert [each["attempt"] for each in attempts] == list(range(1, len(attempts) + 1))
    for rank in range(size):
        given: dict[int, str] = {}
        for attempt, lines in zip(attempts, job.rows(rank), strict=True):
            given |= {attempt["first_step"] + index: line for index, line in enumerate(lines)}
        expected = BatchSampler(Order(SAMPLES), BATCH, SEED, Shares(size), rank).batches(range(STEPS))
        assert given == {step: ",".join(map(str, rows)) for step, (rows, _) in enumerate(expected)}
    assert list(job.losses()) == list(range(STEPS))
    assert job.losses() == reference.losses()
    ours, theirs = job.weights(), reference.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

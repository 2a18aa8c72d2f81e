"""Runs a case: calls `hpc-train` on it, and checks the outcome."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests import jobs

HANG_S = 20.0
_NO_NUMBER = re.compile(r"(?<![\w./-])[-+]?(?:nan|inf(?:inity)?)(?![\w./-])", re.IGNORECASE)
_MESSAGE = re.compile(r"^(?:hpc-train: |Error: )", re.MULTILINE)
_REMEDY = re.compile(r"^hpc-train: .*\n(?:.*\n)*?  \S", re.MULTILINE)


class Fault(AssertionError):
    """An outcome that no input may have."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Server:
    """A process of `server.py`."""

    def __init__(self) -> None:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"],
            cwd=jobs.ROOT,
            env=jobs.environment(PYTHONPATH=str(jobs.ROOT), **threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, folder: Path, words: Sequence[str]) -> tuple[Ended, bool]:
        """(result of `hpc-train words...` in `folder`, whether it had to be killed)."""
        out, err = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err"))
        job = {"words": list(words), "folder": str(folder), "out": str(out), "err": str(err), "timeout_s": HANG_S}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        texts = [path.read_text(errors="replace") for path in (out, err)]
        return Ended(told["code"], *texts), told["hung"]


@dataclass
class Play:
    """The surroundings of one case: an empty folder, files that it may copy, and the program.

    called: the command lines so far, for the report of a fault.
    """

    server: Server
    folder: Path
    materials: Path
    called: list[list[str]] = field(default_factory=list)

    def hpc_train(self, *words: object, codes: tuple[int, ...] = (0, 2), numbers: bool = True) -> Ended:
        """Runs a command and checks its outcome. numbers: a successful command must print finite numbers."""
        line = [str(word) for word in words]
        self.called.append(line)
        ended, hung = self.server.run(self.folder, line)
        fault = "it did not end within 20 s" if hung else fault_of(ended, codes, numbers)
        if fault:
            raise Fault(f"{fault}\n  {' '.join(map(ascii, ['hpc-train', *line]))}\n{_last(ended)}")
        return ended


def fault_of(ended: Ended, codes: tuple[int, ...], numbers: bool) -> str | None:
    if ended.code < 0:
        return f"it died of signal {-ended.code}"
    if "Traceback (most recent call last)" in ended.err + ended.out:
        return "a traceback"
    if ended.code not in codes:
        return f"it ended with {ended.code}"
    if ended.code == 2 and len(_MESSAGE.findall(ended.err)) != 1:
        return f"{len(_MESSAGE.findall(ended.err))} messages"
    if ended.code == 2 and ended.err.startswith("hpc-train: ") and not _REMEDY.search(ended.err):
        return "a message without a remedy"
    # Quotes contain a damaged line of a run that was skipped.
    if ended.code == 0 and numbers and (found := _NO_NUMBER.search(re.sub(r"'[^'\n]*'", "", ended.out))):
        return f"{found[0]} is printed as if all was well"
    return None


def _last(ended: Ended, num_lines: int = 14) -> str:
    return "\n".join((ended.out.splitlines()[-3:] + ended.err.splitlines())[-num_lines:])


# ------------------------------------------------------------------------------------------------ cases

# (description, action)
Case = tuple[str, Callable[[Play], None]]


BATCH = 50


def draw(strategy: SearchStrategy[Case], number: int) -> list[Case]:
    """The `BATCH` cases of this seed, always the same. Hypothesis would draw other cases if fewer were requested."""
    cases: list[Case] = []

    @seed(number)
    @settings(
        max_examples=BATCH,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        cases.append(case)

    collect()
    return cases[:BATCH]


@dataclass(frozen=True)
class Failed:
    """A case with a fault."""

    kind: str
    seed: int
    number: int
    what: str
    fault: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz {self.kind} --seed {self.seed} --case {self.number}"
        return f"{self.what}: {self.fault}\n  again: {again}"


def play_all(
    kind: str, cases: Sequence[tuple[int, Case]], number: int, server: Server, materials: Path, place: Path
) -> list[Failed]:
    """Runs pairs (number within its seed, case) one after the other, each in its own folder."""
    failed: list[Failed] = []
    for index, (what, act) in cases:
        folder = place / f"{kind}-{number}-{index}"
        folder.mkdir()
        try:
            act(Play(server, folder, materials))
        except Fault as fault:
            failed.append(Failed(kind, number, index, what, str(fault)))
        _remove(folder)
    return failed


def _remove(folder: Path) -> None:
    for path in (folder, *folder.parent.glob(f"{folder.name}.*")):
        if path.is_dir() and not path.is_symlink():
            for below, _, _ in os.walk(path):
                os.chmod(below, 0o700)
            shutil.rmtree(path)
        else:
            path.unlink()


def finite_losses(play: Play, root: Path) -> None:
    """Raises `Fault` if a successful run recorded a loss that is not finite."""
    for path in root.glob("*/*/metrics.csv"):
        for line in path.read_text().splitlines()[1:]:
            if _NO_NUMBER.search(line.replace(",", " ")):
                raise Fault(f"exit code 0 and a loss of {line!r}\n  {play.called}")
    for path in root.glob("*/*/summary.json"):
        told: dict[str, Any] = json.loads(path.read_text())
        if "NaN" in path.read_text() or "Infinity" in path.read_text():
            raise Fault(f"exit code 0 and {told}\n  {play.called}")

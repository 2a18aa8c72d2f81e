"""Contenders of several ranks that take turns: one computes, the others are stopped."""

import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from tests import jobs
from tests.benchmarks.io_peers import last_line
from tests.benchmarks.peers_gate import FOLDER, PLACE

ROOT = Path(__file__).parents[2]
_START_S, _TURN_S, _END_S = 300, 600, 120  # after so long it is taken for hung
_LOOK_S = 0.5  # between looks whether it is alive


@dataclass(frozen=True)
class Arm:
    """A contender: command lines, each with what its environment has besides, that together have `ranks` gates.

    is_ours: a peer that fails is left out, this program is not.
    """

    name: str
    commands: Sequence[tuple[Sequence[object], dict[str, str]]]
    is_ours: bool = False
    by_mpirun: bool = False


@dataclass
class Turns:
    """What an arm did: seconds of each turn, the mean of its ranks, and the mean loss at each turn's end."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)


class Failed(Exception):
    """Why an arm does not take part, in words."""


def take_turns(
    arms: Sequence[Arm], turns: int, ranks: int, folder: Path, say: Callable[[str], None]
) -> dict[str, Turns]:
    """`turns` blocks of each arm, forwards and backwards; one more at the beginning counts for its loss alone.

    Arms end by themselves after `turns` + 1 blocks and one step. Raises `Failed` for one that is ours.
    """
    with ExitStack() as stack:
        running: dict[str, _Running] = {}
        for arm in arms:
            say(f"  starting {arm.name}")
            try:
                running[arm.name] = stack.enter_context(_started(arm, ranks, folder / arm.name.replace(" ", "-")))
            except Failed as error:
                if arm.is_ours:
                    raise
                say(f"  {arm.name} is left out: {error}")
        found = {name: Turns() for name in running}
        for turn in range(turns + 1):
            for name in list(running)[:: -1 if turn % 2 else 1]:
                try:
                    seconds, loss = running[name].turn()
                except Failed as error:
                    if running[name].arm.is_ours:
                        raise
                    say(f"  {name} is left out: {error}")
                    del running[name], found[name]
                    continue
                found[name].losses.append(loss)
                if turn:
                    found[name].seconds.append(seconds)
        for each in running.values():
            each.finish()
    return found


class _Running:
    """An arm's processes, stopped but in their turn."""

    def __init__(self, arm: Arm, ranks: int, folder: Path, children: Sequence[subprocess.Popen[bytes]]) -> None:
        self.arm, self._folder, self._children = arm, folder, children
        # For reading and writing: opening waits for nobody then, and a rank that ended leaves no broken pipe.
        self._go = [os.open(folder / f"go-{place}", os.O_RDWR) for place in range(ranks)]
        self._said = [os.open(folder / f"said-{place}", os.O_RDWR) for place in range(ranks)]
        self._pids: list[int] = []

    def open(self) -> None:
        self._pids = [int(each["pid"]) for each in self._answers(_START_S)]  # type: ignore[arg-type]
        self._signal(signal.SIGSTOP)

    def turn(self) -> tuple[float, float | None]:
        self._let_go()
        answers = self._answers(_TURN_S)
        self._signal(signal.SIGSTOP)
        losses = [each["loss"] for each in answers]
        loss = None if None in losses else float(np.mean(losses))  # type: ignore[arg-type]
        return float(np.mean([each["seconds"] for each in answers])), loss  # type: ignore[arg-type]

    def finish(self) -> None:
        """Its last step and its end."""
        self._let_go()
        for child in self._children:
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"{self.arm.name} does not end") from None
            if child.returncode and self.arm.is_ours:
                raise Failed(f"{self.arm.name}: {self._last_words()}")

    def close(self) -> None:
        """Ends what is still there."""
        self._signal(signal.SIGCONT)
        for child in self._children:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        for pipe in self._go + self._said:
            os.close(pipe)

    def _let_go(self) -> None:
        self._signal(signal.SIGCONT)
        for pipe in self._go:
            os.write(pipe, b"go\n")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _answers(self, most_s: float) -> list[dict[str, object]]:
        """A line of each rank. Raises `Failed` where one has ended or says nothing for so long."""
        answers: dict[int, dict[str, object]] = {}
        until_s = monotonic() + most_s
        while len(answers) < len(self._said):
            waiting = [pipe for pipe in self._said if pipe not in answers]
            for pipe in select.select(waiting, [], [], _LOOK_S)[0]:
                answers[pipe] = json.loads(os.read(pipe, 1 << 12))  # shorter than PIPE_BUF: whole lines, one a turn
            if len(answers) < len(self._said) and any(child.poll() is not None for child in self._children):
                raise Failed(self._last_words())
            if monotonic() > until_s:
                raise Failed(f"it has said nothing for {most_s:g} s")
        return [answers[pipe] for pipe in self._said]

    def _last_words(self) -> str:
        return last_line((self._folder / "said.txt").read_text(errors="replace"))


@contextmanager
def _started(arm: Arm, ranks: int, folder: Path) -> Iterator[_Running]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in range(ranks):
        os.mkfifo(folder / f"go-{place}")
        os.mkfifo(folder / f"said-{place}")
    with (folder / "said.txt").open("wb") as said, ExitStack() as children:
        started = []
        for place, (words, more) in enumerate(arm.commands):
            own = {} if arm.by_mpirun else {PLACE: str(place)}
            env = jobs.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **{FOLDER: str(folder)}, **own, **more)
            child = subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            started.append(child)
        running = _Running(arm, ranks, folder, started)
        children.callback(running.close)
        running.open()
        yield running

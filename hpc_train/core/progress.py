"""Progress for people: a live bar on a terminal, plain lines in a log, nothing from other ranks."""

import os
import sys
from time import perf_counter_ns
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from hpc_train.core.job_environment import JobEnvironment

Mode = Literal["auto", "bar", "plain"]
_BAR_EVERY_NS = 200_000_000
_LINE_EVERY_NS = 30_000_000_000


def on_terminal() -> bool:
    """Whether a person watches. mpirun and srun give ranks pseudo-terminals, so the launcher's own output counts."""
    if not sys.stdout.isatty():
        return False
    if not JobEnvironment.current().is_launched:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


class StepProgress:
    """Shows steps done, samples/s and time left. Does nothing on ranks other than the root.

    total: None if unknown. mode: "bar", "plain" or "auto" (a bar if a person watches). `note` is shown in the bar, such
    as the loss. counted: what is counted in place of steps. above: the progress of which this is a part, which shows
    this one beside its own until `close`.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        mode: Mode,
        is_root: bool,
        unit: str = "samples",
        counted: str = "steps",
        above: "StepProgress | None" = None,
    ) -> None:
        self._what, self._total, self._unit, self._counted, self._is_root = what, total, unit, counted, is_root
        self._began_ns = self._shown_ns = perf_counter_ns()
        self._done_units = self._began = 0
        self.is_open = True
        self.note = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._above = above
        if above is not None:
            self._bar = above._bar  # to which a line is added only where the part takes long enough to be seen
        elif is_root and (mode == "bar" or (mode == "auto" and on_terminal())):
            # No auto_refresh: its thread would take time from the rank's own core.
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),  # the bar itself gives way first
                TextColumn("left"),
                console=Console(force_terminal=True, width=_width()),
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, note="", rate="")
            self._bar.start()

    def begin(self, done: int) -> None:
        """Starts measuring now; `done` of the total was done before."""
        self._began = done
        self._began_ns = self._shown_ns = perf_counter_ns()

    def advance(self, done: int, num_units: int, now_ns: int) -> None:
        """`done` of the total is done, with `num_units` more samples; now_ns: the time by `perf_counter_ns`."""
        self._done_units += num_units
        if not self._is_root or now_ns - self._shown_ns < (_BAR_EVERY_NS if self._bar else _LINE_EVERY_NS):
            return
        self._shown_ns = now_ns
        spent_s = (now_ns - self._began_ns) / 1e9
        rate = self._done_units / spent_s
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task(self._what, total=self._total, note="", rate="")
            self._bar.update(self._task, completed=done, note=self.note, rate=f"{rate:,.0f} {self._unit}/s")
            self._bar.refresh()
        else:
            part, left = f"{done} {self._counted}", ""
            if self._total is not None:
                left_s = spent_s / (done - self._began) * (self._total - done) if done > self._began else 0.0
                part, left = f"{done} of {self._total} ({done / self._total:.0%})", f", {duration(left_s)} left"
            where = "" if self._counted == "steps" else f"{self._what}: "
            self.log(f"  {where}{part}, {rate:,.0f} {self._unit}/s{left}")

    def log(self, line: str) -> None:
        """Prints a line, above the bar if there is one. Only on the root."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._is_root:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar and self._above is None:
            self._bar.stop()
        elif self._bar and self._task is not None:
            self._bar.remove_task(self._task)
        self._bar, self.is_open = None, False


def duration(seconds: float) -> str:
    """1:05 or 2:03:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _width() -> int:
    """80 under mpirun, whose terminals claim 0 columns."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80

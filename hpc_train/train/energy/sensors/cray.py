"""HPE Cray EX and XC: the node controller's counters in /sys/cray/pm_counters, which every user may read.

Documented in "User Access to Compute Node Power Data" of Cray System Management.
"""

from pathlib import Path

from hpc_train.train.energy.sensors.meter import Counter, Meter, Now, SysFile

PM_COUNTERS = Path("sys/cray/pm_counters")
_NUM_TRIES = 5
_STALE_S = 10.0  # the controller updates all counters ten times a second


def cray_meters(root: Path, now: Now, unreadable: list[str]) -> list[Meter]:
    """The meter of the whole node.

    Its parts (cpu, memory, accel0 ...) are not used: they are measured separately and do not add up to the node. With
    four MI250X their powers exceeded the node's by 13%.
    """
    folder = root / PM_COUNTERS
    if not folder.is_dir():
        return []
    try:
        node = _Node(folder, now)
    except OSError as error:
        unreadable.append(f"Cray pm_counters: {error}")
        return []
    counter = node.counter
    meter = Meter(
        "node", "Cray pm_counters", "measured", node.read, assumption=lambda: counter.assumption, note=node.cap_changes
    )
    return [meter]


class _Node:
    """The counters of one node.

    freshness changes whenever all counters have been updated: a reading is repeated if it changed meanwhile, and is
    stale if it has not changed for seconds. startup changes when the controller, and with it the counters, restarts.
    generation counts changes of the power cap: these do not affect joules, but the comparison of runs.
    """

    def __init__(self, folder: Path, now: Now) -> None:
        self._folder, self._now = folder, now
        names = ("freshness", "energy", "startup", "generation")
        self._fresh, self._energy, self._start, self._cap = (SysFile(folder / name).number for name in names)
        self._freshness, joules, self._startup, self._generation = self._snapshot()
        self._moved_s = now()
        self.counter = Counter(joules, now)
        self._num_changes = 0

    def read(self) -> float:
        freshness, joules, startup, generation = self._snapshot()
        if freshness != self._freshness:
            self._freshness, self._moved_s = freshness, self._now()
        elif self._now() - self._moved_s > _STALE_S:
            raise OSError(f"{self._folder}: not updated for {self._now() - self._moved_s:.0f} s")
        restarted = startup != self._startup
        self._num_changes += generation != self._generation and not restarted
        self._startup, self._generation = startup, generation
        return self.counter.advance(joules, restarted)

    def cap_changes(self) -> str:
        return f"power cap changed {self._num_changes} times" if self._num_changes else ""

    def _snapshot(self) -> tuple[float, float, float, float]:
        """(freshness, joules, startup, generation) of the same update."""
        freshness = self._fresh()
        for _ in range(_NUM_TRIES):
            joules, startup, generation = self._energy(), self._start(), self._cap()
            before, freshness = freshness, self._fresh()
            if before == freshness:
                return freshness, joules, startup, generation
        raise OSError(f"{self._folder}: updated during each of {_NUM_TRIES} readings")

"""HPE Cray EX and XC: the node controller's counters, /sys/cray/pm_counters ("User Access to Compute Node Power Data",
documentation of Cray System Management). Every user may read them.
"""

from pathlib import Path

from hpc_train.train.energy.sensors.meter import Counter, Meter, Now, SysFile

PM_COUNTERS = Path("sys/cray/pm_counters")
_NUM_TRIES = 5
_STALE_S = 10.0  # all counters are renewed ten times a second


def cray_meters(root: Path, now: Now, faults: list[str]) -> list[Meter]:
    """The node's energy, all of it. Its parts (cpu, memory, accel0 ...) are measured apart from it and do not add up:
    with four MI250X their powers were 13% more than the node's. So they are left out.
    """
    folder = root / PM_COUNTERS
    if not folder.is_dir():
        return []
    try:
        node = _Node(folder, now)
    except OSError as error:
        faults.append(f"Cray pm_counters: {error}")
        return []
    counter = node.counter
    meter = Meter(
        "node", "Cray pm_counters", "measured", node.read, assumption=lambda: counter.assumption, note=node.cap_changes
    )
    return [meter]


class _Node:
    """freshness moves when all counters have been renewed: a reading during which it moved is taken again, and one
    that has not moved for seconds is old. generation counts changes of the power cap, which energy does not mind but
    who compares runs does; startup changes when the controller starts again, and its counters with it.
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
            raise OSError(f"{self._folder}: not renewed for {self._now() - self._moved_s:.0f} s")
        restarted = startup != self._startup
        self._num_changes += generation != self._generation and not restarted
        self._startup, self._generation = startup, generation
        return self.counter.advance(joules, restarted)

    def cap_changes(self) -> str:
        return f"power cap changed {self._num_changes} times" if self._num_changes else ""

    def _snapshot(self) -> tuple[float, float, float, float]:
        """(freshness, joules, startup, generation) of one moment."""
        freshness = self._fresh()
        for _ in range(_NUM_TRIES):
            joules, startup, generation = self._energy(), self._start(), self._cap()
            before, freshness = freshness, self._fresh()
            if before == freshness:
                return freshness, joules, startup, generation
        raise OSError(f"{self._folder}: renewed during each of {_NUM_TRIES} readings")

"""A loop that does next to nothing, and the time of a core that it and what samples energy beside it take.

    python -m tests.benchmarks.peers_meters bare|ours SECONDS FOLDER
    perun monitor tests/benchmarks/peers_meters.py perun SECONDS FOLDER

Writes FOLDER/share: core seconds a second of all processes of this session, while the loop runs. Ours reads a recorded
tree of two packages and their memory (RAPL), so that it has counters to read on every machine.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import monotonic, sleep

_STEP_S = 0.1
_SETTLE_S = 1.0  # until a sampler that starts with the loop has started


def main(how: str, seconds: float, folder: Path) -> None:
    with sampler(folder) if how == "ours" else nullcontext():
        sleep(_SETTLE_S)
        began_s, spent_s = monotonic(), session_s()
        while monotonic() - began_s < seconds:
            sleep(_STEP_S)
        share = (session_s() - spent_s) / (monotonic() - began_s)
    (folder / "share").write_text(str(share))


def sampler(folder: Path) -> AbstractContextManager[None]:
    from hpc_train.train.energy.sensors.choose import choose_meters
    from hpc_train.train.energy.sensors.sampler import Sampler
    from tests.sensor_trees import rapl

    for package in range(2):
        rapl(folder, f"intel-rapl:{package}", f"package-{package}")
        rapl(folder, f"intel-rapl:{package}:0", "dram")
    meters = choose_meters(folder).meters
    assert len(meters) >= 4, meters
    return Sampler(meters, folder / "energy.csv", 1.0, 0.0)


def session_s() -> float:
    """Core seconds of every thread that lives in this session now, to the nanosecond."""
    own, total_ns = os.getsid(0), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == own:
                total_ns += sum(int(each.read_text().split()[0]) for each in process.glob("task/*/schedstat"))
        except (ProcessLookupError, FileNotFoundError):
            continue  # it has ended meanwhile
    return total_ns / 1e9


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))

"""How much memory an epoch takes: python -m tests.benchmarks.io_memory FILE MEMORY_MB

Prints, as JSON, by how many MiB this process grew at most: "all", of which "own" are its own. The rest are pages of the
file, which belong to the page cache: it keeps them as long as nobody else needs the room.
"""

import json
import sys
from pathlib import Path

from tests.benchmarks.io_readers import ours

_LOOK_EVERY = 4  # batches


def resident_mb() -> dict[str, float]:
    """Resident memory, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("all", "VmRSS"), ("own", "RssAnon"))}


def main(path: Path, memory_mb: int) -> None:
    loaded = ours(path.with_name("warm.h5"), memory_mb)
    list(loaded(0))  # what libraries take when they are used first is no growth
    before = resident_mb()
    most = dict(before)
    for number, _ in enumerate(ours(path, memory_mb)(1)):
        if number % _LOOK_EVERY == 0:
            now = resident_mb()
            most = {name: max(most[name], now[name]) for name in most}
    print(json.dumps({name: most[name] - before[name] for name in most}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

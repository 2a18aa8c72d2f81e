"""The last lines of files that a job still appends to: a line that it has not finished is left out."""

from pathlib import Path

import numpy as np

from hpc_train.core.records import IntArray
from hpc_train.core.timing_log import TIMING_COLUMNS

_TAIL_BYTES = 1 << 16  # some 500 lines of timings


def last_lines(path: Path) -> tuple[list[str], list[str]]:
    """(the names of the columns, the last lines) of a CSV file; empty if there are none yet."""
    try:
        with path.open("rb") as file:
            header = file.readline().decode(errors="replace").strip().split(",")
            begin = file.tell()
            file.seek(0, 2)
            end = file.tell()
            file.seek(max(begin, end - _TAIL_BYTES))
            is_cut = file.tell() > begin
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return [], []
    *lines, _ = text.split("\n")
    return header, lines[1:] if is_cut else lines


def last_timings(path: Path) -> dict[str, IntArray]:
    """The columns of a rank's last steps, all of one attempt; each empty if nothing is written yet."""
    header, lines = last_lines(path)
    rows = [cells for line in lines if len(cells := line.split(",")) == len(header) and all(map(str.isdecimal, cells))]
    values = np.array(rows, dtype=np.int64).reshape(len(rows), len(header))
    columns = dict(zip(header, values.T, strict=True))
    found = {name: columns.get(name, np.zeros(len(rows), np.int64)) for name in TIMING_COLUMNS}
    of_last = found["attempt"] == found["attempt"][-1:]
    return {name: column[of_last] for name, column in found.items()} if len(rows) else found


def last_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of the last lines of metrics.csv."""
    found = []
    for line in last_lines(path)[1]:
        step, _, loss = line.partition(",")
        try:
            found.append((int(step), float(loss)))
        except ValueError:  # damage: the other lines count
            continue
    return found

"""Under mpirun: all ranks write the same bytes by HDF5, contiguous, and by raw MPI-IO, interleaved.

    mpirun -n 2 python -m tests.benchmarks.io_write FOLDER MB REPEAT

Prints, as JSON, the seconds of each repetition: {"contiguous": ..., "raw MPI-IO": ..., "raw MPI-IO, collective": ...}.
"""

import json
import sys
from pathlib import Path

from hpc_train.bench import io
from hpc_train.bench.file_layouts import LAYOUTS
from hpc_train.train.comm.startup import open_context


def main(folder: Path, size_mb: int, repeat: int) -> None:
    wanted = {("contiguous", "collective"), ("raw MPI-IO", "independent"), ("raw MPI-IO", "collective")}
    layouts = tuple(layout for layout in LAYOUTS if (layout.name, layout.written) in wanted)
    with open_context(use_mpi=True) as context:
        rows = io.measure(folder, size_mb, repeat, context, lambda text: None, layouts, [context.world.size])
        if context.world.is_root:
            print(json.dumps({f"{row.layout}, {row.written}": row.write_s for row in rows if row.mode == row.written}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""What a run's test counted: true by predicted, of classes or of bins of numbers."""

import numpy as np

from hpc_train.core.records import FloatArray
from hpc_train.core.rundir import RunDir


def counts_of_test(run: RunDir, name: str) -> FloatArray | None:
    """(true, predicted) of test_NAME.csv; None without the file, or if it is damaged."""
    try:
        lines = run.test_table(name).read_text(encoding="ascii").splitlines()[1:]
        counts = np.array([[float(cell) for cell in line.split(",")[1:]] for line in lines])
    except (OSError, ValueError):
        return None
    is_sound = counts.ndim == 2 and counts.shape[0] == counts.shape[1] and np.isfinite(counts).all()
    return counts if is_sound and (counts >= 0).all() and counts.any() else None

"""Over a link of 100 Mbit/s, what `bench allreduce` fitted predicts a training's communication."""

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.link import HIDDEN, measure
from tests.slurm.slurm import Cluster

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]


def test_a_slow_link_is_predicted_by_its_benchmark(cluster: Cluster, tmp_path: Path) -> None:
    ways = [("horovod", "none"), ("mpi", "none"), ("mpi", "bf16")]
    horovod, mpi, halved = measure(cluster, tmp_path, ["100mbit"], 6, ways)
    num_weights = 784 * HIDDEN[0] + HIDDEN[0] * HIDDEN[1] + HIDDEN[1] * 10 + sum(HIDDEN) + 10
    assert horovod.num_bytes == mpi.num_bytes == 4 * num_weights
    wire_s = 2 * 3 / 4 * 4 * num_weights / 12.5e6
    for line in (horovod, mpi):
        assert np.median(line.measured_s) > 0.8 * wire_s, "nothing is faster than the link"
        assert abs(line.error) < 0.5, line.cells()
    assert np.median(halved.measured_s) < 0.75 * np.median(mpi.measured_s)

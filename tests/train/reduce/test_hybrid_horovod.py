"""`reduce.shard_within` over Horovod, whose sets of ranks are given when it starts: each job is a new process."""

from pathlib import Path

import numpy as np
import pytest

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import find
from tests import jobs


@pytest.mark.parametrize("ranks, within, stage", [(2, 1, 3), (4, 2, 1), (4, 2, 3)])
def test_horovod_sums_within_and_between_copies(
    tmp_path: Path, digits: Path, ranks: int, within: int, stage: int
) -> None:
    found = []
    for transport in ("mpi", "horovod"):
        keys = {
            "data__file": digits,
            "run__root": tmp_path / transport,
            "train__steps": 10,
            "reduce__strategy": "sharded",
            "reduce__stage": stage,
            "reduce__shard_within": within,
            "reduce__transport": transport,
        }
        done = jobs.run(ranks, "train", jobs.CONFIGS / "mlp-mnist.toml", *jobs.settings(**keys), cwd=tmp_path)
        assert done.code == 0, done.err
        found.append(np.array(read_metrics(find([tmp_path / transport])[0].metrics)[1]))
    assert len(found[0]) == 10
    assert np.abs(found[0] / found[1] - 1).max() < 1e-5

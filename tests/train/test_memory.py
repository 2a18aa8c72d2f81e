"""The memory of a rank that shapes tell, against what torch allocates."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.train.memory import Trial, smallest
from tests import jobs

WIDTH, BATCH = 512, 256
JOB = """
name = "mlp"
[data]
file = "{file}"
[task]
model = "mlp"
options = {{ hidden = [{width}, {width}] }}
[train]
steps = 3
global_batch = {batch}
optimizer = "adamw"
[reduce]
strategy = "local"
[checkpoint]
keep = 0
[run]
root = "{root}"
"""
NUM_INPUTS, NUM_CLASSES = 256, 10


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    with h5py.File(folder / "data.h5", "w") as file:
        rng = np.random.default_rng(0)
        file["train/inputs"] = rng.random((1024, NUM_INPUTS), np.float32)
        file["train/targets"] = rng.integers(0, NUM_CLASSES, 1024)
    text = JOB.format(file=folder / "data.h5", root=folder / "runs", width=WIDTH, batch=BATCH)
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def test_parts_follow_from_the_shapes_and_the_strategy(job: Path) -> None:
    weights = 4 * (WIDTH * (NUM_INPUTS + WIDTH + NUM_CLASSES) + 2 * WIDTH + NUM_CLASSES)
    whole = Trial(load(job, ("reduce.strategy=mpi",)).config).memory(4)
    assert (whole.weights, whole.optimizer) == (weights, 2 * weights)
    divided = Trial(load(job, ("reduce.strategy=sharded", "reduce.stage=3")).config).memory(4)
    assert (divided.weights, divided.gradients, divided.optimizer) == (weights // 4, weights // 4, 2 * weights // 4)


def test_more_micro_batches_take_less_and_a_node_has_a_smallest_number_of_ranks(job: Path) -> None:
    once, parts = (Trial(load(job, (f"train.accumulate={each}",)).config).memory(1) for each in (1, 8))
    assert parts.activations < once.activations
    trial = Trial(load(job, ()).config)
    assert smallest(trial, 1, once.total * 2) == (1, trial.memory(1))
    assert smallest(trial, 1, 1000.0) is None


def test_what_shapes_do_not_tell_is_refused(job: Path) -> None:
    with pytest.raises(UserError, match="parameter_server"):
        Trial(load(job, ("reduce.strategy=parameter_server",)).config)


def test_the_command_is_near_the_peak_that_a_run_records(job: Path) -> None:
    big = jobs.settings(**{"task.options": "{hidden=[4096, 4096]}"})
    told = jobs.run(1, "memory", job, "--json", *big, cwd=job.parent, cold=True)
    trained = jobs.run(1, "train", job, *big, cwd=job.parent, cold=True)
    assert told.code == trained.code == 0, told.err + trained.err
    (meta,) = job.parent.glob("runs/*/*/meta.json")
    (peak,) = json.loads(meta.read_text())["peak_resident_bytes"]
    assert json.loads(told.out)["rank_bytes"]["total"] == pytest.approx(peak, rel=0.1)

"""The memory of a rank that shapes tell, against what ranks of real jobs take."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.train.memory import Division, Memory, Trial, require_room, smallest, smallest_by_strategy
from tests import jobs
from tests.benchmarks import memory

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


def test_the_weights_of_blocks_and_of_tied_layers_count_once(job: Path) -> None:
    text = load(job, ()).config
    whole, third = (Trial(load(job, ("reduce.strategy=sharded", f"reduce.stage={each}")).config) for each in (1, 3))
    assert whole.memory(8).weights == 8 * third.memory(8).weights == Trial(text).memory(1).weights
    # So small a model takes more for the messages of blocks than it saves.
    kept = [each.memory(8) for each in (third, whole)]
    assert kept[0].gradients < kept[1].gradients and kept[0].optimizer == kept[1].optimizer
    assert kept[0].messages > kept[1].messages


def test_a_copy_on_each_node_is_divided_among_the_ranks_of_a_node(job: Path) -> None:
    keys = ("reduce.strategy=sharded", "reduce.stage=3", "reduce.shard_within=node")
    trial = Trial(load(job, keys).config)
    assert trial.memory(8, ranks_per_node=2).optimizer == 4 * trial.memory(8, ranks_per_node=8).optimizer


def test_the_command_is_near_the_peak_that_a_run_records(job: Path) -> None:
    """Within 10%; `make bench-memory` compares 21 such jobs."""
    big = jobs.settings(**{"task.options": "{hidden=[4096, 4096]}"})
    told = jobs.run(1, "memory", job, "--json", *big, cwd=job.parent, cold=True)
    trained = jobs.run(1, "train", job, *big, cwd=job.parent, cold=True)
    assert told.code == trained.code == 0, told.err + trained.err
    (meta,) = job.parent.glob("runs/*/*/meta.json")
    (peak,) = json.loads(meta.read_text())["peak_anonymous_bytes"]
    assert json.loads(told.out)["rank_bytes"]["total"] == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", memory.FAST, ids=lambda case: case.label)
def test_ranks_take_what_the_benchmark_was_told(case: memory.Case, tmp_path: Path) -> None:
    memory.write_data(tmp_path)
    assert memory.told(case, tmp_path)["total"] == pytest.approx(memory.measured(case, tmp_path), rel=0.1)


def test_the_fewest_ranks_are_found_for_each_strategy(job: Path) -> None:
    trial = Trial(load(job, ("reduce.strategy=mpi", f"task.options={{hidden={[1024] * 12}}}")).config)
    largest = trial.memory(1).total
    found = smallest_by_strategy(trial, 1, largest * 0.9)
    few = found["sharded, stage 3"]
    assert few and few[0] > 1 and few[1].total <= largest * 0.9
    assert found["mpi"] is None or found["mpi"][0] >= few[0]


def test_what_cannot_fit_is_refused_with_what_would(job: Path) -> None:
    config, model = load(job, ("reduce.strategy=mpi",)).config, nn.Linear(1000, 1000, bias=False)  # 4 MB, with AdamW 16
    with pytest.raises(UserError, match=r"16.0 MB a rank .*weights 4.00 MB.* has 10.0 MB") as refused:
        require_room(config, model, Division(0, 1, 4), 10_000_000)
    assert "reduce.stage = 2: 7.00 MB a rank" in refused.value.remedy
    with pytest.raises(UserError) as refused:
        require_room(config, model, Division(0, 1, 1), 1_000_000)
    assert "Start 22 ranks or more" in refused.value.remedy
    with pytest.raises(UserError) as refused:
        within = load(job, ("reduce.strategy=sharded", "reduce.stage=3", "reduce.shard_within=2")).config
        require_room(within, model, Division(3, 2, 4), 7_000_000)
    assert "reduce.shard_within = 'job' and reduce.stage = 3: 4.00 MB a rank" in refused.value.remedy
    require_room(config, model, Division(0, 1, 4), 16_000_000)
    require_room(config, model, Division(3, 4, 4), 4_000_000)
    require_room(load(job, ("run.check_memory=false",)).config, model, Division(0, 1, 1), 0)


def test_the_parts_are_explained_and_nodes_that_hold_no_rank_are_a_mistake(job: Path) -> None:
    ask = ("memory", job, *jobs.settings(reduce__strategy="mpi"), "--ranks", 4, "--node-memory")
    tiny = jobs.run(1, *ask, "100kB", cwd=job.parent)
    assert tiny.code == 2 and "--node-memory 100 kB: one rank needs" in tiny.err and not tiny.out
    small = jobs.run(1, *ask, "300MB", cwd=job.parent)  # of which four ranks take more, however many there are
    assert small.code == 1 and "fits on no number of such nodes" in small.err and small.out.count("none") == 4
    for part in Memory.__dataclass_fields__:
        (line,) = [line for line in small.out.splitlines() if f" {part} " in line]
        assert part == "gradients" or len(line.split("│")[4].strip()) > 5, line
    assert jobs.run(1, *ask, "8GB", cwd=job.parent).code == 0


def test_a_job_beyond_the_limit_of_a_process_ends_before_its_weights_are_made(job: Path) -> None:
    wide = jobs.settings(**{"task.options": "{hidden=[8192, 8192]}"})  # 1.1 GB of weights, gradients and moments
    command = [sys.executable, "-m", "hpc_train", "train", str(job), *wide]
    # Libraries take 0.26 GB of it. At 1 GB three ranks and two lay a megabyte apart.
    ended = subprocess.run(["prlimit", "--data=1050000000", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "this job needs" in ended.stderr and "Start 2 ranks" in ended.stderr


def test_a_rank_without_memory_in_a_step_says_so(job: Path) -> None:
    """A batch of activations that no limit holds: one sentence instead of torch's traceback."""
    keys = ["--set", "train.global_batch=1000", "--set", "train.steps=1", "--set", "task.options={hidden=[200000]}"]
    command = [sys.executable, "-m", "hpc_train", "train", str(job), *keys, "--set", "run.check_memory=false"]
    ended = subprocess.run(["prlimit", "--data=1500000000", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert re.search(r"there is no memory for \d.* more\n  Smaller batches, ", ended.stderr), ended.stderr

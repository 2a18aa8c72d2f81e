"""The same global batch gives the same losses on any number of ranks, by any strategy."""

import csv
import json
import math
import tempfile
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch import nn

from hpc_train.analysis.runs.load import load as load_run
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.settings import Config
from hpc_train.core.timing_log import PHASES, TIMING_COLUMNS, read_timings, step_times
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch
from hpc_train.train.loop import train
from hpc_train.train.tasks.classification import Classification

CONFIGS = Path(__file__).parents[2] / "configs"


def run(context: Context, root: Path, digits: Path, job: str, **keys: object) -> RunDir:
    overrides = {
        "data.file": digits,
        "run.root": root,
        "run.progress": "plain",
        **{k.replace("__", "."): v for k, v in keys.items()},
    }
    train(load(CONFIGS / job, tuple(f"{key}={value}" for key, value in overrides.items())), context)
    context.barrier()
    return find([root])[0]


@lru_cache(maxsize=1)
def losses_alone(digits: Path, job: str, keys: tuple[tuple[str, object], ...]) -> np.ndarray:
    """The reference: one process and no MPI."""
    with tempfile.TemporaryDirectory() as root:
        return losses(run(Context(World()), Path(root), digits, job, reduce__strategy="local", **dict(keys)))


def losses(run: RunDir) -> np.ndarray:
    steps, values = read_metrics(run.metrics)
    assert steps == list(range(len(steps)))
    return np.array(values)


JOBS: list[tuple[str, dict[str, object]]] = [
    ("softmax-mnist.toml", {"train__steps": 200}),
    ("mlp-mnist.toml", {"train__steps": 200}),
    # 4,000 samples leave a last batch of 1, and so 0 samples for most ranks, then one of 22, uneven on 3 and 4. Without
    # momentum: with 0.9 of it so small a batch amplifies rounding a hundredfold, smoothly and on any step.
    ("softmax-mnist.toml", {"train__steps": 6, "train__global_batch": 1333}),
    ("mlp-mnist.toml", {"train__steps": 190, "train__global_batch": 34, "train__momentum": 0}),
]


@pytest.mark.parametrize("strategy, job, keys", [(strategy, *job) for job in JOBS for strategy in ("horovod", "mpi")])
def test_losses_are_those_of_one_process(
    context: Context, shared_path: Path, digits: Path, job: str, keys: dict[str, object], strategy: str
) -> None:
    together = losses(run(context, shared_path, digits, job, reduce__strategy=strategy, **keys))
    alone = context.on_root(lambda: losses_alone(digits, job, tuple(keys.items())))
    assert len(together) == keys["train__steps"]
    difference = np.abs(together - alone) / alone
    assert difference.max() < 1e-5, f"step {difference.argmax()}: {together[difference.argmax()]}"


@pytest.fixture(scope="session")
def softmax_run(context: Context, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunDir:
    root = context.on_root(lambda: tmp_path_factory.mktemp("runs"))
    return run(context, root, digits, "softmax-mnist.toml", train__steps=50)


def test_the_first_loss_is_ln_10(softmax_run: RunDir) -> None:
    assert f"{losses(softmax_run)[0]:.5f}" == f"{math.log(10):.5f}" == "2.30259"


def test_the_run_directory_is_whole(context: Context, softmax_run: RunDir) -> None:
    meta, size = json.loads(softmax_run.meta.read_text()), context.world.size
    assert softmax_run.path.name.endswith(f"-np{size}") and softmax_run.path.parent.name == "softmax-mnist"
    assert meta["size"] == size and [rank["rank"] for rank in meta["ranks"]] == list(range(size))
    assert all(rank["cores"] and rank["threads"] >= 1 for rank in meta["ranks"])
    assert len(meta["clock_offsets_ns"]["start"]) == len(meta["clock_offsets_ns"]["end"]) == size
    used = [meta[f"loop_{name}"] for name in ("time_s", "cpu_s", "read_bytes", "written_bytes")]
    assert all(len(ranks) == size for ranks in used)
    assert all(0 < cpu_s < 64 * time_s for time_s, cpu_s in zip(*used[:2], strict=True))
    assert meta["versions"]["horovod"] and meta["mpi"]["library"].startswith("/") and meta["num_parameters"] == 7850
    assert sorted(path.name for path in softmax_run.timings_dir.iterdir()) == [f"rank-{r:05d}.csv" for r in range(size)]
    assert load(softmax_run.config).config.train.steps == 50, "the resolved configuration is one that can be run again"
    energy = [row for path in softmax_run.energy_dir.iterdir() for row in csv.DictReader(path.open())]
    assert float(energy[-1]["joules"]) > 0 and energy[-1]["quality"] in ("measured", "estimated")


def test_every_rank_writes_every_step_and_nothing_is_lost_between(context: Context, softmax_run: RunDir) -> None:
    timings = read_timings(softmax_run.timings(context.world.rank))
    assert not timings.truncated and timings["step"].tolist() == list(range(50))
    assert timings["warmup"].sum() == 10
    durations = timings.phases_ns.sum(axis=1)
    assert (timings["start_ns"][1:] == timings["start_ns"][:-1] + durations[:-1]).all()
    assert (timings["arrived_ns"] > timings["start_ns"]).all()
    assert len(TIMING_COLUMNS) == timings.values.shape[1]


def test_the_summary_is_the_reduction_of_all_ranks(context: Context, softmax_run: RunDir) -> None:
    summary = json.loads(softmax_run.summary.read_text())
    everyone = [step_times(read_timings(softmax_run.timings(rank))) for rank in range(context.world.size)]
    step_ns = np.mean([each.step_ns for each in everyone], axis=0)
    assert summary["step_s"] == pytest.approx(np.mean(step_ns) / 1e9)
    assert summary["num_samples"] == 50 * 100 and summary["complete"]
    phases = np.sum([each.phases_ns for each in everyone], axis=0)
    assert summary["phase_share"]["reduce"] == pytest.approx(phases[PHASES.index("reduce")] / phases.sum())
    assert 0.8 < summary["test"]["accuracy"] < 0.95
    rebuilt = json.loads(load_run(softmax_run).summary.to_json())
    assert {key: value for key, value in rebuilt.items() if value != pytest.approx(summary[key])} == {}


class DifferentModels(Classification):
    """A user's mistake: the model depends on the rank."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.num_classes += context.world.rank


class OwnShards(Classification):
    """A user's mistake: each rank counts its own part of the data."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.num_samples -= context.world.rank


class InEvaluation(Classification):
    """Fails unless the model is in evaluation mode."""

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, dict[str, float]]:
        assert not model.training
        return super().test(model, batch)


@pytest.mark.parametrize("kind, words", [("DifferentModels", "the model differs"), ("OwnShards", "num_samples = 3999")])
def test_a_task_that_differs_between_ranks_is_refused(
    context: Context, shared_path: Path, digits: Path, kind: str, words: str
) -> None:
    if context.world.size == 1:
        run(context, shared_path, digits, "softmax-mnist.toml", task__kind=f"{__name__}:{kind}", train__steps=2)
        return
    with pytest.raises(UserError, match=words):
        run(context, shared_path, digits, "softmax-mnist.toml", task__kind=f"{__name__}:{kind}", train__steps=2)


def test_a_model_is_tested_in_evaluation_mode(context: Context, shared_path: Path, digits: Path) -> None:
    run(context, shared_path, digits, "softmax-mnist.toml", task__kind=f"{__name__}:InEvaluation", train__steps=2)


def test_each_part_of_the_data_has_its_own_scale(context: Context, shared_path: Path, digits: Path) -> None:
    """Training data as bytes with a scale, test data as ready floats, big-endian at that: the same accuracy."""
    mixed = shared_path / "mixed.h5"

    def write() -> None:
        with h5py.File(digits) as source, h5py.File(mixed, "w") as file:
            source.copy("train", file)
            file["test/inputs"] = (source["test/inputs"][:] / 255).astype(">f4")
            file["test/targets"] = source["test/targets"][:].astype(">i2")

    context.on_root(write)
    accuracy = [
        json.loads(run(context, shared_path / name, path, "softmax-mnist.toml", train__steps=50).summary.read_text())
        for name, path in (("plain", digits), ("mixed", mixed))
    ]
    assert accuracy[0]["test"]["accuracy"] == pytest.approx(accuracy[1]["test"]["accuracy"], abs=0.002)

"""Convolutional models on any number of ranks, with an epoch's last batch that leaves most ranks without samples."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.rundir import RunDir
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from tests.parallel.test_train import losses, run

# 131 pictures in batches of 26: the sixth has one, for the first rank alone.
NUM_TRAIN, BATCH, STEPS = 131, 26, 8


@pytest.fixture(scope="module")
def pictures(context: Context, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the 5,000 digits, from all classes."""

    def write() -> Path:
        path = tmp_path_factory.mktemp("pictures") / "few.h5"
        with h5py.File(digits) as source, h5py.File(path, "w") as file:
            for part, count in (("train", NUM_TRAIN), ("test", 50)):
                every = len(source[part]["targets"]) // count
                for name in ("inputs", "targets"):
                    file[f"{part}/{name}"] = source[part][name][::every][:count]
                file[part]["inputs"].attrs["scale_factor"] = 1 / 255
        return path

    return context.on_root(write)


def trained(context: Context, root: Path, pictures: Path, job: str, strategy: str) -> RunDir:
    """By SGD: Adam divides a gradient by its size, so the rounding error of a tiny one becomes a whole step."""
    keys = {"steps": STEPS, "global_batch": BATCH, "threads": 1}
    keys |= {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "lr_warmup_steps": 0}
    named = {f"train__{key}": value for key, value in keys.items()}
    return run(context, root, pictures, job, reduce__strategy=strategy, **named)


@pytest.mark.parametrize("job", ["resnet-fashion.toml", pytest.param("vgg-fashion.toml", marks=pytest.mark.thorough)])
def test_strategies_agree(context: Context, shared_path: Path, pictures: Path, job: str) -> None:
    """On the same number of ranks: batch statistics are those of a rank's share, so the model depends on the number."""
    runs = [trained(context, shared_path / each, pictures, job, each) for each in ("horovod", "mpi")]
    one, other = (losses(each) for each in runs)
    assert len(one) == STEPS and np.isfinite(one).all() and one[0] == pytest.approx(np.log(10), rel=0.3)
    assert np.abs(one - other).max() < 1e-5 * one.min()
    test = json.loads(runs[0].summary.read_text())["test"]
    assert np.isfinite(test["loss"]) and 0 <= test["accuracy"] <= 1


def test_without_normalisation_losses_are_those_of_one_process(
    context: Context, shared_path: Path, pictures: Path
) -> None:
    def vgg(context: Context, strategy: str) -> np.ndarray:
        return losses(trained(context, shared_path / strategy, pictures, "vgg-fashion.toml", strategy))

    together = vgg(context, "horovod")
    alone = context.on_root(lambda: vgg(Context(World()), "local"))
    assert np.abs(together - alone).max() < 1e-5 * alone.min()

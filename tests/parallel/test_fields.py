"""Fields to fields: the losses of one process by every strategy, with samples that not every rank has; their file."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.rundir import RunDir
from hpc_train.core.world import World
from hpc_train.datasets.prepare import burgers
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.train.comm.context import Context
from tests.parallel.test_train import losses, run

STEPS = 5
STRATEGIES: list[dict[str, object]] = [
    {"reduce__strategy": "mpi"},
    {"reduce__strategy": "horovod", "train__activation_checkpointing": "true"},
    {"reduce__strategy": "sharded", "reduce__stage": 3},
    {"reduce__strategy": "sharded", "reduce__stage": 3, "train__activation_checkpointing": "true"},
]


@pytest.fixture(scope="module")
def flows(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few realizations, as `prepare` writes them on these ranks."""
    path = context.on_root(lambda: tmp_path_factory.mktemp("flows")) / "few.nc"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(burgers, "NUM_REALIZATIONS", {"train": 8, "test": 1})
        prepare("burgers", None, path, context)
        alone = path.with_name("alone.nc")
        context.on_root(lambda: prepare("burgers", None, alone, Context(World())))
    assert path.read_bytes() == alone.read_bytes(), "the same to the bit on any number of ranks"
    context.barrier()
    return path


@pytest.fixture(scope="module")
def volumes(context: Context, flows: Path) -> Path:
    """Fields in three dimensions: the flow beside itself a step later."""

    def write() -> Path:
        path = flows.with_name("volumes.h5")
        with h5py.File(flows) as source, h5py.File(path, "w") as file:
            for part in ("train", "test"):
                for name in ("inputs", "targets"):
                    field = source[f"{part}/{name}"][:, :, ::4, ::4]
                    file[f"{part}/{name}"] = np.stack([field, -field, field / 2, field], axis=2)
        return path

    return context.on_root(write)


def trained(context: Context, root: Path, data: Path, **keys: object) -> RunDir:
    """32 samples in batches of 9: the fourth of an epoch has 5. By SGD: Adam makes steps of rounding errors."""
    options = "{ levels = 2, width = 8, padding = 'circular', residual = true }"
    named: dict[str, object] = {"train__steps": STEPS, "train__global_batch": 9, "train__threads": 1}
    named |= {"train__optimizer": "sgd", "train__lr": 0.01, "train__momentum": 0.9, "train__lr_warmup_steps": 0}
    return run(context, root, data, "unet-burgers.toml", task__options=options, **named | keys)


def test_a_change_on_another_scale_than_the_inputs_is_warned_of(
    context: Context, shared_path: Path, flows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for normalize in ("standardize", "none"):
        trained(context, shared_path / normalize, flows, train__steps=1, data__normalize=normalize)
        said = capfd.readouterr().err
        is_told = "the model adds to inputs of data.normalize = 'none'" in said
        assert is_told == (normalize == "none" and context.world.is_root), said


@pytest.mark.parametrize("kind", ["flows", "volumes"])
def test_losses_and_skill_are_those_of_one_process(
    context: Context, shared_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(kind)
    alone = context.on_root(lambda: trained(Context(World()), shared_path / "alone", data, reduce__strategy="local"))
    expected, test = losses(alone), json.loads(alone.summary.read_text())["test"]
    assert len(expected) == STEPS and 0 < test["persistence_skill"] < 1
    for number, keys in enumerate(STRATEGIES if kind == "flows" else STRATEGIES[::2]):
        done = trained(context, shared_path / str(number), data, **keys)
        assert np.abs(losses(done) - expected).max() < 1e-5 * expected.min(), keys
        found = json.loads(done.summary.read_text())["test"]
        assert found == pytest.approx(test, rel=1e-4), keys

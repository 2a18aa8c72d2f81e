"""`train.init_from` under MPI: every rank begins with the file's weights, whatever the strategy."""

from pathlib import Path

import numpy as np
import pytest

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context
from hpc_train.train.export import Form, export
from hpc_train.train.loop import train
from tests.parallel.test_train import CONFIGS, losses, run


def test_every_strategy_begins_with_the_weights_of_the_file(context: Context, shared_path: Path, digits: Path) -> None:
    """The first loss is the same, and lower than from the weights of the seed."""
    keys = {"train__momentum": 0, "train__lr": 0.05, "train__steps": 3}
    first = run(context, shared_path / "first", digits, "mlp-mnist.toml", reduce__strategy="mpi", **keys)
    out = shared_path / "weights.safetensors"
    context.on_root(lambda: export(first.path, out, Form()))
    begun = {}
    for strategy, stage in (("mpi", 1), ("horovod", 1), ("sharded", 1), ("sharded", 3)):
        for name, source in (("file", out), ("run", first.path)):
            root = shared_path / f"{strategy}-{stage}-{name}"
            more = {"train__init_from": source, "reduce__strategy": strategy, "reduce__stage": stage, "seed": 5}
            begun[strategy, stage, name] = losses(run(context, root, digits, "mlp-mnist.toml", **(keys | more)))
    anew = losses(run(context, shared_path / "anew", digits, "mlp-mnist.toml", reduce__strategy="mpi", seed=5, **keys))
    expected = begun["mpi", 1, "file"]
    assert expected[0] < anew[0] - 0.01, "trained for three steps"
    for case, found in begun.items():
        assert found[0] == pytest.approx(expected[0], abs=1e-6), case
        assert np.abs(found - expected).max() < 1e-5, case


def test_a_file_of_another_model_ends_all_ranks_alike(context: Context, shared_path: Path, digits: Path) -> None:
    first = run(context, shared_path / "first", digits, "softmax-mnist.toml", reduce__strategy="mpi", train__steps=2)
    job = (f"data.file={digits}", f"run.root={shared_path / 'second'}", f"train.init_from={first.path}")
    for stage in ("strategy=mpi", "strategy=sharded", "stage=3"):
        job = (*job, f"reduce.{stage}")
        with pytest.raises(UserError, match=r"is of another model:\n    missing: ") as refused:
            train(load(CONFIGS / "mlp-mnist.toml", job), context)
        assert refused.value.joint

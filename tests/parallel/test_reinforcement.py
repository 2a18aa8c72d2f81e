"""Environments are divided over the ranks; what is learnt does not depend on the number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_train.core.config import Loaded, load
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import find
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.loop import train
from hpc_train.train.tasks.dqn import Dqn

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = {
    "dqn": ("rl.replay_start=60", "rl.num_envs=7", "rl.target_every=3", "rl.epsilon_steps=6", "train.global_batch=33"),
    "reinforce": ("train.global_batch=9",),
}


def job(name: str, root: Path, *overrides: str) -> Loaded:
    quick = ("train.steps=8", "rl.test_episodes=2", f"run.root={root}", "run.progress=plain", "train.threads=1")
    return load(CONFIGS / f"{name}-cartpole.toml", (*quick, *KEYS[name], *overrides))


def losses(root: Path) -> np.ndarray:
    return np.array(read_metrics(find([root])[0].metrics)[1])


@pytest.mark.parametrize("name", KEYS)
def test_losses_are_those_of_one_process(context: Context, shared_path: Path, name: str) -> None:
    def alone() -> np.ndarray:
        train(job(name, shared_path / "alone", "reduce.strategy=local"), Context(World()))
        return losses(shared_path / "alone")

    expected = context.on_root(alone)
    strategies = ["horovod", "mpi", *(["sharded", "parameter_server"] if context.world.size > 1 else [])]
    for strategy in strategies if name == "dqn" else strategies[:1]:
        train(job(name, shared_path / strategy, f"reduce.strategy={strategy}"), context)
        context.barrier()
        together = losses(shared_path / strategy)
        assert len(together) == len(set(expected)) == 8
        assert np.abs(together - expected).max() < 1e-5, (strategy, together, expected)


def test_all_ranks_hold_the_replay_memory_of_one_process(context: Context, shared_path: Path) -> None:
    config = job("dqn", shared_path).config

    def played(context: Context) -> dict[str, object]:
        task = Dqn(config, context)
        task.model()
        for step in range(20):
            task.batch(np.arange(3), step)
        return task.state()

    torch.manual_seed(0)
    together = played(context)
    torch.manual_seed(0)
    alone = played(Context(World()))
    for state in (alone, *context.all_gather(together)):
        torch.testing.assert_close(together, state, rtol=0, atol=0)

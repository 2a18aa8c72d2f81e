"""Reinforcement learning: what is learnt from, against brute force; exact continuation; a user's mistakes."""

import io
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from hpc_train.config import Config, load
from hpc_train.errors import UserError
from hpc_train.partition import drawn, rank_samples
from hpc_train.partition import global_batch as batch_of
from hpc_train.train.context import Context
from hpc_train.train.models.policy import Policy
from hpc_train.train.models.q_network import QNetwork
from hpc_train.train.tasks import open_task
from hpc_train.train.tasks.dqn import Replay, Transitions, td_targets
from hpc_train.train.tasks.policy_gradient import returns_to_go
from hpc_train.train.tasks.reinforcement import Environments, seeds_to_test
from hpc_train.world import World

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "dqn": (
        *("rl.num_envs=5", "rl.replay_start=40", "rl.replay_size=60", "rl.target_every=2", "rl.epsilon_steps=4"),
        "train.global_batch=32",
    ),
    "reinforce": ("train.global_batch=6",),
}


def job(name: str, *overrides: str) -> Config:
    return load(CONFIGS / f"{name}-cartpole.toml", (*SMALL[name], *overrides)).config


class Learner:
    """The loop of the trainer in small, for one process."""

    def __init__(self, config: Config) -> None:
        self.config, self.task = config, open_task(config, Context(World()))
        torch.manual_seed(0)
        self.model = self.task.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.003)

    def losses(self, steps: range) -> list[float]:
        return [self._step(step) for step in steps]

    def _step(self, step: int) -> float:
        size = self.config.train.batch_size(1)
        rows = rank_samples(batch_of(step, self.task.num_samples, size), self.task.num_samples, 0, 0, 1)
        loss = self.task.loss(self.model, self.task.batch(rows, step)) / size
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict[str, Any]:
        own = {"task": self.task.state()} if hasattr(self.task, "state") else {}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "task" in state:
            self.task.load_state(state["task"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SMALL)
def test_a_continued_run_is_the_run_that_was_not_interrupted(name: str) -> None:
    whole = Learner(job(name))
    first = whole.losses(range(3))
    file = io.BytesIO()
    torch.save(whole.state(), file)
    expected = whole.losses(range(3, 12))

    continued = Learner(job(name))
    file.seek(0)
    continued.load_state(torch.load(file, weights_only=True))
    assert continued.losses(range(3, 12)) == expected and len(set(first + expected)) == 12
    if name == "dqn":
        mine, theirs = continued.state()["task"], whole.state()["task"]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine["replay"]["num_added"] == 40 + 12 * 5


def test_returns_are_what_came_after_each_action() -> None:
    rng = np.random.default_rng(0)
    lengths, ends, gamma = np.array([7, 1, 4]), np.array([0.0, 2.0, -3.0]), 0.9
    rewards = np.where(np.arange(7)[:, None] < lengths, rng.normal(size=(7, 3)), 0)
    returns = returns_to_go(rewards, lengths, ends, gamma)
    for i, length in enumerate(lengths):
        for t in range(length):
            later = sum(gamma ** (k - t) * (1 - gamma) * rewards[k, i] for k in range(t, length))
            assert returns[t, i] == pytest.approx(later + gamma ** (length - t) * ends[i])


@pytest.mark.parametrize("double", [False, True])
def test_targets_of_deep_q_learning(double: bool) -> None:
    torch.manual_seed(0)
    network = QNetwork(3, 4, hidden=(8,))
    network.target.layers[0].weight.data.normal_()
    after, rewards, terminated = torch.randn(6, 3), torch.randn(6), torch.arange(6) % 3 == 0
    targets = td_targets(rewards, terminated, network.next_values(after, double), 0.9)
    for i in range(6):
        judge = network.online if double else network.target
        best = max(range(4), key=lambda action: judge(after[i : i + 1])[0, action].item())
        later = 0 if terminated[i] else 0.9 * network.target(after[i : i + 1])[0, best].item()
        assert targets[i].item() == pytest.approx(0.1 * rewards[i].item() + later, abs=1e-6)
    assert not targets.requires_grad


def test_the_target_network_is_a_copy_that_nobody_trains() -> None:
    network = QNetwork(4, 2)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 17_410
    network.online.layers[0].weight.data += 1
    inputs = torch.randn(5, 4)
    assert not torch.equal(network.target(inputs), network(inputs))
    network.update_target()
    assert torch.equal(network.target(inputs), network(inputs))


def test_a_policy_begins_undecided() -> None:
    policy = Policy(4, 2)
    assert sum(p.numel() for p in policy.parameters()) == 9155
    odds, values = policy(torch.randn(50, 4))
    assert odds.softmax(1).max() < 0.55 and values.shape == (50,) and values.abs().max() < 0.1


def test_the_replay_memory_keeps_the_newest() -> None:
    replay, numbers = Replay(10, 2), iter(range(100))
    for count in (4, 4, 4, 3):
        new = torch.tensor([float(next(numbers)) for _ in range(count)])
        replay.add(Transitions(new[:, None].repeat(1, 2), new.long(), new, new[:, None].repeat(1, 2), new > 7))
    kept = replay.take(np.arange(len(replay)))
    assert sorted(kept.actions.tolist()) == list(range(5, 15)) and len(replay) == 10
    assert torch.equal(kept.observations[:, 1], kept.rewards) and torch.equal(kept.terminated, kept.rewards > 7)
    other = Replay(10, 2)
    other.load_state(replay.state())
    torch.testing.assert_close(other.state(), replay.state(), rtol=0, atol=0)


def test_draws_belong_to_the_sample_and_are_even() -> None:
    rows = np.arange(10**6, 10**6 + 60_000)
    draws = drawn(rows, 60, seed=3)
    assert np.array_equal(drawn(rows[7:9], 60, seed=3), draws[7:9])
    counts = np.bincount(draws, minlength=60)
    assert len(counts) == 60 and abs(counts - 1000).max() < 160, "5 deviations"


def test_episodes_side_by_side_are_those_played_one_by_one() -> None:
    environments = Environments(job("dqn", "rl.max_episode_steps=25").rl)
    rng = np.random.default_rng(0)
    choices = (rng.random((25, 6)) < np.array([0.5, 0.5, 0.0, 0.5, 0.9, 0.5])).astype(np.int64)
    for seeds in ([3, 4, 5, 6, 7, 8], [9, 2**40]):  # the environments are used again
        time = iter(range(25))
        played = environments.play(seeds, lambda observed, alive: choices[next(time)][alive])  # noqa: B023
        for i, seed in enumerate(seeds):
            alone = gymnasium.make("CartPole-v1", max_episode_steps=25)
            observed, total, over, t = alone.reset(seed=seed % 2**31)[0], 0.0, False, 0
            while not over:
                assert np.array_equal(played.observations[t, i], observed)
                observed, reward, terminated, truncated, _ = alone.step(choices[t, i])
                total, over, t = total + float(reward), terminated or truncated, t + 1
            assert (played.lengths[i], played.terminated[i], played.rewards[:, i].sum()) == (t, terminated, total)
            assert np.array_equal(played.last[i], observed)
        assert played.terminated.any() and (len(seeds) == 2 or not played.terminated.all())


def test_each_test_episode_is_played_once() -> None:
    for size in (1, 3, 7):
        shares = [list(seeds_to_test(100, World(rank, size))) for rank in range(size)]
        assert [seed for share in shares for seeds in share for seed in seeds] == list(range(100))
    learner = Learner(job("reinforce"))
    count, sums = learner.task.test(learner.model, [0, 1, 2])
    apart = [learner.task.test(learner.model, seeds)[1]["return"] for seeds in ([2], [0, 1])]
    assert count == 3 and 3 * 8 <= sums["return"] == sum(apart) <= 3 * 500


class Endless(gymnasium.Env):
    """No limit of time, and pictures for observations where asked for."""

    def __init__(self, shape: tuple[int, ...] = (3,)) -> None:
        self.action_space = gymnasium.spaces.Discrete(2)
        self.observation_space = gymnasium.spaces.Box(0, 1, shape)


gymnasium.register("Endless-v0", Endless)
gymnasium.register("Pictures-v0", Endless, kwargs={"shape": (8, 8, 3)})


@pytest.mark.parametrize(
    "override, size, words",
    [
        ("rl.environment=CartPole-v7", 1, ["rl.environment = 'CartPole-v7'", "CartPole-v1"]),
        ("rl.environment=nowhere:Cart-v0", 1, ["rl.environment = 'nowhere:Cart-v0'", "nowhere"]),
        ("rl.environment=Pendulum-v1", 1, ["rl.environment = 'Pendulum-v1'", "discrete actions"]),
        ("rl.environment=FrozenLake-v1", 1, ["its observations are Discrete(16)", "vector"]),
        ("rl.environment=Pictures-v0", 1, ["its observations are Box", "vector"]),
        ("rl.environment=Endless-v0", 1, ["Set rl.max_episode_steps"]),
        ("train.global_batch=61", 1, ["rl.replay_size = 60", "global batch of 61"]),
        ("train.batch_per_rank=31", 2, ["rl.replay_size = 60", "global batch of 62"]),
        ("rl.num_envs=2", 3, ["rl.num_envs = 2", "3 ranks"]),
    ],
)
def test_a_users_mistake(override: str, size: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        open_task(job("dqn", override), Context(World(size=size)))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("override, words", [("rl.gamma=1", "rl.gamma"), ("rl.epsilon_end=2", "rl.epsilon_end")])
def test_a_value_out_of_range(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        job("dqn", override)


def test_without_gymnasium_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="pip install gymnasium"):
        open_task(job("reinforce"), Context(World()))

"""Reinforcement learning: batches against brute force; exact resume; a user's mistakes."""

import io
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.sampling import BatchSampler, random_below
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.models.policy import Policy
from hpc_train.train.models.q_network import QNetwork
from hpc_train.train.tasks import open_task
from hpc_train.train.tasks.dqn import Experience, Replay, Transitions
from hpc_train.train.tasks.policy_gradient import returns_to_go
from hpc_train.train.tasks.reinforcement import Environments, rank_seeds

CONFIGS = Path(__file__).parents[3] / "configs"
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
    """A small training loop for one process."""

    def __init__(self, config: Config) -> None:
        self.config, self.task = config, open_task(config, Context(World()))
        torch.manual_seed(0)
        self.model = self.task.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.003)

    def losses(self, steps: range) -> list[float]:
        return [self._step(step) for step in steps]

    def _step(self, step: int) -> float:
        size = self.config.train.batch_size(1)
        rows, _ = BatchSampler(self.task.order, size, 0).batch(step)
        loss = self.task.loss(self.model, self.task.batch(rows, step)) / size
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "task": self.task.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.load_state(state["task"])


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
def test_the_loss_of_deep_q_learning(double: bool) -> None:
    task = open_task(job("dqn", f"rl.double={str(double).lower()}"), Context(World()))
    torch.manual_seed(0)
    network = task.model()
    assert isinstance(network, QNetwork)
    network.target.layers[0].weight.data.normal_()
    now, after, rewards, discounts = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6), torch.rand(6)
    total = 0.0
    for i in range(6):
        judge = network.online if double else network.target
        best = max(range(2), key=lambda action: judge(after[i : i + 1])[0, action].item())
        target = rewards[i].item() + discounts[i].item() * network.target(after[i : i + 1])[0, best].item()
        error = abs(network(now[i : i + 1])[0, i % 2].item() - target)
        total += error**2 / 2 if error < 1 else error - 0.5
    loss = task.loss(network, Experience(now, torch.arange(6) % 2, rewards, after, discounts))
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


def remember(replay: Replay, rng: np.random.Generator, num_plays: int) -> list[Transitions]:
    """Three environments that take `num_plays` actions: what each action added to the memory."""
    plays = []
    for _ in range(num_plays):
        terminated, truncated = torch.from_numpy(rng.random((2, 3)) < 0.2)
        numbers = torch.from_numpy(rng.normal(size=(3, 5))).float()
        columns = numbers[:, :2], torch.from_numpy(rng.integers(0, 9, 3)), numbers[:, 2], numbers[:, 3:]
        plays.append(Transitions(*columns, terminated, terminated | truncated))
        replay.add(plays[-1])
    return plays


@pytest.mark.parametrize("multi_step", [1, 2, 5])
@pytest.mark.parametrize("num_plays", [3, 6, 40])  # into a memory of 20: partly filled, just so, and many times over
def test_what_is_drawn_looks_ahead_as_far_as_the_episode_goes(multi_step: int, num_plays: int) -> None:
    replay, gamma = Replay(20, 3, 2), 0.9
    plays = remember(replay, np.random.default_rng(num_plays), num_plays)
    assert len(replay) == min(3 * num_plays, 20)
    drawn = replay.take(np.arange(len(replay)), multi_step, gamma)
    for place in range(len(replay)):
        number = max(n for n in range(place, 3 * num_plays, 20))  # of all that were added, the last at this place
        first, each = divmod(number, 3)
        total, discount, t = 0.0, 1.0, first
        for t in range(first, min(first + multi_step, num_plays)):
            total, discount = total + discount * (1 - gamma) * plays[t].rewards[each].item(), discount * gamma
            if plays[t].over[each]:
                break
        assert torch.equal(drawn.observations[place], plays[first].observations[each])
        assert drawn.actions[place] == plays[first].actions[each]
        assert drawn.rewards[place].item() == pytest.approx(total, abs=1e-6)
        assert torch.equal(drawn.next_observations[place], plays[t].next_observations[each])
        assert drawn.discounts[place].item() == pytest.approx(0 if plays[t].terminated[each] else discount)


@pytest.mark.parametrize("num_plays", [3, 40])
def test_a_replay_memory_can_be_stored(num_plays: int) -> None:
    replay, other = Replay(20, 3, 2), Replay(20, 3, 2)
    remember(replay, np.random.default_rng(0), num_plays)
    other.load_state(replay.state())
    for each in (replay, other):
        remember(each, np.random.default_rng(1), 2)
    torch.testing.assert_close(other.state(), replay.state(), rtol=0, atol=0)


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


def test_draws_belong_to_the_sample_and_are_even() -> None:
    rows = np.arange(10**6, 10**6 + 60_000)
    draws = random_below(rows, 60, seed=3)
    assert np.array_equal(random_below(rows[7:9], 60, seed=3), draws[7:9])
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
        shares = [list(rank_seeds(100, World(rank, size))) for rank in range(size)]
        assert [seed for share in shares for seeds in share for seed in seeds] == list(range(100))
    learner = Learner(job("reinforce"))
    count, sums = learner.task.test(learner.model, [0, 1, 2])
    apart = [learner.task.test(learner.model, seeds)[1]["return"] for seeds in ([2], [0, 1])]
    assert count == 3 and 3 * 8 <= sums["return"] == sum(apart) <= 3 * 500


class Endless(gymnasium.Env):
    """Without a time limit; its observations may be images."""

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
        ("rl.replay_start=61", 1, ["rl.replay_start = 61", "rl.replay_size = 60"]),
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


def test_episodes_of_a_step_are_not_played_in_parts() -> None:
    with pytest.raises(UserError, match=r"train\.accumulate = 2"):
        open_task(job("reinforce", "train.accumulate=2"), Context(World()))


def test_without_gymnasium_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="pip install gymnasium"):
        open_task(job("reinforce"), Context(World()))


@pytest.mark.parametrize(
    "change",
    [
        {"replay": {}},
        {"replay": 3},
        {"num_episodes": [1]},
        {"num_episodes": ["1", "1"]},
        {"actions": [3, 3]},
        {"actions": [torch.tensor([99]), torch.tensor([0])]},
        {"replay": {"num_added": -2}},
        {"replay": {"num_added": True}},
        {"replay": {"rewards": torch.ones(1)}},
        {"replay": {"actions": torch.ones(4)}},
    ],
)
def test_a_state_that_this_task_did_not_give_is_refused_whole(change: dict[str, Any]) -> None:
    learner = Learner(job("dqn"))
    learner.losses(range(3))
    state = learner.task.state()  # type: ignore[attr-defined]
    for key, value in change.items():
        state[key] = {**state[key], **value} if isinstance(value, dict) and value else value
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError, RuntimeError)):
        Learner(job("dqn")).task.load_state(state)

"""Deep Q-learning: all ranks fill one replay memory, and each holds all of it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.sampling import noise_seed, random_below, rank_span
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.models.q_network import QNetwork
from hpc_train.train.tasks.reinforcement import ENDLESS, Environments, rank_seeds


@dataclass(frozen=True)
class Transitions:
    """n actions and their outcomes."""

    observations: torch.Tensor  # (n, num_observed) float32
    actions: torch.Tensor  # (n,) int64, from 0
    rewards: torch.Tensor  # (n,) float32
    next_observations: torch.Tensor  # (n, num_observed) float32
    terminated: torch.Tensor  # (n,) bool: the episode ended by itself, not by its time limit
    over: torch.Tensor  # (n,) bool: the last action of its episode, for either reason


@dataclass(frozen=True)
class Experience:
    """This rank's share of a global batch: n actions, and the outcome of each within `rl.multi_step` actions."""

    observations: torch.Tensor  # (n, num_observed) float32
    actions: torch.Tensor  # (n,) int64, from 0
    rewards: torch.Tensor  # (n,) float32: discounted and summed, times 1 - gamma
    next_observations: torch.Tensor  # (n, num_observed) float32: after the last of those actions
    discounts: torch.Tensor  # (n,) float32: of the value of that observation; 0 after the end of an episode


class Replay:
    """The last `capacity` transitions: a ring of tensors, the same on every rank.

    They come from `num_envs` environments in turn: an environment's next transition is `num_envs` further on.
    """

    def __init__(self, capacity: int, num_envs: int, num_observed: int) -> None:
        self.capacity, self.num_added = capacity, 0
        self._num_envs = num_envs
        self._kept = Transitions(
            torch.zeros(capacity, num_observed),
            torch.zeros(capacity, dtype=torch.int64),
            torch.zeros(capacity),
            torch.zeros(capacity, num_observed),
            torch.zeros(capacity, dtype=torch.bool),
            torch.zeros(capacity, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(self, new: Transitions) -> None:
        """Keeps `new`, one of each environment, in place of the oldest."""
        indices = torch.arange(self.num_added, self.num_added + self._num_envs) % self.capacity
        for field in fields(Transitions):
            getattr(self._kept, field.name)[indices] = getattr(new, field.name)
        self.num_added += self._num_envs

    def take(self, indices: np.ndarray, multi_step: int, gamma: float) -> Experience:
        """The transitions at `indices`, below len(self), each followed for `multi_step` actions.

        For fewer actions if the episode ends before, or if the environment has not taken more yet. The rewards are
        (1 - gamma) (r_0 + gamma r_1 + ...), the discount after k actions is gamma^k (Sutton and Barto, "Reinforcement
        Learning", 2nd edition 2018, equation 7.1).
        """
        kept, first = self._kept, torch.from_numpy(indices)
        ahead = torch.arange(multi_step)
        at = (first[:, None] + ahead * self._num_envs) % self.capacity  # (n, multi_step)
        over = kept.over[at].long()
        num_newer = (self.num_added - 1 - first) % self.capacity
        follows = (ahead * self._num_envs <= num_newer[:, None]) & (over.cumsum(1) == over)
        rewards = (1 - gamma) * (gamma**ahead * follows * kept.rewards[at]).sum(1)
        count = follows.sum(1)
        last = at.gather(1, count[:, None] - 1).squeeze(1)
        discounts = gamma**count * ~kept.terminated[last]
        now, after = kept.observations[first], kept.next_observations[last]
        return Experience(now, kept.actions[first], rewards, after, discounts)

    def state(self) -> dict[str, Any]:
        """The filled part of each tensor, not a copy."""
        kept = {field.name: getattr(self._kept, field.name)[: len(self)] for field in fields(Transitions)}
        return {"num_added": self.num_added, **kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError, LookupError or TypeError for anything that `state` did not return."""
        num_added = state["num_added"]
        if type(num_added) is not int or num_added < 0 or num_added % self._num_envs:
            raise ValueError(f"replay.num_added is {num_added!r}")
        self.num_added = num_added
        for field in fields(Transitions):
            kept, theirs = getattr(self._kept, field.name)[: len(self)], state[field.name]
            if (theirs.shape, theirs.dtype) != (kept.shape, kept.dtype):
                raise ValueError(f"replay.{field.name} is {theirs.dtype} {tuple(theirs.shape)}")
            kept.copy_(theirs)


class Dqn:
    """In each step every environment takes `rl.actions_per_step` actions; then a batch of transitions is drawn.

    The environments are divided over the ranks, which exchange their transitions. Random numbers of environments and
    samples depend on the seed, their numbers and the step alone, so the number of ranks changes nothing.
    """

    in_step = True  # a batch needs the weights of its step: it cannot be made ahead

    def __init__(self, config: Config, context: Context) -> None:
        """Collective."""
        self.config, self.context = config, context
        self.num_samples = ENDLESS
        rl, world = config.rl, context.world
        self._environments = context.on_all(partial(Environments, config.rl))
        self._replay = Replay(rl.replay_size, rl.num_envs, self._environments.num_observed)
        self._mine = range(*rank_span(rl.num_envs, world.rank, world.size))
        # Of all ranks' environments, so that any number of ranks can resume them: how many episodes each has begun, and
        # its actions in the current one.
        self._num_episodes = [0] * rl.num_envs
        self._actions: list[list[int]] = [[] for _ in range(rl.num_envs)]
        self._now = np.zeros((len(self._mine), self._environments.num_observed), np.float32)  # observations of mine
        self._played_step = -1
        self._begin(range(rl.num_envs))

    def model(self) -> nn.Module:
        task, environments = self.config.task, self._environments
        given = (environments.num_observed, environments.num_actions)
        self._network = cast(QNetwork, models.make_model({"q_network": QNetwork}, task.model, given, task.options))
        return self._network

    def batch(self, rows: np.ndarray, step: int) -> Experience:
        """Collective. Continues the episodes, once per step, and draws from the replay memory."""
        rl = self.config.rl
        if step != self._played_step:
            self._played_step = step
            while len(self._replay) < rl.replay_start:
                self._play((0, self._replay.num_added), epsilon=1.0)
            if step % rl.target_every == 0:
                self._network.update_target()
            epsilon = max(rl.epsilon_end, 1 - (1 - rl.epsilon_end) * step / rl.epsilon_steps)
            for repeat in range(rl.actions_per_step):
                self._play((1 + step, repeat), epsilon)
        indices = random_below(rows, len(self._replay), self.config.seed)
        return self._replay.take(indices, rl.multi_step, rl.gamma)

    def _play(self, when: tuple[int, int], epsilon: float) -> None:
        """Collective. One action of every environment, random with probability `epsilon`; every rank gets all outcomes.

        when: the key of the random numbers, different in each call of a run.
        """
        environments, mine = self._environments, self._mine
        noise = np.random.default_rng([self.config.seed, *when]).random((self.config.rl.num_envs, 2))
        explores, random_action = noise[mine, 0] < epsilon, (noise[mine, 1] * environments.num_actions).astype(np.int64)
        actions = random_action if explores.all() else np.where(explores, random_action, self._best(self._now))
        seen = [
            environments.step(environment, action)
            for environment, action in zip(environments.take(len(mine)), actions.tolist(), strict=True)
        ]
        after, rewards, terminated, over = (np.array(column) for column in zip(*seen, strict=True))
        mine_of_all = (self._now, actions, rewards.astype(np.float32), after, terminated, over)
        columns = zip(*self.context.all_gather(mine_of_all), strict=True)
        everyone = Transitions(*(torch.from_numpy(np.concatenate(column)) for column in columns))
        self._replay.add(everyone)
        for done, action in zip(self._actions, everyone.actions.tolist(), strict=True):
            done.append(action)
        self._now = after
        self._begin(everyone.over.nonzero().flatten().tolist())

    @torch.no_grad()
    def _best(self, observations: np.ndarray) -> np.ndarray:
        device = next(self._network.parameters()).device
        return self._network(torch.from_numpy(observations).to(device)).argmax(1).cpu().numpy()

    def _begin(self, numbers: Any) -> None:
        """Begins the next episode of each of these environments."""
        for number in numbers:
            self._actions[number] = []
            self._num_episodes[number] += 1
            self._reset(number)

    def _reset(self, number: int) -> None:
        """Resets an environment to the start of its current episode; other ranks only count its episodes."""
        if number in self._mine:
            index = number - self._mine.start
            environment = self._environments.take(len(self._mine))[index]
            seed = noise_seed(self.config.seed, self._num_episodes[number], number)
            self._now[index] = self._environments.reset(environment, seed)

    def state(self) -> dict[str, Any]:
        """The replay memory and the actions of each environment's current episode; the same on every rank."""
        return {
            "replay": self._replay.state(),
            "num_episodes": list(self._num_episodes),
            "actions": [torch.tensor(actions, dtype=torch.int64) for actions in self._actions],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state`: environments are reset and repeat the actions of their current episodes.

        Raises ValueError, LookupError or TypeError for anything that `state` did not return.
        """
        num_episodes, actions = state["num_episodes"], [each.tolist() for each in state["actions"]]
        num_envs = len(self._actions)
        if len(num_episodes) != num_envs or not all(type(each) is int and each > 0 for each in num_episodes):
            raise ValueError(f"num_episodes is {num_episodes!r:.60}")
        known = range(self._environments.num_actions)
        if len(actions) != num_envs or any(action not in known for each in actions for action in each):
            raise ValueError(f"actions are not those of {num_envs} environments")
        self._replay.load_state(state["replay"])
        self._num_episodes, self._actions = list(num_episodes), actions
        for index, number in enumerate(self._mine):
            self._reset(number)
            environment = self._environments.take(len(self._mine))[index]
            for action in self._actions[number]:
                self._now[index], *_ = self._environments.step(environment, action)

    def loss(self, model: nn.Module, batch: Experience) -> torch.Tensor:
        values = model(batch.observations).gather(1, batch.actions[:, None]).squeeze(1).float()  # autocast: bf16
        # The factor 1 - gamma in the rewards keeps values of the order of a reward for any gamma. Without it, those
        # of CartPole, up to 100, diverged to 10^6 within 3,000 steps.
        next_values = self._network.next_values(batch.next_observations, self.config.rl.double).float()
        targets = batch.rewards + batch.discounts * next_values
        return functional.smooth_l1_loss(values, targets, reduction="sum")  # gradients of 1 at most, as in the paper

    def test_batches(self, world: World) -> Iterator[list[int]]:
        return rank_seeds(self.config.rl.test_episodes, world)

    def test(self, model: nn.Module, batch: list[int]) -> tuple[int, dict[str, float]]:
        device = next(self._network.parameters()).device
        environments = Environments(self.config.rl)  # new ones: those of training are within episodes
        returns = environments.greedy_returns(batch, lambda observed: self._network(observed.to(device)))
        return len(batch), {"return": float(returns.sum())}

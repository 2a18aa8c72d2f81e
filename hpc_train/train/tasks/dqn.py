"""Deep Q-learning: a replay memory that all ranks fill together and each holds whole."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.config import Config
from hpc_train.errors import UserError
from hpc_train.partition import drawn, noise_seed, rank_span
from hpc_train.train import models
from hpc_train.train.context import Context
from hpc_train.train.models.q_network import QNetwork
from hpc_train.train.tasks.reinforcement import ENDLESS, Environments, seeds_to_test
from hpc_train.world import World


@dataclass(frozen=True)
class Transitions:
    """n actions and what came of them."""

    observations: torch.Tensor  # (n, num_observed) float32
    actions: torch.Tensor  # (n,) int64, from 0
    rewards: torch.Tensor  # (n,) float32
    next_observations: torch.Tensor  # (n, num_observed) float32
    terminated: torch.Tensor  # (n,) bool: nothing comes after; not so where only time ran out


class Replay:
    """The last `capacity` transitions: a ring of tensors, the same on every rank."""

    def __init__(self, capacity: int, num_observed: int) -> None:
        self.capacity, self.num_added = capacity, 0
        self._kept = Transitions(
            torch.zeros(capacity, num_observed),
            torch.zeros(capacity, dtype=torch.int64),
            torch.zeros(capacity),
            torch.zeros(capacity, num_observed),
            torch.zeros(capacity, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(self, new: Transitions) -> None:
        """Keeps `new` in place of the oldest."""
        places = torch.arange(self.num_added, self.num_added + len(new.actions)) % self.capacity
        for field in fields(Transitions):
            getattr(self._kept, field.name)[places] = getattr(new, field.name)
        self.num_added += len(new.actions)

    def take(self, places: np.ndarray) -> Transitions:
        """Copies of the transitions at `places`, below len(self)."""
        index = torch.from_numpy(places)
        return Transitions(*(getattr(self._kept, field.name)[index] for field in fields(Transitions)))

    def state(self) -> dict[str, Any]:
        """The tensors themselves, as far as they are filled."""
        kept = {field.name: getattr(self._kept, field.name)[: len(self)] for field in fields(Transitions)}
        return {"num_added": self.num_added, **kept}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_added = int(state["num_added"])
        for field in fields(Transitions):
            getattr(self._kept, field.name)[: len(self)] = state[field.name]


class Dqn:
    """Collective. In each step every environment takes `rl.actions_per_step` actions; then transitions are drawn.

    The environments are split over the ranks, and what they saw is told to all. What an environment and a sample draw
    depends on the seed, their numbers and the step alone: the number of ranks changes nothing.
    """

    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context = config, context
        self.num_samples = ENDLESS
        rl, world = config.rl, context.world
        self._environments = context.on_all(lambda: self._open(world))
        self._replay = Replay(rl.replay_size, self._environments.num_observed)
        self._mine = range(*rank_span(rl.num_envs, world.rank, world.size))
        # Of all ranks' environments, so that any rank can tell where they stand: how many episodes each has begun, and
        # its actions in the one that is going on.
        self._num_episodes = [0] * rl.num_envs
        self._actions: list[list[int]] = [[] for _ in range(rl.num_envs)]
        self._now = np.zeros((len(self._mine), self._environments.num_observed), np.float32)  # what mine show
        self._played_step = -1
        self._begin(range(rl.num_envs))

    def _open(self, world: World) -> Environments:
        rl, batch = self.config.rl, self.config.train.batch_size(world.size)
        if rl.num_envs < world.size:
            raise UserError(
                f"rl.num_envs = {rl.num_envs} is smaller than the {world.size} ranks: some would have none to play",
                f"Set rl.num_envs to {world.size} or more, or start fewer ranks.",
            )
        if batch > rl.replay_size:
            raise UserError(
                f"rl.replay_size = {rl.replay_size} is smaller than a global batch of {batch}",
                f"Set rl.replay_size to {batch} or more, or train.global_batch to less.",
            )
        return Environments(rl)

    def model(self) -> nn.Module:
        task, environments = self.config.task, self._environments
        given = (environments.num_observed, environments.num_actions)
        self._network = cast(QNetwork, models.make_model({"q_network": QNetwork}, task.model, given, task.options))
        return self._network

    def batch(self, rows: np.ndarray, step: int) -> Transitions:
        """Collective. Plays on, once a step, and draws from the replay memory."""
        rl = self.config.rl
        if step != self._played_step:
            self._played_step = step
            while len(self._replay) < min(rl.replay_start, rl.replay_size):
                self._play((0, self._replay.num_added), epsilon=1.0)
            if step % rl.target_every == 0:
                self._network.update_target()
            epsilon = max(rl.epsilon_end, 1 - (1 - rl.epsilon_end) * step / rl.epsilon_steps)
            for repeat in range(rl.actions_per_step):
                self._play((1 + step, repeat), epsilon)
        return self._replay.take(drawn(rows, len(self._replay), self.config.seed))

    def _play(self, when: tuple[int, int], epsilon: float) -> None:
        """Collective. One action of every environment, random with probability `epsilon`; all ranks learn of all.

        when: names what is drawn here; no two calls of a run have the same.
        """
        environments, mine = self._environments, self._mine
        noise = np.random.default_rng([self.config.seed, *when]).random((self.config.rl.num_envs, 2))
        explores, random_action = noise[mine, 0] < epsilon, (noise[mine, 1] * environments.num_actions).astype(np.int64)
        actions = random_action if explores.all() else np.where(explores, random_action, self._best(self._now))
        seen = [
            environments.step(environment, action)
            for environment, action in zip(environments.take(len(mine)), actions.tolist(), strict=True)
        ]
        after, rewards, terminated, is_over = (list(column) for column in zip(*seen, strict=True))
        told = (self._now, actions, np.array(rewards, np.float32), np.array(after), np.array(terminated))
        self._now = np.array(after)
        everyone = list(zip(*self.context.all((*told, np.array(is_over))), strict=True))
        *columns, overs = [np.concatenate(column) for column in everyone]
        self._replay.add(Transitions(*map(torch.from_numpy, columns)))
        for done, action in zip(self._actions, columns[1].tolist(), strict=True):
            done.append(action)
        self._begin(np.flatnonzero(overs).tolist())

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
        """Resets an environment for the episode it is in; of others' environments only the count is kept here."""
        if number in self._mine:
            place = number - self._mine.start
            environment = self._environments.take(len(self._mine))[place]
            seed = noise_seed(self.config.seed, self._num_episodes[number], number)
            self._now[place] = self._environments.reset(environment, seed)

    def state(self) -> dict[str, Any]:
        """The replay memory and where each environment stands; alike on all ranks, and not collective."""
        return {
            "replay": self._replay.state(),
            "num_episodes": list(self._num_episodes),
            "actions": [torch.tensor(actions, dtype=torch.int64) for actions in self._actions],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state`: environments are reset and play the actions of their episodes again."""
        self._replay.load_state(state["replay"])
        self._num_episodes = [int(count) for count in state["num_episodes"]]
        self._actions = [actions.tolist() for actions in state["actions"]]
        for place, number in enumerate(self._mine):
            self._reset(number)
            environment = self._environments.take(len(self._mine))[place]
            for action in self._actions[number]:
                self._now[place], *_ = self._environments.step(environment, action)

    def loss(self, model: nn.Module, batch: Transitions) -> torch.Tensor:
        values = model(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)
        next_values = self._network.next_values(batch.next_observations, self.config.rl.double)
        targets = td_targets(batch.rewards, batch.terminated, next_values, self.config.rl.gamma)
        return functional.smooth_l1_loss(
            values, targets, reduction="sum"
        )  # an error counts as 1 at most, as in the paper

    def test_batches(self, world: World) -> Iterator[list[int]]:
        return seeds_to_test(self.config.rl.test_episodes, world)

    def test(self, model: nn.Module, batch: list[int]) -> tuple[int, dict[str, float]]:
        device = next(self._network.parameters()).device
        environments = Environments(self.config.rl)  # not those of training, which are amid their episodes
        returns = environments.greedy_returns(batch, lambda observed: self._network(observed.to(device)))
        return len(batch), {"return": float(returns.sum())}


def td_targets(
    rewards: torch.Tensor, terminated: torch.Tensor, next_values: torch.Tensor, gamma: float
) -> torch.Tensor:
    """(n,): (1 - gamma) r + gamma V(s'), without the second where nothing comes after (Mnih et al., 2015, algorithm 1).

    The factor (1 - gamma), which the paper does not have, makes a value one of a lasting reward: of its order, whatever
    gamma. With values of up to 100, CartPole's ran away to 10^6 within 3,000 steps.
    """
    return (1 - gamma) * rewards + gamma * next_values * ~terminated

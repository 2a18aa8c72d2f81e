"""Environments of gymnasium: opened, checked and played by a policy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Rl
from hpc_train.core.world import World
from hpc_train.train.data.rank_batches import RankBatches

# There is no data set, and so no epoch: samples are numbers that never repeat. As this one does not depend on
# train.steps, a run can be continued for more steps.
ENDLESS = 2**40
_TEST_BATCH = 64  # episodes played side by side

Choose = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(observations (k, num_observed) float32, their episodes' indices (k,)) -> actions (k,), from 0."""


@dataclass(frozen=True)
class Rollout:
    """n episodes side by side, T the length of the longest; values after the end of a shorter one are undefined."""

    observations: np.ndarray  # (T, n, num_observed) float32
    actions: np.ndarray  # (T, n) int64, from 0
    rewards: np.ndarray  # (T, n) float64; 0 after the end
    lengths: np.ndarray  # (n,) int64
    last: np.ndarray  # (n, num_observed) float32: the observation after the last action
    terminated: np.ndarray  # (n,) bool: ended by itself, not by its time limit


class Environments:
    """A rank's environments `rl.environment`, made when they are needed. Raises UserError."""

    def __init__(self, settings: Rl) -> None:
        self._settings = settings
        self._made: list[Any] = [_make(settings)]
        actions, observed = self._made[0].action_space, self._made[0].observation_space
        setting = f"rl.environment = '{settings.environment}'"
        if type(actions).__name__ != "Discrete":
            raise UserError(f"{setting}: its actions are {actions}", "Name an environment with discrete actions.")
        if type(observed).__name__ != "Box" or len(observed.shape) != 1:
            raise UserError(
                f"{setting}: its observations are {observed}",
                "Name an environment whose observations are a vector of numbers (a wrapper may flatten them).",
            )
        if self._made[0].spec.max_episode_steps is None:
            raise UserError(
                f"{setting}: its episodes have no maximum length and may never end", "Set rl.max_episode_steps."
            )
        self.num_observed = int(observed.shape[0])
        self.num_actions = int(actions.n)
        self._first_action = int(actions.start)

    def take(self, count: int) -> list[Any]:
        """The first `count` environments of the set."""
        self._made += [_make(self._settings) for _ in range(count - len(self._made))]
        return self._made[:count]

    def reset(self, environment: Any, seed: int) -> np.ndarray:
        """The first observation (num_observed,) float32 of the episode of `seed`."""
        return np.asarray(environment.reset(seed=seed % 2**31)[0], np.float32)

    def step(self, environment: Any, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """(observation, reward, whether the episode ended by itself, whether it is over) after an action from 0."""
        observed, reward, terminated, truncated, _ = environment.step(self._first_action + action)
        return np.asarray(observed, np.float32), float(reward), bool(terminated), bool(terminated or truncated)

    def play(self, seeds: list[int], choose: Choose) -> Rollout:
        """A whole episode from each seed, side by side: one call of `choose` for each time step."""
        environments = self.take(len(seeds))
        now = np.zeros((len(seeds), self.num_observed), np.float32)
        for i, (environment, seed) in enumerate(zip(environments, seeds, strict=True)):
            now[i] = self.reset(environment, seed)
        lengths, terminated = np.zeros(len(seeds), np.int64), np.zeros(len(seeds), bool)
        observations, actions, rewards = [], [], []
        alive = np.arange(len(seeds))
        while len(alive):
            observations.append(now.copy())
            actions.append(np.zeros(len(seeds), np.int64))
            rewards.append(np.zeros(len(seeds)))
            actions[-1][alive] = chosen = choose(now[alive], alive)
            is_over = np.zeros(len(alive), bool)
            for k, (i, action) in enumerate(zip(alive.tolist(), chosen.tolist(), strict=True)):
                now[i], rewards[-1][i], terminated[i], is_over[k] = self.step(environments[i], action)
            lengths[alive] += 1
            alive = alive[~is_over]
        shape = (len(rewards), len(seeds))
        return Rollout(
            np.array(observations, np.float32).reshape(*shape, self.num_observed),
            np.array(actions, np.int64).reshape(shape),
            np.array(rewards).reshape(shape),
            lengths,
            now,
            terminated,
        )

    def greedy_returns(self, seeds: list[int], scores: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """(n,) undiscounted returns of episodes in which each action is the one with the highest score."""

        def choose(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
            return scores(torch.from_numpy(observations)).argmax(1).cpu().numpy()

        return self.play(seeds, choose).rewards.sum(0)


def rank_seeds(num_episodes: int, world: World) -> Iterator[list[int]]:
    """This rank's share of the test episodes, the same in every run: those of the seeds 0, 1, 2, ..."""
    return RankBatches(num_episodes, world, _TEST_BATCH, lambda rows: rows.tolist())


def _make(settings: Rl) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(
            f"rl.environment = '{settings.environment}': gymnasium cannot be loaded: {error}", "pip install gymnasium"
        ) from None
    try:
        # The checker of each step helps to write environments, and costs as much as CartPole itself.
        return gymnasium.make(
            settings.environment, max_episode_steps=settings.max_episode_steps, disable_env_checker=True
        )
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(
            f"rl.environment = '{settings.environment}': {error}",
            "Name one of gymnasium's: 'CartPole-v1'; or your own: 'mypackage.mymodule:MyEnvironment-v0'.",
        ) from None

"""Policy gradient with a baseline (REINFORCE); a sample is an episode."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.sampling import noise_seed
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.models.policy import Policy
from hpc_train.train.tasks.reinforcement import ENDLESS, Environments, Rollout, rank_seeds


@dataclass(frozen=True)
class Episodes:
    """The actions of this rank's episodes, one after another."""

    observations: torch.Tensor  # (num_actions, num_observed) float32
    actions: torch.Tensor  # (num_actions,) int64
    returns: torch.Tensor  # (num_actions,) float32: after each action, see returns_to_go
    advantages: torch.Tensor  # (num_actions,) float32: how much better than the baseline, normalised over all ranks
    weight: float  # of an action, so that the loss is a sum over episodes


class PolicyGradient:
    """Plays `train.global_batch` episodes per step with the policy of that step, and learns from them once.

    An episode is a pure function of the weights and its number: it does not depend on the rank that plays it.
    """

    in_step = True  # a batch needs the weights of its step: it cannot be made ahead

    def __init__(self, config: Config, context: Context) -> None:
        """Collective."""
        self.config, self.context = config, context
        self.num_samples = ENDLESS
        self._environments = context.on_all(partial(Environments, config.rl))

    def model(self) -> nn.Module:
        task, environments = self.config.task, self._environments
        given = (environments.num_observed, environments.num_actions)
        self._policy = cast(Policy, models.make_model({"policy": Policy}, task.model, given, task.options))
        return self._policy

    @torch.no_grad()
    def batch(self, rows: np.ndarray, step: int) -> Episodes:
        """Collective. Plays the episodes of these numbers."""
        seed = self.config.seed
        generators = [np.random.default_rng([seed, row]) for row in rows.tolist()]
        device = next(self._policy.parameters()).device

        def choose(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
            logits = self._policy.actor(torch.from_numpy(observations).to(device)).double()
            cumulative = logits.softmax(1).cumsum(1).cpu().numpy()
            draws = np.array([generators[episode].random() for episode in alive.tolist()])
            return (cumulative[:, :-1] < draws[:, None]).sum(1)

        played = self._environments.play([noise_seed(seed, 0, row) for row in rows.tolist()], choose)
        return self._episodes(played, device)

    def _episodes(self, played: Rollout, device: torch.device) -> Episodes:
        """Collective. Returns, and advantages over the baseline, normalised by all ranks' mean and deviation."""
        gamma = self.config.rl.gamma
        is_played = np.arange(len(played.rewards))[:, None] < played.lengths
        # A time limit says nothing about the state at the end: the baseline replaces the rewards that were cut off.
        ends = self._policy.baseline(torch.from_numpy(played.last).to(device)).squeeze(1).cpu().numpy()
        ends = np.where(played.terminated, 0, ends)
        returns = returns_to_go(played.rewards, played.lengths, ends, gamma)[is_played].astype(np.float32)
        observations = torch.from_numpy(played.observations[is_played])
        values = self._policy.baseline(observations.to(device)).squeeze(1).cpu().numpy()
        advantages = (returns - values).astype(np.float64)
        counted = np.array([len(played.lengths), len(returns), advantages.sum(), np.square(advantages).sum()])
        num_episodes, num_actions, total, squares = self.context.sum(counted)
        mean = total / num_actions
        advantages = (advantages - mean) / (np.sqrt(max(squares / num_actions - mean**2, 0)) + 1e-8)
        return Episodes(
            observations,
            torch.from_numpy(played.actions[is_played]),
            torch.from_numpy(returns),
            torch.from_numpy(advantages.astype(np.float32)),
            num_episodes / num_actions,
        )

    def loss(self, model: nn.Module, batch: Episodes) -> torch.Tensor:
        logits, values = (out.float() for out in model(batch.observations))  # autocast may give bf16
        logs = logits.log_softmax(1)
        chosen = logs.gather(1, batch.actions[:, None]).squeeze(1)
        entropy = -(logs.exp() * logs).sum()
        baseline = functional.mse_loss(values, batch.returns, reduction="sum")
        rl = self.config.rl
        lost = -(batch.advantages * chosen).sum() + rl.baseline_weight * baseline - rl.entropy_weight * entropy
        return batch.weight * lost

    def test_batches(self, world: World) -> Iterator[list[int]]:
        return rank_seeds(self.config.rl.test_episodes, world)

    def test(self, model: nn.Module, batch: list[int]) -> tuple[int, dict[str, float]]:
        device = next(self._policy.parameters()).device
        returns = self._environments.greedy_returns(batch, lambda observed: self._policy.actor(observed.to(device)))
        return len(batch), {"return": float(returns.sum())}


def returns_to_go(rewards: np.ndarray, lengths: np.ndarray, ends: np.ndarray, gamma: float) -> np.ndarray:
    """rewards (T, n) of n episodes of `lengths` (n,), whose last states are worth `ends` (n,) -> returns (T, n):

    G_t = (1 - gamma) r_t + gamma G_(t+1), and `ends` after the last action (Sutton and Barto, equation 3.9, times
    1 - gamma, which keeps returns of the order of a reward for any gamma).
    """
    returns = np.zeros_like(rewards)
    value = ends.astype(rewards.dtype)
    for t in reversed(range(len(rewards))):
        value = np.where(t < lengths, (1 - gamma) * rewards[t] + gamma * value, value)
        returns[t] = value
    return returns

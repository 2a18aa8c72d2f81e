"""A policy and its baseline."""

from collections.abc import Sequence

import torch
from torch import nn

from hpc_train.train.models.mlp import Mlp


class Policy(nn.Module):
    """Two multi-layer perceptrons: the actions' log-odds (Williams, "Simple statistical gradient-following algorithms
    for connectionist reinforcement learning", Machine Learning 1992: REINFORCE), and the state's value, the baseline
    of Sutton and Barto, "Reinforcement Learning", 2nd edition 2018, section 13.4.

    The last layers begin with small weights, so that all actions are about equally likely at first. For CartPole's 4
    numbers and 2 actions, `hidden` = (64, 64) has 4,610 + 4,545 = 9,155 parameters.
    """

    def __init__(self, num_observed: int, num_actions: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.actor = Mlp((num_observed,), num_actions, hidden)
        self.baseline = Mlp((num_observed,), 1, hidden)
        for part in (self.actor, self.baseline):
            *_, weight, _ = part.layers.parameters()
            nn.init.normal_(weight, std=0.001)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, num_observed) float -> log-odds (n, num_actions), values (n,)."""
        return self.actor(observations), self.baseline(observations).squeeze(1)

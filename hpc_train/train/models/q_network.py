"""A network of action values and its target."""

from collections.abc import Sequence

import torch
from torch import nn

from hpc_train.train.models.mlp import Mlp


class QNetwork(nn.Module):
    """The values of all actions in one pass, and an older copy that gives the targets (Mnih et al.,
    "Human-level control through deep reinforcement learning", Nature 2015), here for vectors of observations.

    The copy has no gradients and is in the state_dict, so checkpoints hold it. With `hidden` = (128, 128),
    CartPole's 4 numbers and 2 actions: 17,410 parameters, twice.
    """

    def __init__(self, num_observed: int, num_actions: int, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.online = Mlp((num_observed,), num_actions, hidden)
        self.target = Mlp((num_observed,), num_actions, hidden).requires_grad_(False)
        self.update_target()

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """(n, num_observed) float -> action values (n, num_actions)."""
        return self.online(observations)

    @torch.no_grad()
    def next_values(self, observations: torch.Tensor, double: bool) -> torch.Tensor:
        """(n, num_observed) float -> (n,): the target network's value of the best action.

        double: the best action by the online network; the target network's own choice would favour its random errors
        (van Hasselt, Guez and Silver, "Deep Reinforcement Learning with Double Q-learning", AAAI 2016).
        """
        values = self.target(observations)
        best = (self.online(observations) if double else values).argmax(1, keepdim=True)
        return values.gather(1, best).squeeze(1)

    def update_target(self) -> None:
        """Copies the online network to the target."""
        self.target.load_state_dict(self.online.state_dict())

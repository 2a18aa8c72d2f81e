"""What travels with the gradients of a step, so that all ranks decide alike and no message is added."""

from typing import NamedTuple, Protocol


class ControlFlags(Protocol):
    """What this rank asks of all ranks. A reducer reads it when a step's gradients leave."""

    @property
    def stop(self) -> bool:
        """Whether this rank was asked to stop."""

    @property
    def save(self) -> bool:
        """Whether it is time for a checkpoint; only the root decides that."""


class StepFlags(NamedTuple):
    """What comes back: the sums over ranks, the same on every rank."""

    loss: float  # the global mean: each rank adds its part of it
    stop: float  # how many ranks were asked to stop
    save: float  # whether it is time for a checkpoint


NUM_FLAGS = len(StepFlags._fields)

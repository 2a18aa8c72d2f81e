"""One process: its own gradients are the sum."""

import torch

from hpc_train.train.reduce.step_flags import ControlFlags, StepFlags


class Local:
    """See `reducer.Reducer`."""

    num_updates = 1
    sends_weights = False
    shards = None
    lockstep = None

    def __init__(self, control: ControlFlags) -> None:
        self._control = control

    def begin_step(self, loss: torch.Tensor) -> None:
        self._loss = loss.detach()

    def reduce_gradients(self) -> StepFlags:
        return StepFlags(self._loss.item(), self._control.stop, self._control.save)

    def sum_over_shards(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return made

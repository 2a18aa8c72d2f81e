"""From summed gradients to new weights: learning rate, clipping, loss scale, and optimizers for large batches.

Optimizers are functions here, torch's own among them: its optimizer classes import torch's whole compiler when they are
made, 3 s and 800 modules of a shared file system for each rank. Theirs run `fused`, one pass over memory for an update:
of 10M parameters on a CPU, AdamW in a quarter and SGD in a third of the time.
"""

from collections.abc import Callable, Mapping
from math import ceil, cos, isfinite, log2, pi, sqrt
from typing import Any, cast

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hpc_train.core.settings import Train
from hpc_train.train.reduce.shards import ParamShard, State

_TRUST = 0.001  # of LARS
_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000  # of the loss in fp16, as in torch.amp.GradScaler


def learning_rate(train: Train, step: int, batch_size: int) -> float:
    """The learning rate of `step`.

    Linear scaling and gradual warm-up are those of Goyal et al., "Accurate, Large Minibatch SGD" (2017): a batch that
    is k times `lr_reference_batch` takes k times the rate, reached from the rate of the reference batch.
    """
    peak, start = train.lr, 0.0
    if train.lr_reference_batch:
        peak, start = train.lr * batch_size / train.lr_reference_batch, train.lr
    if step < train.lr_warmup_steps:
        return start + (peak - start) * (step + 1) / train.lr_warmup_steps
    if train.schedule == "step":
        return float(peak * train.lr_decay ** sum(step >= part * train.steps for part in train.lr_milestones))
    gone = (step - train.lr_warmup_steps) / max(1, train.steps - train.lr_warmup_steps)
    return peak * {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + cos(pi * gone)) / 2}[train.schedule]


class Optimizer:
    """Makes the updates of what this rank owns.

    sum_owned: adds a number over the ranks that own different parts, collectively by these (`Reducer.sum_owned`).
    num_shares: ranks that share a batch; each one's gradient is so much smaller than the mean's.
    """

    def __init__(
        self,
        train: Train,
        owned: list[ParamShard],
        batch_size: int,
        sum_owned: Callable[[float], float],
        num_shares: int = 1,
    ) -> None:
        self._train, self._owned, self._batch_size, self._sum_owned = train, owned, batch_size, sum_owned
        self._kept: State = {each.name: {} for each in owned}
        self._is_scaled = train.precision == "fp16"
        self._for_shares = 2.0 ** ceil(log2(num_shares)) if self._is_scaled else 1.0
        self._scale = _FIRST_SCALE if self._is_scaled else 1.0
        self._num_since_scaled = 0
        self.num_left_out = 0  # updates in a row, until now

    @property
    def scale(self) -> float:
        """What the loss is to be multiplied by before backward: without it, small gradients vanish in fp16.

        It makes up for the share of a rank, too: what backward computes with does not depend on how many ranks share.
        """
        return self._scale * self._for_shares

    @torch.no_grad()
    def step(self, step: int) -> bool:
        """One update, and whether it was made: not where the summed gradient, of whatever rank, is not finite.

        Collective where ranks own different parts, and then the answer is the same on all of them; where all own the
        same, so are their gradients. True where this rank owns nothing.
        """
        if not self._owned:
            return True
        updated = [each for each in self._owned if each.parameter.grad is not None]
        gradients = _gradients([each.parameter for each in updated])
        norm = self._norm(gradients) / self.scale
        if not isfinite(norm):
            return False
        factor = 1 / self.scale
        if self._train.clip_norm:
            factor *= min(1.0, self._train.clip_norm / (norm + 1e-6))
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        rate = learning_rate(self._train, step, self._batch_size)
        for decay, some in (
            (self._train.weight_decay, [each for each in updated if each.decays]),
            (0.0, [each for each in updated if not each.decays]),
        ):
            if some:
                _UPDATES[self._train.optimizer](
                    [each.parameter for each in some],
                    [self._kept[each.name] for each in some],
                    rate,
                    decay,
                    self._train,
                )
        return True

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """The length of the whole model's gradient.

        It is computed in every step, since it tells in one pass over memory whether all numbers are finite. Of a GPU
        it is read: the loop has just waited for the step's loss, and waits for no more than this.
        """
        squares = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum()) if gradients else 0.0
        return sqrt(self._sum_owned(squares))

    def end_step(self, made: bool, overflowed: bool) -> None:
        """On every rank alike, after each step: whether its update was made, and if not, whether a gradient ran over.

        Then the scale of fp16 is halved; after a long time without, it is doubled.
        """
        self.num_left_out = 0 if made else self.num_left_out + 1
        if not self._is_scaled:
            return
        self._num_since_scaled += made
        if overflowed:
            self._scale, self._num_since_scaled = self._scale / 2, 0
        elif self._num_since_scaled == _GROW_AFTER:
            self._scale, self._num_since_scaled = self._scale * 2, 0

    @property
    def loss_scale(self) -> list[float]:
        """What a checkpoint keeps: the scale for one share, updates made since it changed, and left out in a row."""
        return [self._scale, self._num_since_scaled, self.num_left_out]

    @loss_scale.setter
    def loss_scale(self, kept: list[float]) -> None:
        self.num_left_out = int(kept[2]) if len(kept) > 2 else 0  # earlier versions kept two
        if self._is_scaled:
            self._scale, self._num_since_scaled = kept[0], int(kept[1])

    def state(self) -> State:
        """What the optimizer keeps, by names of what is owned: tensors shaped as these, and numbers."""
        return {name: dict(kept) for name, kept in self._kept.items() if kept}

    def load(self, state: State) -> None:
        """Goes on from a `state`; learning rate and its like stay as configured."""
        for each in self._owned:
            weights, kept = each.parameter.detach(), state.get(each.name, {})
            self._kept[each.name] = {
                k: torch.empty_like(weights, dtype=v.dtype).copy_(v) if v.ndim else v.clone() for k, v in kept.items()
            }

    @property
    def num_bytes(self) -> int:
        """Memory of the optimizer's state on this rank."""
        return sum(value.nbytes for kept in self.state().values() for value in kept.values())


# ------------------------------------------------------------------------------------------------ updates
# Of parameters that are treated alike, from their gradients and what is kept of them between steps.


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [cast(torch.Tensor, each.grad) for each in parameters]


def _fusible(parameters: list[torch.Tensor]) -> bool:
    """torch's fused updates take numbers as they lie in memory, without a look at how a tensor orders them."""
    return all(tensor.is_contiguous() for tensor in (*parameters, *_gradients(parameters)))


def _sgd(
    parameters: list[torch.Tensor], kept: list[dict[str, torch.Tensor]], rate: float, decay: float, train: Train
) -> None:
    buffers = [each.get("momentum_buffer") for each in kept]
    are_alike = len({buffer is None for buffer in buffers}) == 1  # some parameters may be used for the first time
    sgd(
        parameters,
        _gradients(parameters),
        buffers,
        lr=rate,
        weight_decay=decay,
        momentum=train.momentum,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        fused=are_alike and _fusible(parameters),
    )
    for each, buffer in zip(kept, buffers, strict=True):
        if buffer is not None:
            each["momentum_buffer"] = buffer


def _adamw(
    parameters: list[torch.Tensor], kept: list[dict[str, torch.Tensor]], rate: float, decay: float, train: Train
) -> None:
    _begin_moments(parameters, kept)
    for parameter, each in zip(parameters, kept, strict=True):
        each["step"] = each["step"].to(parameter.device)  # where the fused update counts
    adamw(
        parameters,
        _gradients(parameters),
        [each["exp_avg"] for each in kept],
        [each["exp_avg_sq"] for each in kept],
        [],
        [each["step"] for each in kept],
        lr=rate,
        weight_decay=decay,
        beta1=train.betas[0],
        beta2=train.betas[1],
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        fused=_fusible(parameters),
    )


def _begin_moments(parameters: list[torch.Tensor], kept: list[dict[str, torch.Tensor]]) -> None:
    for parameter, each in zip(parameters, kept, strict=True):
        if not each:
            each["step"] = torch.zeros(())
            each["exp_avg"], each["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def _lars(
    parameters: list[torch.Tensor], kept: list[dict[str, torch.Tensor]], rate: float, decay: float, train: Train
) -> None:
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, "Large Batch Training of ConvNets", 2017).

    A layer's step is `_TRUST` times its weights' length, whatever its gradient's length; vectors (biases, norms) are
    updated as by SGD.
    """
    for parameter, each in zip(parameters, kept, strict=True):
        layer_rate: Any = rate
        gradient = cast(torch.Tensor, parameter.grad)
        if parameter.ndim >= 2:
            length, steepness = parameter.norm(), gradient.norm()
            wanted = _TRUST * length / (steepness + decay * length)
            layer_rate = rate * torch.where((length > 0) & (steepness > 0), wanted, 1.0)
            gradient = gradient + decay * parameter
        buffer = each.setdefault("momentum_buffer", torch.zeros_like(parameter))
        parameter.sub_(buffer.mul_(train.momentum).add_(layer_rate * gradient))


def _lamb(
    parameters: list[torch.Tensor], kept: list[dict[str, torch.Tensor]], rate: float, decay: float, train: Train
) -> None:
    """Layer-wise Adam (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020).

    A layer's step is its rate times its weights' length, in Adam's direction; vectors (biases, norms) are updated as by
    AdamW.
    """
    _begin_moments(parameters, kept)
    beta1, beta2 = train.betas
    for parameter, each in zip(parameters, kept, strict=True):
        gradient = cast(torch.Tensor, parameter.grad)
        each["step"] += 1
        mean = each["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** each["step"].item())
        square = each["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        square = square / (1 - beta2 ** each["step"].item())
        update = mean / (square.sqrt() + 1e-6) + decay * parameter
        layer_rate: Any = rate
        if parameter.ndim >= 2:
            length, steepness = parameter.norm(), update.norm()
            layer_rate = rate * torch.where((length > 0) & (steepness > 0), length / steepness, 1.0)
        parameter.sub_(layer_rate * update)


def misfit(state: Any, train: Train, weights: Mapping[str, torch.Tensor]) -> str | None:
    """Why `state` is none that this job's optimizer keeps of `weights`, by name; None where it is one."""
    if not isinstance(state, dict):
        return f"the optimizer's state is {type(state).__name__}"
    wanted = {"sgd": {"momentum_buffer"}, "lars": {"momentum_buffer"}}.get(train.optimizer, _MOMENTS)
    for name, kept in state.items():
        if name not in weights or not isinstance(kept, dict):
            return f"the optimizer's state has an entry {name!r}, and the model has no weights of that name"
        if kept and kept.keys() != wanted:
            return f"the optimizer keeps {sorted(map(str, kept))} of {name} there and {sorted(wanted)} here"
        for key, value in kept.items():
            here = ((), torch.float32) if key == "step" else (tuple(weights[name].shape), weights[name].dtype)
            there = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            if there != here:
                return f"the optimizer's {key} of {name} is {there} there and {here} here"
    return None


def scale_misfit(kept: Any) -> str | None:
    """Why `kept` is no loss scale of a checkpoint; None where it is one."""
    is_one = (
        isinstance(kept, list)
        and len(kept) in (2, 3)  # earlier versions kept two
        and all(isinstance(each, int | float) and isfinite(each) for each in kept)
        and kept[0] > 0
    )
    return None if is_one else f"its loss scale is {kept!r:.60}"


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_UPDATES = {"sgd": _sgd, "adamw": _adamw, "lars": _lars, "lamb": _lamb}

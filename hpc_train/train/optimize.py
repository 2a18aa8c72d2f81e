"""From summed gradients to new weights: learning rate, clipping, loss scale, and the optimizers.

Optimizers are functions here, torch's own included: its optimizer classes import torch's whole compiler when they are
made, 3 s and 800 modules of a shared file system on each rank. Its functions run `fused`, in one pass over memory: with
10M parameters on a CPU, AdamW takes a quarter and SGD a third of the time.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import ceil, cos, isfinite, log2, pi, sqrt
from typing import Any, NamedTuple, cast

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hpc_train.core.errors import UserError
from hpc_train.core.import_path import at_user_line, import_path, is_import_path
from hpc_train.core.settings import Train
from hpc_train.train.imported_optimizer import ImportedOptimizer
from hpc_train.train.reduce.sharded_weights import ParamShard, State

_TRUST = 0.001  # of LARS
_INITIAL_SCALE, _GROWTH_INTERVAL = 2.0**16, 2000  # of the loss in fp16, as in torch.amp.GradScaler


def learning_rate(train: Train, step: int, batch_size: int) -> float:
    """The learning rate of `step`.

    Linear scaling and gradual warm-up are those of Goyal et al., "Accurate, Large Minibatch SGD" (2017): a batch
    k times as large as `lr_reference_batch` gets k times the rate, reached from the rate of the reference batch.
    """
    peak, start = train.lr, 0.0
    if train.lr_reference_batch:
        peak, start = train.lr * batch_size / train.lr_reference_batch, train.lr
    if step < train.lr_warmup_steps:
        return start + (peak - start) * (step + 1) / train.lr_warmup_steps
    if train.schedule == "step":
        return float(peak * train.lr_decay ** sum(step >= part * train.steps for part in train.lr_milestones))
    if is_import_path(train.schedule):
        return peak * _own_schedule(train.schedule, step, train.steps)
    progress = (step - train.lr_warmup_steps) / max(1, train.steps - train.lr_warmup_steps)
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[train.schedule]


def _own_schedule(path: str, step: int, num_steps: int) -> float:
    """By what a user's function of (step, number of steps) multiplies the rate. Raises UserError."""
    schedule = import_path("train.schedule", path, "function")
    remedy = "It is a function of (step, number of steps), from 0 on, that gives what train.lr is multiplied by."
    if isinstance(schedule, type) or not callable(schedule):
        raise UserError(f"train.schedule = '{path}' is a {'class' if callable(schedule) else 'value'}", remedy)
    try:
        factor = schedule(step, num_steps)
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        told = f"{type(error).__name__}: {error}{at_user_line(error)}"
        raise UserError(f"train.schedule = '{path}' fails for step {step} of {num_steps}: {told}", remedy) from None
    if not isinstance(factor, int | float) or not isfinite(factor) or factor < 0:
        raise UserError(f"train.schedule = '{path}' gives {factor!r:.200} for step {step} of {num_steps}", remedy)
    return float(factor)


def relative_rate(train: Train, name: str) -> float:
    """By what the learning rate of a weight is multiplied: the last pattern of `train.rates` that fits counts."""
    rates = [rate for pattern, rate in train.rates.items() if fnmatchcase(name, pattern)]
    return rates[-1] if rates else 1.0


class Optimizer:
    """Updates what this rank owns.

    sum_over_shards: see `reducer.Reducer`. num_shares: how many ranks share a batch.
    """

    def __init__(
        self,
        train: Train,
        owned: list[ParamShard],
        batch_size: int,
        sum_over_shards: Callable[[float], float],
        num_shares: int = 1,
    ) -> None:
        self._train, self._owned, self._batch_size = train, owned, batch_size
        self._sum_over_shards = sum_over_shards
        self._states: State = {each.name: {} for each in owned}
        self._rate_of = {each.name: relative_rate(train, each.name) for each in owned}
        self._rates = sorted(set(self._rate_of.values()))
        self._own = ImportedOptimizer(train, owned, self._rate_of) if is_import_path(train.optimizer) else None
        learning_rate(train, train.lr_warmup_steps, batch_size)  # a schedule of the user's own is tried
        self._is_scaled = train.precision == "fp16"
        self._scale = _INITIAL_SCALE if self._is_scaled else 1.0
        self._share_scale = 2.0 ** ceil(log2(num_shares)) if self._is_scaled else 1.0
        self._num_since_change = 0
        self.num_skipped_in_a_row = 0  # updates in a row, until now

    @property
    def scale(self) -> float:
        """The factor of the loss before backward: without it, small gradients vanish in fp16.

        It also makes up for a rank's share of the mean, so backward computes with numbers of the same size on any
        number of ranks.
        """
        return self._scale * self._share_scale

    @torch.no_grad()
    def step(self, step: int) -> bool:
        """One update. Returns whether it was made: not if the summed gradient, of any rank, is not finite.

        Collective if ranks own different parts; the answer is the same on all of them. If all ranks own the same, so
        are their gradients and their answers. True if this rank owns nothing.
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
        lr = learning_rate(self._train, step, self._batch_size)
        if self._own:
            self._own.step(lr)
            return True
        for decays in (True, False):
            for rate in self._rates:
                alike = [each for each in updated if each.decays == decays and self._rate_of[each.name] == rate]
                self._update(alike, rate * lr, self._train.weight_decay if decays else 0.0)
        return True

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """The norm of the whole model's gradient, computed in every step to find numbers that are not finite.

        On a GPU this reads one number back: the loop has just waited for the step's loss anyway.
        """
        squares = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum()) if gradients else 0.0
        return sqrt(self._sum_over_shards(squares))

    def _update(self, owned: list[ParamShard], lr: float, weight_decay: float) -> None:
        if owned:
            states = [self._states[each.name] for each in owned]
            group = ParamGroup([each.parameter for each in owned], states, lr, weight_decay)
            _UPDATES[self._train.optimizer](group, self._train)

    def end_step(self, made: bool, overflowed: bool) -> None:
        """After each step, with the same values on every rank: whether its update was made, or a gradient overflowed.

        An overflow halves the scale of fp16; many updates without one double it.
        """
        self.num_skipped_in_a_row = 0 if made else self.num_skipped_in_a_row + 1
        if not self._is_scaled:
            return
        self._num_since_change += made
        if overflowed:
            self._scale, self._num_since_change = self._scale / 2, 0
        elif self._num_since_change == _GROWTH_INTERVAL:
            self._scale, self._num_since_change = self._scale * 2, 0

    @property
    def loss_scale(self) -> list[float]:
        """What a checkpoint keeps: the scale for one share, updates since it changed, updates skipped in a row."""
        return [self._scale, self._num_since_change, self.num_skipped_in_a_row]

    @loss_scale.setter
    def loss_scale(self, kept: list[float]) -> None:
        self.num_skipped_in_a_row = int(kept[2]) if len(kept) > 2 else 0  # earlier versions kept two
        if self._is_scaled:
            self._scale, self._num_since_change = kept[0], int(kept[1])

    def state(self) -> State:
        """What the optimizer keeps, by names of what is owned: tensors of the same shape, and numbers."""
        if self._own:
            return self._own.state()
        return {name: dict(kept) for name, kept in self._states.items() if kept}

    def load(self, state: State) -> None:
        """Continues from a `state`, which it keeps; the learning rate and other settings stay as configured."""
        for each in self._owned:
            kept = state.get(each.name, {})
            self._states[each.name] = {key: _like(each.parameter, value) for key, value in kept.items()}
            if self._own and kept:
                self._own.load(each.name, self._states[each.name])

    @property
    def num_bytes(self) -> int:
        """Memory of the optimizer's state on this rank."""
        return sum(value.nbytes for kept in self.state().values() for value in kept.values())


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` on the parameter's device and in its memory layout; a number stays where it is."""
    if not value.ndim:
        return value.clone()
    if (value.device, value.stride()) == (parameter.device, parameter.stride()):
        return value
    return torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


# ------------------------------------------------------------------------------------------------ updates


class ParamGroup(NamedTuple):
    """Parameters that are updated alike, with gradients, and what the optimizer keeps of each."""

    parameters: list[torch.Tensor]
    states: list[dict[str, torch.Tensor]]
    lr: float
    weight_decay: float

    @property
    def is_fusible(self) -> bool:
        """torch's fused updates go through memory in order, without a look at strides."""
        return all(tensor.is_contiguous() for tensor in (*self.parameters, *_gradients(self.parameters)))


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [cast(torch.Tensor, each.grad) for each in parameters]


def _sgd(group: ParamGroup, train: Train) -> None:
    buffers = [state.get("momentum_buffer") for state in group.states]
    are_alike = len({buffer is None for buffer in buffers}) == 1  # a parameter may be used for the first time later
    sgd(
        group.parameters,
        _gradients(group.parameters),
        buffers,
        lr=group.lr,
        weight_decay=group.weight_decay,
        momentum=train.momentum,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        fused=are_alike and group.is_fusible,
    )
    for state, buffer in zip(group.states, buffers, strict=True):
        if buffer is not None:
            state["momentum_buffer"] = buffer


def _adamw(group: ParamGroup, train: Train) -> None:
    _begin_moments(group)
    for parameter, state in zip(group.parameters, group.states, strict=True):
        state["step"] = state["step"].to(parameter.device)  # the fused update counts there
    adamw(
        group.parameters,
        _gradients(group.parameters),
        [state["exp_avg"] for state in group.states],
        [state["exp_avg_sq"] for state in group.states],
        [],
        [state["step"] for state in group.states],
        lr=group.lr,
        weight_decay=group.weight_decay,
        beta1=train.betas[0],
        beta2=train.betas[1],
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        fused=group.is_fusible,
    )


def _begin_moments(group: ParamGroup) -> None:
    for parameter, state in zip(group.parameters, group.states, strict=True):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def _lars(group: ParamGroup, train: Train) -> None:
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, "Large Batch Training of ConvNets", 2017).

    The length of a layer's step is `_TRUST` times that of its weights, whatever its gradient's length. Vectors (biases,
    norms) are updated as by SGD.
    """
    for parameter, state in zip(group.parameters, group.states, strict=True):
        lr: Any = group.lr
        gradient = cast(torch.Tensor, parameter.grad)
        if parameter.ndim >= 2:
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            trust = _TRUST * weight_norm / (gradient_norm + group.weight_decay * weight_norm)
            lr = group.lr * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
            gradient = gradient + group.weight_decay * parameter
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        parameter.sub_(buffer.mul_(train.momentum).add_(lr * gradient))


def _lamb(group: ParamGroup, train: Train) -> None:
    """Layer-wise Adam (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020).

    The length of a layer's step is its rate times the length of its weights, in Adam's direction. Vectors (biases,
    norms) are updated as by AdamW.
    """
    _begin_moments(group)
    beta1, beta2 = train.betas
    for parameter, state in zip(group.parameters, group.states, strict=True):
        gradient = cast(torch.Tensor, parameter.grad)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"].item())
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        square = square / (1 - beta2 ** state["step"].item())
        update = mean / (square.sqrt() + 1e-6) + group.weight_decay * parameter
        lr: Any = group.lr
        if parameter.ndim >= 2:
            weight_norm, update_norm = parameter.norm(), update.norm()
            lr = group.lr * torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        parameter.sub_(lr * update)


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_KEPT = {"sgd": {"momentum_buffer"}, "lars": {"momentum_buffer"}, "adamw": _MOMENTS, "lamb": _MOMENTS}
_UPDATES = {"sgd": _sgd, "adamw": _adamw, "lars": _lars, "lamb": _lamb}


# ------------------------------------------------------------------------------------------------ checkpoints


def optimizer_misfit(state: Any, train: Train, weights: Mapping[str, torch.Tensor]) -> str | None:
    """Why this job's optimizer cannot continue from `state`; None if it can. weights: the model's, by name."""
    if not isinstance(state, dict):
        return f"the optimizer's state is {type(state).__name__}"
    expected = _KEPT.get(train.optimizer)  # None: of another package
    for name, kept in state.items():
        if name not in weights or not isinstance(kept, dict):
            return f"the optimizer's state has an entry {name!r}, and the model has no weights of that name"
        if kept and expected is not None and kept.keys() != expected:
            return f"the optimizer keeps {sorted(map(str, kept))} of {name} there and {sorted(expected)} here"
        for key, value in kept.items():
            if expected is None and not getattr(value, "shape", ()):
                continue  # a number
            here = ((), torch.float32) if key == "step" else (tuple(weights[name].shape), weights[name].dtype)
            there = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            if there != here:
                return f"the optimizer's {key} of {name} is {there} there and {here} here"
    return None


def loss_scale_misfit(kept: Any) -> str | None:
    """Why `kept` is no loss scale of a checkpoint; None if it is one."""
    is_valid = (
        isinstance(kept, list)
        and len(kept) in (2, 3)  # earlier versions kept two
        and all(isinstance(each, int | float) and isfinite(each) for each in kept)
        and kept[0] > 0
    )
    return None if is_valid else f"its loss scale is {kept!r:.60}"

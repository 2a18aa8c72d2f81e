"""From summed gradients to new weights: learning rate, clipping, loss scale, and optimizers for large batches."""

from collections.abc import Callable
from math import cos, inf, isfinite, pi, sqrt
from typing import Any

import torch

from hpc_train import config
from hpc_train.train.shards import Owned, State

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000  # of the loss in fp16, as in torch.amp.GradScaler


def learning_rate(train: config.Train, step: int, batch_size: int) -> float:
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
    `scale` is what the loss is to be multiplied by before backward: without it, small gradients vanish in fp16.
    """

    def __init__(
        self, train: config.Train, owned: list[Owned], batch_size: int, sum_owned: Callable[[float], float]
    ) -> None:
        self._train, self._owned, self._batch_size, self._sum_owned = train, owned, batch_size, sum_owned
        self._torch = _make(train, owned) if owned else None
        self.scale = _FIRST_SCALE if train.precision == "fp16" else 1.0
        self._num_since_scaled = 0

    def step(self, step: int) -> None:
        """One update; none where a gradient of fp16 ran over: then the scale is halved."""
        if self._torch is None:
            return
        gradients = [each.parameter.grad for each in self._owned if each.parameter.grad is not None]
        factor = 1 / self.scale
        if self._train.clip_norm or self._train.precision == "fp16":
            norm = self._norm(gradients) * factor
            if self._train.precision == "fp16" and self._rescale(norm):
                return
            factor *= min(1.0, (self._train.clip_norm or inf) / (norm + 1e-6))
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        for group in self._torch.param_groups:
            group["lr"] = learning_rate(self._train, step, self._batch_size)
        self._torch.step()

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """The length of the whole model's gradient."""
        squares = sum((norm.double() ** 2 for norm in torch._foreach_norm(gradients)), torch.zeros(()))
        return sqrt(total) if isfinite(total := self._sum_owned(float(squares))) else inf

    def _rescale(self, norm: float) -> bool:
        """Whether this update is to be left out; lowers the scale then, and raises it after a long time without."""
        self._num_since_scaled += 1
        if not isfinite(norm):
            self.scale, self._num_since_scaled = self.scale / 2, 0
            return True
        if self._num_since_scaled == _GROW_AFTER:
            self.scale, self._num_since_scaled = self.scale * 2, 0
        return False

    @property
    def loss_scale(self) -> list[float]:
        """What a checkpoint keeps of the scale."""
        return [self.scale, self._num_since_scaled]

    @loss_scale.setter
    def loss_scale(self, kept: list[float]) -> None:
        if self._train.precision == "fp16":
            self.scale, self._num_since_scaled = kept[0], int(kept[1])

    def state(self) -> State:
        """What the optimizer keeps, by names of what is owned: tensors shaped as these, and numbers."""
        if self._torch is None:
            return {}
        state = self._torch.state
        return {
            each.name: {k: torch.as_tensor(value) for k, value in state[each.parameter].items() if value is not None}
            for each in self._owned
            if state.get(each.parameter)
        }

    def load(self, state: State) -> None:
        """Goes on from a `state`; learning rate and its like stay as configured."""
        assert self._torch is not None or not state
        for each in self._owned:
            if each.name in state and self._torch:
                device = each.parameter.device
                kept = {k: v.to(device) if v.ndim else v.clone() for k, v in state[each.name].items()}
                self._torch.state[each.parameter] = kept

    @property
    def num_bytes(self) -> int:
        """Memory of the optimizer's state on this rank."""
        return sum(value.nbytes for kept in self.state().values() for value in kept.values())


def _make(train: config.Train, owned: list[Owned]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [each.parameter for each in owned if each.decays], "weight_decay": train.weight_decay},
        {"params": [each.parameter for each in owned if not each.decays], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = train.betas
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=train.lr, betas=(beta1, beta2))
        case "lamb":
            return Lamb(groups, lr=train.lr, betas=(beta1, beta2))
        case "lars":
            return Lars(groups, lr=train.lr, momentum=train.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, "Large Batch Training of ConvNets", 2017).

    A layer's step is `trust` times its weights' length, whatever its gradient's length; vectors (biases, norms) are
    updated as by SGD.
    """

    def __init__(self, groups: Any, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            decay = group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rate, gradient = group["lr"], parameter.grad
                if parameter.ndim >= 2:
                    length, steepness = parameter.norm(), gradient.norm()
                    wanted = group["trust"] * length / (steepness + decay * length)
                    rate = rate * torch.where((length > 0) & (steepness > 0), wanted, 1.0)
                    gradient = gradient + decay * parameter
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                parameter.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(rate * gradient))


class Lamb(torch.optim.Optimizer):
    """Layer-wise Adam (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020).

    A layer's step is its rate times its weights' length, in Adam's direction; vectors (biases, norms) are updated as by
    AdamW.
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - beta1) / (1 - beta1 ** state["step"].item())
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                square = square / (1 - beta2 ** state["step"].item())
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                rate = group["lr"]
                if parameter.ndim >= 2:
                    length, steepness = parameter.norm(), update.norm()
                    rate = rate * torch.where((length > 0) & (steepness > 0), length / steepness, 1.0)
                parameter.sub_(rate * update)

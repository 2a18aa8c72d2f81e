"""`train.optimizer = "package.module:Class"`: a torch optimizer of another package in place of our own."""

import inspect
from typing import Any

import torch

from hpc_train.core.errors import UserError
from hpc_train.core.import_path import import_path, refused_options
from hpc_train.core.settings import Train
from hpc_train.train.comm.context import joint
from hpc_train.train.reduce.sharded_weights import ParamShard, State


class ImportedOptimizer:
    """Made with train.optimizer_options, and with train.lr and train.weight_decay, of which vectors have none.

    rate_of: by what the learning rate of a weight is multiplied, by its name. Raises UserError.
    """

    def __init__(self, train: Train, owned: list[ParamShard], rate_of: dict[str, float]) -> None:
        self._path, self._owned, self._is_checked = train.optimizer, owned, False
        make: Any = import_path("train.optimizer", train.optimizer, "class of torch.optim.Optimizer")
        if not isinstance(make, type) or not issubclass(make, torch.optim.Optimizer):
            raise UserError(
                f"train.optimizer = '{self._path}' is no class of torch.optim.Optimizer",
                "Name one, such as 'torch.optim:NAdam'.",
            )
        closure = inspect.signature(make.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"train.optimizer = '{self._path}' computes the loss several times a step, and here a step has one",
                "Name one whose step() takes no closure.",
            )
        options: dict[str, Any] = dict(train.optimizer_options)
        decay: dict[str, Any] = (
            {"weight_decay": train.weight_decay} if "weight_decay" in inspect.signature(make).parameters else {}
        )
        if train.weight_decay and not decay:
            raise UserError(
                f"train.weight_decay = {train.weight_decay:g}, and train.optimizer = '{self._path}' has none",
                "Leave train.weight_decay out.",
            )
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for each in owned:
            plain = {} if each.decays else dict.fromkeys(decay, 0.0)
            group = groups.setdefault((each.decays, rate_of[each.name]), {"params": [], **plain})
            group["params"].append(each.parameter)
        self._rates = [rate for _, rate in groups]
        try:
            self._optimizer = make(list(groups.values()), **{"lr": train.lr, **decay, **options})
        except Exception as error:  # noqa: BLE001  a user's constructor may raise anything
            raise refused_options("train.optimizer_options", self._path, options, error) from None

    def step(self, lr: float) -> None:
        """The same on every rank, which all have the same gradients. Raises UserError after the first, see `_check`."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr
        self._optimizer.step()
        if not self._is_checked:
            self._check()

    def _check(self) -> None:
        """Raises UserError if a checkpoint could not hold the state."""
        self._is_checked = True
        for each in self._owned:
            for key, value in self._optimizer.state[each.parameter].items():
                fits = value is None or isinstance(value, int | float)
                fits |= isinstance(value, torch.Tensor) and value.shape in ((), each.parameter.shape)
                if not fits:
                    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise joint(
                        UserError(
                            f"train.optimizer = '{self._path}' keeps {key} of {each.name} as {shape}: checkpoints hold "
                            f"numbers, and tensors of a weight's shape, {tuple(each.parameter.shape)}",
                            "Name another optimizer.",
                        )
                    )

    def state(self) -> State:
        """What it keeps of each weight, by name: tensors of the weight's shape, and numbers as tensors."""
        found = {}
        for each in self._owned:
            kept = self._optimizer.state.get(each.parameter, {})
            found[each.name] = {key: torch.as_tensor(value) for key, value in kept.items() if value is not None}
        return {name: kept for name, kept in found.items() if kept}

    def load(self, name: str, kept: dict[str, torch.Tensor]) -> None:
        """Continues from what `state` gave for a weight."""
        parameter = next(each.parameter for each in self._owned if each.name == name)
        self._optimizer.state[parameter].update(kept)

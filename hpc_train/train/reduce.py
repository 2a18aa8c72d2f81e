"""Gradient reduction: after `wait`, every gradient on every rank holds the sum over all ranks."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from hpc_train import config
from hpc_train.errors import UserError
from hpc_train.train.context import Context, require_one_mpi


class Reducer(Protocol):
    def wait(self) -> None:
        """Collective. Returns when every gradient holds the sum over ranks: its time is exposed communication."""


@contextmanager
def open_reducer(settings: config.Reduce, model: nn.Module, context: Context) -> Iterator[Reducer]:
    """Collective. Sends the root's weights to all ranks, then sums gradients by `reduce.strategy` until the end."""
    if settings.strategy == "local":
        context.on_all(partial(_require_one_process, context.world.size))
    hvd = context.on_all(partial(_load_horovod, settings)) if settings.strategy == "horovod" else None
    if context.world.size == 1:
        # Its gradients are the sum already. Sending them through Horovod all the same made the one rank's step a tenth
        # longer, and every speedup over that baseline look better than it is.
        yield Local()
    elif hvd is None:
        yield Mpi(model, context)
    else:
        hvd.init()
        yield Horovod(hvd, model)
        hvd.shutdown()


def _require_one_process(size: int) -> None:
    if size > 1:
        raise UserError(
            f"reduce.strategy = 'local' is one process, and there are {size} ranks",
            "Leave mpirun out, or set reduce.strategy to horovod or mpi.",
        )


class Local:
    """One process: its own gradients are the sum."""

    def wait(self) -> None:
        pass


class Mpi:
    """One MPI_Allreduce a parameter, in place, after backward: plain, and the measure for the others."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._context = context
        for tensor in (*model.parameters(), *model.buffers()):
            context.broadcast_array(tensor.detach().numpy())

    def wait(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:  # unused on this rank; the others wait for it all the same
                parameter.grad = torch.zeros_like(parameter)
            self._context.sum_array(parameter.grad.numpy())


class Horovod:
    """Ring all-reduce in the background: each gradient is handed over as soon as backward has made it.

    Horovod's own DistributedOptimizer does this too, but wraps the optimizer. Hooks on the parameters leave the
    optimizer alone, and let `wait` be timed apart from the update.
    """

    def __init__(self, hvd: Any, model: nn.Module) -> None:
        self._hvd = hvd
        self._handles: dict[str, int] = {}
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._send(name, p))

    def _send(self, name: str, parameter: torch.Tensor) -> None:
        self._handles[name] = self._hvd.allreduce_async_(parameter.grad, name=name, op=self._hvd.Sum)

    def wait(self) -> None:
        for name, parameter in self._parameters.items():
            if name not in self._handles:  # unused on this rank; the others wait for it all the same
                parameter.grad = torch.zeros_like(parameter)
                self._send(name, parameter)
        for handle in self._handles.values():
            self._hvd.synchronize(handle)
        self._handles.clear()


def _load_horovod(settings: config.Reduce) -> Any:
    """Horovod's module, on the MPI that mpi4py started. Raises UserError; two MPIs are refused, both named."""
    # Its background thread looks for work once a cycle: at its own default of 1 ms it paces every small model.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", str(settings.cycle_time_ms))
    try:
        import horovod.torch as hvd
        import horovod.torch.mpi_lib_v2 as library
    except ImportError as error:
        raise UserError(
            f"reduce.strategy = 'horovod', and Horovod cannot be loaded on {socket.gethostname()}: {error}",
            "Run `make install`, or set reduce.strategy to mpi (or local for one process).",
        ) from None
    require_one_mpi("Horovod", library.__file__)
    return hvd

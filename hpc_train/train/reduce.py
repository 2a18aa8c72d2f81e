"""Gradient reduction: after `wait`, every gradient on every rank holds the sum over all ranks."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hpc_train import config
from hpc_train.errors import UserError
from hpc_train.train.context import Context, require_one_mpi

# A gradient of at least this many bytes travels alone and in place; smaller ones are copied together into buckets,
# since a message costs more than their copy.
_ALONE_BYTES = 1 << 20
_BUCKET_BYTES = 4 << 20


class Shared(NamedTuple):
    """What travels with a step's gradients, summed over ranks: all ranks decide alike, and no message is added."""

    loss: float  # shares of the global mean
    stop: float  # ranks that were asked to stop
    save: float  # whether the root finds it time for a checkpoint


class Reducer(Protocol):
    """In each step: `share` before backward, `wait` after it."""

    def share(self, loss: torch.Tensor, stop: bool, save: bool) -> None:
        """What this rank adds to what travels with the gradients."""

    def wait(self) -> Shared:
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
        if not hvd.is_initialized():
            hvd.init()  # once: with both of its settings below fixed, a second time crashes. It ends with the process
        yield Horovod(hvd, model)


def _require_one_process(size: int) -> None:
    if size > 1:
        raise UserError(
            f"reduce.strategy = 'local' is one process, and there are {size} ranks",
            "Leave mpirun out, or set reduce.strategy to horovod or mpi.",
        )


class Local:
    """One process: its own gradients are the sum."""

    def share(self, loss: torch.Tensor, stop: bool, save: bool) -> None:
        self._shared = Shared(loss.item(), stop, save)

    def wait(self) -> Shared:
        return self._shared


class Bucket:
    """Parameters whose gradients travel as one message: several copied together, or a large one in place.

    What is in which bucket, and so the order of every sum, depends on the model alone. Horovod's own fusion goes by
    what happens to be ready, and on three or more ranks two runs of one job then differ in their last bits.
    """

    def __init__(self, name: str, parameters: list[nn.Parameter], num_notes: int = 0) -> None:
        self.name, self.parameters = name, parameters
        self._flat: torch.Tensor | None = None
        if num_notes or len(parameters) > 1:
            first = parameters[0] if parameters else torch.zeros(0)
            sizes = [parameter.numel() for parameter in parameters]
            self._flat = torch.zeros(sum(sizes) + num_notes, dtype=first.dtype, device=first.device)
            *views, self.notes = self._flat.split([*sizes, num_notes])
            self._gradients = self._flat[: sum(sizes)]
            self._views = [view.view_as(p) for view, p in zip(views, parameters, strict=True)]

    def fill(self) -> torch.Tensor:
        """The message, with the gradients of this step in it; zeros where this rank did not use a parameter."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self._flat is None:
            self.parameters[0].grad = gradients[0].contiguous()
            return self.parameters[0].grad
        if gradients:
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=self._gradients)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        return self._flat


class _Bucketed:
    """What both reducers over several ranks have: the buckets, and the notes at the end of the last one."""

    def __init__(self, model: nn.Module) -> None:
        self.buckets = make_buckets(model, len(Shared._fields))
        self._notes = self.buckets[-1].notes.numpy()

    def share(self, loss: torch.Tensor, stop: bool, save: bool) -> None:
        self._notes[:] = loss.item(), stop, save


def make_buckets(model: nn.Module, num_notes: int) -> list[Bucket]:
    """Buckets of the model's parameters, the last parameters first: backward makes their gradients first.

    The last bucket has room for `num_notes` numbers of float32 besides.
    """
    parts: list[list[nn.Parameter]] = []
    small: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        if parameter.nbytes >= _ALONE_BYTES:
            parts.append([parameter])
            continue
        group = small.setdefault(parameter.dtype, [])
        group.append(parameter)
        if sum(each.nbytes for each in group) >= _BUCKET_BYTES:
            parts.append(small.pop(parameter.dtype))
    last = small.pop(torch.float32, [])
    parts += small.values()
    return [*(Bucket(f"gradients.{i}", part) for i, part in enumerate(parts)), Bucket("gradients", last, num_notes)]


class Mpi(_Bucketed):
    """One MPI_Allreduce a bucket, in place, after backward: plain, and the measure for the others."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model)
        self._context = context
        for tensor in (*model.parameters(), *model.buffers()):
            context.broadcast_array(tensor.detach().numpy())

    def wait(self) -> Shared:
        for bucket in self.buckets:
            self._context.sum_array(bucket.fill().numpy())
        return Shared(*self._notes.tolist())


class Horovod(_Bucketed):
    """Ring all-reduce in the background: each bucket is handed over as soon as backward has filled it.

    Horovod's own DistributedOptimizer does this too, but wraps the optimizer. Hooks on the parameters leave the
    optimizer alone, and let `wait` be timed apart from the update.
    """

    def __init__(self, hvd: Any, model: nn.Module) -> None:
        super().__init__(model)
        self._hvd = hvd
        self._handles: list[int] = []
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        self._num_missing = [len(bucket.parameters) for bucket in self.buckets]
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, index))

    def _ready(self, index: int, parameter: torch.Tensor) -> None:
        self._num_missing[index] -= 1
        if self._num_missing[index] == 0:
            self._send(self.buckets[index])

    def _send(self, bucket: Bucket) -> None:
        self._handles.append(self._hvd.allreduce_async_(bucket.fill(), name=bucket.name, op=self._hvd.Sum))

    def wait(self) -> Shared:
        for index, bucket in enumerate(self.buckets):
            if self._num_missing[index] or not bucket.parameters:
                self._send(bucket)  # with parameters that this rank did not use; the others wait for them all the same
            self._num_missing[index] = len(bucket.parameters)
        for handle in self._handles:
            self._hvd.synchronize(handle)
        self._handles.clear()
        return Shared(*self._notes.tolist())


def _load_horovod(settings: config.Reduce) -> Any:
    """Horovod's module, on the MPI that mpi4py started. Raises UserError; two MPIs are refused, both named."""
    # Its background thread looks for work once a cycle: at its own default of 1 ms it paces every small model.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", str(settings.cycle_time_ms))
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # see Bucket
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

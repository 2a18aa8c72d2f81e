"""Messages of gradients, and when they leave: each as soon as backward has made what is in it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

# A gradient of at least this many bytes travels alone and in place; smaller ones are copied together into buckets,
# since a message costs more than their copy.
_ALONE_BYTES = 1 << 20
_BUCKET_BYTES = 4 << 20


class Bucket:
    """Parameters whose gradients travel as one message: several copied together, or a large one in place.

    What is in which bucket, and so the order of every sum, depends on the model alone. Horovod's own fusion goes by
    what happens to be ready, and on three or more ranks two runs of one job then differ in their last bits.

    notes: room for that many numbers behind the gradients. multiple: the message's length is filled up to one of it.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], device: torch.device, num_notes: int = 0, multiple: int = 1
    ) -> None:
        self.name, self.parameters = name, parameters
        sizes = [parameter.numel() for parameter in parameters]
        num_filling = -(sum(sizes) + num_notes) % multiple
        self._flat: torch.Tensor | None = None
        if num_notes or num_filling or len(parameters) != 1:
            dtype = parameters[0].dtype if parameters else torch.float32
            self._flat = torch.zeros(sum(sizes) + num_notes + num_filling, dtype=dtype, device=device)
            *views, self._notes, _ = self._flat.split([*sizes, num_notes, num_filling])
            self._views = [view.view_as(p) for view, p in zip(views, parameters, strict=True)]
            # Of what lies on the CPU, numpy writes an element in a tenth of torch's time.
            self._array = self._notes.numpy() if device.type == "cpu" and num_notes else None

    def fill(self) -> torch.Tensor:
        """The message, with the gradients of this step in it; zeros where this rank did not use a parameter."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self._flat is None:
            self.parameters[0].grad = gradients[0].contiguous()
            return self.parameters[0].grad
        if gradients:
            torch._foreach_copy_(self._views, gradients)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        return self._flat

    def note(self, loss: torch.Tensor, stop: bool, save: bool) -> None:
        """Writes this rank's part of `StepFlags` behind the gradients. Nothing waits for a GPU."""
        if self._array is not None:
            self._array[0], self._array[1], self._array[2] = loss.item(), stop, save
        else:
            self._notes[0], self._notes[1], self._notes[2] = loss.detach(), stop, save

    def noted(self) -> list[float]:
        """The notes, after they came back."""
        return self._notes.tolist()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay is for this parameter: matrices and kernels, not biases and norms."""
    return parameter.ndim >= 2


def make_buckets(
    model: nn.Module, num_notes: int, multiple: int = 1, apart: Callable[[torch.Tensor], object] | None = None
) -> list[Bucket]:
    """Buckets of the model's parameters, the last parameters first: backward makes their gradients first.

    The last bucket has room for `num_notes` numbers of float32 besides: with gradients, or alone where `multiple` or
    `apart` asks for messages of one kind. Parameters that `apart` tells apart are in different buckets.
    """
    parts: list[list[nn.Parameter]] = []
    small: dict[tuple[torch.dtype, object], list[nn.Parameter]] = {}
    for parameter in reversed(trainable(model).values()):
        if parameter.nbytes >= _ALONE_BYTES:
            parts.append([parameter])
            continue
        kind = (parameter.dtype, apart(parameter) if apart else None)
        group = small.setdefault(kind, [])
        group.append(parameter)
        if sum(each.nbytes for each in group) >= _BUCKET_BYTES:
            parts.append(small.pop(kind))
    last = small.pop((torch.float32, None), []) if multiple == 1 else []
    parts += small.values()
    device = next(iter(trainable(model).values())).device
    buckets = [Bucket(f"gradients.{i}", part, device, 0, multiple) for i, part in enumerate(parts)]
    return [*buckets, Bucket("gradients", last, device, num_notes)]


class BucketScheduler:
    """Hands each bucket to `send` as soon as backward has filled it, in the same order in every step and on all ranks.

    Only in the backward that follows `begin_step`: gradients of earlier parts of a batch are added up and stay.
    asked: what this rank adds to `StepFlags`, whether it was asked to stop and whether it finds it time to save.
    """

    def __init__(
        self, buckets: list[Bucket], send: Callable[[Bucket], None], asked: Callable[[], tuple[bool, bool]]
    ) -> None:
        self._buckets, self._send, self._asked = buckets, send, asked
        self._num_missing = [0] * len(buckets)
        self._next = len(buckets)
        for index, bucket in enumerate(buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def begin_step(self, loss: torch.Tensor) -> None:
        """See `reduce.Reducer`."""
        self._buckets[-1].note(loss, *self._asked())
        self._num_missing = [len(bucket.parameters) for bucket in self._buckets]
        self._next = 0

    def finish(self) -> None:
        """Sends what backward did not fill: parameters that this rank did not use, for which the others wait."""
        while self._next < len(self._buckets):
            self._send_next()

    def shared(self) -> "StepFlags":
        """What all ranks have noted, after it came back."""
        return StepFlags(*self._buckets[-1].noted())

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            if self._next == len(self._buckets):
                return
            self._num_missing[index] -= 1
            while self._next < len(self._buckets) and self._num_missing[self._next] == 0:
                self._send_next()

        return ready

    def _send_next(self) -> None:
        self._next += 1
        self._send(self._buckets[self._next - 1])


class StepFlags(NamedTuple):
    """What travels with a step's gradients, summed over ranks: all ranks decide alike, and no message is added."""

    loss: float  # shares of the global mean
    stop: float  # ranks that were asked to stop
    save: float  # whether the root finds it time for a checkpoint


NUM_NOTES = len(StepFlags._fields)

"""Messages of gradients, each sent as soon as backward has computed the gradients in it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from hpc_train.train.reduce.step_flags import NUM_FLAGS, ControlFlags, StepFlags

# A gradient of at least this many bytes is a message of its own, sent in place; smaller ones are copied together into
# buckets, since a message costs more than their copy.
ALONE_BYTES = 1 << 20
_BUCKET_BYTES = 4 << 20


class Bucket:
    """Parameters whose gradients travel as one message: several copied together, or a large one in place.

    The model alone decides which parameters share a bucket, and so the order of every sum. Horovod's own fusion takes
    whatever happens to be ready: on three or more ranks, two runs of one job then differ in their last bits.

    num_extra: numbers behind the gradients, for `StepFlags` or as padding. alignment: each gradient begins at a
    multiple of so many numbers.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], num_extra: int, device: torch.device, alignment: int = 1
    ) -> None:
        self.name, self.parameters = name, parameters
        self._flat: torch.Tensor | None = None
        sizes = [aligned(parameter.numel(), alignment) for parameter in parameters]
        if num_extra or len(parameters) != 1 or sizes[0] > parameters[0].numel():
            dtype = parameters[0].dtype if parameters else torch.float32
            self._flat = torch.zeros(sum(sizes) + num_extra, dtype=dtype, device=device)
            *views, self._extra = self._flat.split([*sizes, num_extra])
            self._views = [view[: p.numel()].view_as(p) for view, p in zip(views, parameters, strict=True)]

    def fill(self) -> torch.Tensor:
        """The message with this step's gradients in it; zeros for parameters that this rank did not use."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self._flat is None:
            self.parameters[0].grad = gradients[0].contiguous()
            return self.parameters[0].grad
        if gradients:
            torch._foreach_copy_(self._views, gradients)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        return self._flat

    def write_flags(self, loss: torch.Tensor, control: ControlFlags) -> None:
        """Writes this rank's part of `StepFlags` after the gradients. Does not synchronise with a GPU."""
        if self._extra.device.type == "cpu":
            flags = self._extra.numpy()  # writes a number in a tenth of torch's time
            flags[0], flags[1], flags[2] = loss.item(), control.stop, control.save
        else:
            self._extra[0], self._extra[1], self._extra[2] = loss.detach(), control.stop, control.save

    def read_flags(self) -> StepFlags:
        """The sums over ranks, once the message has come back."""
        return StepFlags(*self._extra.tolist())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def aligned(length: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return length + -length % alignment


def has_weight_decay(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases and norms."""
    return parameter.ndim >= 2


def make_buckets(
    model: nn.Module,
    pad_to_multiple_of: int = 1,
    group_by: Callable[[torch.Tensor], object] | None = None,
    alignment: int = 1,
) -> list[Bucket]:
    """Buckets of the model's parameters, the last parameters first: backward computes their gradients first.

    The last bucket carries the step's flags: behind gradients, or alone if `pad_to_multiple_of` or `group_by` is set.
    pad_to_multiple_of: messages of gradients are padded to a multiple of this length.
    group_by: only parameters with the same value of it share a bucket. alignment: see `Bucket`.
    """
    parameters = list(reversed(trainable_parameters(model).values()))
    full: list[list[nn.Parameter]] = []
    open_groups: dict[tuple[torch.dtype, object], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.nbytes >= ALONE_BYTES:
            full.append([parameter])
            continue
        kind = (parameter.dtype, group_by(parameter) if group_by else None)
        group = open_groups.setdefault(kind, [])
        group.append(parameter)
        if sum(each.nbytes for each in group) >= _BUCKET_BYTES:
            full.append(open_groups.pop(kind))
    # Flags need float32 and an exact sum: they share only an ungrouped, unpadded bucket of float32.
    with_flags = open_groups.pop((torch.float32, None), []) if pad_to_multiple_of == 1 else []
    device = parameters[0].device
    buckets = []
    for number, group in enumerate([*full, *open_groups.values()]):
        num_padding = -sum(aligned(each.numel(), alignment) for each in group) % pad_to_multiple_of
        buckets.append(Bucket(f"gradients.{number}", group, num_padding, device, alignment))
    return [*buckets, Bucket("gradients", with_flags, NUM_FLAGS, device)]


class BucketScheduler:
    """Passes each bucket to `send` as soon as backward has filled it, in the same order in every step and on all ranks.

    Only in the backward pass after `begin_step`: gradients of earlier parts of a batch are accumulated first.
    """

    def __init__(self, buckets: list[Bucket], send: Callable[[Bucket], None], control: ControlFlags) -> None:
        self._buckets, self._send, self._control = buckets, send, control
        self._num_missing = [0] * len(buckets)
        self._next = len(buckets)
        for index, bucket in enumerate(buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))

    def begin_step(self, loss: torch.Tensor) -> None:
        """From now on, buckets are sent as backward fills them."""
        self._buckets[-1].write_flags(loss, self._control)
        self._num_missing = [len(bucket.parameters) for bucket in self._buckets]
        self._next = 0

    def _on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """The hook that autograd calls once `parameter`, of bucket `index`, has its gradient."""
        if self._next == len(self._buckets):
            return  # an earlier part of the batch
        self._num_missing[index] -= 1
        # MPI requires collectives in the same order on all ranks: a full bucket waits for those before it.
        while self._next < len(self._buckets) and self._num_missing[self._next] == 0:
            self._send_next()

    def send_rest(self) -> None:
        """Sends the buckets that backward did not fill: other ranks wait for parameters that this one did not use."""
        while self._next < len(self._buckets):
            self._send_next()

    def _send_next(self) -> None:
        self._next += 1
        self._send(self._buckets[self._next - 1])

    def read_flags(self) -> StepFlags:
        """The sums of all ranks' flags, once the last bucket has come back."""
        return self._buckets[-1].read_flags()

"""The device a rank computes on: which one, how fast it could be, how batches get there, what they cost it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hpc_train.core.clock import Clock
from hpc_train.core.errors import UserError
from hpc_train.core.settings import Train
from hpc_train.core.world import World

# Dense matrix products, 1e12 operations a second, by makers' data sheets: (fp32 as tf32 is off, bf16 and fp16).
_PEAK_TFLOPS = {
    "H200": (67.0, 989.5),
    "H100 NVL": (60.0, 835.5),
    "H100 PCIe": (51.2, 756.5),
    "H100": (67.0, 989.5),
    "GH200": (67.0, 989.5),
    "A100": (19.5, 312.0),
    "V100": (15.7, 125.0),
    "L40S": (91.6, 362.0),
    "MI300X": (163.4, 1307.4),
    "MI250X": (23.9, 191.5),  # of one of its two dies, which is what a rank sees
}


def open_device(train: Train, world: World) -> torch.device:
    """The device of this rank, made the current one. Raises `UserError` where a GPU is asked for and there is none."""
    if train.device == "cpu" or (train.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"train.device = 'cuda', and torch {torch.__version__} finds no GPU on {world.host}",
            "Ask the scheduler for GPUs, install a torch built for them, or set train.device to auto.",
        )
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def peak_flops(train: Train, device: torch.device) -> tuple[float | None, str | None]:
    """(operations a second that this rank's device can do at `train.precision`, who says so); Nones if unknown."""
    if train.peak_tflops:
        return train.peak_tflops * 1e12, "train.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (fp32, half) in _PEAK_TFLOPS.items():
            if part in name:
                words = "fp32" if train.precision == "fp32" else f"dense {train.precision}"
                return (fp32 if train.precision == "fp32" else half) * 1e12, f"{name}, {words}, data sheet"
    return None, None


def open_clock(train: Train, device: torch.device) -> Clock:
    """The timer of this rank's steps; whether it tells phases of a GPU is `train.timing`'s to say."""
    if device.type == "cpu":
        return Clock()
    return Clock(torch.cuda.synchronize) if train.timing == "phases" else Clock(tells_phases=False)


def precision(train: Train, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for forward passes: matrix products in `train.precision`, by autocast."""
    if train.precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def seed_noise(device: torch.device, seed: int) -> None:
    """Dropout draws from here alike whether a run was interrupted or not.

    torch.manual_seed would seed every device there may be: 74 us a step, and the CPU's generator alone 1 us.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def try_out(loss: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """The operations of a forward and backward pass; leaves the model as it was.

    A multiplication and an addition are two operations. Only matrix products, convolutions and attention count, as is
    usual where utilisation is stated (PaLM, appendix B, 2022); what is computed again in backward does not.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _FlopCounter() as counter:
        loss().backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return counter.num_flops


class _FlopCounter(TorchDispatchMode):
    """Adds up what torch.utils.flop_counter knows of each operation.

    Its own FlopCounterMode, which also tells modules apart, has torch import its whole compiler: 3 s for each rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_flops = 0
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts only those of GPUs
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        self._known = flop_registry | {
            attention: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
            backward: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(
                gradient.shape, q.shape, k.shape, v.shape
            ),
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = self._known.get(func._overloadpacket)
        if count is not None:
            self.num_flops += int(count(*args, **(kwargs or {}), out_val=found))
        return found


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing (Chen et al., 2016): `model.blocks` are computed again. Raises `UserError`."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise UserError(
            f"train.activation_checkpointing: {type(model).__name__} has no blocks to compute again",
            "A model names them by an attribute `blocks`, an nn.ModuleList. Leave the key out for this one.",
        )
    for block in blocks:
        norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
        more: dict[str, Any] = {"context_fn": partial(_contexts, norms)} if norms else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Those of a block's first computation and of its second."""
    return nullcontext(), _statistics_stand(norms)


@contextmanager
def _statistics_stand(norms: list[_BatchNorm]) -> Iterator[None]:
    """These have seen the batch before: it would count twice in their running statistics."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

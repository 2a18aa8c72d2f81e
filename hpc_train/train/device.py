"""The device a rank computes on: which one, its peak rate, its precision, and the operations of a training step."""

import ctypes
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

from hpc_train.core.errors import UserError
from hpc_train.core.phase_clock import Clock
from hpc_train.core.settings import Train
from hpc_train.core.world import World
from hpc_train.train.models.blocks import repeated_blocks

_M_MMAP_THRESHOLD = -3  # mallopt(3), malloc.h
# Dense matrix products, 1e12 operations a second, from the makers' data sheets: (fp32 without tf32, bf16 and fp16).
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
    """The device of this rank, made the current one. Raises `UserError` if a GPU is asked for and none found."""
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
    """(peak operations a second of this rank's device at `train.precision`, its source); (None, None) if unknown."""
    if train.peak_tflops:
        return train.peak_tflops * 1e12, "train.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (fp32, half) in _PEAK_TFLOPS.items():
            if part in name:
                peak, kind = (fp32, "fp32") if train.precision == "fp32" else (half, f"dense {train.precision}")
                return peak * 1e12, f"{name}, {kind}, data sheet"
    return None, None


def open_clock(train: Train, device: torch.device) -> Clock:
    """The timer of this rank's steps. On a GPU it measures phases only with `train.timing = "phases"`, by waiting."""
    if device.type == "cpu":
        return Clock()
    return Clock(torch.cuda.synchronize) if train.timing == "phases" else Clock(times_phases=False)


def autocast(train: Train, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts for forward passes, whose matrix products are in `train.precision`."""
    if train.precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype)


def seed_noise(device: torch.device, seed: int) -> None:
    """Seeds what dropout draws from: the CPU's generator and that of `device`."""
    # torch.manual_seed seeds every device there may be, which takes 74 us a step; the CPU's generator alone takes 1 us.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def count_flops(loss: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """The operations of a forward and a backward pass; leaves the model as it was.

    A multiplication and an addition are two operations. As usual for utilisation, only matrix products, convolutions
    and attention count, and recomputation does not (PaLM, appendix B, 2022).
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _FlopCounter() as counter:
        value = loss()
        counter.in_backward = True
        value.backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return counter.num_flops


class _FlopCounter(TorchDispatchMode):
    """Adds up the operations that torch.utils.flop_counter knows.

    Its own FlopCounterMode, which also counts by module, makes torch import its whole compiler: 3 s on each rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_flops = 0
        self.in_backward = False
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts attention of GPUs only
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
        is_recomputed = self.in_backward and torch.is_grad_enabled()  # see `recompute_blocks`
        if count is not None and not is_recomputed:
            self.num_flops += int(count(*args, **(kwargs or {}), out_val=found))
        return found


def give_back_freed_memory() -> None:
    """Makes glibc's malloc return memory from 1 MiB on to the system as soon as it is freed. Elsewhere it does nothing.

    By default malloc keeps up to 32 MiB at a time, in gaps that large tensors often do not fit: with activation
    checkpointing, whose tensors come and go, a rank then takes as much memory as without. It costs page faults: a sixth
    of a step's time with a small GPT on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing (Chen et al., 2016): backward recomputes each block. Raises `UserError`."""
    blocks = repeated_blocks(model).values()
    if not blocks:
        raise UserError(
            f"train.activation_checkpointing: {type(model).__name__} has no blocks to recompute",
            "A model lists them in an attribute `blocks` or in an nn.ModuleList. Remove the key for this model.",
        )
    for block in blocks:
        norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
        more: dict[str, Any] = {"context_fn": partial(_contexts, norms)} if norms else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of a block's first computation and of its recomputation."""
    return nullcontext(), _statistics_frozen(norms)


@contextmanager
def _statistics_frozen(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms that have seen this batch already: it must not count twice in their running statistics."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

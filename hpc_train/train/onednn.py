"""oneDNN's bug 6035: a convolution that writes past its memory, the layers that meet it, and a trial of it.

The backward pass of a 1x1 convolution with a stride over fewer than 16 channels (AVX-512; 8 with AVX2) writes behind
the workspace it was given, where pictures or weights lie channels_last. That ends a process later and elsewhere
(`free(): invalid next size`, SIGSEGV), or changes numbers in silence. Seen with oneDNN 3.12 (torch 2.13) on AMD EPYC of
families 25 and 26; open in torch 2.14. NCHW is not affected. torch.compile makes every convolution on a CPU
channels_last unless it is told not to.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FEWEST_CHANNELS = 16  # that are safe
_TRIAL_S = 40.0
# glibc's own check of what lies around each piece of memory; a C library without it prints that and runs on.
MALLOC_CHECKED = {
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "GLIBC_TUNABLES": "glibc.malloc.check=3",
    "OMP_NUM_THREADS": "1",
}
_TRIAL = """
import torch
layer = torch.nn.Conv2d(8, 16, 1, 2, bias=False)
pictures = torch.randn(1, 8, 128, 128).contiguous(memory_format=torch.channels_last)
(exact,) = torch.autograd.grad(layer.double()(pictures.double()).square().sum(), layer.weight)
layer.float()
for _ in range(20):
    (found,) = torch.autograd.grad(layer(pictures).square().sum(), layer.weight)
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
"""


def exposed_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """The layers, by name, that meet the bug if their pictures or weights lie channels_last on a CPU."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)}
    return {name: layer for name, layer in found.items() if _is_exposed(layer)}


def _is_exposed(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    # A transposed convolution is another one's backward pass: its outputs are that one's inputs.
    num_channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.out_channels
    return (
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.groups == 1 and num_channels < FEWEST_CHANNELS
    )


@contextmanager
def layouts_watched(model: nn.Module, warn: Callable[[str], object]) -> Iterator[None]:
    """While open, the first batch that reaches an exposed layer channels_last on a CPU is told to `warn`, once a layer:
    before the backward pass that may not survive it.
    """
    told: set[str] = set()

    def look(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        tensors = [tensor for tensor in (*given, layer.weight) if isinstance(tensor, torch.Tensor)]
        if name not in told and any(map(lies_channels_last, tensors)):
            told.add(name)
            warn(_warning(name, layer))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, given: look(name, layer, given)

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in exposed_layers(model).items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def lies_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a convolution on this CPU takes (n, channels, height, width) for channels_last: torch's own rule, which
    goes by the order of strides, as a 1x1 weight is contiguous in both layouts.
    """
    if tensor.device.type != "cpu" or tensor.ndim != 4 or tensor.numel() == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if tensor.stride(axis) < least:
            return False
        if axis == 0 and least == tensor.stride(1):  # all sizes are 1
            return False
        least = tensor.stride(axis) * tensor.shape[axis]
    return True


def _warning(name: str, layer: nn.Module) -> str:
    return (
        f"Warning: layer {name} ({layer}) computes channels_last on a CPU over fewer than {FEWEST_CHANNELS} channels: "
        "in its backward pass oneDNN's bug 6035 may corrupt this process's memory.\n"
        "  Keep its pictures and weights contiguous: x.contiguous() before it, no .to(memory_format=channels_last)."
    )


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` by torch.compile, which keeps layouts as they are on a CPU."""
    if device.type == "cpu":
        return torch.compile(model, options={"layout_optimization": False})  # type: ignore[return-value]
    return torch.compile(model)  # type: ignore[return-value]


def try_kernel() -> str | None:
    """How a child process ended that ran the convolution twenty times; None if nothing happened to it."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_"))}
    command = [sys.executable, "-P", "-c", _TRIAL]
    try:
        done = subprocess.run(
            command, env=environ | MALLOC_CHECKED, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S
        )
    except subprocess.TimeoutExpired:  # an emulated or overcrowded machine: that tells nothing of the convolution
        return None
    if done.returncode < 0:
        return f"died of signal {-done.returncode}"
    return f"ended with {done.returncode}" if done.returncode else None

"""oneDNN's bug 6035: a convolution that writes past its memory, the layers that trigger it, and a trial of it.

The backward pass of a strided 1x1 convolution over fewer than 16 channels (AVX-512; 8 with AVX2) writes past the end of
its workspace if images or weights are channels_last. The process then crashes later and elsewhere (`free(): invalid
next size`, SIGSEGV), or computes wrong numbers silently. Seen with oneDNN 3.12 (torch 2.13) on AMD EPYC of families 25
and 26; open in torch 2.14. NCHW is not affected. torch.compile makes every convolution on a CPU channels_last by
default.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SAFE_CHANNELS = 16
_TRIAL_S = 40.0
# glibc checks the bytes around each allocation; another C library prints that it cannot, and continues.
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
    """The layers, by name, that trigger the bug if their images or weights are channels_last on a CPU."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)}
    return {name: layer for name, layer in found.items() if _is_exposed(layer)}


def _is_exposed(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    # A transposed convolution is the backward pass of a convolution, whose inputs are its outputs.
    num_channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.out_channels
    return (
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.groups == 1 and num_channels < SAFE_CHANNELS
    )


@contextmanager
def warn_of_channels_last(model: nn.Module, warn: Callable[[str], object]) -> Iterator[None]:
    """Calls `warn` once for each exposed layer that a channels_last batch reaches on a CPU.

    The warning comes before the backward pass, which may crash.
    """
    hooks = [layer.register_forward_pre_hook(_LayoutCheck(name, warn)) for name, layer in exposed_layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _LayoutCheck:
    """A forward hook of an exposed layer. `warn` is called once."""

    def __init__(self, name: str, warn: Callable[[str], object]) -> None:
        self._name, self._warn = name, warn
        self._has_warned = False

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        tensors = [tensor for tensor in (*inputs, layer.weight) if isinstance(tensor, torch.Tensor)]
        if not self._has_warned and any(map(is_channels_last, tensors)):
            self._has_warned = True
            self._warn(_warning(self._name, layer))


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a convolution on a CPU treats this (n, channels, height, width) as channels_last.

    torch's own rule, by the order of strides: a 1x1 weight is contiguous in both layouts.
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
        f"layer {name} ({layer}) computes channels_last on a CPU over fewer than {SAFE_CHANNELS} channels: "
        "in its backward pass oneDNN's bug 6035 may corrupt this process's memory.\n"
        "  Keep its images and weights contiguous: x.contiguous() before it, no .to(memory_format=channels_last)."
    )


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` compiled; on a CPU memory layouts stay as they are."""
    if device.type == "cpu":
        return torch.compile(model, options={"layout_optimization": False})  # type: ignore[return-value]
    return torch.compile(model)  # type: ignore[return-value]


def try_kernel() -> str | None:
    """Runs the convolution twenty times in a child process: how it failed, or None if it did not."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_"))}
    command = [sys.executable, "-P", "-c", _TRIAL]
    try:
        done = subprocess.run(
            command, env=environ | MALLOC_CHECKED, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S
        )
    except subprocess.TimeoutExpired:  # an emulated or overloaded machine, which says nothing about the convolution
        return None
    if done.returncode < 0:
        return f"died of signal {-done.returncode}"
    return f"ended with {done.returncode}" if done.returncode else None

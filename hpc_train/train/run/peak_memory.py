"""How much memory a rank used at most: of the node as the kernel counts it, and of its GPU as torch does."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int | None:
    """The largest resident memory of this process so far (VmHWM, proc(5)), shared pages included; None if unknown.

    Not getrusage's maximum, which a process inherits from the one that started it.
    """
    return _field("VmHWM")


def peak_gpu_bytes(device: torch.device) -> int | None:
    """The most that tensors of this process took on `device` at a time; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _field(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{name}:"), None)

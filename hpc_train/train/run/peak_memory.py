"""How much memory a rank used at most: of the node as the kernel counts it, and of its GPU as torch does."""

import torch

from hpc_train.train.data.node_memory import status_bytes


def peak_resident_bytes() -> int | None:
    """The largest resident memory of this process so far (VmHWM, proc(5)), shared pages included; None if unknown.

    Not getrusage's maximum, which a process inherits from the one that started it.
    """
    return status_bytes().get("VmHWM")


def peak_anonymous_bytes() -> int | None:
    """The part of that peak that is this process's own: without pages of files and of shared memory.

    The kernel keeps a peak of all pages only. Files and shared memory, once mapped, stay: what they take now is what
    they took at the peak, or a little more.
    """
    found = status_bytes()
    return found["VmHWM"] - found["RssFile"] - found["RssShmem"] if "VmHWM" in found else None


def anonymous_bytes() -> int | None:
    """The resident memory of this process's own now (RssAnon)."""
    return status_bytes().get("RssAnon")


def peak_gpu_bytes(device: torch.device) -> int | None:
    """The most that tensors of this process took on `device` at a time; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

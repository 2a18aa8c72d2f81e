"""How busy a rank's GPU was and how much of its memory was taken, as the driver counts: NVML, or AMD SMI."""

import threading
from collections.abc import Callable
from contextlib import suppress
from statistics import fmean
from types import TracebackType
from typing import Self

import torch

_PERIOD_S = 1.0  # the driver's own: it counts over 1/6 to 1 s


class GpuUse:
    """Samples the GPU in a thread while the block runs. On a CPU, or if the driver tells nothing, it does nothing.

    busy: share of the time in which a kernel ran, mean. used_bytes: the most that was taken of the GPU's memory, by
    all processes. None: not readable.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())  # a thread has a current device of its own
        self._device = device
        self._busy: list[float] = []
        self._used: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-use", daemon=True)

    def __enter__(self) -> Self:
        if self._sample():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._busy = self._busy[1:] or self._busy  # the first is of the time before the block
            self._sample()

    @property
    def busy(self) -> float | None:
        return fmean(self._busy) if self._busy else None

    @property
    def used_bytes(self) -> float | None:
        return max(self._used, default=None)

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self._sample()

    def _sample(self) -> bool:
        """Whether the driver told anything."""
        if self._device.type != "cuda":
            return False
        readers: tuple[tuple[Callable[[torch.device], int], list[float], float], ...] = (
            (torch.cuda.utilization, self._busy, 100),  # percent
            (torch.cuda.device_memory_used, self._used, 1),
        )
        for read, samples, whole in readers:
            # No driver, no package that reads it, a GPU in parts (MIG): each raises an error of its own library.
            with suppress(Exception):
                samples.append(read(self._device) / whole)
        return bool(self._busy or self._used)

"""Batches of any structure, copied to the device."""

from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class DeviceQueue(Generic[T]):
    """Batches on their way to a device: copies to a GPU have a stream of their own and overlap computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._sent: deque[T] = deque()
        self._copied_from: deque[tuple[T, torch.cuda.Event]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, batch: T) -> None:
        """Starts to copy `batch`."""
        if self._stream is None:
            self._sent.append(batch)
            return
        release_copied(self._copied_from)
        with torch.cuda.stream(self._stream):
            copy = map_tensors(batch, lambda tensor: tensor.pin_memory().to(self._device, non_blocking=True))
            # Pinned memory that nobody holds is reused (`Buffers`): hold it until the copy from it has ended.
            self._copied_from.append((batch, self._stream.record_event()))
        self._sent.append(copy)

    def receive(self) -> T:
        """The oldest batch that was sent. The current stream waits for its copy, the CPU does not."""
        batch = self._sent.popleft()
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            # The memory belongs to the copying stream: without this the allocator would reuse it too early.
            map_tensors(batch, lambda tensor: tensor.record_stream(current))
        return batch


def release_copied(copied_from: deque[tuple[T, torch.cuda.Event]]) -> None:
    """Drops the batches whose copies have ended; copies of one stream end in order."""
    while copied_from and copied_from[0][1].query():
        copied_from.popleft()


def map_tensors(value: Any, fn: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with `fn` applied to its tensors: of a list, tuple, dict or dataclass."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, fn) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, fn) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), fn) for f in fields(value) if f.init})
    return value


def moved(value: T, device: torch.device) -> T:
    """`value` with its tensors on `device`."""
    return map_tensors(value, lambda tensor: tensor.to(device))

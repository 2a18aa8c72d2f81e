"""A copy of a rank's share in host memory, from which a thread can write while the loop trains on."""

import torch

from hpc_train.train.run.checkpoint.shares import Part


class HostCopy:
    """Copies parts into host memory that it keeps for the next copy: fresh memory takes five times as long to fill."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, parts: list[Part]) -> list[Part]:
        """The same parts in host memory, valid until the next call."""
        copies = [part._replace(numbers=self._copy(part)) for part in parts]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from a GPU into pinned memory are asynchronous
        self._buffers = {(part.data_set, part.begin): part.numbers for part in copies}
        return copies

    def _copy(self, part: Part) -> torch.Tensor:
        source, buffer = part.numbers.detach(), self._buffers.get((part.data_set, part.begin))
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        return buffer.copy_(source, non_blocking=source.is_cuda)

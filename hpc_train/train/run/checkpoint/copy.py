"""A copy of a rank's share in host memory, from which a thread can write while the loop trains on."""

import torch

from hpc_train.train.data.node_memory import available_bytes
from hpc_train.train.run.checkpoint.shares import Part


class HostCopy:
    """Copies parts into host memory that it keeps for the next copy: fresh memory takes five times as long to fill."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def has_room(self, parts: list[Part], num_local_ranks: int) -> bool:
        """Whether this rank may have memory for a copy beside all that it holds.

        num_local_ranks: that copy at the same time on this node.
        """
        num_bytes = sum(part.numbers.nbytes for part in parts) - sum(each.nbytes for each in self._buffers.values())
        if num_bytes <= 0:
            return True
        if num_bytes > available_bytes() // num_local_ranks:
            return False
        try:
            torch.empty(num_bytes, dtype=torch.uint8)  # freed untouched: a limit of this process (ulimit -d) refuses it
        except RuntimeError:
            return False
        return True

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

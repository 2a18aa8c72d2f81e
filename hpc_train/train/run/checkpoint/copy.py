"""A copy of the state in host memory, from which a thread can write while the loop trains on."""

import torch

from hpc_train.train.run.checkpoint.pieces import Piece


class HostCopy:
    """Copies pieces into host memory that it keeps for the next copy: fresh memory takes five times as long to fill."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces in host memory, valid until the next call."""
        copies = [piece._replace(tensor=self._copy(piece)) for piece in pieces]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from a GPU into pinned memory are asynchronous
        self._buffers = {piece.name: piece.tensor for piece in copies}
        return copies

    def _copy(self, piece: Piece) -> torch.Tensor:
        source, buffer = piece.tensor.detach(), self._buffers.get(piece.name)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        return buffer.copy_(source, non_blocking=source.is_cuda)

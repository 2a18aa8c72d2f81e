"""The high-water mark of a run's memory, as its ranks recorded it."""

from dataclasses import dataclass

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import list_at, positive_number


@dataclass(frozen=True)
class PeakMemory:
    """The largest of all ranks, in bytes. None: not recorded, as by older versions, or no GPU.

    own_bytes: anonymous memory on the node. resident_bytes: with pages of files and shared memory. gpu_bytes: tensors
    on its GPU. expected_bytes: what the largest rank expected before the first step, of room_bytes that it may take:
    its share of its node, or of its GPU.
    """

    own_bytes: float | None
    resident_bytes: float | None
    gpu_bytes: float | None
    expected_bytes: float | None
    room_bytes: float | None

    @property
    def on_gpu(self) -> bool:
        return self.gpu_bytes is not None

    @property
    def peak_bytes(self) -> float | None:
        """Where the model is: on the GPU, or of the node."""
        return self.gpu_bytes if self.on_gpu else self.own_bytes


def peak_memory(run: Run) -> PeakMemory:
    return PeakMemory(
        own_bytes=_largest(run, "peak_anonymous_bytes"),
        resident_bytes=_largest(run, "peak_resident_bytes"),
        gpu_bytes=_largest(run, "peak_gpu_bytes"),
        expected_bytes=_largest(run, "expected_peak_bytes"),
        room_bytes=positive_number(run.meta.get("rank_room_bytes")),
    )


def _largest(run: Run, key: str) -> float | None:
    """Of the values of all ranks."""
    return max(filter(None, map(positive_number, list_at(run.meta, key))), default=None)

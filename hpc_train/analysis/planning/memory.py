"""Whether a model fits on fewer or more ranks than it was trained on."""

from dataclasses import dataclass

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.memory import peak_memory
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.scaling.compare import Group


@dataclass(frozen=True)
class RankMemory:
    """What a rank took at most on `ranks` ranks.

    divided_bytes: weights, gradients and optimizer state that the ranks divided, of all shards together. room_bytes:
    the most that one of them may take. shares_node: ranks share the node's memory; a GPU's is its rank's own.
    shard_within: see `reduce.shard_within`.
    """

    peak_bytes: float
    divided_bytes: float
    room_bytes: float
    ranks: int
    ranks_per_node: int
    shard_within: str | int
    shares_node: bool = True

    def at(self, ranks: int) -> float:
        """Bytes of a rank of so many: what they do not divide stays as it was measured."""
        return self.peak_bytes + self.divided_bytes * (1 / self._num_shards(ranks) - 1 / self._num_shards(self.ranks))

    def room(self, ranks: int) -> float:
        """Bytes that one of so many may take."""
        here, there = (min(each, self.ranks_per_node) for each in (self.ranks, ranks))
        return self.room_bytes * here / there if self.shares_node else self.room_bytes

    def _num_shards(self, ranks: int) -> int:
        if self.shard_within == "job":
            return ranks
        return min(ranks, self.ranks_per_node if self.shard_within == "node" else int(self.shard_within))


def rank_memory(group: Group, ranks_per_node: int | None) -> RankMemory | None:
    """From the run with the fewest ranks, of which most is measured; None if runs do not state it, as older ones."""
    known = [found for row in group.rows for run in row.runs if (found := _of_run(run, ranks_per_node or run.size))]
    return min(known, key=lambda each: (each.ranks, -each.peak_bytes), default=None)


def _of_run(run: Run, ranks_per_node: int) -> RankMemory | None:
    memory = peak_memory(run)
    if memory.peak_bytes is None or memory.room_bytes is None:
        return None
    divided = positive_number(run.meta.get("divided_bytes")) or 0.0
    within, shares_node = run.config.reduce.shard_within, not memory.on_gpu
    return RankMemory(
        memory.peak_bytes, divided, memory.room_bytes, run.size, ranks_per_node, within, shares_node=shares_node
    )

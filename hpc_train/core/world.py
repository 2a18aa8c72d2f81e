"""A rank's place among all ranks: a value, passed as an argument, never looked up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """A rank among all ranks, and among those on its host, of which `node_root` is the lowest."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    node_root: int = 0

    @property
    def is_root(self) -> bool:
        return self.rank == 0

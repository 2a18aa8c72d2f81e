"""A training state, divided among the ranks: the part of each tensor that one rank writes.

A state is a nesting of dicts and lists. Its other values, called leaves here, are tensors or plain values.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

STATE_KEYS = {"model", "optimizer", "loss_scale", "task"}

# Below this, another rank that opens the file costs more than its help saves.
_LEAST_BYTES_OF_A_WRITER = 16 << 20


class UnusableCheckpoint(Exception):
    """Why a checkpoint cannot be written or used, in words."""


class Part(NamedTuple):
    """Consecutive numbers of a tensor, in the order of its elements."""

    data_set: str  # of the checkpoint: "model/0.weight"
    begin: int  # the first number's place in the whole tensor
    numbers: torch.Tensor  # flat and contiguous, on any device

    def cut(self, begin: int, end: int) -> "Part":
        return Part(self.data_set, self.begin + begin, self.numbers[begin:end])


class Share(NamedTuple):
    """What one rank adds to a checkpoint. All ranks' parts together hold each number of each tensor once.

    state: on the root, the nesting, with a tensor on the meta device in place of one that ranks hold in parts, and one
    object under the names of tied weights; None on the other ranks.
    """

    state: dict[str, Any] | None
    parts: list[Part]


def divide(tensors: list[torch.Tensor], num_ranks: int) -> list[list[tuple[int, int, int]]]:
    """By rank: (number of a tensor, begin, end) of what each writes, or reads, of flat tensors that all of them hold.

    Equal on all ranks. The ranks with work are spread over the job: neighbours share a node and its link to the disks.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    num_busy = max(1, min(num_ranks, total // _LEAST_BYTES_OF_A_WRITER))
    divided: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    busy = divided[:: num_ranks // num_busy][:num_busy]
    done = 0
    for number, tensor in enumerate(tensors):
        bounds = [(total * index // num_busy - done) // tensor.itemsize for index in range(num_busy + 1)]
        for mine, first, last in zip(busy, bounds, bounds[1:], strict=False):
            begin, end = max(0, first), min(len(tensor), last)
            if begin < end:
                mine.append((number, begin, end))
        done += tensor.nbytes
    return divided


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf, in the order of the nesting."""
    if not isinstance(state, dict | list):
        yield path, state
        return
    for key, item in state.items() if isinstance(state, dict) else enumerate(state):
        yield from leaves(item, f"{path}/{key}" if path else str(key))


def map_leaves(fn: Callable[[Any], Any], state: Any) -> Any:
    """The state with fn(leaf) in place of each leaf, those in tuples included; dicts of any kind become plain ones."""
    if isinstance(state, dict):
        return {key: map_leaves(fn, item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_leaves(fn, item) for item in state)
    return fn(state)

"""A training state as pieces of tensors: what a rank holds of each, so that a rank can save what it owns.

A state is a nesting of dicts and lists. Its other values are tensors or plain values, which are called leaves here.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

PARTS = {"model", "optimizer", "loss_scale", "task"}  # of the state that a checkpoint holds


class UnusableCheckpoint(Exception):
    """Why a checkpoint cannot be written or used, in words."""


class Piece(NamedTuple):
    """The part of a tensor that one rank holds; all of it where the offset is 0 and the shapes agree."""

    name: str  # its path in the state: "model/0.weight"
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]  # index in the whole tensor of the part's first element
    tensor: torch.Tensor


class Blank(NamedTuple):
    """The place of a tensor in a skeleton."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def local_pieces(state: dict[str, Any]) -> list[Piece]:
    """Every tensor of the state, each in one piece: today each rank that saves holds whole tensors."""
    pieces = [
        Piece(name, tuple(leaf.shape), (0,) * leaf.ndim, leaf)
        for name, leaf in leaves(state)
        if isinstance(leaf, torch.Tensor)
    ]
    assert len({piece.name for piece in pieces}) == len(pieces), "no key holds a slash that makes two paths one"
    return pieces


def skeleton(state: dict[str, Any]) -> Any:
    """The state with a `Blank` in place of each tensor."""

    def blank(name: str, leaf: Any) -> Any:
        return Blank(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return map_leaves(blank, state)


def assemble(bones: Any, pieces: Iterable[Piece]) -> Any:
    """The state of a skeleton and all pieces of its tensors. A tensor in one piece is not copied."""
    whole: dict[str, torch.Tensor] = {}
    for name, global_shape, offset, tensor in pieces:
        if tensor.shape == global_shape:
            whole[name] = tensor
            continue
        target = whole.setdefault(name, torch.empty(global_shape, dtype=tensor.dtype))
        place = (slice(begin, begin + length) for begin, length in zip(offset, tensor.shape, strict=True))
        target[tuple(place)] = tensor

    def filled(name: str, leaf: Any) -> Any:
        return whole[name] if isinstance(leaf, Blank) else leaf

    return map_leaves(filled, bones)


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf, in the order of the nesting."""
    if not isinstance(state, dict | list):
        yield path, state
        return
    for key, item in state.items() if isinstance(state, dict) else enumerate(state):
        yield from leaves(item, f"{path}/{key}" if path else str(key))


def map_leaves(fn: Callable[[str, Any], Any], state: Any, path: str = "") -> Any:
    """The state with fn(path, leaf) in place of each leaf; dicts of any kind become plain ones."""
    prefix = f"{path}/" if path else ""
    if isinstance(state, dict):
        return {key: map_leaves(fn, item, f"{prefix}{key}") for key, item in state.items()}
    if isinstance(state, list):
        return [map_leaves(fn, item, f"{prefix}{index}") for index, item in enumerate(state)]
    return fn(path, state)

"""Writes a checkpoint: the root drafts the file, every rank fills in its parts, and the root seals it.

None of these functions sends a message, so that each may run in a thread.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hpc_train import __version__
from hpc_train.train.run.checkpoint.encoding import Encoded, encode
from hpc_train.train.run.checkpoint.format import FORMAT, Layout, lay_out, seal
from hpc_train.train.run.checkpoint.ranges import bytes_of, checksum, cut, write_all
from hpc_train.train.run.checkpoint.retention import remove
from hpc_train.train.run.checkpoint.shares import Part, Share, UnusableCheckpoint

_MOST_ALIGNMENT = 16 << 20


class Extent(NamedTuple):
    """Which bytes of a data set one rank writes."""

    data_set: str
    begin: int
    end: int

    @classmethod
    def of(cls, part: Part) -> "Extent":
        begin = part.begin * part.numbers.itemsize
        return cls(part.data_set, begin, begin + part.numbers.nbytes)

    @property
    def num_pieces(self) -> int:
        return len(list(cut(self.begin, self.end)))


class Target(NamedTuple):
    """What every rank must know to write its parts: the file, its size, and where its data sets begin."""

    path: Path
    num_bytes: int
    offsets: dict[str, int]


def own_parts(share: Share, encoded: Encoded) -> list[Part]:
    """On the root: its parts, and every tensor of the state that is in no other rank's."""
    whole = [Part(name, 0, tensor.view(-1)) for name, tensor in encoded.tensors.items() if not tensor.is_meta]
    return [*share.parts, *whole]


class Draft:
    """A checkpoint under a temporary name, on the root."""

    def __init__(
        self,
        path: Path,
        encoded: Encoded,
        extents: list[list[Extent]],
        manifest: dict[str, Any],
        before: Layout | None = None,
    ) -> None:
        """Creates the file without its data. extents: of each rank, in the order of its parts. before: see `lay_out`.

        Raises TypeError for a value that a checkpoint cannot hold, and OSError if the disk refuses.
        """
        _check_complete(encoded, extents)
        pieces = [(each.data_set, *piece) for of_rank in extents for each in of_rank for piece in cut(*each[1:])]
        self.path = path
        facts = {"format": FORMAT, "hpc_train": __version__, **manifest}
        path.parent.mkdir(exist_ok=True)
        alignment = min(path.parent.stat().st_blksize, _MOST_ALIGNMENT)  # Lustre and NFS say megabytes
        self.layout = lay_out(encoded, len(pieces), facts, alignment, before)
        offsets = {name: place.offset for name, place in self.layout.places.items()}
        self._table = np.array(
            [(name.encode(), begin, end, offsets[name] + begin, 0) for name, begin, end in pieces], self.layout.row
        )
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # not the name another job uses
        self.target = Target(partial, self.layout.image.num_bytes, offsets)
        with self._discarded_on_error(), _opened(partial, os.O_CREAT | os.O_EXCL) as handle:
            os.ftruncate(handle, self.layout.image.num_bytes)
            # Before the data: its pages may overlap the edges of tensors.
            for offset, page in self.layout.image.pages():
                write_all(handle, page, offset)

    def seal(self, checksums: np.ndarray, before_rename: Callable[[], None] = lambda: None) -> None:
        """Gives the file its checksums and its name. `before_rename` may raise to prevent it. Raises OSError.

        checksums: of all pieces, in the order of ranks and of their parts.
        """
        self._table["xxh3"] = checksums
        with self._discarded_on_error():
            with _opened(self.target.path) as handle:
                seal(handle, self.layout, self._table)
                os.fsync(handle)
            before_rename()
            os.rename(self.target.path, self.path)  # over a damaged checkpoint of the same step
        _sync_folder(self.path.parent)
        if (folder := self.path.with_suffix("")).is_dir():  # of format 2, of the same step, which was refused
            remove(folder)

    def discard(self) -> None:
        with suppress(OSError):
            self.target.path.unlink(missing_ok=True)

    @contextmanager
    def _discarded_on_error(self) -> Any:
        try:
            yield
        except BaseException:
            self.discard()
            raise


def write_parts(target: Target, parts: list[Part]) -> np.ndarray:
    """Writes and syncs one rank's parts; returns the checksums of their pieces.

    Raises `UnusableCheckpoint` if a weight is NaN or infinite, and OSError if the disk refuses.
    """
    if not parts:
        return np.empty(0, np.uint64)
    checksums = []
    with _opened(target.path) as handle:
        for offset, piece in pieces_of(target, parts):
            write_all(handle, piece, offset)
            checksums.append(checksum(piece))
        os.fsync(handle)
    return np.array(checksums, np.uint64)


def pieces_of(target: Target, parts: list[Part]) -> Iterator[tuple[int, memoryview]]:
    """(offset in the file, bytes) of each piece. Raises `UnusableCheckpoint` if a weight is NaN or infinite."""
    for part in parts:
        extent, data = Extent.of(part), bytes_of(part.numbers)
        for begin, end in cut(extent.begin, extent.end):
            piece = data[begin - extent.begin : end - extent.begin]
            _check_finite(part, piece)  # while its weights are on their way through the cache
            yield target.offsets[part.data_set] + begin, piece


def write(path: Path, state: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Writes a state that this process holds whole. Raises as `Draft` and `write_parts` do."""
    encoded = encode(state)
    parts = own_parts(Share(state, []), encoded)
    draft = Draft(path, encoded, [[Extent.of(part) for part in parts]], manifest)
    try:
        checksums = write_parts(draft.target, parts)
    except BaseException:
        draft.discard()
        raise
    draft.seal(checksums)


def _check_complete(encoded: Encoded, extents: list[list[Extent]]) -> None:
    """Raises TypeError if the ranks do not hold each byte of each tensor once."""
    reached = dict.fromkeys(encoded.tensors, 0)
    for name, begin, end in sorted(each for of_rank in extents for each in of_rank):
        if reached.get(name) != begin:
            raise TypeError(f"the ranks hold bytes {begin} to {end} of {name} after {reached.get(name)}")
        reached[name] = end
    for name, end in reached.items():
        if end != (num_bytes := encoded.tensors[name].nbytes):
            raise TypeError(f"the ranks hold {end} of the {num_bytes} bytes of {name}")


def _check_finite(part: Part, piece: memoryview) -> None:
    dtype = part.numbers.dtype
    if not part.data_set.startswith("model/") or not dtype.is_floating_point:
        return
    weights = torch.frombuffer(piece, dtype=dtype)
    # A sum takes a third of the time, and is finite only if all weights are; it may overflow where they are.
    if not torch.isfinite(weights.sum()) and not torch.isfinite(weights).all():
        raise UnusableCheckpoint(f"{part.data_set.removeprefix('model/')} holds NaN or infinity")


@contextmanager
def _opened(path: Path, flags: int = 0) -> Any:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

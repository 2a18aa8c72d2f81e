"""Streams of tokens from HDF5, cut into windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import require_rows
from hpc_train.train.data.files import Files
from hpc_train.train.data.reader_interface import Reader


class StreamName(NamedTuple):
    """The data set `name` of tokens, which the configuration's `key` names.

    offsets: the data set that says where documents begin, if windows must not span two documents.
    """

    name: str
    key: str
    offsets: str | None


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, cut into windows of `length`; each window also has the `num_ahead` tokens after it.

    starts: of each window, if no window spans two documents; None if windows follow each other without a gap.
    """

    values: Reader
    length: int
    num_ahead: int
    check_unchanged: Callable[[], None]
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return (len(self.values) - self.num_ahead) // self.length if self.starts is None else len(self.starts)

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """(n, length + num_ahead) ids of the file's type: the windows at `rows`."""
        self.check_unchanged()
        return self.values.take(self._positions(rows).reshape(-1)).reshape(len(rows), self.length + self.num_ahead)

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint: these windows are needed soon."""
        self.values.prefetch(self._positions(rows)[:, [0, -1]].reshape(-1))

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        """Of the windows' tokens in the stream, (n, length + num_ahead)."""
        require_rows(rows, len(self))
        starts = rows * self.length if self.starts is None else self.starts[rows]
        return np.asarray(starts[:, None] + np.arange(self.length + self.num_ahead))


def open_tokens(files: Files, stream: StreamName, length: int, num_ahead: int) -> Tokens:
    """Opens a stream as windows of `length` tokens. Raises `UserError` for data that are no tokens, or too few.

    With offsets, each window is within one document; the rest of a document, too short for a window, is skipped.
    """
    values, path = files.reader(stream.name, stream.key), files.paths[0]
    if len(values.shape) != 1 or values.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {stream.name} is {values.dtype} {values.shape}, and no tokens",
            f"Tokens are integers of shape (tokens,): make them with hpc-train prepare text {path} --from DIR",
        )
    starts = None if stream.offsets is None else _window_starts(files, stream.name, stream.offsets, length + num_ahead)
    tokens = Tokens(values, length, num_ahead, files.check_unchanged, starts)
    if len(tokens) == 0:
        raise UserError(
            f"{path}: {stream.name} has {len(values):,} tokens, too few for a window of "
            f"task.options.context = {length}",
            "Prepare more text, or set task.options.context lower.",
        )
    return tokens


def _window_starts(files: Files, name: str, offsets: str, width: int) -> np.ndarray:
    """Where windows of `width` tokens begin, none of which leaves its document."""
    found, num_before = [], 0
    bounds, streams = files.datasets(offsets, "data.offsets"), files.datasets(name, "")
    for path, each, stream in zip(files.paths, bounds, streams, strict=True):
        ends = _document_ends(path, each, len(stream), name)
        counts = np.diff(ends) // width
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found.append(num_before + np.repeat(ends[:-1], counts) + inside * width)
        num_before += len(stream)
    return np.concatenate(found)


def _document_ends(path: object, bounds: Any, num_tokens: int, name: str) -> np.ndarray:
    """0 and where each document ends. Raises `UserError` unless these are increasing, from 0 to `num_tokens`."""
    ends = np.asarray(bounds[()]).astype(np.int64) if bounds.dtype.kind in "iu" else np.zeros(0, np.int64)
    is_valid = ends.ndim == 1 and len(ends) >= 2 and ends[0] == 0 and ends[-1] == num_tokens
    if not is_valid or (np.diff(ends) < 0).any():
        raise UserError(
            f"{path}: {bounds.name.strip('/')} is {bounds.dtype} {bounds.shape}, and no beginnings of documents",
            f"It must hold increasing integers from 0 to the number of tokens in {name}, {num_tokens:,}.",
        )
    return ends

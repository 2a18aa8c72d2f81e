"""What every way to read rows of an HDF5 data set offers."""

import numpy as np

from hpc_train.core.sampling import Indices


class Reader:
    """Rows of a data set, in native byte order.

    chunk_edges: the first row of each chunk, and the end, as `Order` takes them; None if each row is read by itself.
    description: how the rows are read and why, for the log.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    description: str
    chunk_edges: Indices | None = None

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """These rows in this order, in `out` if it is given. Raises IndexError for a row that does not exist."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(np.arange(*rows.indices(len(self))))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; 0 if a row has no values."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, as they are in memory."""
        return len(self) * self.row_bytes

    def stored_rows(self, rows: Indices) -> Indices:
        """Where `rows` of this reader are in the data set."""
        return rows

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint: these rows are taken soon."""

    def close(self) -> None:
        """Ends the threads and files of this reader."""

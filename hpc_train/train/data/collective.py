"""Reading that ranks do together: collective reads of whole global batches, and data spread over all ranks' memory.

Both are for data that a node's page cache does not hold, on file systems where many small reads hurt. Every rank calls
them at the same steps, and its loop does so itself: MPI is not asked by two threads at once.
"""

import atexit
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system
from hpc_train.core.sampling import (
    BatchSampler,
    Indices,
    Order,
    Shares,
    positions_in,
    rank_span,
    regular_chunk_edges,
    require_rows,
)
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import parallel_file_options
from hpc_train.train.data.dataset import Split
from hpc_train.train.data.files import Files, require_parallel_hdf5, select_rows, transfer_properties
from hpc_train.train.data.readers import Reader

_OF_NETWORKS = ("lustre", "gpfs", "nfs", "nfs4", "ceph", "beegfs", "wekafs", "panfs", "fuse.glusterfs", "daos", "cifs")


class CollectiveReader:
    """Rows that lie together, read by all ranks at once through MPI-IO; a rank without rows takes part, too.

    Its chunks, of which the order consists, are global batches: which samples are in a batch never changes, and batches
    come in another order in each epoch.
    """

    def __init__(self, path: Path, name: str, batch_size: int, context: Context) -> None:
        """Collective."""
        self._waiting = context.waiting
        with self._waiting:
            self._file = h5py.File(path, "r", **parallel_file_options(context))
        atexit.register(self.close)  # by all ranks, and before MPI ends, which aborts where a file is still open
        self._dataset = self._file[name]
        self.shape: tuple[int, ...] = self._dataset.shape
        self.dtype = self._dataset.dtype.newbyteorder("=")
        self.chunk_edges: Indices = regular_chunk_edges(len(self), batch_size)
        self.description = "collective reads of whole global batches"
        self._transfer = transfer_properties(collective=context.comm is not None)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Collective. `rows` rise, as those of a global batch do: they are one run, or two where an epoch's short chunk
        came before.
        """
        require_rows(rows, len(self))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        space, memory = select_rows(self._dataset, [(int(run[0]), len(run)) for run in runs if len(run)])
        with self._waiting:
            self._dataset.id.read(memory, space, out, dxpl=self._transfer)
        return out

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(np.arange(*rows.indices(len(self))))

    def prefetch(self, rows: np.ndarray) -> None:
        pass

    def close(self) -> None:
        """Collective."""
        self._file.close()


class DistributedReader:
    """Rows that lie in the memory of all ranks, each of which holds its part and is sent what its next steps need.

    As many steps at once as `memory_bytes` has room for, an epoch at most.
    """

    chunk_edges = None

    def __init__(self, reader: Reader, sampler: BatchSampler, memory_bytes: int, context: Context) -> None:
        """Every rank reads its part."""
        self.shape, self.dtype = reader.shape, reader.dtype
        size, num_rows = context.world.size, self.shape[0]
        self._context, self._sampler = context, sampler
        self._starts = np.array([rank_span(num_rows, rank, size)[0] for rank in range(size)])
        start, stop = rank_span(num_rows, context.world.rank, size)
        self._mine = np.array(reader[start:stop])
        row_bytes = max(1, int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize)
        share_bytes = -(-sampler.batch_size // size) * row_bytes
        self.steps_at_once = max(1, min(memory_bytes // 2 // share_bytes, -(-num_rows // sampler.batch_size)))
        self.description = (
            f"distributed over the memory of {size} ranks, {self.steps_at_once} steps' samples exchanged at once"
        )
        self._round: int | None = None
        self._rows, self._held = np.zeros(0, np.int64), self._mine[:0]

    def begin(self, step: int) -> None:
        """Collective, before each step's `take`: fetches the rows of the steps to come, where they are not here yet."""
        if self._round == step // self.steps_at_once:
            return
        self._round, context = step // self.steps_at_once, self._context
        steps = range(self._round * self.steps_at_once, (self._round + 1) * self.steps_at_once)
        world = context.world
        wanted = np.sort(np.concatenate([batch.rows for batch in self._sampler.batches(steps)]))
        holders = np.searchsorted(self._starts, wanted, "right") - 1
        self._held = self._mine[:0]  # before its successor comes
        asked, counts = context.exchange(wanted, np.bincount(holders, minlength=world.size))
        self._held, _ = context.exchange(self._mine[asked - self._starts[world.rank]], counts)
        self._rows = wanted

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raises `UserError` for a row that was not sent to this rank for the steps at hand."""
        try:
            found = positions_in(self._rows, rows)
        except LookupError as error:
            raise UserError(
                f"data.read = 'memory': sample {error} is not on rank {self._context.world.rank} at this step",
                "A rank holds the rows that Task.batch is given, at that step: ask for those, or leave data.read out.",
            ) from None
        # All are there, so nothing is clipped: with "raise" numpy gathers into a buffer of its own first.
        return np.take(self._held, found, axis=0, out=out, mode="raise" if out is None else "clip")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(np.arange(*rows.indices(len(self))))

    def prefetch(self, rows: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def choose_read_mode(reader: Reader, files: Files, config: Config, context: Context) -> tuple[str, str]:
    """Collective. (how to read: data.read, or what suits it; why, where that is not plain).

    What fits no node's memory and lies on a file system of a network would be fetched again for each sample: then it is
    spread over the memory of all nodes, if that holds it. The order of samples is the same.
    """
    if config.data.read != "auto":
        return config.data.read, "as data.read says"
    num_bytes = int(np.prod(reader.shape, dtype=np.int64)) * reader.dtype.itemsize
    hosts = context.all_gather((context.world.host, physical_bytes()))
    node_bytes, num_nodes = min(num for _, num in hosts), len({host for host, _ in hosts})
    kind = context.on_root(lambda: file_system(files.paths[0]))
    fits = kind not in _OF_NETWORKS or num_bytes <= node_bytes // 2
    if fits or reader.chunk_edges is not None or config.reduce.strategy == "parameter_server":  # servers read nothing
        return "auto", ""
    why = f"{num_bytes / 1e9:,.1f} GB on {kind}, more than half of a node's {node_bytes / 1e9:,.1f} GB of memory"
    if num_bytes <= num_nodes * node_bytes // 2:
        return "memory", f"because it is {why}, and {num_nodes} nodes hold it"
    return "auto", f"although it is {why}: data.read = 'collective' reads whole batches, or pack it in chunks"


def physical_bytes() -> int:
    """Bytes of this node."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def with_shared_reader(split: Split, way: str, files: Files, name: str, config: Config, context: Context) -> Split:
    """Collective. `split` with its inputs, data set `name`, read in one `way`, "collective" or "memory"."""
    world = context.world
    batch_size = config.train.batch_size(world.size)
    if way == "memory":
        sampler = BatchSampler(Order(len(split)), batch_size, config.seed, Shares(world.size), world.rank)
        spread = DistributedReader(split.inputs[0], sampler, files.memory_bytes, context)
        return replace(split, inputs=(spread,), begin=spread.begin)

    def check() -> None:
        if len(files.paths) > 1 or files.datasets(name, "data.inputs")[0].is_virtual:
            raise UserError(
                f"data.read = 'collective' reads one file, and data.file = '{config.data.file}': {name} is in several",
                "Write them into one file, or leave data.read out.",
            )
        if context.comm is not None:
            require_parallel_hdf5()

    context.on_all(check)
    return replace(split, inputs=(CollectiveReader(files.paths[0], name, batch_size, context),))

"""Readers that need all ranks: collective reads of global batches, and data distributed over the ranks' memory.

Both are for data larger than a node's page cache, on file systems where many small reads are slow. Every rank calls
them at the same steps, from the training loop and not from a prefetch thread: only one thread may call MPI.
"""

import atexit
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system
from hpc_train.core.formatting import amount
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
from hpc_train.train.data.files import Files
from hpc_train.train.data.node_memory import physical_bytes
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5, select_rows, transfer_properties
from hpc_train.train.data.reader_interface import Reader

_NETWORK_FILE_SYSTEMS = (
    *("lustre", "gpfs", "nfs", "nfs4", "ceph", "beegfs", "wekafs", "panfs", "fuse.glusterfs", "daos", "cifs"),
)


class CollectiveReader(Reader):
    """Neighbouring rows, read by all ranks at once through MPI-IO; a rank without rows takes part, too.

    Its chunks are global batches: which samples form a batch never changes, only the order of batches does.
    """

    description = "collective reads of whole global batches"

    def __init__(self, path: Path, name: str, batch_size: int, context: Context) -> None:
        """Collective."""
        self._waiting = context.waiting
        with self._waiting:
            self._file = h5py.File(path, "r", **parallel_file_options(context))
        # Closing is collective and must come before MPI_Finalize, which aborts if a file is still open.
        atexit.register(self.close)
        self._dataset = self._file[name]
        self.shape = self._dataset.shape
        self.dtype = self._dataset.dtype.newbyteorder("=")
        self.chunk_edges: Indices = regular_chunk_edges(len(self), batch_size)
        self._transfer = transfer_properties(collective=context.comm is not None)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Collective. `rows` increase, as those of a rank's share do: one run, or two after an epoch's short chunk."""
        require_rows(rows, len(self))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        space, memory = select_rows(self._dataset, [(int(run[0]), len(run)) for run in runs if len(run)])
        with self._waiting:
            self._dataset.id.read(memory, space, out, dxpl=self._transfer)
        return out

    def close(self) -> None:
        """Collective."""
        self._file.close()


class DistributedReader(Reader):
    """Rows held in the memory of all ranks: each holds a part and receives the rows of its coming steps.

    Rows of as many steps are exchanged at once as `memory_bytes` has room for, of an epoch at most.
    """

    def __init__(self, reader: Reader, sampler: BatchSampler, memory_bytes: int, context: Context) -> None:
        """Each rank reads its part."""
        self.shape, self.dtype = reader.shape, reader.dtype
        self._context, self._sampler = context, sampler
        world, num_rows = context.world, len(reader)
        self._starts = np.array([rank_span(num_rows, rank, world.size)[0] for rank in range(world.size)])
        start, stop = rank_span(num_rows, world.rank, world.size)
        self._mine = np.array(reader[start:stop])
        share_bytes = -(-sampler.batch_size // world.size) * max(1, reader.row_bytes)
        # Half of the memory, as rows are held twice while they are exchanged.
        self.steps_at_once = max(1, min(memory_bytes // 2 // share_bytes, -(-num_rows // sampler.batch_size)))
        self.description = (
            f"distributed over the memory of {world.size} ranks, {self.steps_at_once} steps' samples exchanged at once"
        )
        self._round: int | None = None
        self._rows, self._held = np.zeros(0, np.int64), self._mine[:0]  # what this rank has for the steps at hand

    def begin_step(self, step: int) -> None:
        """Collective, before the `take` of each step: fetches the rows of the coming steps if they are not here yet."""
        if self._round == step // self.steps_at_once:
            return
        self._round, context = step // self.steps_at_once, self._context
        steps = range(self._round * self.steps_at_once, (self._round + 1) * self.steps_at_once)
        self._rows = np.sort(np.concatenate([batch.rows for batch in self._sampler.batches(steps)]))
        holders = np.searchsorted(self._starts, self._rows, "right") - 1
        self._held = self._mine[:0]  # frees the last steps' rows before the next ones arrive
        requested, counts = context.exchange(self._rows, np.bincount(holders, minlength=context.world.size))
        self._held, _ = context.exchange(self._mine[requested - self._starts[context.world.rank]], counts)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raises `UserError` for a row that this rank did not receive for the steps at hand."""
        try:
            found = positions_in(self._rows, rows)
        except LookupError as error:
            raise UserError(
                f"data.read = 'memory': sample {error} is not on rank {self._context.world.rank} at this step",
                "A rank has the rows that Task.batch gets at that step: read those, or remove data.read.",
            ) from None
        # All rows exist, so mode="clip" clips nothing; with "raise" numpy gathers into a buffer of its own first.
        return np.take(self._held, found, axis=0, out=out, mode="raise" if out is None else "clip")


def choose_read_mode(reader: Reader, files: Files, config: Config, context: Context) -> tuple[str, str]:
    """Collective. (data.read, or for "auto" the mode that suits the data; the reason, "" for the usual mode).

    Data that fit into no node's memory and are on a network file system would be fetched again for each sample. They
    are distributed over the memory of all nodes if that is large enough; the order of the samples is the same.
    """
    if config.data.read != "auto":
        return config.data.read, "as data.read says"
    hosts = context.all_gather((context.world.host, physical_bytes()))
    node_bytes, num_nodes = min(num for _, num in hosts), len({host for host, _ in hosts})
    kind = context.on_root(lambda: file_system(files.paths[0]))
    fits = kind not in _NETWORK_FILE_SYSTEMS or reader.num_bytes <= node_bytes // 2
    has_servers = config.reduce.strategy == "parameter_server"  # which read nothing and cannot take part
    if fits or reader.chunk_edges is not None or has_servers:
        return "auto", ""
    why = f"{amount(reader.num_bytes, 'B')} on {kind}, more than half of a node's {amount(node_bytes, 'B')} of memory"
    if reader.num_bytes <= num_nodes * node_bytes // 2:
        return "memory", f"because it is {why}, and {num_nodes} nodes hold it"
    return "auto", f"although it is {why}: data.read = 'collective' reads whole batches, or store it in chunks"


def with_shared_reader(split: Split, mode: str, files: Files, config: Config, context: Context) -> Split:
    """Collective. `split`, its inputs read in `mode`: "collective" or "memory"."""
    world, batch_size = context.world, config.train.batch_size(context.world.size)
    if mode == "memory":
        sampler = BatchSampler(Order(len(split)), batch_size, config.seed, Shares(world.size), world.rank)
        distributed = DistributedReader(split.inputs[0], sampler, files.memory_bytes, context)
        return replace(split, inputs=(distributed,), begin_step=distributed.begin_step)
    name = str(config.data.inputs)

    def check() -> None:
        if len(files.paths) > 1 or files.datasets(name, "data.inputs")[0].is_virtual:
            raise UserError(
                f"data.read = 'collective' reads one file, and data.file = '{config.data.file}': {name} is in several",
                "Write them into one file, or remove data.read.",
            )
        if context.comm is not None:
            require_parallel_hdf5()

    context.on_all(check)
    return replace(split, inputs=(CollectiveReader(files.paths[0], name, batch_size, context),))

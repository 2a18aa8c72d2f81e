"""Readers that need all ranks: collective reads, and data distributed over the ranks' memory.

Both are for data larger than a node's page cache, on file systems where many small reads are slow. Every rank calls
them at the same steps, from the training loop and not from a prefetch thread: only one thread may call MPI.
"""

import atexit
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system
from hpc_train.core.formatting import amount, plural
from hpc_train.core.sampling import (
    BatchSampler,
    Indices,
    Order,
    Shares,
    global_batch,
    positions_in,
    rank_span,
    regular_chunk_edges,
    require_rows,
)
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import parallel_file_options
from hpc_train.train.data.dataset import MAX_CHUNKS_MIXED, Split, open_order
from hpc_train.train.data.files import Files, chunk_cache_bytes
from hpc_train.train.data.node_memory import physical_bytes
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5, select_rows, transfer_properties
from hpc_train.train.data.reader_interface import Reader

_READ_BYTES = 256 << 20  # of a rank in one collective read: MPI-IO counts bytes in 31 bits
_NETWORK_FILE_SYSTEMS = (
    *("lustre", "gpfs", "nfs", "nfs4", "ceph", "beegfs", "wekafs", "panfs", "fuse.glusterfs", "daos", "cifs"),
)


class CollectiveReader(Reader):
    """Rows of one data set, read by all ranks together through MPI-IO and sent to the rank that trains on them.

    The ranks read the rows of a window of the order (see `Order`) in slabs, each row once, and exchange them. Data that
    one window holds are mixed as any others are: global batches are those of a memory map. Larger data are mixed as
    if they were stored in chunks of a slab.
    """

    def __init__(self, path: Path, name: str, stored: Reader, config: Config, context: Context) -> None:
        """Collective. stored: which rows of the data set are read, as another reader has them."""
        self._context, self._stored = context, stored
        with context.waiting:
            self._file = h5py.File(path, "r", **parallel_file_options(context))
        # Closing is collective and must come before MPI_Finalize, which aborts if a file is still open.
        atexit.register(self.close)
        self._dataset = self._file[name]
        self.shape, self.dtype = stored.shape, self._dataset.dtype.newbyteorder("=")
        slab_rows = self._slab_rows(config)
        self.chunk_edges = _slab_edges(len(self), slab_rows, config)
        order = open_order([self], len(self), config)
        world = context.world
        batch_size = config.train.batch_size(world.size)
        self._sampler = BatchSampler(order, batch_size, config.seed, Shares(world.size), world.rank)
        self._transfer = transfer_properties(collective=context.comm is not None)
        self._held: dict[tuple[int, int], tuple[Indices, np.ndarray]] = {}  # (epoch, window): rows, their values
        self.num_exchanges = self.num_sent = 0  # messages of all ranks to all ranks; rows to other ranks
        how = "all of them" if order.chunk_edges is None else f"{order.window} slabs of {slab_rows:,} rows"
        self.description = f"collective reads, {how} exchanged between {plural(world.size, 'rank')} at once"

    def _slab_rows(self, config: Config) -> int:
        """Rows that are read together: 1/64 of what is mixed, and whole chunks of compressed data."""
        num_mixed = config.data.shuffle_chunks or MAX_CHUNKS_MIXED
        rows = max(1, chunk_cache_bytes(config) // 2 // num_mixed // max(1, self.row_bytes))
        chunk_rows = self._dataset.chunks[0] if self._dataset.chunks else 1
        return int(-(-rows // chunk_rows) * chunk_rows)

    def begin_step(self, step: int) -> None:
        """Collective, before the `take` of each step: reads and exchanges the windows that it is the first to need."""
        order, seed = self._sampler.order, self._sampler.seed
        batch = global_batch(step, order.num_samples, self._sampler.batch_size)
        ends = order.window_ends(seed, batch.epoch)
        first, last = np.searchsorted(ends, (batch.start, batch.stop - 1), "right").tolist()
        needed = [(batch.epoch, window) for window in range(first, last + 1)]
        self._held = {key: held for key, held in self._held.items() if key in needed}
        for epoch, window in needed:
            if (epoch, window) not in self._held:
                begin = int(ends[window - 1]) if window else 0
                self._held[epoch, window] = self._fetch(epoch, window, begin, int(ends[window]))

    def _fetch(self, epoch: int, window: int, begin: int, end: int) -> tuple[Indices, np.ndarray]:
        """Collective. This rank's rows of a window, which has positions [begin, end) of the epoch's order."""
        sampler, world = self._sampler, self._context.world
        spans = np.array(sampler.order.window_spans(window, sampler.seed, epoch))
        before = np.cumsum(spans[:, 1] - spans[:, 0]) - (spans[:, 1] - spans[:, 0])  # rows in the spans before each
        num_before = epoch * -(-sampler.order.num_samples // sampler.batch_size)
        steps = range(num_before + begin // sampler.batch_size, num_before + (end - 1) // sampler.batch_size + 1)
        rows = np.sort(np.concatenate([share.rows for share in sampler.batches(steps)]))
        span = np.searchsorted(spans[:, 0], rows, "right") - 1
        is_here = (span >= 0) & (rows < spans[span, 1])  # a step may take rows of two windows
        rows, span = rows[is_here], span[is_here]
        numbers = before[span] + rows - spans[span, 0]  # within the window
        starts = np.array([rank_span(end - begin, rank, world.size)[0] for rank in range(world.size)])
        mine = self._read(_part(spans, *rank_span(end - begin, world.rank, world.size)))
        values, num_sent = _exchanged(mine, starts, numbers, self._context)
        self.num_exchanges, self.num_sent = self.num_exchanges + 2, self.num_sent + num_sent
        return rows, values

    def _read(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """Collective. The rows [start, stop) of each span; maybe none. Stored rows between them are read, too."""
        samples = [np.arange(*span) for span in spans]
        stored = [self._stored.stored_rows(each) for each in samples]
        runs = [(int(rows[0]), int(rows[-1]) + 1 - int(rows[0])) for rows in stored]
        read = np.empty((sum(number for _, number in runs), *self.shape[1:]), self.dtype)
        max_rows = max(1, _READ_BYTES // max(1, self.row_bytes))
        num_reads = int(self._context.max(np.array([-(-len(read) // max_rows)]))[0])
        pieces, done = _pieces(runs, max_rows), 0
        for _ in range(num_reads):  # as many on each rank: a collective read waits for all
            piece = next(pieces, [])
            num_rows = sum(number for _, number in piece)
            space, memory = select_rows(self._dataset, piece)
            with self._context.waiting:
                self._dataset.id.read(memory, space, read[done : done + num_rows], dxpl=self._transfer)
            done += num_rows
        if all(len(rows) == number for rows, (_, number) in zip(stored, runs, strict=True)):
            return read
        begins = np.cumsum([0, *(number for _, number in runs)])
        where = [begin + rows - rows[0] for begin, rows in zip(begins[:-1], stored, strict=True)]
        return np.asarray(read[np.concatenate(where)])

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raises `UserError` for a row that this rank did not receive for the step at hand."""
        require_rows(rows, len(self))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        is_missing = np.ones(len(rows), bool)
        for held, values in self._held.values():
            found = np.minimum(np.searchsorted(held, rows), max(0, len(held) - 1))
            where = np.flatnonzero(held[found] == rows) if len(held) else np.zeros(0, np.int64)
            out[where] = values[found[where]]
            is_missing[where] = False
        if is_missing.any():
            raise _not_here("collective", int(rows[is_missing][0]), self._context.world.rank)
        return out

    def close(self) -> None:
        """Collective."""
        self._file.close()


def _slab_edges(num_samples: int, slab_rows: int, config: Config) -> Indices | None:
    """Edges of slabs; None if all slabs are mixed at once, so that there is no need for them."""
    edges = regular_chunk_edges(num_samples, slab_rows)
    return edges if len(edges) - 1 > (config.data.shuffle_chunks or MAX_CHUNKS_MIXED) else None


def _part(spans: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Items start to stop of the concatenated spans, as spans."""
    lengths = spans[:, 1] - spans[:, 0]
    before = np.cumsum(lengths) - lengths
    low = np.maximum(spans[:, 0], spans[:, 0] + start - before)
    high = np.minimum(spans[:, 1], spans[:, 0] + stop - before)
    return [(int(first), int(end)) for first, end in zip(low, high, strict=True) if first < end]


def _pieces(runs: list[tuple[int, int]], max_rows: int) -> Iterator[list[tuple[int, int]]]:
    """The runs (first row, number of rows), cut into lists of at most `max_rows` rows each, in order."""
    piece: list[tuple[int, int]] = []
    room = max_rows
    for first, number in runs:
        while number:
            taken = min(number, room)
            piece.append((first, taken))
            first, number, room = first + taken, number - taken, room - taken
            if not room:
                yield piece
                piece, room = [], max_rows
    if piece:
        yield piece


def _exchanged(mine: np.ndarray, starts: Indices, wanted: Indices, context: Context) -> tuple[np.ndarray, int]:
    """Collective. The rows `wanted`, increasing, of those that all ranks hold; how many rows this rank sent to others.

    mine: the rows that this rank holds; starts: the number of each rank's first row.
    """
    holders = np.searchsorted(starts, wanted, "right") - 1
    requested, counts = context.exchange(wanted, np.bincount(holders, minlength=context.world.size))
    values, _ = context.exchange(mine[requested - starts[context.world.rank]], counts)
    return values, int(counts.sum() - counts[context.world.rank])


def _not_here(mode: str, row: int, rank: int) -> UserError:
    return UserError(
        f"data.read = '{mode}': sample {row} is not on rank {rank} at this step",
        "A rank has the rows that Task.batch gets at that step: read those, or remove data.read.",
    )


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
        self._held = self._mine[:0]  # frees the last steps' rows before the next ones arrive
        self._held, _ = _exchanged(self._mine, self._starts, self._rows, context)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raises `UserError` for a row that this rank did not receive for the steps at hand."""
        try:
            found = positions_in(self._rows, rows)
        except LookupError as error:
            raise _not_here("memory", int(str(error)), self._context.world.rank) from None
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
    if mode == "memory":
        world, batch_size = context.world, config.train.batch_size(context.world.size)
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
    together = CollectiveReader(files.paths[0], name, split.inputs[0], config, context)
    return replace(split, inputs=(together,), begin_step=together.begin_step)

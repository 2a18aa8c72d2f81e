"""OUT.h5 while it is written: under a temporary name, by all ranks together, with a note of how far it is.

The file has its final size from the beginning, so that only numbers change afterwards: one that was killed at any
moment can be opened, and the note says which of its rows count.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from hpc_train.core import lock
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.inference_record import Work
from hpc_train.core.lock import Lease
from hpc_train.core.paths import exists, same_file
from hpc_train.core.rundir import sync, write_atomic
from hpc_train.train.comm.context import Context, raised_on_all_ranks
from hpc_train.train.comm.mpi_library import parallel_file_options
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5, select_rows, transfer_properties
from hpc_train.train.inference.outputs import Column, Predictions
from hpc_train.train.inference.pass_over import Tally

_OVERHEAD_BYTES = 2048  # of a data set, besides its values

Run = tuple[int, int]  # (first row, number of rows)


@dataclass(frozen=True)
class Asked:
    """What a prediction is of. Two commands that ask for the same continue each other's work."""

    run: str
    config: str  # its digest
    data: str
    data_state: list[Any]  # size and time of change of each file
    inputs: str
    targets: str | None
    rows: list[int]
    batch: int


@dataclass(frozen=True)
class Progress:
    """How far an unfinished output is: rows before `tally.row` count. work: of the starts until now."""

    asked: Asked
    step: int  # of the checkpoint
    tally: Tally
    record: str | None  # the folder of its record
    work: list[Work] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError, TypeError or KeyError for anything else."""
        content = json.loads(text)
        asked, tally = Asked(**content["asked"]), Tally(**content["tally"])
        work = [Work(**each) for each in content["work"]]
        return cls(asked, content["step"], tally, content["record"], work)


def partial_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def note_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial.json")


def require_free(out: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raises UserError unless an output may be written there. force: it may replace one, but none of `inputs`."""
    for path in inputs:
        if same_file(out, path):
            raise UserError(
                f"--output {out} is {path}, which is read: predictions would replace it", "Name another output file."
            )
    if exists(out) and not force:
        raise UserError(f"{out} exists", "Name another file, or overwrite it: --force")
    if not exists(out.parent):
        raise UserError(f"--output {out}: its folder does not exist", "Create the folder, or choose another.")


def find_progress(out: Path, asked: Asked, force: bool) -> Progress | None:
    """How far an earlier start of the same command came; None to begin. Raises UserError for an unfinished output of
    another command. force: begins in any case.
    """
    if force:
        remove_unfinished(out)
    if not exists(note_path(out)) or not exists(partial_path(out)):
        return None
    try:
        found = Progress.from_json(note_path(out).read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{note_path(out)} cannot be read: {error!r:.80}", "Begin this prediction anew: --force"
        ) from None
    for each in fields(Asked):
        before, now = getattr(found.asked, each.name), getattr(asked, each.name)
        if before != now:
            raise UserError(
                f"{partial_path(out)} is an unfinished prediction with {each.name} = {before}, and this one has {now}",
                "Repeat that command to finish it, name another file, or begin anew: --force",
            )
    return found


def remove_unfinished(out: Path) -> None:
    note_path(out).unlink(missing_ok=True)
    partial_path(out).unlink(missing_ok=True)


def create(
    out: Path, num_rows: int, columns: dict[str, Column], constants: dict[str, np.ndarray], facts: dict[str, Any]
) -> None:
    """Makes the unfinished output, of its final size. Raises UserError if the disk refuses. For one rank."""
    path = partial_path(out)
    num_bytes = sum(num_rows * int(np.prod(each.shape)) * each.dtype.itemsize for each in columns.values())
    remove_unfinished(out)
    try:
        with h5py.File(path, "x") as file:
            file.attrs.update(facts)
            for name, column in columns.items():
                # Space is taken now, and nothing is written to it: HDF5 then changes no metadata later.
                properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                space = h5py.h5s.create_simple((num_rows, *column.shape))
                h5py.h5d.create(file.id, name.encode(), _stored_type(column.dtype), space, dcpl=properties)
            for name, values in constants.items():
                file.create_dataset(name, data=values.astype(_stored_type(values.dtype).dtype))
        # HDF5 crashes the process, later, if the disk refuses a write: the space must be there.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise not_written(out, error, num_bytes + _OVERHEAD_BYTES * len(columns)) from None


def _stored_type(dtype: np.dtype) -> Any:
    """HDF5's type; strings are of fixed length, in UTF-8."""
    if dtype.kind == "S":
        return h5py.h5t.py_create(h5py.string_dtype("utf-8", max(1, dtype.itemsize)), logical=True)
    return h5py.h5t.py_create(dtype, logical=True)


class OutputFile:
    """Collective: opening, each method and closing. The unfinished output.

    together: whether all ranks write, through MPI-IO; else rank 0 writes what the others send it.
    """

    def __init__(self, out: Path, columns: dict[str, Column], together: bool, context: Context) -> None:
        self._path, self._columns, self._context = partial_path(out), columns, context
        self._collective = together
        self._file: h5py.File | None = None
        if self._collective:
            with context.waiting:
                self._file = h5py.File(self._path, "r+", **parallel_file_options(context))
        elif context.world.is_root:
            self._file = h5py.File(self._path, "r+", locking=False)
        self._transfer = transfer_properties(self._collective)

    def write(self, first: int, runs: Sequence[Run], blocks: Sequence[Predictions]) -> None:
        """Collective. Writes this rank's runs of rows, a block each, counted from row `first` of the data."""
        places = _joined([(begin - first, number) for begin, number in runs])
        predictions = {
            name: np.concatenate([np.zeros((0, *column.shape), column.dtype), *(block[name] for block in blocks)])
            for name, column in self._columns.items()
        }
        if self._collective:
            with self._context.waiting:
                self._write(places, predictions)
            return
        for theirs in self._context.gather((places, predictions)):
            self._write(*theirs)

    def _write(self, places: Sequence[Run], predictions: Predictions) -> None:
        assert self._file is not None
        for name, column in self._columns.items():
            dataset = self._file[name]
            space, memory = select_rows(dataset, places)
            values = np.ascontiguousarray(predictions[name], column.dtype)
            dataset.id.write(memory, space, values, mtype=_stored_type(column.dtype), dxpl=self._transfer)

    def sync(self) -> None:
        """Collective. Returns once what was written is on disk."""
        if self._file is not None:
            with self._context.waiting:
                self._file.flush()
        self._context.on_root(lambda: sync(self._path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All ranks close together: a rank that fails alone would wait for the others instead of ending them.
        is_alone = error is not None and not raised_on_all_ranks(error)
        if self._file is not None and not (self._collective and is_alone):
            self._file.close()


def _joined(runs: Sequence[Run]) -> list[Run]:
    """The same rows in as few runs as possible; `runs` are in order."""
    joined: list[Run] = []
    for begin, number in runs:
        if joined and joined[-1][0] + joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], joined[-1][1] + number)
        else:
            joined.append((begin, number))
    return joined


def can_write_together(context: Context, log: Callable[[str], None]) -> bool:
    """Whether all ranks can write one file; a line says so if they cannot. Raises UserError for two MPIs."""
    if context.world.size == 1:
        return False
    if not h5py.get_config().mpi:
        log("This h5py was built without MPI: rank 0 receives all predictions and writes them")
        return False
    require_parallel_hdf5()
    return True


@contextmanager
def locked(out: Path, context: Context, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Collective. No other job writes `out` inside the block. Yields a check for rank 0, which raises UserError if
    another job has taken over meanwhile. Raises UserError if another job is writing `out`.
    """
    path = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:

        def hold() -> Lease:
            try:
                return stack.enter_context(lock.hold(path, log))
            except UserError as error:
                raise UserError(
                    f"another job is writing {out}: {error.what}", "Wait until it has ended, or name another file."
                ) from None

        leases: list[Lease] = []
        context.on_root(lambda: leases.append(hold()))
        yield lambda: leases[0].confirm()


def write_note(out: Path, progress: Progress) -> None:
    write_atomic(note_path(out), progress.to_json())


def publish(out: Path) -> None:
    """Gives the finished output its name. For one rank."""
    sync(partial_path(out))
    try:
        os.replace(partial_path(out), out)
    except OSError as error:
        raise not_written(out, error, 0) from None
    sync(out.parent)
    note_path(out).unlink(missing_ok=True)

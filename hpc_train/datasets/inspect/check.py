"""`hpc-train data check`: every chunk or block of HDF5 files verified, and what their values tell, by all ranks."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import h5py
import numpy as np

from hpc_train.core.progress import StepProgress
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.inspect.checks import Facts, judge, offset_faults, unequal_numbers
from hpc_train.datasets.inspect.chunk_ranges import Piece, Pieces, num_pieces, shares
from hpc_train.datasets.inspect.duplicates import Equal, equal_samples, keep_one_in
from hpc_train.datasets.inspect.statistics import MOST_LABELS, Tally, role
from hpc_train.datasets.inspect.structure import Fault, Found, Surveyed, disagreements, parts_that_disagree, survey
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import reading_threads

_PIECES_AHEAD = 2  # of each thread: read, and not yet counted
_NOT_READ = ("external", "empty", "missing", "filter", "absurd")  # faults of data sets that are not read then


@dataclass(frozen=True)
class Checked:
    """What `check` found. datasets: by name, what the values of all files tell. seconds: of this rank."""

    files: tuple[str, ...]
    num_bytes: int
    num_ranks: int
    seconds: float
    datasets: dict[str, dict[str, Any]]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]


@dataclass(frozen=True)
class _Plan:
    """What is to be read, as the root sees it.

    first_samples: the number of the first row of each of `readable`, among all samples it may be equal to; -1 where it
    is compared with none. groups: the
    names of the data sets whose samples may be equal, with where each ends in these numbers. first_rows: by name.
    """

    files: list[Surveyed]
    readable: list[Found]
    roles: dict[str, str]
    first_samples: list[int]
    groups: list[dict[str, int]]
    first_rows: dict[str, np.ndarray]
    keep_one_in: int
    vocabulary: int | None
    most_classes: int

    def tally(self, name: str) -> Tally:
        return Tally(self.roles[name], self.first_rows.get(name), self.keep_one_in, self.vocabulary, self.most_classes)


def check(
    paths: Sequence[Path], context: Context, quiet: bool = False, at: Callable[[Path], object] = lambda path: None
) -> Checked:
    """Collective. Verifies the HDF5 files `paths`, which are one data set. at: is told which file comes next.

    Every rank returns the same, which is the same at any number of ranks but for the time. Raises `UserError` for a
    file that may not be read.
    """
    began_ns = perf_counter_ns()
    plan = context.on_root(lambda: _plan(paths, at))
    tallies = {name: plan.tally(name) for name in plan.roles}
    context.on_all(lambda: _count(plan, tallies, context, quiet, at))
    equal: dict[tuple[str, ...], list[Equal]] = {}
    for group in plan.groups:
        hashed = [array for name in group for array in tallies[name].hashes]
        equal[tuple(group)] = equal_samples(hashed, list(group.values()), context)
    num_varying: dict[str, int | None] = dict.fromkeys(tallies)
    for name, tally in tallies.items():
        tally.hashes = []
        if tally.varies is not None:
            num_varying[name] = int(np.count_nonzero(context.sum(tally.varies.astype(np.int32))))
            tally.varies = None
    gathered = context.gather(tallies)
    return context.on_root(lambda: _summary(plan, gathered, equal, num_varying, began_ns, context.world.size))


def _plan(paths: Sequence[Path], at: Callable[[Path], object]) -> _Plan:
    files = []
    for path in paths:
        at(path)
        files.append(survey(path))
    readable, roles, first_rows = [], dict[str, str](), dict[str, np.ndarray]()
    vocabulary = next((size for file in files if isinstance(size := file.attributes.get("vocab_size"), int)), None)
    for file in files:
        not_read = {fault.dataset for fault in file.faults if fault.kind in _NOT_READ}
        for found in file.datasets:
            if found.name in not_read:
                continue
            readable.append(found)
            if found.name not in roles:
                roles[found.name] = role(found, file.datasets, vocabulary is not None)
                if roles[found.name] == "samples" and (row := _first_row(found)) is not None:
                    first_rows[found.name] = row
    groups, first_samples = _numbered(readable, roles)
    num_samples = sum(found.num_rows for found in readable if roles[found.name] == "samples")
    most_classes = max(num_samples, MOST_LABELS)
    one_in = keep_one_in(num_samples)
    return _Plan(files, readable, roles, first_samples, groups, first_rows, one_in, vocabulary, most_classes)


def _first_row(found: Found) -> np.ndarray | None:
    """What features are compared with; None where it is damaged, or only a part of a row can be read at once."""
    if not num_pieces(found):
        return None
    with h5py.File(found.path, "r") as file, closing(Pieces(file, found)) as pieces:
        piece = pieces.read(0)
    return piece.values[0].copy() if piece.is_whole and len(piece.values) else None


def _numbered(readable: list[Found], roles: dict[str, str]) -> tuple[list[dict[str, int]], list[int]]:
    """(groups, first_samples) of `_Plan`. Data sets to train on come first: samples of others are leaks."""
    groups: dict[Any, list[int]] = {}
    kinds: dict[str, Any] = {}
    for index, found in enumerate(readable):
        kind = found.name.rpartition("/")[2], found.shape[1:], found.dtype.str
        if roles[found.name] == "samples" and kinds.setdefault(found.name, kind) == kind:  # else its files disagree
            groups.setdefault(kind, []).append(index)
    ends: list[dict[str, int]] = []
    first_samples = [-1] * len(readable)
    for group in groups.values():
        number, ends_of = 0, dict[str, int]()
        for index in sorted(group, key=lambda i: (not readable[i].name.startswith("train"), readable[i].name, i)):
            first_samples[index] = number
            number += readable[index].num_rows
            ends_of[readable[index].name] = number
        ends.append(ends_of)
    return ends, first_samples


def _count(plan: _Plan, tallies: dict[str, Tally], context: Context, quiet: bool, at: Callable[[Path], object]) -> None:
    """Reads this rank's share of all pieces, and counts what is in them."""
    world, num_threads = context.world, reading_threads(context)
    start, stop = rank_span(sum(map(num_pieces, plan.readable)), world.rank, world.size)
    first_samples = {(found.path, found.name): n for found, n in zip(plan.readable, plan.first_samples, strict=True)}
    shown = StepProgress("checking", stop - start, "auto", world.is_root and not quiet, unit="MB")
    done = num_bytes = 0
    with closing(shown) as progress, ThreadPoolExecutor(num_threads, "hpc-train-check") as pool:
        for found, numbers in shares(plan.readable, start, stop):
            at(found.path)
            tally, first = tallies[found.name], first_samples[found.path, found.name]
            with h5py.File(found.path, "r") as file, closing(Pieces(file, found)) as pieces:
                for piece in _ahead(pool, pieces.read, numbers, num_threads * _PIECES_AHEAD):
                    tally.add(piece, found, first)
                    before, num_bytes = num_bytes, num_bytes + piece.values.nbytes * world.size
                    done += 1
                    progress.advance(done, num_bytes // 1_000_000 - before // 1_000_000, perf_counter_ns())


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], Piece], numbers: Sequence[int], most: int
) -> Iterator[Piece]:
    """read(number) of each of `numbers` in order, at most `most` of them at once in memory."""
    waiting: deque[Future[Piece]] = deque()
    try:
        for number in numbers:
            if len(waiting) == most:
                yield waiting.popleft().result()
            waiting.append(pool.submit(read, number))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            if not future.cancel():
                future.exception()  # until then it may be reading the file that is closed next


def _summary(
    plan: _Plan,
    gathered: list[dict[str, Tally]],
    equal: dict[tuple[str, ...], list[Equal]],
    num_varying: dict[str, int | None],
    began_ns: int,
    num_ranks: int,
) -> Checked:
    """On the root: what all ranks counted, judged."""
    merged = {name: tally.joined([each[name] for each in gathered[1:]]) for name, tally in gathered[0].items()}
    facts = Facts(plan.readable, plan.first_samples, merged, equal, num_varying, plan.keep_one_in)
    datasets, faults, warnings = judge(facts)
    for file in plan.files:
        faults += file.faults
        faults += unequal_numbers(file, plan.roles)
        faults += parts_that_disagree(file)
    faults += disagreements(plan.files)
    damaged = {(fault.file, fault.dataset) for fault in faults if fault.kind == "damaged"}
    for found in plan.readable:
        if plan.roles[found.name] == "offsets" and (str(found.path), found.name) not in damaged:
            faults += offset_faults(found, plan.readable)
    in_order = sorted(faults, key=lambda fault: (fault.file, fault.dataset, fault.kind, fault.number or 0))
    return Checked(
        files=tuple(str(file.path) for file in plan.files),
        num_bytes=sum(file.num_bytes for file in plan.files),
        num_ranks=num_ranks,
        seconds=(perf_counter_ns() - began_ns) / 1e9,
        datasets=datasets,
        faults=tuple(in_order),
        warnings=tuple(warnings),
    )

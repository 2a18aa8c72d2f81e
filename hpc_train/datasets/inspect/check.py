"""`hpc-train data check`: all ranks verify every chunk or block of HDF5 files, and collect statistics of the values."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.labels import MAX_CLASSES
from hpc_train.core.progress import StepProgress
from hpc_train.core.sampling import rank_span
from hpc_train.core.settings import Config
from hpc_train.datasets.inspect import checks
from hpc_train.datasets.inspect.chunk_ranges import RangeReader, RangeValues, num_ranges, ranges_between
from hpc_train.datasets.inspect.duplicates import Duplicates, find_duplicates, keep_one_in
from hpc_train.datasets.inspect.faults import Fault
from hpc_train.datasets.inspect.names import Names, names_of
from hpc_train.datasets.inspect.statistics import Limits, Statistics, role_of
from hpc_train.datasets.inspect.structure import (
    DatasetInfo,
    FileStructure,
    differences_between_files,
    differences_from_train,
    read_structure,
)
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import num_decode_threads
from hpc_train.train.data.hdf5_faults import data_paths, not_a_file

_RANGES_AHEAD = 2  # of each thread: read, and not yet added to the statistics
_NOT_READ = {"external", "empty", "missing", "filter", "absurd", "unreadable"}  # faults of data sets that are skipped


@dataclass(frozen=True)
class Checked:
    """The result of `check`. datasets: by name, over all files. seconds: on this rank. reading: what the job reads."""

    files: tuple[str, ...]
    num_bytes: int
    num_ranks: int
    seconds: float
    datasets: dict[str, dict[str, Any]]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    reading: str | None = None


@dataclass(frozen=True)
class _Plan:
    """What to read, decided by the root.

    sets: the files of each data set: those to train on, and those that a job tests or validates on.
    datasets: those that can be read, with the sample number of each one's first row; -1 if it is not compared.
    groups: data sets whose samples are compared with each other, with the sample number at which each ends.
    """

    names: Names
    sets: list[list[FileStructure]]
    datasets: list[DatasetInfo]
    roles: dict[str, str]
    first_numbers: list[int]
    groups: list[dict[str, int]]
    first_samples: dict[str, np.ndarray]
    limits: Limits

    @property
    def files(self) -> list[FileStructure]:
        return [file for files in self.sets for file in files]

    @property
    def unread(self) -> set[str]:
        """Names of data sets and groups that are not read in some file; "" is a whole file."""
        return {fault.dataset for file in self.files for fault in file.faults if fault.kind in _NOT_READ}


def check(
    paths: Sequence[Path],
    context: Context,
    quiet: bool = False,
    on_file: Callable[[Path], object] = lambda path: None,
    job: Config | None = None,
) -> Checked:
    """Collective. Verifies the HDF5 files `paths`, which are one data set; calls `on_file` before it opens one.

    job: then only what it reads, and it is opened as training opens it. Every rank returns the same result, which
    depends on the number of ranks only in its times. Raises `UserError` for a file that may not be read.
    """
    began_ns = perf_counter_ns()
    plan = context.on_root(lambda: _make_plan(paths, on_file, job))
    statistics = {
        name: Statistics(role, plan.first_samples.get(name), plan.limits) for name, role in plan.roles.items()
    }
    context.on_all(lambda: _read_my_ranges(plan, statistics, context, quiet, on_file))
    duplicates: list[Duplicates] = []
    for group in plan.groups:
        hashes = [array for name in group for array in statistics[name].hashes]
        duplicates += find_duplicates(hashes, group, context)
    for each in statistics.values():
        each.reduce_features(context)
        each.hashes, each.feature_varies = [], None  # large, and no longer needed: not gathered
    of_ranks = context.gather(statistics)
    checked = context.on_root(lambda: _summary(plan, of_ranks, duplicates, began_ns))
    return checked if job is None else _as_training_opens_it(checked, job, context)


def _as_training_opens_it(checked: Checked, job: Config, context: Context) -> Checked:
    """Collective. With what training reads, and the fault that ends it before its first step, if there is one."""
    from hpc_train.train.setup import require_a_batch  # all of training, which a check of files does not need
    from hpc_train.train.tasks import open_task

    if any(fault.kind in ("damaged", "unreadable") for fault in checked.faults):
        return checked
    try:
        task = open_task(job, context)
        if job.train.global_batch:
            context.on_all(lambda: require_a_batch(job, job.global_batch(1), task.num_samples))
    except UserError as error:
        # Another fault may name the same: training's own words come first, as they have the keys of the job.
        refused = Fault("refused", job.name, "", error.what, error.remedy)
        return replace(checked, faults=(refused, *checked.faults))
    return replace(checked, reading=task.reading)


def _make_plan(paths: Sequence[Path], on_file: Callable[[Path], object], job: Config | None) -> _Plan:
    names, sets = Names() if job is None else names_of(job), list[list[FileStructure]]()
    paths_by_key = {"file": paths}
    if job is not None:
        paths_by_key |= {key: data_paths(job, key) for key in dict.fromkeys(names.elsewhere.values())}
    for key, its_paths in paths_by_key.items():
        sets.append([])
        for path in its_paths:
            if why := not_a_file(path):
                raise UserError(f"data.{key} = '{path}' {why}", "Name an HDF5 file.")
            on_file(path)
            sets[-1].append(_only(names, key, read_structure(path)))
    files = [file for each in sets for file in each]
    vocab_sizes = [file.attributes.get("vocab_size") for file in files]
    vocab_size = next((size for size in vocab_sizes if isinstance(size, int)), None)
    datasets, roles, first_samples = [], dict[str, str](), dict[str, np.ndarray]()
    for file in files:
        skipped = {fault.dataset for fault in file.faults if fault.kind in _NOT_READ}
        for info in file.datasets:
            if info.name in skipped:
                continue
            datasets.append(info)
            if info.name in roles:
                continue
            roles[info.name] = names.role(info) or role_of(info, file.datasets, vocab_size is not None)
            if roles[info.name] == "samples" and (sample := _first_sample(info)) is not None:
                first_samples[info.name] = sample
    groups, first_numbers = _number_samples(names, datasets, roles)
    num_samples = sum(info.num_rows for info in datasets if roles[info.name] == "samples")
    may_lack = job is not None and job.data.missing != "refuse"
    limits = Limits(vocab_size, max(num_samples, MAX_CLASSES), keep_one_in(num_samples), may_lack)
    return _Plan(names, sets, datasets, roles, first_numbers, groups, first_samples, limits)


def _only(names: Names, key: str, file: FileStructure) -> FileStructure:
    """What a job reads of `file`, which data.`key` names."""
    return replace(
        file,
        datasets=tuple(info for info in file.datasets if names.has(info.name, key)),
        faults=tuple(fault for fault in file.faults if not fault.dataset or names.has(fault.dataset, key)),
    )


def _first_sample(info: DatasetInfo) -> np.ndarray | None:
    """None if it is damaged, or if only a part of a row can be read at once."""
    if not num_ranges(info):
        return None
    with h5py.File(info.path, "r") as file, closing(RangeReader(file, info)) as reader:
        part = reader.read(0)
    return part.values[0].copy() if part.is_whole_rows and len(part.values) else None


def _number_samples(
    names: Names, datasets: list[DatasetInfo], roles: dict[str, str]
) -> tuple[list[dict[str, int]], list[int]]:
    """(groups, first_numbers) of `_Plan`. Training data come first: their samples in other parts are leaks."""
    groups: dict[Any, list[int]] = defaultdict(list)
    kinds: dict[str, Any] = {}
    for index, info in enumerate(datasets):
        kind = names.part(info.name), info.shape[1:], info.dtype.str
        if roles[info.name] == "samples" and kinds.setdefault(info.name, kind) == kind:  # else its files differ
            groups[kind].append(index)
    ends: list[dict[str, int]] = []
    first_numbers = [-1] * len(datasets)
    for group in groups.values():
        number, end_of = 0, dict[str, int]()
        for index in sorted(group, key=lambda i: (not names.is_training(datasets[i].name), datasets[i].name, i)):
            first_numbers[index] = number
            number += datasets[index].num_rows
            end_of[datasets[index].name] = number
        ends.append(end_of)
    return ends, first_numbers


def _read_my_ranges(
    plan: _Plan, statistics: dict[str, Statistics], context: Context, quiet: bool, on_file: Callable[[Path], object]
) -> None:
    """Adds this rank's share of all ranges to the statistics."""
    world, num_threads = context.world, num_decode_threads(context)
    start, stop = rank_span(sum(map(num_ranges, plan.datasets)), world.rank, world.size)
    first_numbers = {(info.path, info.name): n for info, n in zip(plan.datasets, plan.first_numbers, strict=True)}
    shown = StepProgress("checking", stop - start, "auto", world.is_root and not quiet, unit="MB")
    num_done = num_bytes = 0
    with closing(shown) as progress, ThreadPoolExecutor(num_threads, "hpc-train-check") as pool:
        for info, numbers in ranges_between(plan.datasets, start, stop):
            on_file(info.path)
            with h5py.File(info.path, "r") as file, closing(RangeReader(file, info)) as reader:
                for part in _read_ahead(pool, reader.read, numbers, num_threads * _RANGES_AHEAD):
                    statistics[info.name].add(part, first_numbers[info.path, info.name])
                    num_done += 1
                    before, num_bytes = num_bytes, num_bytes + part.values.nbytes * world.size
                    progress.advance(num_done, num_bytes // 1_000_000 - before // 1_000_000, perf_counter_ns())


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], RangeValues], numbers: Sequence[int], max_in_memory: int
) -> Iterator[RangeValues]:
    """read(number) for each of `numbers`, in order."""
    waiting: deque[Future[RangeValues]] = deque()
    try:
        for number in numbers:
            if len(waiting) == max_in_memory:
                yield waiting.popleft().result()
            waiting.append(pool.submit(read, number))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            if not future.cancel():
                future.exception()  # wait: it may be reading the file that the caller closes next


def _summary(
    plan: _Plan, of_ranks: list[dict[str, Statistics]], duplicates: list[Duplicates], began_ns: int
) -> Checked:
    """On the root: what all ranks counted, judged."""
    root, *others = of_ranks
    facts = checks.Facts(
        names=plan.names,
        datasets=plan.datasets,
        first_numbers=plan.first_numbers,
        statistics={name: root[name].merge([other[name] for other in others]) for name in plan.roles},
        duplicates=duplicates,
        keep_one_in=plan.limits.keep_one_in,
        unread=plan.unread,
    )
    faults = list(checks.value_faults(facts))
    for file in plan.files:
        faults += file.faults
        faults += checks.unequal_lengths(file, plan.roles)
        faults += differences_from_train(file)
    for files in plan.sets:
        faults += differences_between_files(files)
    damaged = {(fault.file, fault.dataset) for fault in faults if fault.kind == "damaged"}
    for file in plan.files:
        if not damaged and not plan.names.roles:  # HDF5 itself reads these rows, and may crash on damage
            faults += checks.unwritten_faults(
                file, {info.name: plan.roles.get(info.name, "") for info in file.datasets}
            )
    for info in plan.datasets:
        if plan.roles[info.name] == "offsets" and (str(info.path), info.name) not in damaged:
            faults += checks.offset_faults(info, plan.datasets)
    if plan.limits.may_lack:
        faults = [fault for fault in faults if fault.kind != "unwritten"]
    return Checked(
        files=tuple(str(file.path) for file in plan.files),
        num_bytes=sum(file.num_bytes for file in plan.files),
        num_ranks=len(of_ranks),
        seconds=(perf_counter_ns() - began_ns) / 1e9,
        datasets=checks.describe(facts),
        faults=tuple(sorted(faults, key=lambda each: (each.file, each.dataset, each.kind, each.number or 0))),
        warnings=tuple(checks.value_warnings(facts)),
    )

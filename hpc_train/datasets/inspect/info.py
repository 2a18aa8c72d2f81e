"""`hpc-train data info`: what HDF5 files hold, how it lies in them, how fast it is read here, and what to change."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import drop_pages, file_system, resident, stripe_count
from hpc_train.core.sampling import shuffled
from hpc_train.datasets.inspect.advice import compression_ratio, of_dataset, of_file
from hpc_train.datasets.inspect.structure import Found, Surveyed, disagreements, parts_that_disagree, survey
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import reading_threads
from hpc_train.train.data.foreign_files import HDF5_ERRORS
from hpc_train.train.data.readers import Reader, open_reader

_SAMPLES, _BATCH = 256, 32
_SEQUENTIAL_BYTES, _PIECE_BYTES = 64 << 20, 4 << 20
_FEWEST_BYTES = 64 << 10  # smaller ones say nothing of the file system
_MOST_S = 2.0  # of one measurement
_MEMORY_BYTES = 64 << 20
_NUMBERS_A_SAMPLE = 1024  # of a data set of single numbers: a window of tokens
_COLD = 0.05  # the share of a file that may still be in memory when it is called cold
_FILE_FACTS = ("title", "complete", "vocab_size", "tokenizer", "num_rows", "license")


@dataclass(frozen=True)
class Speed:
    """Of a measurement: what was read, in which time. is_cold: none of it was in the page cache before."""

    num_samples: int
    num_bytes: int
    seconds: float
    is_cold: bool | None

    def facts(self) -> dict[str, Any]:
        return {
            "samples_per_s": self.num_samples / self.seconds,
            "bytes_per_s": self.num_bytes / self.seconds,
            "samples": self.num_samples,
            "page_cache": "unknown" if self.is_cold is None else "cold" if self.is_cold else "warm",
        }


def inform(
    paths: Sequence[Path], context: Context, measure: bool = True, at: Callable[[Path], object] = lambda path: None
) -> dict[str, Any]:
    """All that is known of HDF5 files that are one data set, ready for JSON. Raises `UserError`.

    at: is told which file comes next.
    """
    files = []
    for path in paths:
        at(path)
        files.append(survey(path))
    faults = [asdict(fault) for file in files for fault in (*file.faults, *parts_that_disagree(file))]
    return {
        "files": [_file_facts(file, context, measure, at) for file in files],
        "faults": faults + [asdict(fault) for fault in disagreements(files)],
    }


def _file_facts(file: Surveyed, context: Context, measure: bool, at: Callable[[Path], object]) -> dict[str, Any]:
    at(file.path)
    kind = file_system(file.path)
    stripes = stripe_count(file.path) if kind == "lustre" else None
    faulty = {fault.dataset for fault in file.faults}
    advice = list(of_file(file.datasets, file.num_bytes, stripes))
    datasets = {}
    for found in file.datasets:
        advice += of_dataset(found)
        datasets[found.name] = _dataset_facts(found)
        if measure and found.is_numeric and found.num_bytes >= _FEWEST_BYTES and found.name not in faulty:
            datasets[found.name]["speed"] = _speeds(found, context)
    return {
        "path": str(file.path),
        "bytes": file.num_bytes,
        "file_system": kind,
        "stripes": stripes,
        "attributes": {key: file.attributes[key] for key in _FILE_FACTS if key in file.attributes},
        "datasets": datasets,
        "advice": [asdict(each) for each in advice],
    }


def _dataset_facts(found: Found) -> dict[str, Any]:
    return {
        "shape": list(found.shape),
        "dtype": str(found.dtype),
        "samples": found.num_rows,
        "layout": found.layout,
        "bytes": found.num_bytes,
        "stored_bytes": found.stored_bytes,
        "chunk": list(found.chunk) or None,
        "chunk_bytes": found.chunk_bytes if found.chunk else None,
        "filters": list(found.filters),
        "compression_ratio": compression_ratio(found),
        "checksums": "crc32" if found.block_rows else "fletcher32" if "fletcher32" in found.filters else None,
        "sources": list(found.sources),
        "attributes": found.attributes,
    }


# ------------------------------------------------------------------------------------------------ speed


def _speeds(found: Found, context: Context) -> dict[str, Any]:
    """What this process reads in a second: samples in a shuffled order, first and again, and all in their order."""
    ways: dict[str, tuple[Callable[[Reader, Found], tuple[int, int]], bool]] = {
        "shuffled": (_gather, True),
        "shuffled_again": (_gather, False),
        "sequential": (_in_order, True),
    }
    try:
        return {name: _timed(found, context, read, drop).facts() for name, (read, drop) in ways.items()}
    except (UserError, *HDF5_ERRORS) as error:
        return {"error": str(error)}


def _timed(found: Found, context: Context, read: Callable[[Reader, Found], tuple[int, int]], drop: bool) -> Speed:
    is_cold: bool | None = False
    if drop:
        drop_pages(found.path)
        there = resident(found.path, found.offset or 0, found.num_bytes if found.offset is not None else None)
        is_cold = None if there is None else there < _COLD
    with h5py.File(found.path, "r") as file:
        reader = open_reader(found.path, file[found.name], _MEMORY_BYTES, reading_threads(context))
        with closing(reader):
            began = perf_counter()
            num_samples, num_bytes = read(reader, found)
            seconds = perf_counter() - began
    return Speed(num_samples, num_bytes, max(seconds, 1e-9), is_cold)


def _gather(reader: Reader, found: Found) -> tuple[int, int]:
    """Some hundred samples in a shuffled order, or as many as the time allows."""
    width = _NUMBERS_A_SAMPLE if len(found.shape) == 1 else 1
    num = max(1, found.num_rows // width)
    order = shuffled(np.arange(min(num, _SAMPLES)), num, 0, 0)
    stop_at, done = perf_counter() + _MOST_S, 0
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        rows = (batch[:, None] * width + np.arange(min(width, found.num_rows))).reshape(-1)
        reader.take(rows)
        done += len(batch)
        if perf_counter() > stop_at:
            break
    return done, done * min(width, found.num_rows) * found.row_bytes


def _in_order(reader: Reader, found: Found) -> tuple[int, int]:
    rows = max(1, _PIECE_BYTES // max(1, found.row_bytes))
    stop_at, done = perf_counter() + _MOST_S, 0
    while done < found.num_rows and done * found.row_bytes < _SEQUENTIAL_BYTES and perf_counter() < stop_at:
        part = reader[done : min(done + rows, found.num_rows)]
        np.asarray(part).reshape(-1).view(np.uint8).max()  # a map is read when its bytes are looked at
        done += len(part)
    width = _NUMBERS_A_SAMPLE if len(found.shape) == 1 else 1
    return max(1, done // width), done * found.row_bytes

"""`hpc-train data info`: the structure of HDF5 files, how fast this machine reads them, and what to change."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import drop_pages, file_system, resident, stripe_count
from hpc_train.core.sampling import shuffled
from hpc_train.datasets.inspect.advice import of_dataset, of_file
from hpc_train.datasets.inspect.structure import (
    DatasetInfo,
    FileStructure,
    differences_between_files,
    differences_from_train,
    read_structure,
)
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import num_decode_threads
from hpc_train.train.data.hdf5_faults import HDF5_ERRORS
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.readers import open_reader

_NUM_SAMPLES, _BATCH_SIZE = 256, 32
_SEQUENTIAL_BYTES, _READ_BYTES = 64 << 20, 4 << 20
_MIN_BYTES = 64 << 10  # smaller data sets tell nothing about the file system
_MAX_S = 2.0  # of one measurement
_MEMORY_BYTES = 64 << 20
_TOKENS_PER_SAMPLE = 1024  # a data set of single numbers is read in windows, as tokens are
_MAX_COLD_SHARE = 0.05  # of a file that may be in memory if it is called cold
_FILE_ATTRIBUTES = ("title", "complete", "vocab_size", "tokenizer", "num_rows", "license")


def inform(
    paths: Sequence[Path], context: Context, measure: bool = True, on_file: Callable[[Path], object] = lambda path: None
) -> dict[str, Any]:
    """All that is known about HDF5 files that are one data set, ready for JSON. Raises `UserError`.

    on_file: called before a file is opened.
    """
    files = []
    for path in paths:
        on_file(path)
        files.append(read_structure(path))
    faults = [fault for file in files for fault in (*file.faults, *differences_from_train(file))]
    faults += differences_between_files(files)
    described = []
    for file in files:
        on_file(file.path)
        described.append(_describe_file(file, context, measure))
    return {"files": described, "faults": [asdict(fault) for fault in faults]}


def _describe_file(file: FileStructure, context: Context, measure: bool) -> dict[str, Any]:
    kind = file_system(file.path)
    num_stripes = stripe_count(file.path) if kind == "lustre" else None
    faulty = {fault.dataset for fault in file.faults}
    advice = list(of_file(file.datasets, file.num_bytes, num_stripes))
    datasets = {}
    for info in file.datasets:
        advice += of_dataset(info)
        datasets[info.name] = _describe_dataset(info)
        if measure and info.is_numeric and info.num_bytes >= _MIN_BYTES and info.name not in faulty:
            datasets[info.name]["speed"] = _measure(info, context)
    return {
        "path": str(file.path),
        "bytes": file.num_bytes,
        "file_system": kind,
        "stripes": num_stripes,
        "attributes": {key: file.attributes[key] for key in _FILE_ATTRIBUTES if key in file.attributes},
        "datasets": datasets,
        "advice": [asdict(each) for each in advice],
    }


def _describe_dataset(info: DatasetInfo) -> dict[str, Any]:
    return {
        "shape": list(info.shape),
        "dtype": str(info.dtype),
        "samples": info.num_rows,
        "layout": info.layout,
        "bytes": info.num_bytes,
        "stored_bytes": info.stored_bytes,
        "chunk": list(info.chunk) or None,
        "chunk_bytes": info.chunk_bytes if info.chunk else None,
        "filters": list(info.filters),
        "compression_ratio": info.compression_ratio,
        "checksums": "crc32" if info.block_rows else "fletcher32" if "fletcher32" in info.filters else None,
        "sources": list(info.sources),
        "attributes": info.attributes,
    }


# ------------------------------------------------------------------------------------------------ speed


def _measure(info: DatasetInfo, context: Context) -> dict[str, Any]:
    """How fast this process reads: samples in a shuffled order, the same again, and all samples in order."""
    try:
        return {
            "shuffled": _time(info, context, _read_shuffled, drop_cache=True),
            "shuffled_again": _time(info, context, _read_shuffled, drop_cache=False),
            "sequential": _time(info, context, _read_in_order, drop_cache=True),
        }
    except (UserError, *HDF5_ERRORS) as error:
        return {"error": str(error)}


def _time(
    info: DatasetInfo, context: Context, read: Callable[[Reader, DatasetInfo], tuple[int, int]], drop_cache: bool
) -> dict[str, Any]:
    page_cache = "warm"
    if drop_cache:
        drop_pages(info.path)
        in_memory = resident(info.path, info.offset or 0, info.num_bytes if info.offset is not None else None)
        if in_memory is None:
            page_cache = "unknown"
        elif in_memory < _MAX_COLD_SHARE:
            page_cache = "cold"
    num_threads = num_decode_threads(context)
    with (
        h5py.File(info.path, "r") as file,
        closing(open_reader(info.path, file[info.name], _MEMORY_BYTES, num_threads)) as reader,
    ):
        began_s = perf_counter()
        num_samples, num_bytes = read(reader, info)
        seconds = max(perf_counter() - began_s, 1e-9)
    return {
        "samples_per_s": num_samples / seconds,
        "bytes_per_s": num_bytes / seconds,
        "samples": num_samples,
        "page_cache": page_cache,
    }


def _rows_per_sample(info: DatasetInfo) -> int:
    return min(_TOKENS_PER_SAMPLE, info.num_rows) if len(info.shape) == 1 else 1


def _read_shuffled(reader: Reader, info: DatasetInfo) -> tuple[int, int]:
    """(samples, bytes) read: some hundred samples, or as many as the time allows."""
    num_rows = _rows_per_sample(info)
    num_samples = info.num_rows // num_rows
    order = shuffled(np.arange(min(num_samples, _NUM_SAMPLES)), num_samples, 0, 0)
    deadline_s, num_read = perf_counter() + _MAX_S, 0
    for start in range(0, len(order), _BATCH_SIZE):
        batch = order[start : start + _BATCH_SIZE]
        reader.take((batch[:, None] * num_rows + np.arange(num_rows)).reshape(-1))
        num_read += len(batch)
        if perf_counter() > deadline_s:
            break
    return num_read, num_read * num_rows * info.row_bytes


def _read_in_order(reader: Reader, info: DatasetInfo) -> tuple[int, int]:
    """(samples, bytes) read from the start."""
    rows_at_once = max(1, _READ_BYTES // max(1, info.row_bytes))
    deadline_s, num_read = perf_counter() + _MAX_S, 0
    while num_read < info.num_rows and num_read * info.row_bytes < _SEQUENTIAL_BYTES and perf_counter() < deadline_s:
        rows = reader[num_read : min(num_read + rows_at_once, info.num_rows)]
        np.asarray(rows).reshape(-1).view(np.uint8).max()  # a memory map reads a page when a byte of it is used
        num_read += len(rows)
    return max(1, num_read // _rows_per_sample(info)), num_read * info.row_bytes

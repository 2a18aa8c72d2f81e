"""What to change about a data set so that it reads faster. Pure functions of its structure."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from hpc_train.core.formatting import binary_size
from hpc_train.datasets.inspect.structure import DatasetInfo

_CHUNK_BYTES = 1 << 20
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 64 << 10, 8 << 20
_MIN_COMPRESSION_RATIO = 1.2  # below it, decompressing costs more than the bytes that it saves
_MIN_STRIPED_BYTES = 1 << 30
_CONTIGUOUS = "Write it contiguous, as `hpc-train prepare` does, or convert it: h5repack -f NAME:NONE -l NAME:CONTI."
_RECHUNK = (
    "Write whole samples in chunks of 1 MiB with checksums, as `hpc-train prepare --compress` does, or convert it: "
    "h5repack -f NAME:FLET -l NAME:CHUNK=ROWSx..."
)


@dataclass(frozen=True)
class Advice:
    """A possible improvement of a data set (of the file if `dataset` is ""), and how to make it."""

    kind: str
    dataset: str
    what: str
    remedy: str


def of_dataset(info: DatasetInfo) -> Iterator[Advice]:
    """What to change about one data set. Small ones need no change."""
    if info.dtype.kind == "f" and info.dtype.itemsize > 4 and len(info.shape) > 1:
        what = "8-byte floats: twice the bytes of float32, in which models train"
        yield Advice("floats", info.name, what, "Write it as float32: values.astype('f4').")
    elif not info.dtype.isnative and info.is_numeric:
        what = f"byte order: {info.dtype} is not this machine's, and each read swaps the bytes"
        native = info.dtype.newbyteorder("=").str[1:]
        yield Advice("byte order", info.name, what, f"Write it in this machine's order: values.astype('{native}').")
    if info.layout == "external":
        yield Advice("external", info.name, "stores its values in other files, which are not read", _CONTIGUOUS)
    if info.layout == "chunked" and info.num_bytes >= _CHUNK_BYTES:
        yield from _of_chunks(info)


def _of_chunks(info: DatasetInfo) -> Iterator[Advice]:
    compressors = [name for name in info.filters if name not in ("shuffle", "fletcher32")]
    ratio, chunk_size = info.compression_ratio, binary_size(info.chunk_bytes)
    if not compressors:
        what = "chunked and not compressed: a contiguous data set is read through a memory map, sample by sample"
        yield Advice("layout", info.name, what, _CONTIGUOUS)
        return
    if ratio is not None and ratio < _MIN_COMPRESSION_RATIO:
        saved = max(0.0, 1 - 1 / ratio)
        what = f"{compressors[0]} saves {saved:.0%} of the bytes: decompressing costs more than reading them"
        yield Advice("compression", info.name, what, _CONTIGUOUS)
    elif (num_parts := prod(info.num_chunks[1:])) > 1:
        yield Advice("chunks", info.name, f"chunks cut samples: each is in {num_parts} of them", _RECHUNK)
    elif info.chunk[0] == 1 and info.row_bytes < _CHUNK_BYTES // 2:
        what = f"one sample a chunk ({chunk_size}): each costs a look-up and a read of its own"
        yield Advice("chunks", info.name, what, _RECHUNK)
    elif info.chunk_bytes > _MAX_CHUNK_BYTES and info.chunk[0] > 1:
        what = f"chunks of {chunk_size}: a shuffled order holds many of them in memory; about 1 MiB is best"
        yield Advice("chunks", info.name, what, _RECHUNK)
    elif info.chunk_bytes < _MIN_CHUNK_BYTES and info.chunk[0] < info.num_rows:
        what = f"chunks of {chunk_size}: more look-ups than reading; about 1 MiB is best"
        yield Advice("chunks", info.name, what, _RECHUNK)
    if "fletcher32" not in info.filters:
        what = "no checksums: a changed byte may be read as if it were right"
        yield Advice("checksums", info.name, what, _RECHUNK)


def of_file(
    datasets: Sequence[DatasetInfo], num_bytes: int, num_stripes: int | None, num_ranks: int = 4
) -> Iterator[Advice]:
    """What to change about the file as a whole. num_stripes: on a Lustre file system; None elsewhere."""
    if num_stripes is not None and num_bytes >= _MIN_STRIPED_BYTES and num_stripes < num_ranks:
        path = shlex.quote(str(datasets[0].path)) if datasets else "FILE"
        servers = "1 Lustre server" if num_stripes == 1 else f"{num_stripes} Lustre servers"
        yield Advice("stripes", "", f"on {servers}: all ranks read from there", f"lfs migrate -c -1 {path}")
    for info in datasets:
        if info.layout == "contiguous" and info.block_rows is None and info.num_bytes >= _CHUNK_BYTES:
            what = f"{info.name} has no checksums: `data check` cannot find changed bytes"
            yield Advice("checksums", info.name, what, "hpc-train prepare --help")
            return

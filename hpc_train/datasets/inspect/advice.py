"""What to change about a data set so that it reads faster, and the command that does it. Pure functions of facts."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hpc_train.datasets.inspect.structure import CHECKSUMS, Found

_CHUNK_BYTES = 1 << 20
_SMALL_CHUNK, _LARGE_CHUNK = 64 << 10, 8 << 20
_WORTH_IT = 1.2  # compression ratio below which decompressing costs more than reading
_STRIPED_BYTES = 1 << 30


@dataclass(frozen=True)
class Advice:
    """What could be better about a data set (of the file where `dataset` is ""), and a command that does it."""

    kind: str
    dataset: str
    what: str
    command: str


def of_dataset(found: Found) -> Iterator[Advice]:
    """What to change about one data set; small ones are well as they are."""
    if found.dtype.kind == "f" and found.dtype.itemsize > 4 and len(found.shape) > 1:
        what = "8-byte floats: twice the bytes of float32, in which models train"
        yield Advice("floats", found.name, what, _converted(found, "f4"))
    elif not found.dtype.isnative and found.is_numeric:
        what = f"byte order: {found.dtype} is not this machine's, and is swapped at each reading"
        yield Advice("byte order", found.name, what, _converted(found, found.dtype.newbyteorder("=").str[1:]))
    if found.layout == "external":
        yield Advice("external", found.name, "its values lie in other files, and are not read", _repacked(found, None))
    if found.layout != "chunked" or found.num_bytes < _CHUNK_BYTES:
        return
    ratio = compression_ratio(found)
    packers = [name for name in found.filters if name not in ("shuffle", "fletcher32")]
    if packers and ratio is not None and ratio < _WORTH_IT:
        what = (
            f"{packers[0]} saves {max(0.0, 1 - 1 / ratio):.0%} of the bytes: decompressing costs more than reading them"
        )
        yield Advice("compression", found.name, what, _repacked(found, None))
    elif not packers:
        what = "chunked and not compressed: a contiguous data set is read through a memory map, sample by sample"
        yield Advice("layout", found.name, what, _repacked(found, None))
    elif any(chunk < size for chunk, size in zip(found.chunk[1:], found.shape[1:], strict=True)):
        count = int(np.prod([-(-size // chunk) for size, chunk in zip(found.shape[1:], found.chunk[1:], strict=True)]))
        yield Advice(
            "chunks", found.name, f"chunks cut samples: each is in {count} of them", _repacked(found, packers[0])
        )
    elif found.chunk[0] == 1 and found.row_bytes < _CHUNK_BYTES // 2:
        what = f"one sample a chunk ({_size(found.chunk_bytes)}): each costs a look-up and a read of its own"
        yield Advice("chunks", found.name, what, _repacked(found, packers[0]))
    elif found.chunk_bytes > _LARGE_CHUNK and found.chunk[0] > 1:
        what = (
            f"chunks of {_size(found.chunk_bytes)}: a shuffled order holds many of them in memory; about 1 MiB is best"
        )
        yield Advice("chunks", found.name, what, _repacked(found, packers[0]))
    elif found.chunk_bytes < _SMALL_CHUNK and found.chunk[0] < found.num_rows:
        what = f"chunks of {_size(found.chunk_bytes)}: more look-ups than reading; about 1 MiB is best"
        yield Advice("chunks", found.name, what, _repacked(found, packers[0]))
    if packers and "fletcher32" not in found.filters:
        what = "no checksums: a changed byte may be read as if it were right"
        yield Advice("checksums", found.name, what, _repacked(found, packers[0]))


def of_file(datasets: Sequence[Found], num_bytes: int, stripes: int | None, num_ranks: int = 4) -> Iterator[Advice]:
    """What to change about the file as a whole. stripes: of a Lustre file system; None elsewhere."""
    if stripes is not None and num_bytes >= _STRIPED_BYTES and stripes < num_ranks:
        path = shlex.quote(str(datasets[0].path)) if datasets else "FILE"
        what = (
            f"on {stripes} Lustre server{'s' * (stripes != 1)}: all ranks read from {'it' if stripes == 1 else 'these'}"
        )
        yield Advice("stripes", "", what, f"lfs migrate -c -1 {path}")
    plain = [
        found
        for found in datasets
        if found.layout == "contiguous" and found.block_rows is None and found.num_bytes >= _CHUNK_BYTES
    ]
    if plain:
        what = f"{plain[0].name} has no checksums: `data check` cannot tell whether its bytes changed"
        yield Advice("checksums", plain[0].name, what, "hpc-train prepare --help")


def compression_ratio(found: Found) -> float | None:
    """Bytes of the values by bytes in the file; None of what holds none."""
    return found.num_bytes / found.stored_bytes if found.stored_bytes and found.layout != "virtual" else None


def _repacked(found: Found, packer: str | None) -> str:
    """A command that writes the file anew with this data set contiguous, or in chunks of whole samples of 1 MiB."""
    old, new = shlex.quote(str(found.path)), shlex.quote(str(found.path.with_suffix(f".new{found.path.suffix}")))
    name = shlex.quote(found.name)
    if packer is None:
        return f"h5repack -f {name}:NONE -l {name}:CONTI {old} {new}"
    rows = min(found.num_rows, max(1, _CHUNK_BYTES // max(1, found.row_bytes)))
    shape = "x".join(map(str, (rows, *found.shape[1:])))
    shuffle = f"-f {name}:SHUF " * (found.dtype.itemsize > 1)
    level = packer.partition(" ")[2]
    packed = f"GZIP={level}" if packer.startswith("gzip") and level else "GZIP=4"
    return f"h5repack {shuffle}-f {name}:{packed} -f {name}:FLET -l {name}:CHUNK={shape} {old} {new}"


def _converted(found: Found, dtype: str) -> str:
    """A command that replaces a data set by the same numbers of another type, some rows at a time."""
    rows = max(1, (4 << 20) // max(1, found.row_bytes))
    name, new, sums = found.name, f"{found.name}.new", f"{CHECKSUMS}/{found.name}"
    code = (
        f"import h5py; f = h5py.File({str(found.path)!r}, 'r+'); a = f[{name!r}]; "
        f"b = f.create_dataset({new!r}, a.shape, {dtype!r}, chunks=a.chunks, compression=a.compression); "
        f"b.attrs.update(a.attrs); "
        f"[b.write_direct(a[i:i + {rows}].astype({dtype!r}), None, slice(i, i + {rows})) "
        f"for i in range(0, len(a), {rows})]; del f[{name!r}]; f.move({new!r}, {name!r})"
    )
    if found.block_rows:
        code += f"; del f[{sums!r}]"  # of the bytes as they were
    return f"python -c {shlex.quote(code)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes / 1024:,.1f} KiB"

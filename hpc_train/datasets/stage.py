"""`hpc-train stage`: copies a data set to node-local storage, once a node. A copy gets its name when it is complete.

The copy is read back from the disk, and must equal what came from the source, and its NAME.sha256 if it has one.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import IO

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount, plural
from hpc_train.core.progress import StepProgress
from hpc_train.core.rundir import write_atomic
from hpc_train.datasets import storage
from hpc_train.datasets.range_copy import RANGE_BYTES, RangeCopy
from hpc_train.datasets.storage import Source
from hpc_train.train.comm.context import Context


@dataclass(frozen=True)
class Staged:
    """A complete copy on this node. is_published: its source has a checksum beside it. spent_s: what it took."""

    path: Path
    num_bytes: int
    sha256: str
    is_published: bool
    is_reused: bool
    spent_s: float


def stage(url: str, folder: Path, context: Context, wait_s: float) -> Path:
    """Collective. One rank a node copies `url` (or a file) into `folder`; the root prints the copy's path last.

    Returns that path, which is the same on each node. Reuses a complete copy of the same version. Raises `UserError`
    on all ranks if one node fails, also if no byte comes for `wait_s` seconds.
    """
    copies = context.world.local_rank == 0
    mine = context.on_all(lambda: _stage_here(url, folder, wait_s, context.world.is_root) if copies else None)
    nodes = [staged for staged in context.gather(mine) if staged is not None]
    if context.world.is_root:
        print(_summary(nodes), nodes[0].path, sep="\n", flush=True)
    return context.on_root(lambda: nodes[0].path)


def _summary(nodes: list[Staged]) -> str:
    first, copied = nodes[0], [staged for staged in nodes if not staged.is_reused]
    source = "as its source says" if first.is_published else "its source says none"
    text = f"{first.path.name}: {amount(first.num_bytes, 'B')}, sha256 {first.sha256[:16]}... ({source})"
    if copied:
        slowest_s = max(staged.spent_s for staged in copied)
        speed = f"{first.num_bytes / 1e6 / slowest_s:,.0f} MB/s each"
        text += f"; copied to {plural(len(copied), 'node')} in {slowest_s:.1f} s, {speed}, read back and equal"
    if len(copied) < len(nodes):
        text += f"; reused on {plural(len(nodes) - len(copied), 'node')}, where it was complete"
    return text


def _stage_here(url: str, folder: Path, wait_s: float, is_root: bool) -> Staged:
    began_s = perf_counter()
    source = storage.find(url)
    path = folder / source.name
    try:
        path = folder.absolute() / source.name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path) as target:
            _require_own_copy(path)
            checksum = _checksum_of_copy(source, path)
            is_reused = checksum is not None
            if checksum is None:
                _reserve(source, target)
                checksum = _copy_verified(source, target, wait_s, is_root)
                _publish(source, checksum, target, path)
    except OSError as error:
        raise UserError(
            f"{path} on {socket.gethostname()} cannot be written: {error.strerror or error}",
            "Name a folder on a disk of the node with room that you may write.",
        ) from None
    return Staged(path, source.num_bytes, checksum, source.sha256 is not None, is_reused, perf_counter() - began_s)


# ------------------------------------------------------------------------------------- the file on this node


@dataclass(frozen=True)
class _PartialFile:
    """The file that becomes a copy. It is written and read through `file`, whatever has its name meanwhile."""

    path: Path
    file: IO[bytes]

    @property
    def descriptor(self) -> int:
        return self.file.fileno()

    def has_its_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.lstat())
        except FileNotFoundError:
            return False


@contextmanager
def _locked(path: Path) -> Iterator[_PartialFile]:
    """The file that becomes `path`, locked by this process: a second job on this node waits here.

    It always has the same name, so that the next job takes over what a killed one left. It is removed at the end.
    """
    name = path.with_name(f".{path.name}.partial")
    while True:
        with owned_files.opened(name, "r+b") as file:
            target = _PartialFile(name, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another job on {socket.gethostname()} stages {path.name}: waiting", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not target.has_its_name():
                continue  # the job before renamed or removed it: this locks a file without that name
            if owned_files.others_may_write(file):
                name.unlink()  # they may have it open, and could write after it was found equal
                continue
            try:
                yield target
            finally:
                if target.has_its_name():  # after the rename this name may be the next job's
                    name.unlink()
            return


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.staged.json")


def _require_own_copy(path: Path) -> None:
    """Raises `UserError` for files of others: whoever wrote the record could have written any checksum into it."""
    owned_files.require(path, _record_path(path))
    if path.exists() and not _record_path(path).exists():
        raise UserError(
            f"{path} exists, and was not staged by hpc-train", "Name another folder, or remove that file first."
        )


def _checksum_of_copy(source: Source, path: Path) -> str | None:
    """The sha256 of the copy at `path`; None unless it is complete, of this version, and nobody else may write it."""
    try:
        with owned_files.opened(_record_path(path), "rb") as record_file, owned_files.opened(path, "rb") as copy:
            if owned_files.others_may_write(record_file) or owned_files.others_may_write(copy):
                return None
            record = json.loads(record_file.read())
            recorded = (record["source"], record["version"], record["bytes"])
            num_bytes = os.fstat(copy.fileno()).st_size
            if recorded != (source.url, source.version, source.num_bytes) or num_bytes != source.num_bytes:
                return None
            found, _ = _read_back(copy.fileno())
        return found if source.version and found == record["sha256"] == (source.sha256 or found) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _reserve(source: Source, target: _PartialFile) -> None:
    """Reserves the room now, so that a full disk does not show half-way."""
    try:
        os.ftruncate(target.descriptor, 0)  # what a killed job left
        free = shutil.disk_usage(target.path.parent).free
        # Where the file system cannot reserve, the C library writes zeros until the disk is full.
        if source.num_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if source.num_bytes:
            os.posix_fallocate(target.descriptor, 0, source.num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f"{target.path.parent} on {socket.gethostname()}"
        raise UserError(
            f"{source.name} needs {amount(source.num_bytes, 'B')}, and {where} has {amount(free, 'B')} free"
            f" ({error.strerror})",
            "Name a folder with more room, or make room.",
        ) from None


def _copy_verified(source: Source, target: _PartialFile, wait_s: float, is_root: bool) -> str:
    """Copies, syncs, reads back and compares; returns the sha256."""
    total_mb = source.num_bytes // 1_000_000 + 1
    with closing(StepProgress(f"staging {source.name}", total_mb, "auto", is_root, unit="MB")) as progress:
        checksums = RangeCopy(source, target.descriptor).run(wait_s, progress)
    os.fsync(target.descriptor)
    os.posix_fadvise(target.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # read it back from the disk, not from memory
    found, found_checksums = _read_back(target.descriptor)
    remedy = "Stage it again; if that happens twice, the disk or the network changes data."
    if found_checksums != checksums or os.fstat(target.descriptor).st_size != source.num_bytes:
        raise UserError(f"{source.name} on {socket.gethostname()} does not read back as it was written", remedy)
    if source.sha256 not in (None, found):
        raise UserError(f"{source.url} has sha256 {found}; {source.name}.sha256 beside it says {source.sha256}", remedy)
    if source.has_changed():
        raise UserError(f"{source.url} changed during the copy", "Stage it again when nobody writes it.")
    return found


def _read_back(descriptor: int) -> tuple[str, dict[int, int]]:
    """(sha256 of the file, CRC-32 of each range by offset): ranges come in any order, which sha256 cannot take."""
    checksums: dict[int, int] = {}
    whole, offset = sha256(), 0
    while data := os.pread(descriptor, RANGE_BYTES - offset % RANGE_BYTES, offset):
        begin = offset - offset % RANGE_BYTES
        whole.update(data)
        checksums[begin] = zlib.crc32(data, checksums.get(begin, 0))
        offset += len(data)
    return whole.hexdigest(), checksums


def _publish(source: Source, checksum: str, target: _PartialFile, path: Path) -> None:
    """First the record, then the name: a copy without a record, or with another's, is not used."""
    record = {"source": source.url, "version": source.version, "bytes": source.num_bytes, "sha256": checksum}
    write_atomic(_record_path(path), json.dumps(record, indent=2) + "\n", permissions=0o644)
    if not target.has_its_name():
        raise UserError(
            f"somebody replaced {target.path} while it was written",
            "Name a folder that nobody else may write, or one with the sticky bit.",
        )
    target.path.replace(path)

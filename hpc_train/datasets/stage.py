"""Copying a data set to node-local storage, once a node: the copy has its name when it is whole, and never before.

Ranges of the file travel at once, each tried again when it fails. What lies on the disk is read back and must equal
what was read from the source, and the source's own NAME.sha256 where it has one.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from random import uniform
from time import monotonic, perf_counter, perf_counter_ns
from typing import IO

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.progress import StepProgress
from hpc_train.core.rundir import write_atomic
from hpc_train.datasets import storage
from hpc_train.datasets.storage import Source
from hpc_train.train.comm.context import Context

# Four ranges at once are read from WebHDFS twice as fast as one (300 and 160 MB/s); more are no faster.
_NUM_STREAMS = 4
_RANGE_BYTES = 8 << 20
# Before a failed range is tried again: doubled each time up to the longest, and drawn from the upper half of that, so
# that a thousand nodes that failed together do not come back together.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Staged:
    """A whole copy on this node, and what it took."""

    path: Path
    num_bytes: int
    sha256: str
    told: bool  # the source itself told the checksum
    reused: bool
    spent_s: float


def stage(url: str, folder: Path, context: Context, wait_s: float) -> Path:
    """Collective. One rank a node copies `url` (or a file) into `folder`; the root prints the copy's path last.

    Returns that path, which is the same on each node.

    A whole copy of the same version is used again. Raises `UserError`, on all ranks where one node fails, also when
    no byte comes for `wait_s` seconds.
    """
    copies = context.world.local_rank == 0
    here = context.on_all(lambda: _stage_here(url, folder, wait_s, context.world.is_root) if copies else None)
    nodes = [staged for staged in context.gather(here) if staged is not None]
    if context.world.is_root:
        print(_summary(nodes), nodes[0].path, sep="\n", flush=True)
    return context.on_root(lambda: nodes[0].path)


def _summary(nodes: list[Staged]) -> str:
    first, copied = nodes[0], [staged for staged in nodes if not staged.reused]
    says = "as its source says" if first.told else "its source says none"
    words = f"{first.path.name}: {_size(first.num_bytes)}, sha256 {first.sha256[:16]}... ({says})"
    if copied:
        slowest_s = max(staged.spent_s for staged in copied)
        words += f"; copied to {_nodes(len(copied))} in {slowest_s:.1f} s, "
        words += f"{first.num_bytes / 1e6 / slowest_s:,.0f} MB/s each, read back and equal"
    if len(copied) < len(nodes):
        words += f"; reused on {_nodes(len(nodes) - len(copied))}, where it was whole"
    return words


def _nodes(number: int) -> str:
    return f"{number} node{'s' * (number != 1)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


# ------------------------------------------------------------------------------------- on one node


def _stage_here(url: str, folder: Path, wait_s: float, is_root: bool) -> Staged:
    began_s = perf_counter()
    source = storage.find(url)
    path = folder / source.name
    try:
        path = folder.absolute() / source.name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path) as unfinished:
            _refuse_others_files(path)
            checksum = _whole_copy(source, path)
            reused = checksum is not None
            if checksum is None:
                _reserve(source, unfinished)
                checksum = _copy_verified(source, unfinished, wait_s, is_root)
                _give_name(source, checksum, unfinished, path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    return Staged(path, source.num_bytes, checksum, source.sha256 is not None, reused, perf_counter() - began_s)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} on {socket.gethostname()} cannot be written: {error.strerror or error}",
        "Name a folder on a disk of the node with room that you may write.",
    )


@dataclass(frozen=True)
class _Unfinished:
    """The file that becomes a copy. It is written and read as it was opened, whatever has its name by then."""

    path: Path
    file: IO[bytes]

    @property
    def handle(self) -> int:
        return self.file.fileno()

    def has_its_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.lstat())
        except FileNotFoundError:
            return False


@contextmanager
def _locked(path: Path) -> Iterator[_Unfinished]:
    """The file that becomes `path`, held by this process alone: a second job on this node waits here.

    It has one name, so that what a killed job left is taken over by the next, and it is gone at the end.
    """
    name = path.with_name(f".{path.name}.partial")
    while True:
        with owned_files.opened(name, "r+b") as file:
            unfinished = _Unfinished(name, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path.name} is being staged on {socket.gethostname()} by another job: waiting", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not unfinished.has_its_name():
                continue  # the job before renamed or removed it: this is a lock on a file without that name
            if owned_files.others_may_write(file):
                name.unlink()  # they may have it open, and could write when it is found equal
                continue
            try:
                yield unfinished
            finally:
                if unfinished.has_its_name():  # once it is renamed, this name may be the next job's
                    name.unlink()
            return


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.staged.json")


def _refuse_others_files(path: Path) -> None:
    """Whoever wrote the record could have written any checksum in it: neither it nor the copy may be another's."""
    owned_files.require(path, _record_of(path))
    if path.exists() and not _record_of(path).exists():
        raise UserError(
            f"{path} exists, and was not staged by hpc-train", "Name another folder, or remove that file first."
        )


def _whole_copy(source: Source, path: Path) -> str | None:
    """The checksum of the copy at `path` if it is this version of the source, whole, and nobody else may write it."""
    try:
        with owned_files.opened(_record_of(path), "rb") as noted, owned_files.opened(path, "rb") as copy:
            if owned_files.others_may_write(noted) or owned_files.others_may_write(copy):
                return None
            record = json.loads(noted.read())
            theirs = (record["source"], record["version"], record["bytes"])
            length = os.fstat(copy.fileno()).st_size
            if theirs != (source.url, source.version, source.num_bytes) or length != source.num_bytes:
                return None
            found, _ = _read_back(copy.fileno())
        return found if source.version and found == record["sha256"] == (source.sha256 or found) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _reserve(source: Source, unfinished: _Unfinished) -> None:
    """No room is told now, not half-way."""
    try:
        os.ftruncate(unfinished.handle, 0)  # what a killed job left
        free = shutil.disk_usage(unfinished.path.parent).free
        if source.num_bytes > free:  # where a file system cannot reserve, the C library would write it full first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if source.num_bytes:
            os.posix_fallocate(unfinished.handle, 0, source.num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f"{unfinished.path.parent} on {socket.gethostname()}"
        raise UserError(
            f"{source.name} needs {_size(source.num_bytes)}, and {where} has {_size(free)} free ({error.strerror})",
            "Name a folder with more room, or make room.",
        ) from None


def _give_name(source: Source, checksum: str, unfinished: _Unfinished, path: Path) -> None:
    """First the record, then the name: a copy without a record, or with another's, is not used."""
    record = {"source": source.url, "version": source.version, "bytes": source.num_bytes, "sha256": checksum}
    write_atomic(_record_of(path), json.dumps(record, indent=2) + "\n", permissions=0o644)
    if not unfinished.has_its_name():
        raise UserError(
            f"{unfinished.path} was replaced by somebody while it was written",
            "Name a folder that nobody else may write, or one with the sticky bit.",
        )
    unfinished.path.replace(path)


# ------------------------------------------------------------------------------------- copying


def _copy_verified(source: Source, unfinished: _Unfinished, wait_s: float, is_root: bool) -> str:
    """Copies, syncs, reads back and compares; returns the sha256."""
    total = source.num_bytes // 10**6 + 1
    with closing(StepProgress(f"staging {source.name}", total, "auto", is_root, unit="MB")) as progress:
        checksums = _copy(_Copy(source, unfinished), wait_s, progress)
    os.fsync(unfinished.handle)
    os.posix_fadvise(unfinished.handle, 0, 0, os.POSIX_FADV_DONTNEED)  # read it back from the disk, not from memory
    found, found_checksums = _read_back(unfinished.handle)
    remedy = "Stage it again; if that happens twice, the disk or the network changes data."
    if found_checksums != checksums or os.fstat(unfinished.handle).st_size != source.num_bytes:
        raise UserError(f"{source.name} on {socket.gethostname()} does not read back as it was written", remedy)
    if source.sha256 not in (None, found):
        raise UserError(f"{source.url} has sha256 {found}; {source.name}.sha256 beside it says {source.sha256}", remedy)
    if storage.changed(source):
        raise UserError(f"{source.url} changed while it was copied", "Stage it again when nobody writes it.")
    return found


def _read_back(handle: int) -> tuple[str, dict[int, int]]:
    """The file's sha256, and the crc32 of each range by offset: ranges come in any order, which sha256 cannot take."""
    checksums: dict[int, int] = {}
    whole, offset = sha256(), 0
    while data := os.pread(handle, _RANGE_BYTES - offset % _RANGE_BYTES, offset):
        begin = offset - offset % _RANGE_BYTES
        whole.update(data)
        checksums[begin] = zlib.crc32(data, checksums.get(begin, 0))
        offset += len(data)
    return whole.hexdigest(), checksums


@dataclass(frozen=True)
class _Failure:
    """What happened to a span, and when it is tried again."""

    error: Exception
    pause_s: float


@dataclass(frozen=True)
class _Copy:
    """What the streams of one copy share: spans (start, end) to be copied, and what they have to say.

    News is a range's offset and crc32, a failure that is tried again, or a UserError, which ends the copy.
    """

    source: Source
    unfinished: _Unfinished
    spans: "SimpleQueue[tuple[int, int]]" = field(default_factory=SimpleQueue)
    news: "SimpleQueue[tuple[int, int] | _Failure | UserError]" = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)


def _copy(copy: _Copy, wait_s: float, progress: StepProgress) -> dict[int, int]:
    """Copies all ranges; returns the crc32 of each by offset, of the bytes as they came."""
    source = copy.source
    offsets = range(0, source.num_bytes, _RANGE_BYTES)
    for start in offsets if source.in_ranges else offsets[:1]:
        copy.spans.put((start, min(start + _RANGE_BYTES, source.num_bytes) if source.in_ranges else source.num_bytes))
    for _ in range(_NUM_STREAMS):  # daemon: a read that never comes back must not keep the process from ending
        # Its own handle: a stream that comes back when all is over must not write to what has the number by then.
        handle = os.dup(copy.unfinished.handle)
        threading.Thread(target=_stream, args=(copy, handle), daemon=True).start()
    checksums: dict[int, int] = {}
    heard_s, said_s, trouble = monotonic(), 0.0, ""
    try:
        while len(checksums) < len(offsets):
            try:
                news = copy.news.get(timeout=max(0.0, heard_s + wait_s - monotonic()))
            except Empty:
                raise UserError(
                    f"{source.url}: no byte came for {wait_s:g} s{trouble}",
                    "Stage it again when the storage is whole, or wait longer: --wait SECONDS",
                ) from None
            if isinstance(news, UserError):
                raise news
            if isinstance(news, _Failure):
                trouble = f" ({storage.in_words(news.error)})"
                if monotonic() - said_s > _SAY_EVERY_S:
                    said_s = monotonic()
                    progress.log(f"  trying again in {news.pause_s:.1f} s{trouble}")
            elif news[0] not in checksums:  # a stream without ranges begins again at its start
                heard_s, trouble = monotonic(), ""
                done = len(checksums) * _RANGE_BYTES // 10**6
                checksums[news[0]] = news[1]
                now_done = min(len(checksums) * _RANGE_BYTES, source.num_bytes) // 10**6
                progress.advance(now_done, now_done - done, perf_counter_ns())
    finally:
        copy.stop.set()
    return checksums


def _stream(copy: _Copy, handle: int) -> None:
    """Copies spans until there are none; what fails is said and tried again."""
    with os.fdopen(handle, "r+b", buffering=0):
        while not copy.stop.is_set():
            try:
                span = copy.spans.get_nowait()
            except Empty:
                return
            if not _copy_until_done(copy, handle, *span):
                return


def _copy_until_done(copy: _Copy, handle: int, start: int, end: int) -> bool:
    """Whether the span is copied; else the copy is over, and an error is among the news if this span had one."""
    for attempt in count():
        if copy.stop.is_set():
            break
        try:
            _copy_span(copy, handle, start, end)
            return True
        except UserError as error:
            copy.news.put(error)
            break
        except Exception as error:  # noqa: BLE001  clients of many kinds of storage raise what they like
            if storage.is_gone(error) or isinstance(error, PermissionError):  # waiting does not mend these
                words = f"{copy.source.url}: {storage.in_words(error)}"
                copy.news.put(UserError(words, "Somebody changed it half-way: check it, and stage it again."))
                break
            pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(attempt, 10), _LONGEST_PAUSE_S) * uniform(0.5, 1)
            copy.news.put(_Failure(error, pause_s))
            copy.stop.wait(pause_s)
    return False


def _copy_span(copy: _Copy, handle: int, start: int, end: int) -> None:
    with storage.open_span(copy.source) as file:
        if start:
            file.seek(start)
        for offset in range(start, end, _RANGE_BYTES):
            data = _read_exactly(file, min(_RANGE_BYTES, end - offset))
            if copy.stop.is_set():
                return
            try:
                _write_all(handle, data, offset)
            except OSError as error:  # the local disk's: no reason to ask the source again
                raise _cannot_write(copy.unfinished.path, error) from None
            copy.news.put((offset, zlib.crc32(data)))


def _read_exactly(file: IO[bytes], num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    while len(data) < num_bytes:
        more = file.read(num_bytes - len(data))
        if not more:
            raise EOFError(f"{num_bytes - len(data)} bytes of a range are missing")
        data += more
    return data


def _write_all(handle: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written

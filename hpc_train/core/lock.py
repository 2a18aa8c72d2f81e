"""One job at a time in a run directory: a second job is refused and told of the first; a dead job's lock is taken over.

Many parallel file systems disable the operating system's file locks. This lock is a file, created by a hard link, which
its holder rewrites in place every few seconds. If the holder's process cannot be looked up from here, a lock that does
not change belongs to a dead job; no clocks are compared. A holder that was suspended, or whose file system was, may
have been taken for dead: it reads its token back whenever its last heartbeat is old and before each write that matters,
and writes nothing more once the token is another's (fencing).

flufl.lock was considered: it compares the file's mtime with the local clock, and removes locks by name, so that two
jobs that break the same dead lock can both hold it.
"""

import errno
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Self

from hpc_train.core.errors import UserError, not_written
from hpc_train.core.job_environment import JobEnvironment

BEAT_S = 5.0
_VALID_BEATS = 2.0  # after a heartbeat, how long nobody can have taken over: others wait for `_PATIENCE_BEATS`
_PATIENCE_BEATS = 4.0
_NUM_BYTES = 1024  # of the file, always: a heartbeat overwrites it in place
_ASIDE_S = 1.0  # another process may have moved the lock aside this long, to look at it


@dataclass
class Holder:
    """What the lock file says. Another machine's entries may be damaged: only the token is verified."""

    token: str
    host: Any = "an unknown host"
    pid: Any = "unknown"
    process: Any = None  # when the process started: its id may be reused
    system: Any = None  # where the pid is valid
    job: Any = None
    beat: Any = 0

    @classmethod
    def this_process(cls) -> Self:
        pid, job = os.getpid(), JobEnvironment.current().job_id
        return cls(secrets.token_hex(8), socket.gethostname(), pid, _process(pid), _system(), job)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """None if the data is no lock, or half rewritten."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get("token"), str):
            return None
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(_NUM_BYTES)

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    @property
    def is_gone(self) -> bool | None:
        """Whether the process has ended; None if it cannot be looked up from here."""
        if self.system != _system() or not isinstance(self.pid, int):
            return None
        return bool(_process(self.pid) != self.process)


class Lease:
    """A held lock: `check` it at every step, `confirm` it before a write that matters.

    Both raise `UserError` if another job has taken it over; this job must write nothing more then.

    One rank holds the lock and sends heartbeats. The others have a lease with the same token and without heartbeats: a
    step that ends shows them that the holder still runs, and after a step that took long they read the file.
    """

    def __init__(self, path: Path, token: str, beat_s: float = BEAT_S, beats: bool = False) -> None:
        self.path, self.token, self.is_lost = path, token, False
        self._valid_s, self._beats, self._renewed_s = _VALID_BEATS * beat_s, beats, monotonic()

    def check(self) -> None:
        """Costs next to nothing as long as the last heartbeat is fresh."""
        now_s = monotonic()  # keeps counting while a process is suspended by a signal
        if self.is_lost or now_s - self._renewed_s > self._valid_s:
            self.confirm()
        elif not self._beats:
            self._renewed_s = now_s

    def confirm(self) -> None:
        """Reads the file."""
        began_s = monotonic()
        try:
            holder = _read(self.path)
            while holder is None and monotonic() - began_s < _ASIDE_S:
                sleep(_ASIDE_S / 20)
                holder = _read(self.path)
        except UserError:
            if not self.is_lost and began_s - self._renewed_s <= self._valid_s:
                return  # the file system failed once, and nobody can have taken over yet
            raise
        if holder is None or holder.token != self.token:
            self.is_lost = True
            who = f"{holder} has taken it over" if holder else "its lock was removed"
            raise UserError(
                f"this job has lost its lock on {self.path.parent}: {who} while this job did not respond",
                "It writes nothing more there. The other job continues the run; after it, --resume does.",
            )
        if not self._beats:
            self._renewed_s = began_s  # the holder's is renewed by heartbeats alone, since others see only those

    def beat(self, holder: Holder) -> None:
        """Rewrites the lock in place: another job's lock is another file (inode), which this never touches."""
        began_s = monotonic()
        with self.path.open("r+b", buffering=0) as file:
            found = Holder.parse(file.read())
            if found is None or found.token != self.token:
                self.confirm()
                return
            os.pwrite(file.fileno(), holder.encode(), 0)
            os.fsync(file.fileno())
        self._renewed_s = began_s


@contextmanager
def hold(path: Path, log: Callable[[str], None], beat_s: float = BEAT_S) -> Iterator[Lease]:
    """Holds the lock file `path` inside the block. Raises `UserError` naming the holder if another job is alive.

    log: receives a line if this has to wait, or takes over a dead job's lock.
    """
    me = Holder.this_process()
    while not _create(path, me):
        other = _read(path)
        if other is None:
            sleep(0.01)  # it was removed in between
            continue
        if not _is_dead(path, other, log, _PATIENCE_BEATS * beat_s):
            raise UserError(
                f"{path.parent} is in use by {other}",
                "Wait until that job has ended, or begin another run: --resume never",
            )
        if _remove(path, other.token):
            log(f"{path.parent}: took over from {other}, which ended without releasing its lock")
        elif _token(path) == other.token:
            raise UserError(
                f"{path} of {other}, which has ended, cannot be removed",
                "Remove it as its owner or on a writable disk, or begin another run: --resume never",
            )
    lease, stop = Lease(path, me.token, beat_s, beats=True), threading.Event()
    thread = threading.Thread(target=_send_heartbeats, args=(lease, me, stop, beat_s), name="lock", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        _remove(path, me.token)


def is_held_by_dead_process(path: Path) -> bool:
    """Whether the lock file's holder was a process of this machine that has ended."""
    try:
        holder = _read(path)
    except UserError:
        return False
    return holder is not None and holder.is_gone is True


def _send_heartbeats(lease: Lease, me: Holder, stop: threading.Event, beat_s: float) -> None:
    while not stop.wait(beat_s) and not lease.is_lost:
        me.beat += 1
        with suppress(OSError, UserError):  # one failed write must not end the job; a lost lock does, at the next step
            lease.beat(me)


def _is_dead(path: Path, other: Holder, log: Callable[[str], None], patience_s: float) -> bool:
    """Whether the holder's process has ended or, if it cannot be looked up, its lock does not change for `patience_s`.

    That Slurm has requeued the same job proves nothing: its old node may be alive behind a broken network.
    """
    if (is_gone := other.is_gone) is not None:
        return is_gone
    log(f"{path.parent} is locked by {other}: looking for {patience_s:.0f} s whether that still runs")
    first = now = _read(path)
    first_s = asked_s = monotonic()  # after the first read, which the file system may have kept waiting
    while now is not None and now == first and asked_s - first_s < patience_s:
        sleep(min(0.25, patience_s / 20))
        asked_s = monotonic()
        now = _read(path)
    return now is None or now == first


# ------------------------------------------------------------------------------------------------ the file


def _create(path: Path, me: Holder) -> bool:
    """Whether this process has created the lock file; complete from its first moment, because others may read it."""
    temporary, data = path.with_name(f".{path.name}.{me.token}"), me.encode()
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise not_written(path, error, len(data)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _read(path: Path) -> Holder | None:
    """None if there is no lock. Reopened each time: only then a network file system shows what others wrote."""
    remedy = f"Check whether a job still writes in {path.parent}; if not, remove the file {path.name}."
    for _ in range(5):
        try:
            holder = Holder.parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: the file was replaced while it was being opened
                raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
            holder = None
        if holder is not None:
            return holder
        sleep(0.02)  # its holder may be rewriting it
    raise UserError(f"{path} is no lock of hpc-train", remedy)


def _token(path: Path) -> str | None:
    holder = _read(path)
    return holder.token if holder else None


def _remove(path: Path, token: str) -> bool:
    """Removes the lock if it still has `token`: renamed first, so that only one of two jobs can win it."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with suppress(OSError, UserError):  # gone; or the disk has become read-only, and it stays as that of a dead job
        if _token(path) != token:
            return False
        os.rename(path, aside)
        try:
            is_expected = _token(aside) == token
            if not is_expected:
                os.link(aside, path)  # another job was faster: give its lock back
        finally:
            aside.unlink()
        return is_expected
    return False


# ------------------------------------------------------------------------------------------------ processes


def _system() -> str:
    """This machine since its boot, and this container: where a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> str | None:
    """When the process started, in ticks since the boot; None if there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]

"""One job at a time in a run directory: the second is refused and told of the first, a dead job's lock is taken over.

File locks of the operating system are switched off on many parallel file systems. This lock is a file, made by a hard
link, whose holder rewrites it in place every few seconds: where its process cannot be looked up, a lock that stands
still belongs to the dead. Nobody's clock is compared with another's. A holder that was stopped, or whose file system
was, may have been taken for dead: so it asks the file for its token whenever its last beat is old, and before each
write that counts, and writes nothing more where the token is another's (fencing).
"""

import errno
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from hpc_train.core.errors import UserError, not_written
from hpc_train.core.job_environment import JobEnvironment

BEAT_S = 5.0
_VALID_BEATS = 2.0  # after a beat, the time in which nobody can have taken over: others wait for `_PATIENCE_BEATS`
_PATIENCE_BEATS = 4.0
_NUM_BYTES = 1024  # of the file, always: a beat overwrites it in place
_TURNED_S = 1.0  # another process may have moved the lock aside for a moment, to look at it


class Lease:
    """A held lock: `check` it at every step, `confirm` it before a write that counts. Both raise `UserError` where
    another job has taken it over; this job must write nothing more then.

    One rank holds the lock and beats. The others have a lease with the same token and without beats: a step that ends
    tells them that the holder still runs, and they read the file after a step that took long.
    """

    def __init__(self, path: Path, token: str, beat_s: float = BEAT_S, beats: bool = False) -> None:
        self.path, self.token, self.is_lost = path, token, False
        self._valid_s, self._beats, self._renewed_s = _VALID_BEATS * beat_s, beats, monotonic()

    def check(self) -> None:
        """Costs next to nothing as long as the last beat is fresh."""
        now_s = monotonic()  # goes on while a process is stopped
        if self.is_lost or now_s - self._renewed_s > self._valid_s:
            self.confirm()
        elif not self._beats:
            self._renewed_s = now_s

    def confirm(self) -> None:
        """Reads the file again."""
        began_s = monotonic()
        try:
            now = _read(self.path)
            while now is None and monotonic() - began_s < _TURNED_S:
                sleep(_TURNED_S / 20)
                now = _read(self.path)
        except UserError:
            if not self.is_lost and began_s - self._renewed_s <= self._valid_s:
                return  # the file system failed once, and nobody can have taken over yet
            raise
        if now is None or now["token"] != self.token:
            self.is_lost = True
            who = f"{_name(now)} has taken it over" if now else "its lock was removed"
            raise UserError(
                f"this job has lost its lock on {self.path.parent}: {who} while this job did not respond",
                "It writes nothing more there. The other job continues the run; after it, --resume does.",
            )
        if not self._beats:
            self._renewed_s = began_s  # the holder renews with its beats alone, since others see only those

    def beat(self, content: dict[str, Any]) -> None:
        """Rewrites the lock in place: the lock of another job is another file, and is never touched."""
        began_s = monotonic()
        with self.path.open("r+b", buffering=0) as file:
            held = _parsed(file.read())
            if held is None or held["token"] != self.token:
                self.confirm()
                return
            os.pwrite(file.fileno(), _encoded(content), 0)
            os.fsync(file.fileno())
        self._renewed_s = began_s


@contextmanager
def hold(path: Path, say: Callable[[str], None], beat_s: float = BEAT_S) -> Iterator[Lease]:
    """Holds the lock file `path` meanwhile. Raises `UserError` naming the holder if another job lives.

    say: called with a line for the user where it has to be waited, or a dead job's lock is taken over.
    """
    mine = _identity()
    while not _create(path, mine):
        other = _read(path)
        if other is None:
            sleep(0.01)  # gone in between
            continue
        if not _is_dead(path, other, say, _PATIENCE_BEATS * beat_s):
            raise UserError(
                f"{path.parent} is in use by {_name(other)}",
                "Wait until that job has ended, or begin another run: --resume never",
            )
        if _remove(path, other["token"]):
            say(f"{path.parent}: took over from {_name(other)}, which has ended without saying so")
        elif (_read(path) or {}).get("token") == other["token"]:
            raise UserError(
                f"{path} of {_name(other)}, which has ended, cannot be removed",
                "Remove it, as its owner or on a disk that can be written, or begin another run: --resume never",
            )
    lease, stop = Lease(path, mine["token"], beat_s, beats=True), threading.Event()
    thread = threading.Thread(target=_beat, args=(lease, mine, stop, beat_s), name="lock", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        _remove(path, mine["token"])


def is_held_by_dead_process(path: Path) -> bool:
    """Whether the lock file's holder was a process of this machine that is gone."""
    try:
        other = _read(path)
    except UserError:
        return False
    return other is not None and _is_gone(other) is True


def _is_gone(other: dict[str, Any]) -> bool | None:
    """Whether the holder's process is gone; None where it cannot be looked up from here."""
    if other.get("system") != _system() or not isinstance(other.get("pid"), int):
        return None
    return _process(other["pid"]) != other.get("process")


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "system": _system(),
        "job": JobEnvironment.current().job_id,
        "token": secrets.token_hex(8),
        "beat": 0,
    }


def _system() -> str:
    """This machine since it was started, and this container: where a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> str | None:
    """When the process began, in ticks since the machine started: its id may be another's later. None: no process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]


def _create(path: Path, content: dict[str, Any]) -> bool:
    """Whether this process has made the lock file; whole from its first moment, because another may read it."""
    temporary, data = path.with_name(f".{path.name}.{content['token']}"), _encoded(content)
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


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode().ljust(_NUM_BYTES)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """What a lock says; None where it is none, or half rewritten."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("token"), str) else None


def _read(path: Path) -> dict[str, Any] | None:
    """What the lock says; None where it is gone. Opened each time: a network file system shows others' writes then."""
    remedy = f"Look whether a job still writes in {path.parent}; if not, remove the file {path.name}."
    for _ in range(5):
        try:
            content = _parsed(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: it was replaced while it was opened
                raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
            content = None
        if content is not None:
            return content
        sleep(0.02)  # its holder may be at it
    raise UserError(f"{path} is no lock of hpc-train", remedy)


def _is_dead(path: Path, other: dict[str, Any], say: Callable[[str], None], patience_s: float) -> bool:
    """Whether the holder's process is gone or, where it cannot be looked up, its lock stands still for `patience_s`.

    That Slurm has started the same job again proves nothing: its old node may live behind a broken network.
    """
    is_gone = _is_gone(other)
    if is_gone is not None:
        return is_gone
    say(f"{path.parent} is locked by {_name(other)}: looking for {patience_s:.0f} s whether that still runs")
    first = _read(path)
    seen_s = monotonic()  # once the first look is over: the file system may have kept it waiting
    while first is not None:
        sleep(min(0.25, patience_s / 20))
        asked_s = monotonic()
        now = _read(path)
        if now is not None and now != first:
            return False
        if now is None or asked_s - seen_s >= patience_s:
            return True
    return True


def _remove(path: Path, token: str) -> bool:
    """Removes the lock if it is still that of `token`: moved aside first, so that of two only one can take it."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with suppress(OSError, UserError):  # gone; or the disk has become read-only, and it stays as that of a dead job
        if (_read(path) or {}).get("token") != token:
            return False
        os.rename(path, aside)
        try:
            is_it = (_read(aside) or {}).get("token") == token
            if not is_it:
                os.link(aside, path)  # another was quicker
        finally:
            aside.unlink()
        return is_it
    return False


def _beat(lease: Lease, content: dict[str, Any], stop: threading.Event, beat_s: float) -> None:
    while not stop.wait(beat_s) and not lease.is_lost:
        content["beat"] += 1
        with suppress(OSError, UserError):  # one failed write must not end the job; a lost lock does, at the next step
            lease.beat(content)


def _name(owner: dict[str, Any]) -> str:
    job = f"Slurm job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"

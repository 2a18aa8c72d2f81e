"""One job at a time in a run directory: the second is refused and told of the first, a dead job's lock is taken over.

File locks of the operating system are switched off on many parallel file systems. This lock is a file whose holder
rewrites it every few seconds; where its process cannot be looked up, a lock that stands still belongs to the dead.
"""

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

from hpc_train.errors import UserError, not_written
from hpc_train.rundir import write_atomic

BEAT_S = 5.0
PATIENCE_S = 20.0


@contextmanager
def held(path: Path, say: Callable[[str], None], beat_s: float = BEAT_S) -> Iterator[None]:
    """Holds the lock file `path` meanwhile. Raises `UserError` naming the holder if another job lives.

    say: called with a line for the user where it has to be waited, or a dead job's lock is taken over.
    """
    mine = _identity()
    while not _create(path, mine):
        other = _read(path)
        if other is None:
            continue  # gone in between
        if not _is_dead(path, other, mine, say, PATIENCE_S / BEAT_S * beat_s):
            raise UserError(
                f"{path.parent} is in use by {_name(other)}",
                "Wait until that job has ended, or begin another run: --resume never",
            )
        say(f"{path.parent}: took over from {_name(other)}, which has ended without saying so")
        _remove(path, other["token"])
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, mine, stop, beat_s), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _remove(path, mine["token"])


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "system": _system(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
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
    temporary, text = path.with_name(f".{path.name}.{content['token']}"), json.dumps(content)
    try:
        temporary.write_text(text)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise not_written(path, error, len(text)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict) or "token" not in content:
        raise UserError(f"{path} is no lock of hpc-train", "Look whether a job still writes there; if not, remove it.")
    return content


def _is_dead(
    path: Path, other: dict[str, Any], mine: dict[str, Any], say: Callable[[str], None], patience_s: float
) -> bool:
    if other.get("system") == mine["system"]:
        return _process(int(other["pid"])) != other.get("process")
    if mine["job"] and other.get("job") == mine["job"] and other.get("restart") != mine["restart"]:
        return True  # Slurm starts a job again only after it has ended it
    say(f"{path.parent} is locked by {_name(other)}: looking for {patience_s:.0f} s whether that still runs")
    end = monotonic() + patience_s
    while monotonic() < end:
        sleep(min(0.25, patience_s / 20))
        now = _read(path)
        if now is None:
            return True
        if now != other:
            return False
    return True


def _remove(path: Path, token: str) -> None:
    """Removes the lock if it is still that of `token`: moved aside first, so that of two only one can take it."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        os.rename(path, aside)
    except OSError:  # gone; or the disk has become read-only, and the lock stays as that of a dead job
        return
    moved = _read(aside)
    if moved is not None and moved["token"] != token:
        os.link(aside, path)  # another was quicker
    aside.unlink()


def _beat(path: Path, content: dict[str, Any], stop: threading.Event, beat_s: float) -> None:
    while not stop.wait(beat_s):
        content["beat"] += 1
        try:
            write_atomic(path, json.dumps(content))
        except UserError:  # a full disk must not end the job; others will think longer before they take over
            continue


def _name(owner: dict[str, Any]) -> str:
    job = f"Slurm job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} on {owner.get('host')}"

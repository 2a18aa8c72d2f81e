"""`hpc-train doctor`: finds out what works on this machine by trying it.

Each rank starts a second process, which runs the checks (`__main__.py`). This one waits, so that a check that hangs or
crashes, in MPI or in a file system, still ends in a table that names it.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any

import click

from hpc_train.core.child_process import died_of
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import expanded

SCHEMA = 1
_START_S = 600.0  # Python's own start: a thousand ranks on one file server take minutes
_GRACE_S = 3.0  # added to a check's limit: the checking process itself may still name ranks that do not answer
_ROOT_S = 60.0  # added on other ranks: the root prints the result
_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red", "n/a": "dim"}


class _Terminated(Exception):
    """The launcher ends the job."""


@dataclass
class Examination:
    """What is known so far. at: the check that runs; remedy: its remedy if it does not end."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    size: int = 1
    at: str = "start"
    remedy: str = ""
    limit_s: float = _START_S
    root: tuple[str, int, str] = ("", 0, "")  # host, port, token: where the root accepts other ranks' faults

    @property
    def failed(self) -> bool:
        return any(finding["status"] == "fail" for finding in self.findings)

    def fail(self, seen: str) -> None:
        empty: dict[str, Any] = {"ranks": [], "where": "", "values": {}}
        result = {"check": self.at, "status": "fail", "seen": seen, "remedy": self.remedy, "mend": self.remedy}
        self.findings.append({**result, **empty})

    def update(self, message: dict[str, Any]) -> None:
        """With one line of the checking process."""
        if "begins" in message:
            self.at, self.remedy, self.limit_s = message["begins"], message["remedy"], message["limit_s"]
        elif "finding" in message:
            self.findings.append(message["finding"])
        else:
            self.size, self.root = message["size"], tuple(message["root"])


def examine(job: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Runs every check, prints the results on the first rank, and returns the exit code.

    Raises `UserError` for a wrong job file.
    """
    launched, began_s = JobEnvironment.current(), monotonic()
    rank = launched.rank or 0
    if job is None and overrides:
        raise _joint(UserError(f"--set {overrides[0]} without CONFIG", "Name the job file whose key it overrides."))
    try:
        if job is not None:
            config = load(job, overrides).config
            expanded(config.run.root), expanded(config.data.file or "")  # the checks use these paths
    except UserError as error:
        raise _joint(error) from None
    examination = Examination(size=launched.size or 1)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        fault = _run_checks(job, overrides, examination, rank)
    except _Terminated:
        if rank:  # the root has printed the result, or is printing it
            return 1
        fault = "the launcher ended the job during this check, because a rank failed; that rank names the cause"
    if rank:
        return _report_to_root(fault, examination, rank)
    if fault:
        examination.fail(fault)
    _print(examination, monotonic() - began_s, as_json)
    return int(examination.failed)


def _joint(error: UserError) -> UserError:
    """Every rank reads the same job file."""
    error.joint = True
    return error


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


# ---------------------------------------------------------------------------------------- the checking process


def _run_checks(job: Path | None, overrides: tuple[str, ...], examination: Examination, rank: int) -> str | None:
    """Starts the checking process and reads its messages until it ends. Returns how it failed, if it did."""
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    token = secrets.token_hex()
    # Other ranks report faults over TCP, because MPI may be what died.
    notices = socket.create_server(("", 0), backlog=64) if rank == 0 and examination.size > 1 else None
    port = notices.getsockname()[1] if notices else 0
    # -P: do not import from the current folder, as hpc-train itself does not.
    begin = [sys.executable, "-P", "-m", "hpc_train.doctor", str(theirs)]
    words = [*begin, f"{port}:{token}", str(job or ""), *overrides]
    # stdout goes to stderr: what libraries print must not get into the table. PMI needs its inherited descriptors.
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), close_fds=False)
    os.close(theirs)
    try:
        return _read_messages(ours, notices, token, examination, rank) or _ended(child, examination, rank)
    finally:
        child.kill()
        os.close(ours)
        if notices:
            notices.close()


def _read_messages(
    pipe: int, notices: socket.socket | None, token: str, examination: Examination, rank: int
) -> str | None:
    """Reads until the checking process closes its pipe. Returns the fault if a check or a rank stopped it before."""
    grace_s = _ROOT_S if rank else _GRACE_S
    rest, until_s = b"", monotonic() + examination.limit_s + grace_s
    with selectors.DefaultSelector() as selector:
        for source in (pipe, notices):
            if source is not None:
                selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(max(0.0, until_s - monotonic()))]
            if not ready:
                return f"no end within {examination.limit_s:g} s: a rank or the network between ranks hangs"
            if notices and notices in ready and (notice := _accept(notices, token)):
                examination.at, examination.remedy = notice["at"], notice["remedy"]
                return str(notice["fault"])
            if pipe not in ready:
                continue
            data = os.read(pipe, 1 << 16)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                examination.update(json.loads(line))
            until_s = monotonic() + examination.limit_s + grace_s


def _ended(child: "subprocess.Popen[bytes]", examination: Examination, rank: int) -> str | None:
    try:
        code = child.wait(_ROOT_S)
    except subprocess.TimeoutExpired:
        return "the checking process does not end"
    where = f"rank {rank} on {socket.gethostname()}"
    if code < 0:
        return f"{where} died of {died_of(-code)}"
    return f"{where} ended with exit code {code}" if code and not examination.failed else None


def _accept(notices: socket.socket, token: str) -> dict[str, Any] | None:
    """The message of a rank that failed; None for any other connection."""
    link, _ = notices.accept()
    with link, suppress(OSError, ValueError):
        link.settimeout(_GRACE_S)
        message = json.loads(link.makefile().readline(1 << 16))
        if isinstance(message, dict) and message.get("token") == token:
            return message
    return None


def _report_to_root(fault: str | None, examination: Examination, rank: int) -> int:
    """Sends the fault of this rank to the root, and gives it time to print the table."""
    if fault is None:
        return 0
    message = {"fault": fault, "at": examination.at, "remedy": examination.remedy, "token": examination.root[2]}
    try:
        with socket.create_connection((examination.root[0], examination.root[1]), timeout=_GRACE_S) as link:
            link.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # MPI had not started, or a firewall blocks
        click.echo(f"hpc-train doctor: rank {rank} on {socket.gethostname()}, {examination.at}: {fault}", err=True)
    sleep(examination.limit_s + _GRACE_S)  # when one rank ends with an error, the launcher ends all of them
    return 1


# ---------------------------------------------------------------------------------------- results


def _print(examination: Examination, seconds: float, as_json: bool) -> None:
    worst = "fail" if examination.failed else "warn" if _count(examination, "warn") else "ok"
    if as_json:
        facts = {"schema": SCHEMA, "status": worst, "ranks": examination.size, "seconds": round(seconds, 2)}
        click.echo(json.dumps({**facts, "checks": examination.findings}, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    from hpc_train.core.terminal import open_console

    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in examination.findings:
        status, where = finding["status"], f" ({finding['where']})" * bool(finding["where"])
        what = Text(finding["seen"] + where)
        if finding["remedy"] and status in ("warn", "fail"):
            what.append(f"\n→ {finding['remedy']}", style="bold")
        table.add_row(Text(status, _COLORS[status]), Text(finding["check"], no_wrap=True), what)
    open_console(highlight=False).print(table)
    click.echo(_summary(examination, seconds))


def _summary(examination: Examination, seconds: float) -> str:
    counts = ", ".join(f"{number} {status}" for status in _COLORS if (number := _count(examination, status)))
    hint = ". To check what ranks do together: mpirun -n 2 hpc-train doctor" * (examination.size == 1)
    return f"{plural(examination.size, 'rank')}, {seconds:.1f} s: {counts}{hint}"


def _count(examination: Examination, status: str) -> int:
    return sum(finding["status"] == status for finding in examination.findings)

"""`hpc-train doctor`: what works on this machine and what does not, found by doing it.

The checks run in a process of their own (`train/doctor/`), one beside each rank's: this one waits, so that a check that
hangs or crashes, in MPI or in a file system, ends in a table that names it.
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
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import expanded

SCHEMA = 1
_START_S = 600.0  # Python's own start: a thousand ranks on one file server take minutes
_GRACE_S = 3.0  # of the process that checks, which names ranks that do not answer, before it is ended
_LONGER_S = 60.0  # that others wait for the root, which has the last word
_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red", "n/a": "dim"}


class _Terminated(Exception):
    """The launcher ends the job."""


@dataclass
class Examined:
    """What is known so far. `at`: the check under way; `mend`: of that one, should it not end."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    size: int = 1
    at: str = "start"
    mend: str = ""
    limit_s: float = _START_S
    root: tuple[str, int, str] = ("", 0, "")  # where the first rank is told of faults: host, port, token

    @property
    def failed(self) -> bool:
        return any(finding["status"] == "fail" for finding in self.findings)

    def fail(self, seen: str) -> None:
        empty: dict[str, Any] = {"ranks": [], "where": "", "values": {}}
        self.findings.append({"check": self.at, "status": "fail", "seen": seen, "mend": self.mend, **empty})

    def hear(self, told: dict[str, Any]) -> None:
        """A line of the process that checks."""
        if "begins" in told:
            self.at, self.mend, self.limit_s = told["begins"], told["mend"], told["limit_s"]
        elif "finding" in told:
            self.findings.append(told["finding"])
        else:
            self.size, self.root = told["size"], tuple(told["root"])


def examine(job: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Makes every check, prints what came of them on the first rank, and returns the exit code.

    Raises `UserError` for a job file that is none.
    """
    launched, began_s = JobEnvironment.current(), monotonic()
    rank = launched.rank or 0
    if job is None and overrides:
        raise _joint(UserError(f"--set {overrides[0]}, and no CONFIG", "Name the job file whose key it is."))
    try:
        if job is not None:
            config = load(job, overrides).config
            expanded(config.run.root), expanded(config.data.file or "")  # the checks look at these
    except UserError as error:
        raise _joint(error) from None
    examined = Examined(size=launched.size or 1)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        fault = _follow(job, overrides, examined, rank)
    except _Terminated:
        if rank:  # the rank that prints has said what there was to say, or says it now
            return 1
        fault = "the launcher ended the job during this check: a rank failed, which says so itself"
    if rank:
        return _pass_on(fault, examined, rank)
    if fault:
        examined.fail(fault)
    _print(examined, monotonic() - began_s, as_json)
    return int(examined.failed)


def _joint(error: UserError) -> UserError:
    """Every rank reads the same job file."""
    error.joint = True
    return error


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


# ---------------------------------------------------------------------------------------- the process that checks


def _follow(job: Path | None, overrides: tuple[str, ...], examined: Examined, rank: int) -> str | None:
    """Starts it and hears what it says until it ends; how it failed, if it did."""
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    token = secrets.token_hex()
    # What other ranks have to say of theirs comes over TCP: their MPI may be what died.
    notices = socket.create_server(("", 0), backlog=64) if rank == 0 and examined.size > 1 else None
    port = notices.getsockname()[1] if notices else 0
    # -P: what lies in the current folder is not imported, as by hpc-train itself.
    begin = [sys.executable, "-P", "-m", "hpc_train.doctor", str(theirs)]
    words = [*begin, f"{port}:{token}", str(job or ""), *overrides]
    # What libraries say to standard output must not get into the table; handles that PMI left open are passed on.
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), close_fds=False)
    os.close(theirs)
    try:
        return _hear(ours, notices, token, examined, rank) or _ended(child, examined, rank)
    finally:
        child.kill()
        os.close(ours)
        if notices:
            notices.close()


def _hear(pipe: int, notices: socket.socket | None, token: str, examined: Examined, rank: int) -> str | None:
    """Until the process that checks has said all; why not longer, if it stops before."""
    grace_s = _LONGER_S if rank else _GRACE_S
    rest, until_s = b"", monotonic() + examined.limit_s + grace_s
    with selectors.DefaultSelector() as selector:
        for source in (pipe, notices):
            if source is not None:
                selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(max(0.0, until_s - monotonic()))]
            if not ready:
                return f"no end within {examined.limit_s:g} s: a rank hangs in it, or the way between ranks does"
            if notices and notices in ready and (notice := _accept(notices, token)):
                examined.at, examined.mend = notice["at"], notice["mend"]
                return str(notice["fault"])
            if pipe not in ready:
                continue
            data = os.read(pipe, 1 << 16)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                examined.hear(json.loads(line))
            until_s = monotonic() + examined.limit_s + grace_s


def _ended(child: "subprocess.Popen[bytes]", examined: Examined, rank: int) -> str | None:
    try:
        code = child.wait(_LONGER_S)
    except subprocess.TimeoutExpired:
        return "the process that checks does not end"
    where = f"rank {rank} on {socket.gethostname()}"
    if code < 0:
        return f"{where} died of {died_of(-code)}"
    return f"{where} ended with exit code {code}" if code and not examined.failed else None


def _accept(notices: socket.socket, token: str) -> dict[str, Any] | None:
    """What a rank that failed says; None for whoever else calls."""
    link, _ = notices.accept()
    with link, suppress(OSError, ValueError):
        link.settimeout(_GRACE_S)
        told = json.loads(link.makefile().readline(1 << 16))
        if isinstance(told, dict) and told.get("token") == token:
            return told
    return None


def _pass_on(fault: str | None, examined: Examined, rank: int) -> int:
    """The fault of a rank that does not print the table, to the one that does; and time for that to be printed."""
    if fault is None:
        return 0
    told = {"fault": fault, "at": examined.at, "mend": examined.mend, "token": examined.root[2]}
    try:
        with socket.create_connection((examined.root[0], examined.root[1]), timeout=_GRACE_S) as link:
            link.sendall(json.dumps(told).encode() + b"\n")
    except OSError:  # MPI had not started, or a firewall
        click.echo(f"hpc-train doctor: rank {rank} on {socket.gethostname()}, {examined.at}: {fault}", err=True)
    sleep(examined.limit_s + _GRACE_S)  # a launcher ends all ranks when one ends so
    return 1


# ---------------------------------------------------------------------------------------- what came of it


def _print(examined: Examined, seconds: float, as_json: bool) -> None:
    worst = "fail" if examined.failed else "warn" if _count(examined, "warn") else "ok"
    if as_json:
        facts = {"schema": SCHEMA, "status": worst, "ranks": examined.size, "seconds": round(seconds, 2)}
        click.echo(json.dumps({**facts, "checks": examined.findings}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in examined.findings:
        status, where = finding["status"], f" ({finding['where']})" * bool(finding["where"])
        what = Text(finding["seen"] + where)
        if finding["mend"] and status in ("warn", "fail"):
            what.append(f"\n→ {finding['mend']}", style="bold")
        table.add_row(Text(status, _COLORS[status]), Text(finding["check"], no_wrap=True), what)
    Console(highlight=False).print(table)
    click.echo(_summary(examined, seconds))


def _summary(examined: Examined, seconds: float) -> str:
    ranks = f"{examined.size} rank{'s' * (examined.size != 1)}"
    counts = ", ".join(f"{number} {status}" for status in _COLORS if (number := _count(examined, status)))
    alone = ". What ranks do together: mpirun -n 2 hpc-train doctor" * (examined.size == 1)
    return f"{ranks}, {seconds:.1f} s: {counts}{alone}"


def _count(examined: Examined, status: str) -> int:
    return sum(finding["status"] == status for finding in examined.findings)

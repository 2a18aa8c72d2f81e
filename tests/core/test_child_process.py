"""What a child process does that a library may crash in: its end is the parent's, told in one message."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

from hpc_train.core import child_process
from hpc_train.core.errors import UserError
from tests import jobs


def test_a_crash_names_the_file_at_hand() -> None:
    def crash(notes: child_process.Notes) -> None:
        notes.at("whole.h5")
        notes.at("ä.h5")
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(UserError, match=r"^ä.h5 made HDF5 crash: signal 11 \(Segmentation fault\)"):
        child_process.begin(crash).wait()


def test_what_does_not_crash_is_nobodys() -> None:
    def fail(notes: child_process.Notes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does to all processes of a job
        raise ValueError

    assert child_process.begin(fail).wait() == 0


def test_the_first_look_loads_neither_torch_nor_mpi() -> None:
    """It costs a training's start nothing: all that time the job loads torch."""
    code = "import sys, hpc_train.datasets.inspect.structure as s; print({'torch', 'horovod'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited_for(condition: Callable[[], object], patience_s: float = 30) -> bool:
    until = monotonic() + patience_s
    while not (found := condition()) and monotonic() < until:
        sleep(0.005)
    return bool(found)


@pytest.mark.parametrize("words", [("data", "check"), ("data", "info")], ids=" ".join)
@pytest.mark.parametrize(
    "whom, number, code, says",
    [
        ("child", signal.SIGSEGV, 2, "signal 11 (Segmentation fault)"),
        ("child", signal.SIGKILL, 2, "killed by signal 9 (Killed)"),
        ("parent", signal.SIGINT, 130, "hpc-train: interrupted"),
        ("both", signal.SIGINT, 130, "hpc-train: interrupted"),
        ("parent", signal.SIGTERM, 143, ""),
        ("parent", signal.SIGKILL, -9, ""),
    ],
)
def test_signals(
    words: tuple[str, str], whom: str, number: int, code: int, says: str, digits: Path, tmp_path: Path
) -> None:
    parent = subprocess.Popen(
        jobs.command(0, *words, digits),
        env=jobs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waited_for(lambda: children(parent.pid))
    (child,) = children(parent.pid)
    sleep(0.2)  # it has ended nothing yet: it loads torch
    for pid in {"child": [child], "parent": [parent.pid], "both": [parent.pid, child]}[whom]:
        os.kill(pid, number)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == code and (says in err if code == 2 else err.strip() == says), err
    assert waited_for(lambda: not is_there(child), 5)
    assert err.count("hpc-train: ") == (code in (2, 130)) and "Traceback" not in err


def test_exit_codes_pass_through(digits: Path, tmp_path: Path) -> None:
    content = bytearray(digits.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.h5").write_bytes(content)
    (tmp_path / "none.h5").write_bytes(b"none")
    os.mkfifo(tmp_path / "fifo.h5")
    for name, code in ((digits, 0), ("changed.h5", 1), ("none.h5", 1), ("fifo.h5", 2), ("nothing.h5", 2)):
        done = jobs.run(0, "data", "check", name, cwd=tmp_path, timeout_s=60)
        assert done.code == code, done
        assert done.err.count("hpc-train: ") == (code == 2) and ("Faults:" in done.out) == (code == 1)


def test_nobody_is_killed_in_the_place_of_a_child_that_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    child = child_process.begin(lambda notes: None)
    assert child.wait() == 0
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    child.end()
    assert not killed, "its number may be another process's by now"

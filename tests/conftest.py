import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpc_train.analysis.guard import RAISE
from tests import jobs

_FAULTS = pytest.StashKey[list[tuple[str, str, str, str]]]()
FaultTable = Callable[..., None]


def pytest_configure() -> None:
    # A shell starts what it puts in the background with Ctrl-C switched off, and all that is started from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[RAISE] = "1"  # also of what tests start: no fault of a report's section may hide behind a sentence


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """A training in this process leaves SIGUSR2 ignored, and all that is started from here would inherit that."""
    yield
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist-5k in HDF5, prepared once by two ranks."""
    folder = tmp_path_factory.mktemp("data")
    done = jobs.run(2, "prepare", "mnist-5k", folder / "mnist-5k.h5", cwd=folder)
    assert done.code == 0, done.err
    return folder / "mnist-5k.h5"


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk_of("8m"): a new file system of that size, for root only."""
    with ExitStack() as mounted:

        def mount(size: str) -> Path:
            if os.geteuid():
                pytest.skip("a small disk can be mounted by root only")
            disk = tmp_path / f"disk-{size}"
            disk.mkdir()
            line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
            if subprocess.run(line, capture_output=True, timeout=20).returncode:
                pytest.skip("this root may not mount a tmpfs")
            mounted.callback(subprocess.run, ["umount", str(disk)], check=True, timeout=20)
            return disk

        yield mount


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> FaultTable:
    """survived(fault, what_happened, recover_s, steps_lost): a line of the table that `make test-faults` prints."""
    rows = request.config.stash.setdefault(_FAULTS, [])

    def add(fault: str, what: str, recover_s: float | None = None, steps_lost: int | None = None) -> None:
        seconds = "" if recover_s is None else f"{recover_s:.1f}"
        rows.append((fault, what, seconds, "" if steps_lost is None else str(steps_lost)))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_FAULTS, [])
    if rows:
        terminalreporter.section("faults")
        header = ("fault", "what happens", "seconds to recover or end", "steps lost")
        for cells in (header, ("---",) * len(header), *rows):
            terminalreporter.write_line(f"| {' | '.join(cells)} |")

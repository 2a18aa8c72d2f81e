import os
import resource
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from hpc_train.analysis.guard import RAISE
from tests import jobs

# Before torch is loaded, here and in all that tests start: OpenMP's threads wait for each other by spinning. Where two
# tests share two cores, a training of 300 steps took 11 s of CPU; it takes 2.4 s without.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

_FAULTS = pytest.StashKey[list[tuple[str, str, str, str]]]()
FaultTable = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu", action="store_true", help="print the CPU seconds of each test file, child processes included"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[RAISE] = "1"  # inherited by the commands: an error in one section of a report must fail the test
    # Containers switch bytecode off, and each start would compile a hundred modules: 0.2 s of CPU.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    settings.register_profile("shared-cores", deadline=None)  # the time of one example depends on what else runs
    settings.load_profile("shared-cores")
    if config.getoption("--cpu"):
        config.pluginmanager.register(CpuSeconds(), "cpu-seconds")


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """A training in this process leaves SIGUSR2 ignored, which every process that a later test starts would inherit."""
    yield
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist-5k in HDF5, prepared by two ranks."""
    folder = tmp_path_factory.mktemp("data")
    done = jobs.run(2, "prepare", "mnist-5k", folder / "mnist-5k.h5", cwd=folder)
    assert done.code == 0, done.err
    return folder / "mnist-5k.h5"


@pytest.fixture(scope="session")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of an MPICH that pip installed."""
    prefix = tmp_path_factory.mktemp("mpich")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", prefix, "mpich>=4"]
    subprocess.run(pip, check=True, timeout=200)
    return prefix


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
    """survived(fault, what_happened, recover_s, steps_lost) adds a line to the table that `make test-faults` prints."""
    rows = request.config.stash.setdefault(_FAULTS, [])

    def add(fault: str, what: str, recover_s: float | None = None, steps_lost: int | None = None) -> None:
        seconds = "" if recover_s is None else f"{recover_s:.1f}"
        rows.append((fault, what, seconds, "" if steps_lost is None else str(steps_lost)))

    return add


class CpuSeconds:
    """Prints the CPU seconds of each test file, which depend less on the load than wall time does."""

    def __init__(self) -> None:
        self._last_s = _cpu_s()
        self._of_files: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        before_s, self._last_s = self._last_s, _cpu_s()
        report.cpu_s = self._last_s - before_s  # xdist carries it to the process that prints
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._of_files[report.nodeid.partition("::")[0]] += report.cpu_s  # type: ignore[attr-defined]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"{sum(self._of_files.values()):.0f} CPU seconds")
        for name, seconds in sorted(self._of_files.items(), key=lambda each: -each[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")


def _cpu_s() -> float:
    """CPU seconds of this process, of its ended children and of warm starts."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    warm_s = jobs.warm_server().cpu_s() if jobs.warm_server.cache_info().currsize else 0.0
    return warm_s + sum(each.ru_utime + each.ru_stime for each in usage)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_FAULTS, [])
    if rows:
        terminalreporter.section("faults")
        header = ("fault", "what happens", "seconds to recover or end", "steps lost")
        for cells in (header, ("---",) * len(header), *rows):
            terminalreporter.write_line(f"| {' | '.join(cells)} |")

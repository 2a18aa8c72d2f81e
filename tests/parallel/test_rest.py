"""What nodes draw at rest is measured while ranks rest: Horovod's thread, once started, never does."""

import csv
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from hpc_train.train.comm.context import Context
from hpc_train.train.energy import node_energy
from hpc_train.train.energy.sensors.choose import choose_meters
from tests import sensor_trees as trees
from tests.parallel.test_train import run


def test_one_rank_a_node_measures_rest_and_loop(
    context: Context, shared_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packages of 50 W; the ranks that read for nobody wait without spinning."""
    own_cpu_s = []
    monkeypatch.setattr(node_energy, "choose_meters", lambda: choose_meters(shared_path / "root"))

    def rests(seconds: float) -> None:
        began_s = time.process_time()
        time.sleep(seconds)
        own_cpu_s.append(time.process_time() - began_s)

    monkeypatch.setattr(node_energy, "sleep", rests)
    keys = {"train__steps": 20, "energy__idle_s": 0.5, "energy__sample_hz": 20}
    with trees.drawing(shared_path / "root", 50) if context.world.is_root else nullcontext():
        context.barrier()
        path = run(context, shared_path / "runs", digits, "softmax-mnist.toml", **keys)
    assert sum(own_cpu_s) < 0.25, "of a second and a half"
    facts = json.loads(path.meta.read_text())["energy"]
    assert facts.keys() == {
        *("assumption", "meters", "unreadable", "shared", "foreign_cores", "num_cpus", "epoch_s", "idle_w"),
        "idle_quality",
    }
    (host,) = facts["meters"]
    assert facts["idle_quality"] == "measured" and facts["shared"].keys() == facts["foreign_cores"].keys() == {host}
    assert facts["num_cpus"] == {host: os.cpu_count()}
    assert facts["idle_w"][host] == {domain: pytest.approx(50, rel=0.6) for domain in ("package-0", "package-1")}
    (file,) = path.energy_dir.iterdir()
    last = list(csv.DictReader(file.open()))[-2:]
    assert [row["domain"] for row in last] == ["package-0", "package-1"]
    assert all(float(row["joules"]) > 0 and row["quality"] == "measured" for row in last)
    assert json.loads(path.summary.read_text())["energy_source"] == "RAPL"

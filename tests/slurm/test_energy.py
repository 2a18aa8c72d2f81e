"""The run records Slurm's count of joules. The processors are simulated (meter.py), the rest is real."""

import csv
import json
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.meter import WATTS
from tests.slurm.slurm import Cluster, until

SLOW = "6mbit"  # an all-reduce of 31 KB then takes some 50 ms


@pytest.mark.skipif(not Path("/dev/cpu").is_dir(), reason="no /dev/cpu here, in which Slurm looks for meters")
def test_slurms_count_of_a_step_stands_for_all_its_nodes(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    cluster.shape(SLOW)
    config = jobs.CONFIGS / "softmax-mnist.toml"
    keys = {"data__file": digits, "train__steps": 150, "reduce__strategy": "mpi", "run__root": tmp_path / "runs"}
    words = [jobs.ROOT / "slurm/train.sbatch", config, *jobs.settings(**keys)]
    job = cluster.sbatch("--nodes=2", "--exclusive", "--acctg-freq=energy=1", *words, cwd=tmp_path)
    cluster.ends(job, "COMPLETED", timeout_s=150)
    (meta,) = tmp_path.glob("runs/*/*/meta.json")
    facts = json.loads(meta.read_text())["energy"]
    root, other = json.loads(meta.read_text())["hosts"]
    source = "Slurm ConsumedEnergyRaw (rapl)"
    assert facts["meters"] == {root: [{"domain": "packages", "source": source, "quality": "measured"}], other: []}
    assert facts["shared"].keys() == {root, other} and facts["assumption"] is None
    assert [path.name for path in meta.parent.glob("energy/*")] == [f"{root}.csv"]
    rows = list(csv.DictReader((meta.parent / f"energy/{root}.csv").open()))
    seconds = float(rows[-1]["time_s"]) - float(rows[0]["time_s"])
    assert seconds > 5 and float(rows[-1]["joules"]) == pytest.approx(2 * WATTS * seconds, rel=0.25)
    summary = json.loads((meta.parent / "summary.json").read_text())
    assert summary["energy_source"].startswith(source)

    def accounted_j() -> float:
        said = cluster.on("head", "sacct", "-n", "-P", "-o", "ConsumedEnergyRaw", "-j", f"{job}.0").split()
        return float(said[0]) if said else 0.0

    until(lambda: accounted_j() > 0, "the step's joules in the accounting", 30)
    assert float(rows[-1]["joules"]) < accounted_j(), "which also counts what was before the loop and after it"

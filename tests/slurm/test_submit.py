"""Jobs that hpc-train submits to a real Slurm: they run, are requeued after an interruption, and stay cancelled."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.slurm import Cluster, until

LONG_S = 150
SLOW = "6mbit"  # an all-reduce of 31 KB then takes some 50 ms, which leaves time to interrupt a short training
SITE = """
ranks_per_node = 2
time = "10"
signal_s = 60
launcher = "{launcher}"
bind = {bind}
energy = "slurm"
sbatch = ["--exclusive"]
[environment]
OMPI_ALLOW_RUN_AS_ROOT = "1"
OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = "1"
"""
BIND = {"srun": "[]", "mpirun": '["--oversubscribe", "--bind-to", "none"]'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder to submit from. Its name needs quoting."""
    folder = tmp_path / "a 'place' of $HOME"
    folder.mkdir()
    for launcher, bind in BIND.items():
        (folder / f"{launcher}.toml").write_text(SITE.format(launcher=launcher, bind=bind))
    return folder


def settings(digits: Path, **keys: object) -> list[str]:
    return jobs.settings(data__file=digits, reduce__strategy="mpi", train__log_every=10, **keys)


def submit(cluster: Cluster, folder: Path, launcher: str, *words: str) -> tuple[int, Path]:
    """Submits a softmax training on 2 nodes with 2 ranks each, over slow links. Returns (job id, run directory)."""
    cluster.shape(SLOW)
    config = jobs.CONFIGS / "softmax-mnist.toml"
    own = ["submit", config, "--nodes", 2, "--site", f"./{launcher}.toml", "--json", *words]
    told = json.loads(cluster.on("head", jobs.HPC_TRAIN, *own, cwd=folder, timeout_s=60))
    cluster.submitted.append(int(told["job"]))
    return int(told["job"]), folder / told["run"]


def trains(cluster: Cluster, job: int, run: Path) -> None:
    """Waits until the job trains."""
    until(lambda: run.joinpath("metrics.csv").exists(), f"job {job} trains", LONG_S)


def attempts(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "meta.json").read_text())["attempts"]


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job_asked_to_stop_comes_back_and_finishes_the_same_run(
    cluster: Cluster, digits: Path, folder: Path, launcher: str
) -> None:
    job, run = submit(cluster, folder, launcher, *settings(digits, train__steps=300))
    trains(cluster, job, run)
    # As --signal does: srun signals the ranks, mpirun needs the batch shell.
    whom = [] if launcher == "srun" else ["--batch"]
    cluster.on("head", "scancel", *whom, "--signal=USR2", job)
    until(lambda: cluster.show(job).get("Restarts") == "1", f"job {job} starts again", LONG_S)
    cluster.shape(None)  # not before: mpirun takes its time to pass a signal on, and a fast training ends meanwhile
    cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=LONG_S)
    assert cluster.state(job) == "COMPLETED", cluster.output(job)
    said = (run / f"job-{job}.out").read_text()
    assert "stopped with a checkpoint, requeued" in said and ", start 1, " in said
    assert len(attempts(run)) == 2
    steps = [int(line.split(",")[0]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(300)), "no step is lost or trained twice"
    assert [path.parent for path in folder.glob("runs/*/*/meta.json")] == [run]


@pytest.mark.thorough
def test_a_cancelled_job_keeps_its_work_and_does_not_come_back(cluster: Cluster, digits: Path, folder: Path) -> None:
    job, run = submit(cluster, folder, "srun", *settings(digits, train__steps=1000000, checkpoint__every_steps=20))
    until(lambda: list(run.glob("checkpoints/step-*.h5")), "a checkpoint", LONG_S)
    cluster.shape(None)
    cluster.cancel(job)
    until(lambda: cluster.accounted(job) == ["CANCELLED"], "CANCELLED in the accounting", LONG_S)
    assert cluster.show(job)["Restarts"] == "0"
    assert "requeued" not in (run / f"job-{job}.out").read_text()
    assert list(run.glob("checkpoints/step-*.h5"))


def test_the_same_script_again_continues_the_same_run(cluster: Cluster, digits: Path, folder: Path) -> None:
    """The script contains all options, so the job is the same from any shell, whatever ended it before."""
    job, run = submit(cluster, folder, "srun", *settings(digits, train__steps=300, checkpoint__every_steps=20))
    trains(cluster, job, run)
    until(lambda: list(run.glob("checkpoints/step-*.h5")), "a checkpoint", LONG_S)
    cluster.on("head", "scancel", "--signal=KILL", job)
    cluster.shape(None)
    cluster.wait(job, "FAILED", "CANCELLED", timeout_s=LONG_S)
    again = cluster.sbatch("train.sbatch", cwd=run)
    assert cluster.wait(again, "COMPLETED", "FAILED", timeout_s=LONG_S) == "COMPLETED", cluster.output(again)
    assert len(attempts(run)) == 2
    assert (run / f"job-{again}.out").exists()


def test_a_study_runs_one_size_after_the_other_and_reports(cluster: Cluster, digits: Path, folder: Path) -> None:
    """The last size exceeds the global batch and fails. A second call repeats nothing that is done."""
    short = settings(digits, train__steps=30, train__global_batch=2)
    words = ["scale", jobs.CONFIGS / "softmax-mnist.toml", "--site", "./srun.toml", *short]
    said = cluster.on("head", jobs.HPC_TRAIN, *words, "--ranks", "1,2,4", cwd=folder, timeout_s=60)
    ids = [int(line.split()[1].rstrip(":")) for line in said.splitlines() if line.startswith("Job ")]
    cluster.submitted += ids
    assert len(ids) == 4
    again = cluster.on("head", jobs.HPC_TRAIN, *words, "--ranks", "1,2,4", cwd=folder, timeout_s=60)
    assert "0 to do" in again, "what waits in the queue is not submitted again"
    cluster.submitted.append(int(again.split("Job ")[1].split()[0]))
    assert cluster.wait(ids[-1], "COMPLETED", "FAILED", timeout_s=2 * LONG_S) == "COMPLETED", cluster.output(ids[-1])
    assert [cluster.state(job) for job in ids] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    shown = [cluster.show(job) for job in ids]
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(shown))
    study = folder / "runs/scale-softmax-mnist"
    assert len((study / "report/scaling.csv").read_text().splitlines()) == 3
    assert "speedup" in (study / f"job-{ids[-1]}.out").read_text()


def test_ctrl_c_after_slurm_has_accepted_keeps_the_job_and_its_directory(
    cluster: Cluster, digits: Path, folder: Path
) -> None:
    """sbatch submits the job and hangs, as if the controller's reply were lost."""
    wrapper = folder / "bin/sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/bash\n{shutil.which("sbatch")} "$@"\nkill -INT $PPID\nsleep 600\n')
    wrapper.chmod(0o755)
    (folder / "held.toml").write_text('sbatch = ["--hold"]\n')
    words = ["submit", jobs.CONFIGS / "softmax-mnist.toml", "--nodes", 1, "--site", "./held.toml", *settings(digits)]
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    cluster.on("head", jobs.HPC_TRAIN, *words, cwd=folder, timeout_s=60, check=False, PATH=path)
    (config,) = folder.glob("runs/*/*/config.toml")
    job, place = cluster.on("head", "squeue", "--noheader", "--format=%A %Z").strip().split(" ", 1)
    cluster.submitted.append(int(job))
    assert Path(place) == config.parent, "the queue and the run directory belong together"
    with pytest.raises(RuntimeError, match=f"is in the queue, or running, as job {job}"):
        cluster.on("head", jobs.HPC_TRAIN, *words, cwd=folder, timeout_s=60)
    cluster.cancel(int(job))
    again = json.loads(cluster.on("head", jobs.HPC_TRAIN, *words, "--json", cwd=folder, timeout_s=60))
    assert folder / again["run"] == config.parent
    cluster.cancel(int(again["job"]))

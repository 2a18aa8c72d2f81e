"""Output that cannot be written: training continues, meta.json records it, and the exit code is right."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import jobs
from tests.conftest import FaultTable


def shell(job: list[str], redirection: str, cwd: Path) -> tuple[int, str]:
    """(exit code, stderr) of a job for which a shell redirects the output of each rank.

    The output of mpirun itself is not redirected: Open MPI's mpirun ends the job when it gets SIGPIPE.
    """
    launcher, rank = job[: job.index(str(jobs.HPC_TRAIN))], job[job.index(str(jobs.HPC_TRAIN)) :]
    done = subprocess.run(
        [*launcher, "bash", "-c", f"{shlex.join(rank)} {redirection}; exit ${{PIPESTATUS[0]}}"],
        cwd=cwd,
        env=jobs.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def words(digits: Path, root: Path, ranks: int, *more: str) -> list[str]:
    keys = jobs.settings(
        data__file=digits,
        train__steps=300,
        train__log_every=1,
        train__threads=1,
        run__root=root,
        reduce__strategy="mpi" if ranks else "local",
    )
    return jobs.command(ranks, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, *more)


@pytest.mark.parametrize(
    ("ranks", "redirection", "progress", "fault"),
    [
        (0, "| head -1", "plain", "Broken pipe"),
        (0, ">/dev/full", "bar", "No space left on device"),
        (0, ">&-", "plain", "it was closed"),
        (0, "2>/dev/full >/dev/full", "plain", "No space left on device"),
        (2, "| head -1", "bar", "Broken pipe"),
        (2, ">/dev/full", "plain", "No space left on device"),
    ],
)
def test_a_training_outlasts_its_output(
    ranks: int, redirection: str, progress: str, fault: str, tmp_path: Path, digits: Path, survived: FaultTable
) -> None:
    code, err = shell(words(digits, tmp_path, ranks, "--set", f"run.progress={progress}"), redirection, tmp_path)
    assert code == 0 and "Traceback" not in err and "Exception ignored" not in err, err
    (run,) = tmp_path.glob("softmax-mnist/*")
    meta = json.loads((run / "meta.json").read_text())
    assert meta["outcome"] == "complete" and (run / "summary.json").exists()
    assert (run / "checkpoints/step-00000300.h5").exists()
    assert meta["output_lost"]["0"]["stdout"] == fault
    survived(
        f"output {redirection.replace('|', 'into')}, {ranks or 1} ranks",
        "dropped, said in meta.json; trains to its end, exit code 0",
    )


def test_a_user_error_keeps_its_exit_code_without_output(tmp_path: Path, digits: Path) -> None:
    assert shell(words(digits, tmp_path, 0, "--set", "train.global_batch=5000"), "2>/dev/full >&-", tmp_path)[0] == 2

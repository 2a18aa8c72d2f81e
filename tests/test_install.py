"""The plain install: wheels only, nothing compiled, no MPI, and everything that analysis needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs

RECORDED = Path(__file__).with_name("runs")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hpc-train command of `pip install .` in a new environment."""
    folder = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    pip = [folder / "venv/bin/pip", "install", "--quiet", "--only-binary=:all:", str(jobs.ROOT)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder / "venv/bin/hpc-train"


def run(plain: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([plain, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_it_reports_without_mpi_or_torch(plain: Path, tmp_path: Path) -> None:
    installed = {path.name for path in plain.parents[1].glob("lib/python*/site-packages/*")}
    assert not installed & {"mpi4py", "torch", "horovod", "h5py"}
    done = run(plain, tmp_path, "report", RECORDED, "--output", tmp_path / "report", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["ranks"] for row in json.loads(done.stdout)["groups"][0]["rows"]] == [1, 2, 4]
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_it_carries_the_shipped_jobs_and_scripts(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path, "config", "show", "configs/softmax-mnist.toml")
    assert done.returncode == 0 and 'name = "softmax-mnist"' in done.stdout, done.stderr
    script = run(plain, tmp_path, "submit", "configs/softmax-mnist.toml", "--nodes", 2, "--dry-run")
    assert script.returncode == 0 and "#SBATCH --nodes=2" in script.stdout, script.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("train", "configs/softmax-mnist.toml"),
        ("prepare", "mnist-5k", "x.h5"),
        ("data", "check", "x.h5"),
        ("data", "info", "x.h5"),
        ("bench", "io"),
    ],
)
def test_what_needs_more_says_what_is_missing(plain: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(plain, tmp_path, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "[train]" in done.stderr

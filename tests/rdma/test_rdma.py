"""Training over InfiniBand verbs, with proof that gradients use them: `make test-rdma`, for root."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_train.core import rundir
from hpc_train.core.records import read_metrics
from tests import jobs
from tests.rdma import guests
from tests.rdma.capture import roce_bytes

pytestmark = pytest.mark.timeout(900)
STEPS = 4
JOB = f"""
name = "job"
[data]
file = "/shared/data.h5"
[task]
kind = "classification"
model = "mlp"
[train]
steps = {STEPS}
global_batch = 32
lr = 0.1
log_every = 1
warmup_steps = 0
[checkpoint]
keep = 0
[run]
root = "/shared/runs"
"""


@dataclass(frozen=True)
class Tried:
    """The result of a job on both guests. The counters are increments of the devices' counters; None: no device."""

    code: int
    said: str
    seconds: float
    sent_packets: list[int] | None  # by Soft-RoCE
    sent_bytes: list[int]  # by the network device, RoCE included


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guests' folder after they have done everything."""
    reason = guests.why_not()
    if reason:
        pytest.skip(f"no guests here: {reason}")
    boot, shared = jobs.ROOT / "runs/rdma-boot", tmp_path_factory.mktemp("shared")
    guests.make_boot(boot)
    prepared = jobs.run(0, "prepare", "mnist-5k", shared / "data.h5", cwd=shared)
    assert prepared.code == 0, prepared.err
    (shared / "job.toml").write_text(JOB)
    (shared / "venv.txt").write_text(sys.prefix)
    shutil.copy(Path(__file__).with_name("plan.sh"), shared)
    seconds = guests.run(boot, shared, timeout_s=840)
    print(f"both guests were done in {seconds:.0f} s")
    return shared


def tried(shared: Path, name: str) -> Tried:
    code, times, before, after = (shared / f"{name}.txt").read_text().splitlines()
    began, ended = map(float, times.split())
    rises = [int(end) - int(start) for start, end in zip(before.split(), after.split(), strict=True)]
    has_device = len(rises) == 4
    return Tried(
        int(code),
        (shared / f"{name}.log").read_text(),
        ended - began,
        rises[::2] if has_device else None,
        rises[1::2] if has_device else rises,
    )


def run_of(shared: Path, name: str) -> rundir.RunDir:
    (run,) = rundir.find([shared / "runs" / name])
    return run


def ring_bytes(run: rundir.RunDir) -> float:
    """The bytes that each of N ranks must send in all steps: 2 (N-1)/N of the gradients (Patarasu and Yuan, 2009)."""
    meta = json.loads(run.meta.read_text())
    assert meta["size"] == 2 and meta["hosts"] == ["n1", "n2"]
    return STEPS * 2 * (2 - 1) / 2 * 4 * meta["num_parameters"]


@pytest.mark.parametrize("strategy", ["horovod", "mpi"])
def test_gradients_travel_by_rdma(shared: Path, strategy: str) -> None:
    done = tried(shared, strategy)
    assert done.code == 0, done.said
    needed = ring_bytes(run_of(shared, strategy))
    moved = roce_bytes(shared / "wire.pcap")[strategy]
    assert min(moved["10.78.0.1"], moved["10.78.0.2"]) >= needed, (dict(moved), needed)
    assert done.sent_packets is not None
    assert min(done.sent_packets) >= needed / 1024, "the device counts packets of at most 1024 bytes of data"
    told = ", ".join(f"{moved[f'10.78.0.{number}'] / 1e6:.1f}" for number in (1, 2))
    print(f"{strategy}: {told} MB of data by RDMA, {needed / 1e6:.1f} needed; {done.seconds:.0f} s")


def test_tcp_moves_no_byte_by_rdma_and_trains_alike(shared: Path) -> None:
    done = tried(shared, "tcp")
    assert done.code == 0, done.said
    assert done.sent_packets == [0, 0] and not roce_bytes(shared / "wire.pcap")["tcp"]
    assert min(done.sent_bytes) >= ring_bytes(run_of(shared, "tcp"))
    losses = {name: read_metrics(run_of(shared, name).metrics)[1] for name in ("horovod", "mpi", "tcp")}
    assert len(losses["tcp"]) == STEPS
    assert losses["horovod"] == pytest.approx(losses["tcp"], rel=1e-5)
    assert losses["mpi"] == pytest.approx(losses["tcp"], rel=1e-5)


def test_without_the_device_the_job_ends_and_nothing_is_sent_another_way(shared: Path) -> None:
    done = tried(shared, "gone")
    assert done.code not in (0, 124, 137), done.said
    assert "the ranks cannot reach each other through MPI" in done.said
    assert max(done.sent_bytes) < 100_000, "mpirun's own words alone"
    assert not (shared / "runs/gone").exists()


def test_the_doctor_names_the_device_and_what_carried_the_sums(shared: Path) -> None:
    said = tried(shared, "doctor").said
    told, _ = json.JSONDecoder().raw_decode(said, said.index('{\n  "schema"'))
    found = {each["check"]: each for each in told["checks"]}
    assert told["ranks"] == 2 and "the sum is right" in found["all-reduce"]["seen"]  # slow: the guests are emulated
    transport = found["transport"]
    assert transport["status"] == "ok" and transport["seen"].startswith("RDMA (rxe0:1"), transport["seen"]
    assert "UCX" in transport["seen"] and "verbs" in transport["seen"]
    print(f"doctor: {transport['seen']}; {told['seconds']:.0f} s")

"""What `hpc-train doctor` makes of hardware that is not here: recorded /sys trees, and values that ranks would tell."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core.filesystem import stripe_count
from hpc_train.core.settings import Config, Data, Task, Train
from hpc_train.core.world import World
from hpc_train.doctor import (
    disk_space,
    hardware,
    job,
    memory,
    network,
    software,
    storage,
    supervisor,
    transport_counters,
)
from hpc_train.doctor.check import Answer, Finding, Subject, places, spans, time_text
from hpc_train.train.comm.context import Context
from hpc_train.train.optimize import Optimizer
from hpc_train.train.reduce.sharded_weights import whole_parameters
from hpc_train.train.tasks import open_task

MIB = 1 << 20


def ranks(*values: dict[str, Any], hosts: int = 1) -> list[Answer]:
    """One answer for each, spread over hosts c0, c1, ... in blocks."""
    each = len(values) // hosts
    return [Answer(rank, f"c{rank // each}", rank % each, told) for rank, told in enumerate(values)]


def record(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")


def subject(root: Path = Path("/"), config: Config | None = None, **environ: str) -> Subject:
    return Subject(Context(World()), config, environ, root)


def test_words() -> None:
    assert spans([5, 0, 1, 2]) == "0-2, 5"
    assert places(ranks({}, {}, {}, {}, hosts=2)) == "ranks 0-1 on c0, ranks 2-3 on c1"
    assert places(ranks(*[{}] * 6, hosts=6)).endswith("rank 3 on c3 and 2 more hosts")
    assert (time_text(3e-6), time_text(0.02), time_text(20)) == ("3 us", "20 ms", "20 s")


# ---------------------------------------------------------------------------------------- transport


def carried(tcp: float = 0, rdma: float = 0, local: float = 0, fabric: str = "", **more: Any) -> dict[str, Any]:
    told = {"name": "mlx5_0:1", "kind": fabric, "active": True, "rate": "100 Gb/sec"}
    return {
        "payload": 8 * MIB,
        "tcp": {"hsn0": int(tcp)} if tcp else {},
        "tcp_local": int(local),
        "rdma": {"mlx5_0:1": int(rdma)},
        "parts": ["pml ob1"],
        "devices": [],
        "adapters": [told] if fabric else [],
        **more,
    }


@pytest.mark.parametrize(
    "values, hosts, status, seen, remedy",
    [
        (carried(), 1, "ok", "shared memory (loaded: pml ob1)", ""),
        (carried(tcp=8 * MIB), 2, "ok", "TCP (hsn0: 8 MiB received by a rank)", ""),
        (
            carried(tcp=8 * MIB, fabric="InfiniBand"),
            2,
            "warn",
            "InfiniBand mlx5_0:1 (100 Gb/sec) is available",
            "pml=ucx",
        ),
        (carried(tcp=8 * MIB, fabric="RoCE"), 2, "warn", "RoCE mlx5_0:1", "UCX_NET_DEVICES=mlx5_0:1"),
        (carried(tcp=8 * MIB, fabric="Slingshot"), 2, "warn", "Slingshot", "cray-mpich"),
        (carried(tcp=8 * MIB, fabric="Omni-Path"), 2, "warn", "Omni-Path", "mtl=psm2"),
        (carried(rdma=9 * MIB, fabric="InfiniBand"), 2, "ok", "RDMA (mlx5_0:1)", ""),
        (carried(tcp=9000, rdma=9 * MIB, fabric="InfiniBand"), 2, "ok", "RDMA (mlx5_0:1)", ""),
        (carried(fabric="Slingshot", devices=["cxi0"]), 2, "ok", "libfabric or PSM over cxi0", ""),
        (carried(), 2, "warn", "2 hosts, and no counter shows", "pml_base_verbose"),
        (carried(tcp=8 * MIB, local=8 * MIB), 1, "warn", "instead of shared memory", "OMPI_MCA_btl"),
    ],
)
def test_what_carried_an_all_reduce(values: dict[str, Any], hosts: int, status: str, seen: str, remedy: str) -> None:
    finding = network.evaluate_transport(ranks(values, values, hosts=hosts))
    assert finding.status == status and seen in finding.seen and remedy in finding.remedy, finding


def test_a_port_that_is_down_beside_tcp() -> None:
    values = carried(tcp=8 * MIB, adapters=[{"name": "mlx5_0:1", "kind": "InfiniBand", "active": False, "rate": ""}])
    finding = network.evaluate_transport(ranks(values, values, hosts=2))
    assert finding.status == "warn" and "is not active" in finding.seen and "ibstat" in finding.remedy


def test_adapters_and_their_counters_are_read_from_sys(tmp_path: Path) -> None:
    ports = tmp_path / "sys/class/infiniband"
    record(ports / "mlx5_0/ports/1", link_layer="InfiniBand", state="4: ACTIVE", counters__port_rcv_data="1000")
    record(ports / "rxe0/ports/1", link_layer="Ethernet", state="1: DOWN", hw_counters__rcvd_pkts="3")
    (tmp_path / "sys/class/cxi/cxi0").mkdir(parents=True)
    found = {each.name: (each.kind, each.active) for each in transport_counters.adapters(tmp_path)}
    assert found == {"mlx5_0:1": ("InfiniBand", True), "rxe0:1": ("RoCE", False), "cxi0": ("Slingshot", True)}
    before = transport_counters.count(tmp_path)
    assert before.rdma == {"mlx5_0:1": 4000, "rxe0:1": 3072}
    record(ports / "mlx5_0/ports/1", counters__port_rcv_data="3000")
    assert transport_counters.between(before, transport_counters.count(tmp_path))["rdma"] == {
        "mlx5_0:1": 8000,
        "rxe0:1": 0,
    }


def test_bytes_that_come_over_tcp_are_counted() -> None:
    """By the kernel, of this process's own sockets: 1,000 bytes to itself."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        before = transport_counters.count()
        one.sendall(bytes(1000))
        assert len(other.recv(1000, socket.MSG_WAITALL)) == 1000
        moved = transport_counters.between(before, transport_counters.count())
        other.close()
    assert moved["tcp"] == {"lo": 1000} and moved["tcp_local"] == 1000


def test_a_slow_or_wrong_all_reduce() -> None:
    slow = {"num_wrong": 0, "latency_s": 3e-3, "bytes": MIB, "time_s": 0.1, "bus_bytes_per_s": 1e7}
    assert network.evaluate_all_reduce(ranks(slow, slow)).status == "warn"
    finding = network.evaluate_all_reduce(ranks(slow, slow | {"num_wrong": 2}))
    assert finding.status == "fail" and finding.ranks == (1,)


# ---------------------------------------------------------------------------------------- cores, GPUs, meters


def cores(some: list[int], threads: int, share: float, speed: float = 1.0) -> dict[str, Any]:
    return {"cores": some, "threads": threads, "share": share, "speed": speed}


@pytest.mark.parametrize(
    "values, status, seen",
    [
        ([cores([0], 1, 0.25)] * 4, "fail", "4 ranks on c0 have 4 threads on 1 core: "),
        ([cores([0], 4, 0.25), cores([1, 2, 3, 4, 5, 6, 7, 8], 4, 1.0)], "fail", "rank 0 has 4 threads and is bound"),
        (
            [cores([0], 1, 0.5), cores([0], 1, 0.5), cores([1, 2], 1, 1.0)],
            "fail",
            "2 ranks on c0 are bound to the same 1 c",
        ),
        ([cores([0, 1], 1, 0.3)] * 2, "warn", "or a CPU quota applies"),
        ([cores([0], 1, 1.0, 0.4), cores([1], 1, 1.0, 0.4)], "warn", "0.40 of the speed"),
        ([cores([0, 1], 1, 0.97, 0.93)] * 2, "ok", "1 thread and 2 cores per rank"),
    ],
)
def test_cores(values: list[dict[str, Any]], status: str, seen: str) -> None:
    finding = hardware.evaluate_cores(ranks(*values))
    assert finding.status == status and seen in finding.seen, finding


def test_one_thread_gets_less_where_two_share_a_core() -> None:
    """Really: this process on one core."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        assert hardware._compute(2, 0.1).share < 0.6
    finally:
        os.sched_setaffinity(0, own)


def gpu(uuid: str = "", visible: int = 4, **more: Any) -> dict[str, Any]:
    has = {"gpu": uuid, "name": "A100"} if uuid else {}
    return {"asked": "auto", "of_driver": visible, "visible": visible, "torch": "2.13", "error": None, **has, **more}


@pytest.mark.parametrize(
    "values, status, seen",
    [
        ([gpu("a"), gpu("b")], "ok", "one for each rank"),
        ([gpu("a"), gpu("a")], "fail", "2 ranks share one GPU (A100)"),
        ([gpu("a"), gpu(visible=0)], "fail", "some ranks find a GPU"),
        ([gpu(visible=0, of_driver=4)] * 2, "warn", "the driver has 4 GPUs, but torch 2.13 uses none"),
        ([gpu("a", error="CUDA error: out of memory")], "fail", "out of memory"),
        ([gpu(visible=0, asked="cuda")], "fail", "train.device = 'cuda'"),
        ([gpu(visible=0)], "n/a", "no GPU here"),
        ([gpu(visible=0, of_driver=4, asked="cpu")], "n/a", "train.device = 'cpu'"),
    ],
)
def test_gpus(values: list[dict[str, Any]], status: str, seen: str) -> None:
    finding = hardware.evaluate_gpu(ranks(*values))
    assert finding.status == status and seen in finding.seen, finding


@pytest.mark.parametrize(
    "fault, on_cpu, status, seen",
    [
        (None, True, "ok", "20 backward passes"),
        ("died of signal 11", True, "warn", "torch 2.13 has oneDNN's bug 6035: a process died of signal 11"),
        (None, False, "n/a", "GPUs"),
    ],
)
def test_convolutions(fault: str | None, on_cpu: bool, status: str, seen: str) -> None:
    told = {"on_cpu": on_cpu, "torch": "2.13"}
    finding = hardware.evaluate_convolutions(ranks({"fault": fault, **told}, {"fault": None, **told}))
    assert finding.status == status and seen in finding.seen, finding


def test_gpus_of_a_driver_that_torch_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    record(tmp_path / "sys/class/kfd/kfd/topology/nodes", **{"0__gpu_id": "0", "1__gpu_id": "51966"})
    finding = hardware.evaluate_gpu(ranks(hardware.probe_gpu(subject(tmp_path))))
    assert finding.status == "warn" and finding.seen.startswith("the driver has 2 GPUs"), finding


def test_meters_that_count_that_stand_still_and_that_are_locked(tmp_path: Path) -> None:
    def look(name: str) -> Finding:
        return hardware.evaluate_meters(ranks(hardware.probe_meters(subject(tmp_path / name))))

    zone = "sys/class/powercap/intel-rapl:0"
    record(tmp_path / "still" / zone, name="package-0", energy_uj="5", max_energy_range_uj="1000")
    assert look("still").status == "warn" and "do not count: package-0 (RAPL)" in look("still").seen
    record(tmp_path / "locked" / zone, name="package-0", max_energy_range_uj="1000")
    (tmp_path / "locked" / zone / "energy_uj").mkdir()  # not readable, even by root
    assert "this user may not read them" in look("locked").seen and "chmod o+r" in look("locked").remedy
    assert look("none").status == "warn" and "estimate" in look("none").seen


# ---------------------------------------------------------------------------------------- files


def test_a_folder_that_takes_no_file() -> None:
    """/sys: the system refuses, root or not."""
    config = Config(name="x", data=Data(file="x.h5"), train=Train(steps=1, global_batch=1))
    there = subject(config=config.model_copy(update={"run": SimpleNamespace(root="/sys/runs")}))
    finding = storage.evaluate_parallel_file(ranks(storage.probe_parallel_file(there)))
    assert finding.status == "fail" and finding.seen.startswith("/sys (sysfs): ") and "run.root=" in finding.remedy
    assert storage.evaluate_locks(ranks(storage.probe_locks(there))).status == "fail"


def written(**more: Any) -> dict[str, Any]:
    return {"folder": "/s", "file_system": "lustre", "error": None, "parallel": True, "same": True, **more}


@pytest.mark.parametrize(
    "second, seen, remedy",
    [
        (written(same=False), "data read differ", "OMPI_MCA_io"),
        (written(error="unable to lock file, errno = 95"), "unable to lock", "HDF5_USE_FILE_LOCKING=FALSE"),
        (written(unseen=True), "not visible on all nodes", "run.root="),
    ],
)
def test_a_file_that_ranks_do_not_share(second: dict[str, Any], seen: str, remedy: str) -> None:
    finding = storage.evaluate_parallel_file(ranks(written(), second, hosts=2))
    assert finding.status == "fail" and seen in finding.seen and remedy in finding.remedy and finding.ranks == (1,)


def test_locks_that_hold_within_a_node_only() -> None:
    def told(flock: str) -> dict[str, Any]:
        at = {"folder": "/s", "file_system": "lustre", "error": None, "hdf5": None, "fcntl": "held", "flock": flock}
        return {"runs": at, "data": None}

    finding = storage.evaluate_locks(ranks(told("held"), told("not seen by others"), hosts=2))
    assert finding.status == "warn" and "flock locks: not seen by others" in finding.seen and finding.ranks == (1,)


def test_stripes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lfs = tmp_path / "lfs"
    lfs.write_text("#!/bin/sh\necho 1\n")
    lfs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    place = {"place": "/l/x.h5", "file_system": "lustre", "stripes": stripe_count(tmp_path), "bytes": 8 << 30}
    finding = storage.evaluate_stripes(ranks(place, {}))
    assert finding.status == "warn" and "lfs migrate -c 8 /l/x.h5" in finding.remedy
    assert "setstripe" in storage.evaluate_stripes(ranks(place | {"bytes": None}, {})).remedy
    assert storage.evaluate_stripes(ranks(place | {"stripes": 8}, {})).status == "ok"
    assert storage.evaluate_stripes(ranks(place | {"stripes": None}, {})).status == "warn"
    assert storage.evaluate_stripes(ranks(place | {"file_system": "ext4"}, {})).status == "n/a"


def test_room_for_checkpoints() -> None:
    told = {"folder": "/s", "keep": 2, "error": None, "bytes": 100 * MIB, "free": 1 << 40}
    assert disk_space.evaluate_disk_space(ranks(told)).status == "ok"
    assert disk_space.evaluate_disk_space(ranks(told | {"free": 400 * MIB})).status == "warn"
    assert disk_space.evaluate_disk_space(ranks(told | {"free": 299 * MIB})).status == "fail"
    assert disk_space.evaluate_disk_space(ranks(told | {"keep": 0})).status == "n/a"
    assert (
        disk_space.evaluate_disk_space(ranks(told | {"error": "x.h5 does not exist", "remedy": "prepare it"})).remedy
        == "prepare it"
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
def test_the_size_of_a_checkpoint(tmp_path: Path, optimizer: Any) -> None:
    """Of tensors that were really made, by an optimizer that really stepped; its step counts are a few bytes."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["train/inputs"], file["train/targets"] = np.zeros((20, 30), "f4"), np.arange(20) % 5
    train = Train(steps=1, global_batch=4, optimizer=optimizer, momentum=0.9)
    task = Task(model="mlp", options={"hidden": [200]})
    config = Config(name="x", data=Data(file=str(tmp_path / "x.h5")), task=task, train=train)
    model = open_task(config, Context(World())).model()
    model(torch.zeros(4, 30)).sum().backward()
    stepped = Optimizer(train, whole_parameters(model), 4, lambda value: value)
    stepped.step(0)
    made = sum(tensor.nbytes for tensor in model.state_dict().values()) + stepped.num_bytes
    assert disk_space.checkpoint_bytes(config) == pytest.approx(made, abs=100)


# ---------------------------------------------------------------------------------------- software and job


def test_weights_gradients_and_moments_must_fit_a_rank() -> None:
    told = {"available": 400 * MIB, "needed": 100 * MIB}
    assert memory.evaluate_memory(ranks(told)).status == "ok"
    assert memory.evaluate_memory(ranks(told | {"needed": 350 * MIB})).status == "warn"
    refused = memory.evaluate_memory(ranks(told | {"needed": 401 * MIB}))
    assert refused.status == "fail" and "420 MB of 419 MB" in refused.seen and "hpc-train memory" in refused.remedy
    assert memory.evaluate_memory(ranks(told | {"needed": None})).status == "n/a"


def test_horovod_without_what_the_job_needs() -> None:
    good = {"error": None, "sum": 2.0, "size": 2, "built": ["mpi"], "torch": "2", "needed": True, "has_gpu": False}
    assert software.evaluate_horovod(ranks(good, good)).status == "ok"
    assert "without NCCL" in software.evaluate_horovod(ranks(*[good | {"has_gpu": True}] * 2)).seen
    assert software.evaluate_horovod(ranks(*[good | {"built": ["gloo"]}] * 2)).status == "fail"
    alone = software.evaluate_horovod(ranks(*[good | {"size": 1, "sum": 1.0}] * 2))
    assert alone.status == "fail" and "it has 1 of 2 ranks" in alone.seen
    assert software.evaluate_horovod(ranks(*[good | {"built": [], "needed": False}] * 2)).status == "warn"


def test_ranks_of_two_installations() -> None:
    told = {"versions": {"mpi4py": "4", "torch": "2.13"}, "needed": [], "load_s": 1.0}
    other = told | {"versions": {"mpi4py": "4", "torch": "2.10"}}
    assert "torch 2.10 and 2.13" in software.evaluate_installed(ranks(told, other)).seen
    slow = software.evaluate_installed(ranks(told, told | {"load_s": 236.0}))
    assert slow.status == "warn" and "sbcast" in slow.remedy


STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "1"}


@pytest.mark.parametrize(
    "more, second, status, seen",
    [
        ({}, {"SLURM_PROCID": "1"}, "ok", "job 7: 2 ranks on 1 node"),
        ({}, {}, "fail", "SLURM_PROCID = 0, but MPI's rank is 1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {"SLURM_PROCID": "1"}, "fail", "SLURM_STEP_NUM_TASKS = 4, but MPI's size is 2"),
        ({"SLURM_CPUS_PER_TASK": "8"}, {"SLURM_PROCID": "1"}, "fail", "SLURM_CPUS_PER_TASK = 8, but a rank may use 1"),
        ({"SLURM_JOB_NUM_NODES": "4"}, {"SLURM_PROCID": "1"}, "warn", "of 4 allocated"),
        ({"OMPI_COMM_WORLD_RANK": "0", "SLURM_NTASKS": "8"}, {}, "warn", "SLURM_NTASKS = 8"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, {"SLURM_JOB_ID": "8"}, "fail", "different jobs: 7, 8"),
    ],
)
def test_slurm(more: dict[str, str], second: dict[str, str], status: str, seen: str) -> None:
    told = []
    for rank, own in enumerate(({}, second)):
        environ = STEP | more | own
        looked = job.probe_slurm(Subject(Context(World(rank, 2, rank, 2)), None, environ))
        told.append(looked | {"num_cores": 1})
    finding = job.evaluate_slurm(ranks(*told))
    assert finding.status == status and seen in finding.seen, finding


def test_clocks() -> None:
    def status(offset_s: float) -> str:
        return job.evaluate_clocks(
            ranks({"offset_s": 0.0, "error_s": 0.0}, {"offset_s": offset_s, "error_s": 1e-4})
        ).status

    assert [status(offset_s) for offset_s in (0.01, -0.5, 20.0)] == ["ok", "warn", "fail"]


def test_a_fork_beside_verbs() -> None:
    told = {"spawn_error": None, "fork_error": None, "intact": True, "verbs": ["infiniband/uverbs0"], "set": []}
    old, new = (job.evaluate_fork(ranks(told | {"kernel": kernel})) for kernel in ("4.18.0-553.el8", "6.1.0"))
    assert (old.status, new.status) == ("warn", "ok") and "RDMAV_FORK_SAFE=1" in old.remedy
    safe = job.probe_fork(subject(RDMAV_FORK_SAFE="1"))
    assert safe["set"] == ["RDMAV_FORK_SAFE"] and safe["intact"] and safe["spawn_error"] is safe["fork_error"] is None
    assert job.evaluate_fork(ranks(told | {"kernel": "6.1", "intact": False})).status == "fail"


# ---------------------------------------------------------------------------------------- a process that does not end

CHILD = (
    "import os, json, sys, time; pipe = open(int(sys.argv[1]), 'w', buffering=1)\nprint(json.dumps({}), file=pipe)\n{}"
)


@pytest.mark.parametrize(
    "then, fault",
    [
        ("time.sleep(60)", "no end within 0.2 s: a rank or the network between ranks hangs"),
        ("os.kill(os.getpid(), 11)", "died of signal 11 (Segmentation fault)"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("", None),
    ],
)
def test_a_check_that_hangs_or_dies(then: str, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    begins = {"begins": "file locks", "limit_s": 0.2, "remedy": "df"}
    code = CHILD.format(begins, then)
    start = subprocess.Popen
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.1)
    monkeypatch.setattr(
        supervisor.subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", code, words[4]], **more)
    )
    examined = supervisor.Examination()
    told = supervisor._run_checks(None, (), examined, 0)
    assert (told or "").endswith(fault or "") and (told is None) == (fault is None)
    assert (examined.at, examined.remedy) == ("file locks", "df")

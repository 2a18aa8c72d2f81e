"""Whose joules a node's meters count: Slurm's count of a step, nodes shared with others, what a run says of both."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.rundir import find
from hpc_train.train.energy import node_energy
from hpc_train.train.energy.sensors import sharing, slurm
from hpc_train.train.energy.sensors.choose import choose_meters
from hpc_train.train.energy.sensors.sampler import Sampler
from hpc_train.train.recording import recording
from tests import sensor_trees as trees
from tests.sensor_trees import put
from tests.synthetic import energy_of

CONFIG = """Configuration data as of 2024-05-13T12:00:00
AccountingStorageTRES   = cpu,mem,energy,node,billing
AcctGatherEnergyType    = acct_gather_energy/{}
AcctGatherNodeFreq      = 30 sec
"""
job = JobEnvironment.from_variables
STEP = {"SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recorded answers: in front on PATH lie programs that print them."""
    for name in ("scontrol", "sstat"):
        program = put(tmp_path / "bin" / name, f'#!/bin/sh\necho "$0 $*" >>{tmp_path}/asked\ncat {tmp_path}/{name}')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_slurms_count_is_taken_where_its_plugin_measures_nodes(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plugin, whole in (("ipmi", True), ("pm_counters", True), ("rapl", False)):
        put(answers / "scontrol", CONFIG.format(plugin))
        assert slurm.find_step(2, job(STEP)) == slurm.Step("812.0", plugin, whole)
    assert slurm.find_step(3, job(STEP)) is None, "a host outside the step would have no joules"
    assert slurm.find_step(2, job(STEP | {"SLURM_STEP_ID": "4294967291"})) is not None
    assert slurm.find_step(2, job({"SLURM_JOB_ID": "812"})) is None, "the batch script, under mpirun"
    for plugin in ("none", "gpu"):
        put(answers / "scontrol", CONFIG.format(plugin))
        assert slurm.find_step(2, job(STEP)) is None
    put(answers / "scontrol", CONFIG.format("gpu,acct_gather_energy/xcc"))
    assert slurm.find_step(2, job(STEP)) == slurm.Step("812.0", "xcc", True)
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.find_step(2, job(STEP)) is None


def test_slurms_zero_is_missing(answers: Path) -> None:
    assert slurm.joules_in("24713\n") == slurm.joules_in("24713\n0\n") == 24713
    assert [slurm.joules_in(text) for text in ("0\n", "", "\n")] == [None, None, None]
    answer, path = answers / "sstat", answers / "node.csv"

    def run(first: object, last: object) -> list[list[str]]:
        path.unlink(missing_ok=True)
        put(answer, first)
        with Sampler([slurm.step_meter(slurm.Step("812.0", "ipmi", True))], path, hz=10, epoch_s=0.0):
            put(answer, last)
        return [line.split(",")[1:5] for line in path.read_text().splitlines()[1:]]

    source = "Slurm ConsumedEnergyRaw (ipmi)"
    assert run(1000, 4500) == [["nodes", "0.000000", "measured", source], ["nodes", "3500.000000", "measured", source]]
    assert (
        (answers / "asked")
        .read_text()
        .splitlines()[-1]
        .endswith("sstat --noheader --parsable2 --format=ConsumedEnergyRaw --jobs=812.0")
    )
    late = f"{source} (counted from the start of the step)"
    assert run(0, 4500)[-1] == ["nodes", "4500.000000", "estimated", late]
    assert run(0, 0)[-1] == ["nodes", "", "missing", late]
    assert run(1000, 0)[-1] == ["nodes", "", "missing", source]
    assert energy_of(path).quality == "missing"


# --------------------------------------------------------------------------------------------- sharing


def machine(root: Path, num_cores: int, threads_per_core: int) -> Path:
    """The processors as /sys shows them."""
    cpus = root / "sys/devices/system/cpu"
    num_threads = num_cores * threads_per_core
    put(cpus / "online", f"0-{num_threads - 1}")
    for thread in range(num_threads):
        siblings = sorted(other for other in range(num_threads) if other % num_cores == thread % num_cores)
        put(cpus / f"cpu{thread}/topology/thread_siblings_list", ",".join(map(str, siblings)))
    return root


def test_a_job_that_holds_part_of_a_node_may_share_it(tmp_path: Path) -> None:
    one, two = machine(tmp_path / "one", 8, 1), machine(tmp_path / "two", 8, 2)

    def part(root: Path, cpus: str, **environ: str) -> bool | None:
        return sharing.has_part_of_node(job({"SLURM_JOB_ID": "1", "SLURM_JOB_CPUS_PER_NODE": cpus, **environ}), root)

    assert part(one, "8(x2)") is False and part(one, "4(x2)") is True
    assert part(two, "16") is False and part(two, "2") is True
    assert part(two, "8") is None, "all cores, if Slurm counts cores; half of the node, if it counts their threads"
    of_step = {"SLURM_STEP_NUM_NODES": "3", "SLURM_JOB_NUM_NODES": "3"}
    assert [part(one, "8(x2),4", SLURM_NODEID=str(node), **of_step) for node in range(3)] == [False, False, True]
    assert part(one, "8(x2),4", SLURM_NODEID="0") is None and part(one, "all") is None
    assert sharing.has_part_of_node(job({"SLURM_JOB_ID": "1"}), one) is None
    assert (
        sharing.has_part_of_node(job({"SLURM_JOB_ID": "1", "SLURM_JOB_CPUS_PER_NODE": "8"}), tmp_path / "none") is None
    )

    assert sharing.has_part_of_node(job({}), one) is None, "nobody gave anything"
    put(one / "proc/self/cgroup", "0::/kubepods/pod1")
    assert sharing.has_part_of_node(job({}), one) is None
    put(one / "sys/fs/cgroup/kubepods/pod1/cpuset.cpus.effective", "0-2,5")
    assert sharing.has_part_of_node(job({}), one) is True, "a container with 4 of 8 cores"
    put(two / "proc/self/cgroup", "12:cpu,cpuacct:/job\n5:cpuset:/job")
    put(two / "sys/fs/cgroup/cpuset/job/cpuset.effective_cpus", "0-15")
    assert sharing.has_part_of_node(job({}), two) is None, "all of it, but not alone, perhaps"


def test_foreign_load_is_what_the_node_did_without_us(tmp_path: Path) -> None:
    assert sharing.busy_s(tmp_path) is None
    stat = tmp_path / "proc/stat"
    put(stat, "cpu  400 100 200 99999 700 30 20 50 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0")
    assert sharing.busy_s(tmp_path) == pytest.approx(750 / os.sysconf("SC_CLK_TCK")), "without idle, iowait and steal"
    assert sharing.foreign_cores(1.0, 0.5, 0.5) is None, "too short to be told"
    assert sharing.foreign_cores(90.0, 80.0, 10.0) == 1.0 and sharing.foreign_cores(79.9, 80.0, 10.0) == 0

    own, num_threads = 8.0, 16
    for part, foreign, verdict in (
        (None, None, None),
        (None, 0.1, False),
        (None, 1.0, True),
        (False, 0.1, False),
        (False, 1.0, True),
        (False, None, False),
        (True, 0.0, True),
        (True, None, True),
    ):
        assert sharing.is_shared(part, foreign, own, num_threads) is verdict
    assert sharing.is_shared(None, 0.1, 0.5, 128) is False, "daemons of a large node"


# --------------------------------------------------------------------------------------------- a run


@pytest.fixture
def two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(node_energy, "choose_meters", lambda: choose_meters(tmp_path / "root"))
    with trees.drawing(tmp_path / "root", 50):
        yield


def test_a_run_writes_down_rest_and_sharing(tmp_path: Path, two_packages: None) -> None:
    with recording(
        "job", global_batch=4, root=tmp_path / "runs", energy={"idle_s": 0.4, "sample_hz": 20.0}
    ) as recorder:
        began_s = time.monotonic()
        for _ in range(20):
            with recorder.step():
                time.sleep(0.02)
        passed_s = time.monotonic() - began_s
    (run,) = find([tmp_path / "runs"])
    facts = json.loads(run.meta.read_text())["energy"]
    (host,) = facts["meters"]
    assert [each["domain"] for each in facts["meters"][host]] == ["package-0", "package-1"]
    assert facts["assumption"] is None and facts["unreadable"] == {} and facts["idle_quality"] == "measured"
    assert facts["idle_w"][host] == {domain: pytest.approx(50, rel=0.6) for domain in ("package-0", "package-1")}
    assert facts["shared"][host] in (True, False, None) and host in facts["foreign_cores"]
    used = energy_of(run.energy(host))
    assert used.quality == "measured" and used.joules == pytest.approx(100 * passed_s, rel=0.6)
    first_s = float(run.energy(host).read_text().splitlines()[1].split(",")[0])
    start_ns = int(run.timings(0).read_text().splitlines()[1].split(",")[1])
    # Readings are written to the millisecond, so the first may seem up to half of one later than it was.
    assert -0.0005 <= facts["epoch_s"][host] + start_ns / 1e9 - first_s < 1, "steps and joules on one clock"


def test_what_a_node_draws_at_rest_may_be_given(
    tmp_path: Path, two_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "root/sys/class/powercap/intel-rapl:1/max_energy_range_uj", 65_532_610_987)  # of an older Xeon
    settings = {"idle_w": 180.0, "sample_hz": 0.02}
    with recording("job", global_batch=4, root=tmp_path / "runs", energy=settings) as recorder, recorder.step():
        pass
    (run,) = find([tmp_path / "runs"])
    facts = json.loads(run.meta.read_text())["energy"]
    assert list(facts["idle_w"].values()) == [{"node": 180.0}] and facts["idle_quality"] == "given"
    said = capsys.readouterr().out
    assert "energy.sample_hz = 0.02: a counter may wrap around twice" in said and "set it to 0.031 or more" in said

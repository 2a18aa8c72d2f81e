"""The recorder alone, around loops of other programs: under torchrun, under mpirun and in one process."""

import difflib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.renderers.files import summary_tree
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.runs.load import Run, load_all
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.settings import UNKNOWN_STEPS
from hpc_train.core.timing_log import read_timings
from hpc_train.train.recording import recording
from tests import jobs

LOOPS = Path(__file__).parents[1]
# Gradients summed by hand, and every phase marked; on 2 ranks with mpi4py, alone without.
BY_HAND = """
import os, signal, sys, torch
from torch import nn
from hpc_train.train.recording import recording
size = int(sys.argv[1])
if size > 1:
    from mpi4py import MPI
torch.manual_seed(0)
model = nn.Linear(20, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with recording("by-hand", batch_per_rank=64, model=model, steps=40, warmup_steps=4, lr=0.1) as recorder:
    for index in range(40):
        with recorder.step() as step:
            with recorder.data:
                inputs = torch.randn(64, 20)
            with recorder.forward:
                loss = model(inputs).square().mean()
            with recorder.backward:
                loss.backward()
            if size > 1:
                with recorder.reduce:
                    for parameter in model.parameters():
                        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
            with recorder.optimizer:
                optimizer.step()
                optimizer.zero_grad()
            if size > 1:
                with recorder.sync:
                    for parameter in model.parameters():
                        MPI.COMM_WORLD.Bcast(parameter.detach().numpy())
            step.loss = loss
            if index == int(sys.argv[2]):
                if len(sys.argv) > 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyError("the loop's own fault")
    recorder.test["accuracy"] = 0.75
"""


def start(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = jobs.environment(OMP_NUM_THREADS="1", PYTHONPATH=str(jobs.ROOT))
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


def torchrun(ranks: int, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return start([*launcher, *map(str, words)], cwd)


@pytest.fixture(scope="module")
def recorded(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The loop of own_loop_recorded.py by torchrun on 1 and on 2 ranks, with DistributedDataParallel."""
    folder = tmp_path_factory.mktemp("recorded")
    for ranks in (1, 2):
        done = torchrun(ranks, LOOPS / "own_loop_recorded.py", digits, 2, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Step 0, Loss: 2.3") + done.stdout.count("Step 0, Loss: 2.2") == 1
        assert done.stdout.count("Mean step ") == 1 and done.stdout.count("Run directory: runs/own-loop/") == 1
    return load_all([folder / "runs"])


def test_recording_a_loop_adds_fewer_than_ten_lines() -> None:
    plain, marked = ((LOOPS / name).read_text().splitlines() for name in ("own_loop.py", "own_loop_recorded.py"))
    after_docstring = slice(1, None)
    lines = list(
        difflib.ndiff(
            [line.strip() for line in plain[after_docstring]], [line.strip() for line in marked[after_docstring]]
        )
    )
    assert not [line for line in lines if line.startswith("- ")], "nothing is taken from the loop"
    assert len([line for line in lines if line.startswith("+ ") and line[2:]]) == 4


def test_the_plain_loop_runs_without_us(recorded: list[Run], digits: Path) -> None:
    folder = recorded[0].dir.path.parents[2]
    before = len(list(folder.rglob("meta.json")))
    done = torchrun(1, LOOPS / "own_loop.py", digits, 1, cwd=folder)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert len(list(folder.rglob("meta.json"))) == before


def test_a_recorded_loop_leaves_a_whole_run_directory(recorded: list[Run]) -> None:
    for ranks, run in enumerate(recorded, 1):
        assert run.size == ranks and run.incomplete is None and run.summary.num_hosts == 1
        assert (run.summary.num_steps, run.summary.num_warmup, run.summary.num_samples) == (30, 10, 30 * 256)
        assert load(run.dir.config).config == run.config and run.config.train.steps == 30
        assert "optimizer" not in run.dir.config.read_text(), "what the loop does is not ours to say"
        assert run.meta["num_parameters"] == 784 * 512 + 512 + 512 * 10 + 10
        assert run.meta["recorded"]["ranks_talk_through"] == "torch.distributed (gloo)" and run.meta["mpi"] == {}
        assert len(run.meta["clock_offsets_ns"]["end"]) == ranks and run.meta["outcome"] == "complete"
        assert [rank["local_rank"] for rank in run.meta["ranks"]] == list(range(ranks))
        for rank in range(ranks):
            timings = read_timings(run.dir.timings(rank))
            assert (
                timings["step"].tolist() == list(range(30)) and timings["num_samples"].tolist() == [256 // ranks] * 30
            )
            durations = timings.phases_ns.sum(axis=1)
            assert (timings["start_ns"][1:] == timings["start_ns"][:-1] + durations[:-1]).all()
        written = json.loads(run.dir.summary.read_text())
        assert written["phase_share"] == {"other": 1.0} and written["complete"]


def test_losses_are_means_over_all_ranks(recorded: list[Run]) -> None:
    """Both numbers of ranks train on the same global batches, each rank on its part of them."""
    (steps, alone), (same_steps, together) = (read_metrics(run.dir.metrics) for run in recorded)
    assert steps == same_steps == list(range(30))
    np.testing.assert_allclose(alone, together, rtol=1e-4)
    assert alone[-1] < 0.5


def test_the_report_compares_them_like_our_own(recorded: list[Run]) -> None:
    (group,) = summary_tree(make_report([recorded[0].dir.path.parent]))["groups"]
    one, two = group["rows"]
    assert two["baseline_ranks"] == 1 and two["speedup"] > 0 and two["speedup_low"] <= two["speedup"]
    assert one["joules"] > 0 and two["joules"] > 0 and one["energy_quality"] in ("measured", "estimated")
    assert one["share_other"] == 1.0 and one["share_reduce"] is None, "not measured, and not 0"
    assert group["config"].keys() == {"task.kind", "task.model", "task.options", "train.global_batch"} | {
        "train.warmup_steps",
        "train.timing",
        "reduce.strategy",
    }
    said = jobs.run(0, "report", recorded[0].dir.path.parent, "--full", cwd=recorded[0].dir.path)
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert "did not time data, forward, backward, reduce, optimizer" in words
    assert "communication was not measured" in words
    assert "0% of the step is exposed communication" not in words and "speedup" in words


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_hand")
    (folder / "loop.py").write_text(BY_HAND)
    return folder


def test_under_mpirun_and_alone_with_every_phase_marked(by_hand: Path) -> None:
    mpirun = jobs.command(2, "")[:-2]
    for ranks, launcher in ((1, []), (2, mpirun)):
        done = start([*launcher, sys.executable, "loop.py", str(ranks), "-1"], by_hand)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Test accuracy: 0.7500") == 1
    alone, together = load_all([by_hand / "runs"])
    assert (alone.size, together.size) == (1, 2) and not alone.incomplete and not together.incomplete
    assert alone.meta["recorded"]["ranks_talk_through"] == "nothing: one process"
    assert together.meta["recorded"]["ranks_talk_through"] == "MPI" and "Open MPI" in together.meta["mpi"]["version"]
    assert together.config.task.options == {"lr": 0.1} and together.summary.global_batch == 128
    assert together.summary.phase_share["reduce"] > 0 < together.summary.phase_share["sync"]
    assert together.summary.test == {"accuracy": 0.75}
    (group,) = gather([by_hand / "runs"]).scaling.groups
    assert group.weak and group.largest is not None and group.largest.size == 2
    assert "reduce" not in group.rows[0].phase_share and group.rows[1].phase_share["reduce"] > 0


def test_an_exception_of_the_loop_is_the_loops_own(by_hand: Path) -> None:
    done = start([sys.executable, "loop.py", "1", "25"], by_hand)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == 'KeyError: "the loop\'s own fault"'
    assert "hpc-train" not in done.stderr and "Run directory" not in done.stdout
    cut = load_all([by_hand / "runs"])[-1]
    assert cut.summary.num_steps == 25 and cut.incomplete and "25 of 40 steps can be used" in cut.incomplete
    assert not cut.dir.lock.exists() and cut.summary.joules
    assert read_metrics(cut.dir.metrics)[0] == [0], "losses are written every log_every steps"


def test_a_killed_loop_is_an_incomplete_run(by_hand: Path) -> None:
    assert start([sys.executable, "loop.py", "1", "25", "killed"], by_hand).returncode == -9
    lost = load_all([by_hand / "runs"])[-1]
    assert lost.incomplete and "did not reach its end" in lost.incomplete and lost.summary.num_steps >= 1


def test_a_rank_that_fails_alone_ends_torchrun_with_its_own_exception(by_hand: Path) -> None:
    loop = """
        import sys
        from torch import distributed
        from hpc_train.train.recording import recording
        distributed.init_process_group("gloo")
        with recording("one-fails", global_batch=8) as recorder:
            for index in range(9):
                with recorder.step():
                    if index == 5 and distributed.get_rank() == 1:
                        raise MemoryError("of one rank")
    """
    (by_hand / "one.py").write_text("\n".join(line[8:] for line in loop.splitlines()))
    done = torchrun(2, "one.py", cwd=by_hand)
    assert done.returncode == 1 and done.stderr.count("MemoryError: of one rank") == 1, done.stderr
    (cut,) = load_all([by_hand / "runs" / "one-fails"])
    assert cut.incomplete and "5 steps can be used" in cut.incomplete and str(UNKNOWN_STEPS) not in cut.incomplete


# Whose ranks talk in three ways, and where one of them leaves as early as it can.
START = {
    "horovod": "import horovod.torch as hvd; hvd.init(); rank, add_up = hvd.rank(), hvd.allreduce_",
    "mpi4py": "from mpi4py import MPI; rank, add_up = MPI.COMM_WORLD.rank, lambda x: MPI.COMM_WORLD.Allreduce("
    "MPI.IN_PLACE, x.numpy())",
    "gloo": "from torch import distributed; distributed.init_process_group('gloo'); "
    "rank, add_up = distributed.get_rank(), distributed.all_reduce",
}
LEAVES_FIRST = """
import os, time, torch
from pathlib import Path
from hpc_train.train.run import recorder as recorder_module
from hpc_train.train.recording import recording
if rank != first:  # the others are slow to come out: in the gather of what they recorded, and in what follows
    finish = recorder_module.Recorder.finish
    recorder_module.Recorder.finish = lambda self, test: (time.sleep(1), finish(self, test), time.sleep(1))
with recording("leaves", global_batch=6) as recorder:
    for index in range(4):
        with recorder.step() as step:
            add_up(torch.ones(3))
            step.loss = 1.0
"""


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("way", START)
def test_a_rank_that_leaves_first_takes_nothing_from_the_others(way: str, first: int, tmp_path: Path) -> None:
    """Horovod ends MPI on all ranks as soon as one process ends."""
    # torch asks for this call: without it, gloo's threads can abort the process while it exits.
    end = "distributed.destroy_process_group()" if way == "gloo" else ""
    (tmp_path / "leaves.py").write_text("\n".join([f"first = {first}", START[way], LEAVES_FIRST, end]))
    mpirun = [*jobs.command(3, "")[:-2], sys.executable, "leaves.py"]
    done = torchrun(3, "leaves.py", cwd=tmp_path) if way == "gloo" else start(mpirun, tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = load_all([tmp_path / "runs"])
    assert run.incomplete is None and run.size == 3 and run.summary.num_steps == 4


def test_steps_say_what_they_know(tmp_path: Path) -> None:
    """Samples of uneven steps, losses that are not known, a pause; by hand: 3 steps, of 4, 4 and 1 samples."""
    with recording("mine", global_batch=4, warmup_steps=0, root=tmp_path, log_every=2) as recorder:
        with recorder.step() as step:
            step.loss = torch.tensor([2.5], requires_grad=True)
        with recorder.step():
            pass
        with recorder.pause():
            deadline = torch.ones(2_000_000).cumsum(0)[-1]
        with recorder.step() as step:
            step.loss, step.num_samples = float(deadline) * 0 + 1.5, 1
    (run,) = load_all([tmp_path])
    assert run.metrics == ([0, 2], [2.5, 1.5]) and run.summary.loss == 1.5 and run.summary.num_samples == 9
    assert run.meta["num_parameters"] is None and run.config.task.model == "unknown" and run.incomplete is None
    timings = read_timings(run.dir.timings(0))
    gap = timings["start_ns"][2] - timings["start_ns"][1] - timings.phases_ns[1].sum()
    assert gap > 100_000, "the pause is no part of a step"


def test_a_loop_without_steps_is_recorded_too(tmp_path: Path) -> None:
    with recording("none", global_batch=4, root=tmp_path):
        pass
    (run,) = load_all([tmp_path])
    assert run.summary.num_steps == 0 and run.summary.step_s is None


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "exactly one of train.global_batch"),
        ({"global_batch": 4, "batch_per_rank": 4}, "exactly one of train.global_batch"),
        ({"global_batch": 0}, "recording(): train.global_batch = 0"),
        ({"global_batch": 4, "steps": 0}, "recording(): train.steps = 0"),
        ({"global_batch": 4, "layers": object()}, "task.options"),
        ({"global_batch": 4, "timing": "all"}, "recording(): train.timing = 'all'"),
        ({"global_batch": 4, "root": "/proc/nowhere"}, "run.root = '/proc/nowhere'"),
    ],
)
def test_what_does_not_fit_is_said_before_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught, recording("mine", **given):  # type: ignore[arg-type]
        raise AssertionError("the loop must not begin")
    assert words in str(caught.value) and not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=r"step.loss of step 0 has the shape \(4,\)")
    with refused, recording("mine", global_batch=4, root=tmp_path) as recorder, recorder.step() as step:
        step.loss = torch.zeros(4)


def test_ranks_that_cannot_reach_each_other_are_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    for environment, words in (({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2"), (srun, "srun's tasks = 2")):
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            refused = pytest.raises(UserError, match=rf"{words}.*\n.*init_process_group")
            with refused, recording("mine", global_batch=4, root=tmp_path):
                pass


def test_a_recorded_run_is_not_started_by_us(recorded: list[Run]) -> None:
    done = jobs.run(0, "train", recorded[0].dir.config, cwd=recorded[0].dir.path.parent)
    assert done.code == 2 and "task.kind = 'recorded'" in done.err and "Start that program again" in done.err
    assert "Traceback" not in done.err

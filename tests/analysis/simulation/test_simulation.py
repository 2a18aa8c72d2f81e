"""Simulated steps, and studies of runs whose machine, noise and overlap are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hpc_train.analysis.runs.load import load
from hpc_train.analysis.simulation.collectives import Algorithm, all_reduce
from hpc_train.analysis.simulation.machine import Link, Machine
from hpc_train.analysis.simulation.network import read_links
from hpc_train.analysis.simulation.noise import NO_NOISE, Noise, measured_noise
from hpc_train.analysis.simulation.simulate import simulate
from hpc_train.analysis.simulation.step import Job, simulate_step
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.cli.main import cli
from hpc_train.core.allreduce_times import Row, record
from hpc_train.core.errors import UserError
from hpc_train.core.records import FloatArray
from hpc_train.core.rundir import RunDir
from hpc_train.core.timing_log import TimingLog
from tests.synthetic import Recipe, write_run

MACHINE = Machine(4, Link(1e-6, 2e-10), Link(4e-6, 1e-9), overhead_s=3e-5)
PARAMETERS = 10_000_000
JOB = Job(0.0, 0.02, 0.04, 0.004, 4.0 * PARAMETERS, 4.0 * PARAMETERS, 10, "ring", 0, overlap=0.5)
NOISE = Noise(0.01, np.sort(np.random.default_rng(3).exponential(0.02, 20_000) - 0.02))


def together(job: Job, machine: Machine, ranks: int) -> FloatArray:
    shape = (1, ranks)
    return simulate_step(job, machine, np.zeros(shape), np.ones(shape))[0]


# ---------------------------------------------------------------------------------------------- one step


def test_a_step_without_noise_is_what_its_parts_add_up_to() -> None:
    machine = Machine(1, MACHINE.inside, Link(1e-6, 1e-9))
    one = replace(JOB, num_messages=1, overlap=1.0)
    computing_s = JOB.forward_s + JOB.backward_s + JOB.own_s
    for ranks in (1, 2, 8, 64):
        ring_s = 2 * (ranks - 1) * (1e-6 + JOB.gradient_bytes / ranks * 1e-9)
        assert np.allclose(together(one, machine, ranks), computing_s + ring_s), "one message hides behind nothing"
    halves = [JOB.gradient_bytes / 2, 63e-6 + 63 / 64 * JOB.gradient_bytes / 2 * 1e-9]
    # Two messages: the first begins at half of backward and is not over at its end, so the second follows it.
    two = replace(one, num_messages=2)
    assert np.allclose(together(two, machine, 64), JOB.forward_s + 0.02 + JOB.own_s + 2 * 2 * halves[1])
    # At no rate beside the computation, both begin at its end; at half the rate the first is behind by a half.
    assert np.allclose(together(replace(two, overlap=0.0), machine, 64), computing_s + 2 * 2 * halves[1])
    assert np.allclose(together(replace(two, overlap=0.5), machine, 64), computing_s - 0.01 + 2 * 2 * halves[1])


@pytest.mark.parametrize("ranks", [8, 64, 100])
def test_stages_move_what_is_in_print(ranks: int) -> None:
    """Rajbhandari et al. 2020: stages 1 and 2 move what an all-reduce does, stage 3 half as much again."""
    machine = Machine(1, MACHINE.inside, Link(0.0, 1e-9))
    still = replace(JOB, forward_s=0.0, backward_s=0.0, own_s=0.0, num_messages=8, overlap=1.0)
    one = together(still, machine, ranks).max()
    assert one == pytest.approx(2 * (ranks - 1) / ranks * JOB.gradient_bytes * 1e-9)
    for stage, ratio in ((1, 1.0), (2, 1.0), (3, 1.5)):
        assert together(replace(still, stage=stage), machine, ranks).max() == pytest.approx(ratio * one, rel=0.1)
    # Stage 3 hides its gathers behind the passes, which whole weights cannot.
    long = replace(JOB, num_messages=8, overlap=1.0, stage=3, forward_s=1.0, backward_s=2.0, own_s=0.0)
    exposed_s = together(long, machine, ranks).max() - 3.0
    assert exposed_s == pytest.approx(2 / 8 * one / 2, rel=0.02), "the first gather and the last gradients"


def test_ranks_wait_for_the_slowest() -> None:
    """The mean of the maximum of N normal numbers, in print since Tippett (1925)."""
    free = Machine(4, Link(0.0, 0.0), Link(0.0, 0.0))
    normal = Noise(0.0, np.sort(np.random.default_rng(0).standard_normal(200_000) * 0.02))
    for ranks in (1, 2, 16, 1024):
        made = simulate(JOB, free, ranks, normal)
        slowest = 0.064 * (1 + 0.02 * float(expected_maximum(np.array([ranks]))[0]))
        assert made.step_s == pytest.approx(slowest, rel=0.01), ranks
        assert made.imbalance_s == pytest.approx(slowest - 0.064, abs=0.0007) and made.transfer_s == 0
        parts = made.input_s + made.computation_s + made.imbalance_s + made.transfer_s
        assert parts == pytest.approx(made.step_s)
    assert simulate(JOB, MACHINE, 64, NOISE, seed=1) == simulate(JOB, MACHINE, 64, NOISE, seed=1)
    assert simulate(JOB, MACHINE, 64, NOISE, seed=1) != simulate(JOB, MACHINE, 64, NOISE, seed=2)


def test_100_000_ranks_take_little_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    made = simulate(replace(JOB, algorithm="hierarchical"), MACHINE, 100_000, NOISE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9 and made.step_interval_s[0] < made.step_s < made.step_interval_s[1]
    fewer = simulate(replace(JOB, algorithm="hierarchical"), MACHINE, 10_000, NOISE)
    assert made.imbalance_s > fewer.imbalance_s > 0


# ---------------------------------------------------------------------------------------------- what drives it


def benchmark(path: Path, machine: Machine, algorithm: Algorithm = "ring") -> Path:
    """As `hpc-train bench allreduce` would write it on this machine: two nodes of four ranks."""
    rows = []
    for ranks, nodes in ((2, 1), (4, 1), (2, 2)):
        place = (ranks, nodes, ranks // nodes)
        link = machine.inside if nodes == 1 else machine.between
        for size in (4, 64, 1 << 10, 1 << 16, 1 << 20, 1 << 24):
            alone = replace(machine, ranks_per_node=ranks // nodes)
            took_s = float(all_reduce(algorithm, np.zeros((1, ranks)), size, alone).max())
            rows.append(Row("mpi", *place, size, (took_s, took_s)))
            if ranks == 2:
                rows.append(Row("link", *place, size, (float(link.seconds(size)),) * 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(rows, {})))
    return path


@pytest.mark.parametrize("algorithm", ["ring", "rabenseifner"])
def test_links_are_read_from_a_benchmark(tmp_path: Path, algorithm: Algorithm) -> None:
    links = read_links(benchmark(tmp_path / "a.json", MACHINE, algorithm), "mpi", algorithm)
    assert links.inside is not None and links.between is not None
    for found, true in ((links.inside, MACHINE.inside), (links.between, MACHINE.between)):
        assert found.latency_s == pytest.approx(true.latency_s, rel=0.01)
        assert found.s_per_byte == pytest.approx(true.s_per_byte, rel=0.01)
    assert links.overhead_s == pytest.approx(MACHINE.overhead_s, rel=0.03)


def study(root: Path, job: Job, machine: Machine, noise: Noise, sizes: tuple[int, ...], steps: int = 60) -> Path:
    """Runs in weak scaling, each step of each rank as `simulate_step` makes it."""
    for ranks in sizes:
        hosts = tuple(f"n{index}" for index in range(machine.nodes(ranks)))
        meta = {"num_parameters": PARAMETERS, "flops_per_sample": None}
        recipe = Recipe(
            size=ranks,
            steps=steps,
            warmup=2,
            global_batch=None,
            batch_per_rank=4,
            strategy="mpi",
            hosts=hosts,
            joules=None,
            meta=meta,
            name="known",
        )
        run = write_run(root, recipe)
        random = np.random.default_rng(ranks)
        of_rank = noise.rank_factors((1, ranks), random)
        logs = []
        for rank in range(ranks):
            run.timings(rank).unlink()
            logs.append(TimingLog(run.timings(rank)))
        now = np.zeros((1, ranks))
        for step in range(steps):
            factors = of_rank * noise.step_factors((1, ranks), random)
            ended, waits = simulate_step(job, machine, now, factors)
            exposed = waits.imbalance_s + waits.transfer_s
            for rank, log in enumerate(logs):
                parts = [job.forward_s, job.backward_s, job.own_s]
                forward, backward, own = (int(1e9 * part * factors[0, rank]) for part in parts)
                start = 1_000_000 + int(1e9 * now[0, rank])
                reduce = int(1e9 * exposed[0, rank])
                log.write(
                    (step, start, start + forward + backward, 0, forward, backward, reduce, own, 0, 0, 4, int(step < 2))
                )
            now = ended
        for log in logs:
            log.close()
    return root / "known"


def test_a_study_recovers_the_machine_that_made_its_runs_and_tells_larger_ones(tmp_path: Path) -> None:
    job = replace(JOB, algorithm="rabenseifner")
    runs = study(tmp_path, job, MACHINE, NOISE, (1, 2, 4, 8, 16))
    noise = measured_noise([load(RunDir(runs / "20261123T210000Z-np16"))])
    assert noise.of_ranks == pytest.approx(NOISE.of_ranks, rel=0.5)
    assert noise.of_steps.std() == pytest.approx(0.02, rel=0.15)
    network = benchmark(tmp_path / "bench" / "allreduce-1.json", MACHINE, "rabenseifner")
    told = CliRunner().invoke(cli, ["simulate", str(runs), "--ranks", "64,1000", "--json"], catch_exceptions=False)
    made = json.loads(told.output)
    assert made["quality"] == "estimated" and network.name in made["links_source"]
    assert made["job"]["overlap"] == pytest.approx(0.5, abs=0.15)
    assert [each["ranks"] for each in made["checks"]] == [1, 2, 4, 8, 16]
    assert all(abs(each["error"]) < 0.04 for each in made["checks"])
    for step in made["steps"]:
        true = simulate(job, MACHINE, step["ranks"], NOISE, seed=5)
        assert step["step_s"] == pytest.approx(true.step_s, rel=0.05)
        assert step["transfer_s"] == pytest.approx(true.transfer_s, rel=0.1)
        assert step["imbalance_s"] == pytest.approx(true.imbalance_s, rel=0.35)
    by_algorithm = {name: each["step_s"] for name, each in made["algorithms"].items()}
    assert set(by_algorithm) == {"ring", "rabenseifner", "recursive-doubling", "tree", "hierarchical"}
    assert (
        by_algorithm["rabenseifner"] == made["steps"][-1]["step_s"] and by_algorithm["ring"] > by_algorithm["tree"] / 10
    )


def run_simulate(*words: object) -> Any:
    return CliRunner().invoke(cli, ["simulate", *map(str, words)])


def test_another_network_another_stage_and_mistakes(tmp_path: Path) -> None:
    runs = study(tmp_path, JOB, MACHINE, NO_NOISE, (1, 2), steps=8)
    unknown = run_simulate(runs, "--ranks", "1024")
    assert "nothing is known of the links between them" in str(unknown.exception)
    assert "need both" in str(run_simulate(runs, "--ranks", "8", "--latency", "2us").exception).replace("needs", "need")
    links = ["--latency", "2us", "--bandwidth", "12.5GB/s"]
    slow, fast = (
        json.loads(run_simulate(runs, "--ranks", "1024", *which, "--json").output)["steps"][0]["transfer_s"]
        for which in (["--latency", "200us", "--bandwidth", "100Mbit/s"], links)
    )
    assert slow > 20 * fast > 0
    stage3 = json.loads(run_simulate(runs, "--ranks", "1024", *links, "--stage", 3, "--json").output)
    assert stage3["job"]["stage"] == 3 and stage3["algorithms"] == {}
    figure = tmp_path / "steps.svg"
    shown = run_simulate(runs, "--ranks", "64,1024", *links, "--figure", figure)
    assert shown.output.startswith("Simulated, not measured: 1,024 ranks on 512 nodes")
    assert "<svg" in figure.read_text() and "exposed communication" not in figure.read_text()[:100]
    for wrong in (
        ["--latency", "2"],
        ["--bandwidth", "12GB"],
        ["--figure", tmp_path / "x.png"],
        ["--ranks", 2_000_000],
    ):
        assert run_simulate(runs, *wrong).exit_code != 0


LINKS = ["--latency", "2us", "--bandwidth", "12.5GB/s"]


def test_ranks_that_share_cores_do_not_drive_it() -> None:
    """The four ranks of these runs share two cores: a simulation driven by them takes twice as long on one rank."""
    told = run_simulate("tests/runs/mlp-mnist", "--ranks", "1,2", *LINKS)
    said = " ".join(told.output.split())
    assert "ranks waited for cores: 4 ranks (4 ranks share 2 cores of vm)" in said
    assert said.index("4 ranks share 2 cores") < said.index("Simulated steps and what")
    made = json.loads(run_simulate("tests/runs/mlp-mnist", "--ranks", "1,2", *LINKS, "--json").output)
    assert made["left_out"] == [4] and [check["ranks"] for check in made["checks"]] == [1], "one rank has no links"
    assert abs(made["checks"][0]["error"]) < 0.05
    assert made["steps"][1]["step_s"] == pytest.approx(0.0237, rel=0.1), "as measured on two ranks"
    only = " ".join(run_simulate("tests/runs/mlp-two-hosts", "--ranks", "64", *LINKS).output.split())
    assert "Do not rely on it: ranks waited for cores" in only and "other programs kept" in only


def test_an_efficiency_is_against_a_simulation_of_the_same_network(tmp_path: Path) -> None:
    runs = study(tmp_path, JOB, MACHINE, NO_NOISE, (1, 2), steps=8)
    made = json.loads(run_simulate(runs, "--ranks", "1,2,64", *LINKS, "--json").output)
    base, steps = made["baseline"], made["steps"]
    assert base["ranks"] == 1 and base["efficiency"] == 1 and steps[0]["step_s"] == base["step_s"]
    of_one = base["samples_per_s"]
    assert [step["efficiency"] for step in steps] == pytest.approx(
        [s["samples_per_s"] / s["ranks"] / of_one for s in steps]
    )
    said = " ".join(run_simulate(runs, "--ranks", "64", *LINKS).output.split())
    assert "efficiency against 1 rank simulated on the same network" in said
    alone = run_simulate(runs, "--ranks", "1", *LINKS).output
    assert alone.startswith("Simulated, not measured: 1 rank on 1 node takes ")


def test_a_batch_that_grows_with_the_ranks() -> None:
    refused = run_simulate("tests/runs/mlp-mnist", "--ranks", "100000", *LINKS).exception
    assert isinstance(refused, UserError) and "--batch-per-rank" in (refused.remedy or "")
    ended = " ".join(run_simulate("tests/runs/mlp-mnist", *LINKS).output.split())
    assert "512 samples of the global batch have nothing to do: --batch-per-rank" in ended
    words = ("tests/runs/mlp-mnist", *LINKS, "--json", "--batch-per-rank")
    of_batch = {batch: json.loads(run_simulate(*words, batch).output)["steps"] for batch in (32, 256)}
    assert [step["ranks"] for step in of_batch[32]] == [1024, 4096, 16384, 65536]
    assert of_batch[32][-1]["samples"] == 65536 * 32
    # On 2 ranks the runs had 256 samples a rank: as many take as long, and an eighth shortens the passes alone.
    measured = json.loads(run_simulate("tests/runs/mlp-mnist", *LINKS, "--json", "--ranks", "2").output)["steps"][0]
    assert of_batch[256][0]["computation_s"] == pytest.approx(measured["computation_s"], rel=0.05)
    assert of_batch[32][0]["computation_s"] < 0.3 * measured["computation_s"]


def test_a_figure_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    done = run_simulate("tests/runs/mlp-mnist", *LINKS, "--figure", tmp_path / "none" / "x.svg")
    assert isinstance(done.exception, UserError) and "there is no folder" in done.exception.what and not done.output
    several = run_simulate("tests/runs", *LINKS).exception
    assert isinstance(several, UserError) and several.what.startswith("simulate needs runs of one job")


def test_a_plan_far_beyond_the_runs_shows_a_simulation_beside_the_fit(tmp_path: Path) -> None:
    runs = study(tmp_path, replace(JOB, algorithm="rabenseifner"), MACHINE, NOISE, (1, 2, 4, 8), steps=30)
    plain = CliRunner().invoke(cli, ["plan", str(runs), "--predict", "16", "--json"])
    assert json.loads(plain.output)["simulation"] is None
    without = CliRunner().invoke(cli, ["plan", str(runs), "--predict", "1024", "--json"])
    assert json.loads(without.output)["simulation"] is None, "nothing to drive it"
    benchmark(tmp_path / "bench" / "allreduce-1.json", MACHINE, "rabenseifner")
    told = CliRunner().invoke(cli, ["plan", str(runs), "--predict", "16,1024", "--json"])
    made = json.loads(told.output)["simulation"]
    assert [step["ranks"] for step in made["steps"]] == [1024] and made["quality"] == "estimated"
    said = CliRunner().invoke(cli, ["plan", str(runs), "--predict", "1024"])
    assert "Simulated, not measured: 1,024 ranks" in said.output

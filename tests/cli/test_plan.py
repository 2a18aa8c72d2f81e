"""`hpc-train plan`: the essay's case, budgets and their reasons, tables of all kinds, and runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.models.measurement_table import read_table
from hpc_train.analysis.models.predict import curve_sizes, predict
from hpc_train.analysis.planning.budget import Work, read_network, samples_work, steps_work
from hpc_train.analysis.planning.memory import RankMemory
from hpc_train.analysis.planning.plan import Limits, make_plan
from hpc_train.analysis.planning.power import power
from hpc_train.analysis.report.notes.plan import why_not_larger, why_not_smaller
from hpc_train.analysis.report.sections.next_run import next_run
from hpc_train.analysis.report.sections.plan import answer, short_answer
from hpc_train.analysis.runs.load import load_all
from hpc_train.analysis.scaling.compare import compare
from hpc_train.cli.main import cli
from hpc_train.cli.plan import duration_s, joules
from hpc_train.core.errors import UserError
from tests.published import all_series
from tests.synthetic import Recipe, write_run

WEAK = "ranks,samples_per_s,ranks_per_node\n1,100,4\n2,199,4\n4,392,4\n8,740,4\n16,1430,4\n32,2780,4\n"


def table(folder: Path, text: str) -> Path:
    path = folder / "scaling.csv"
    path.write_text(text)
    return path


def run_plan(*words: str | Path) -> Any:
    return CliRunner().invoke(cli, ["plan", *map(str, words)], catch_exceptions=True)


def test_the_essays_case(tmp_path: Path) -> None:
    """10^10 records at 1 s each are 10^10 s on one computer, 10^8 s on 100 that share them."""
    path = table(tmp_path, "ranks,samples_per_s,ranks_per_node\n1,1,1\n2,2,1\n4,4,1\n8,8,1\n")
    result = run_plan("--table", path, "--samples", "1e10", "--predict", "1,100", "--json")
    assert result.exit_code == 0
    one, hundred = json.loads(result.output)["options"]
    assert one["time_s"] == pytest.approx(1e10, rel=1e-3)
    assert hundred["time_s"] == pytest.approx(1e8, rel=0.02)
    low, high = hundred["time_interval_s"]
    assert low <= 1e8 <= high and hundred["extrapolation"] == 12.5
    told = run_plan("--table", path, "--samples", "1e10", "--predict", "100").output
    years = re.match(r"100 nodes \(100 ranks\): ([\d.]+) years \(", told)
    assert years is not None and float(years[1]) == pytest.approx(1e8 / (365.25 * 86400), rel=0.02)


@pytest.mark.parametrize("shard_within", ["job", "node", 16])
def test_no_size_is_chosen_on_which_a_rank_lacks_memory(tmp_path: Path, shard_within: str | int) -> None:
    """16 GB of state, divided by 16 ranks on 4 nodes."""
    foreseen = predict(read_table(table(tmp_path, WEAK)))
    memory = RankMemory(2e9, 16e9, 5.1e9, 16, 4, shard_within)
    assert memory.at(16) == 2e9
    if shard_within == "job":
        assert [memory.at(ranks) for ranks in (4, 8, 32)] == [5e9, 3e9, 1.5e9]
        assert [memory.room(ranks) for ranks in (1, 4, 64)] == [20.4e9, 5.1e9, 5.1e9]
    if shard_within == "node":
        assert memory.at(64) == 2e9 == memory.at(4), "more nodes divide nothing further"
    if shard_within == 16:
        assert memory.at(8) == 3e9 and memory.at(64) == 2e9
    few = RankMemory(2e9, 16e9, 2.5e9, 16, 4, shard_within)
    made = make_plan(foreseen, samples_work(foreseen.measurements, 1e8), Limits(max_nodes=4), memory=few)
    broken = {option.nodes: [each.name for each in option.broken] for option in made.options}
    lacking = {"job": {1, 2}, "node": set(), 16: {1, 2}}[shard_within]
    assert {nodes for nodes, names in broken.items() if names == ["memory"]} == lacking
    assert made.chosen is not None and made.chosen.nodes == 4
    if lacking:
        cheapest = make_plan(
            foreseen, samples_work(foreseen.measurements, 1e8), Limits(max_nodes=4, deadline_s=1e9), memory=few
        )
        assert cheapest.chosen is not None and cheapest.chosen.nodes == 3
        assert "2 nodes: may break the memory of a rank, 2.50 GB (it would take 3.00 GB)" in why_not_smaller(cheapest)
        none = make_plan(
            foreseen, samples_work(foreseen.measurements, 1e8), memory=RankMemory(2e9, 0.0, 4e8, 16, 4, "job")
        )
        assert none.chosen is None


def test_limits_and_the_reasons_for_no_other_number(tmp_path: Path) -> None:
    foreseen = predict(read_table(table(tmp_path, WEAK)))
    work = samples_work(foreseen.measurements, 1e8)
    freely = make_plan(foreseen, work)
    assert freely.chosen is not None and freely.chosen.nodes == 32  # almost perfect scaling: as far as it looks
    assert "4 times the largest measured" in why_not_larger(freely) and "slower" in why_not_smaller(freely)
    in_time = make_plan(foreseen, work, Limits(deadline_s=14 * 3600.0))
    assert in_time.chosen is not None and in_time.chosen.nodes == 6
    assert why_not_smaller(in_time).startswith("4 nodes: breaks the deadline of 14.0 h (19.0 h at least)")
    assert "faster for" in why_not_larger(in_time)
    assert in_time.chosen.time_s == pytest.approx(1e8 / 2110, rel=0.03)
    assert in_time.chosen.node_hours == pytest.approx(6 * in_time.chosen.time_s / 3600)
    cheap = make_plan(foreseen, work, Limits(node_hours=76.5))
    assert cheap.chosen is not None and cheap.chosen.nodes < 8 and "budget of 76.5 node-hours" in why_not_larger(cheap)
    never = make_plan(foreseen, work, Limits(deadline_s=60.0))
    assert never.chosen is None and short_answer(never) is None and answer(never)[0].startswith("Nothing to ask for")
    with pytest.raises(UserError, match="a limit needs the amount of work"):
        make_plan(foreseen, None, Limits(deadline_s=60.0))
    with pytest.raises(UserError, match="no energy was measured"):
        make_plan(foreseen, work, Limits(energy_j=1.0))


def test_a_measured_size_is_planned_as_it_was_measured() -> None:
    """These runs took longer on 4 ranks than on 2, which no model of the sizes says."""
    made = json.loads(run_plan("tests/runs/mlp-mnist", "--steps", "1000", "--json").output)
    measured = {each["ranks"]: each["step_s"] for each in made["measured"]}
    assert measured[4] > 1.3 * measured[2]
    assert made["ranks"] == 2 and not made["is_forecast"] and [each["ranks"] for each in made["options"]] == [1, 2, 4]
    for option in made["options"]:
        low, high = option["time_interval_s"]
        assert not option["is_forecast"] and option["time_s"] == pytest.approx(1000 * measured[option["ranks"]])
        assert low < option["time_s"] < high
    joules = {option["ranks"]: option["energy_j"] for option in made["options"]}
    group = compare(load_all([Path("tests/runs/mlp-mnist")])).groups[0]
    for row in group.rows:
        assert row.joules_per_sample is not None
        assert joules[row.size] == pytest.approx(1000 * row.global_batch * row.joules_per_sample)
    first, second = made["answer"][:2]
    assert first.startswith("Ask for 2 ranks: 23.7 s (")
    contradicted = r"The mechanistic model contradicts the measurements: 33.4 ms a step on 4 ranks, for which"
    contradicted += r" it says ([\d.]+) ms\."
    says = re.match(contradicted, second)
    assert says is not None and float(says[1]) < 0.5 * 33.4
    assert made["why_not_larger"] == "4 ranks: measured to be no faster"


def test_between_and_beyond_measured_sizes_the_fit_answers(tmp_path: Path) -> None:
    made = make_plan(predict(read_table(table(tmp_path, WEAK))), sizes=[8, 12, 64])
    assert [option.forecast.is_forecast for option in made.options] == [False, True, True] and made.is_forecast
    assert made.options[0].forecast.samples_per_s == pytest.approx(740)
    assert not make_plan(made.prediction, sizes=[8]).is_forecast


def test_measured_parts_of_a_node_are_considered() -> None:
    """Another model than the mechanistic one looks at several nodes; so far it had left out what one node measured."""
    made = json.loads(run_plan("tests/runs/mlp-mnist", "--steps", "1000", "--model", "amdahl", "--json").output)
    assert {1, 2, 4} <= {each["ranks"] for each in made["options"]} and made["ranks"] == 2
    assert made["why_not_smaller"] == "1 rank: 44% slower, and no fewer node-hours"


def test_a_deadline_that_even_the_lower_end_misses_is_broken() -> None:
    made = run_plan("tests/runs/mlp-mnist", "--steps", "1000", "--deadline", "1s")
    assert made.exit_code == 1
    told = " ".join(made.output.split())
    least = re.search(r"The fastest considered, 2 ranks, breaks the deadline of 1.00 s \(([\d.]+) s at least\)\.", told)
    assert least is not None and 1.0 < float(least[1]) < 20.0
    told = " ".join(run_plan("tests/runs/mlp-mnist", "--steps", "1000", "--deadline", "20s").output.split())
    assert "2 ranks, may break the deadline of 20.0 s (up to " in told


def test_a_job_that_stops_scaling_is_given_its_knee(tmp_path: Path) -> None:
    rows = [f"{n},{(8.0 / n + 0.05 * n):.6g},4,strong,512" for n in (1, 2, 4, 8, 16, 32)]
    text = "\n".join(["ranks,step_s,ranks_per_node,scaling,global_batch", *rows, ""])
    measurements = read_table(table(tmp_path, text))
    made = make_plan(predict(measurements), steps_work(measurements, 1000), Limits(max_nodes=16))
    assert made.chosen is not None and made.chosen.nodes <= 3
    assert why_not_larger(made) and why_not_smaller(made)
    assert short_answer(made) in (f"ask for {made.chosen.nodes} nodes", "ask for 1 node")


def test_joules_are_split_into_nodes_and_samples(tmp_path: Path) -> None:
    sizes = [(4, 0.10), (8, 0.12), (16, 0.15), (32, 0.16)]
    rows = [f"{n},{t},4,{64 * n},{300 * n / 4 * t + 0.5 * 64 * n:.6f}" for n, t in sizes]
    measurements = read_table(
        table(tmp_path, "\n".join(["ranks,step_s,ranks_per_node,global_batch,joules", *rows, ""]))
    )
    found = power(measurements)
    assert found is not None and found.waiting_w == pytest.approx(300, rel=0.01)
    assert (found.busy_w - found.waiting_w) / found.full_rate == pytest.approx(0.5, rel=0.01)
    made = make_plan(predict(measurements), samples_work(measurements, 1e7))
    option = made.options[1]
    assert option.nodes == 2 and option.energy_j == pytest.approx(300 * 2 * (option.time_s or 0) + 0.5e7, rel=1e-3)
    low, high = option.energy_interval_j or (0, 0)
    assert low < option.energy_j < high
    budget = make_plan(
        predict(measurements), samples_work(measurements, 1e7), Limits(energy_j=1.01 * (option.energy_j or 0))
    )
    assert budget.chosen is None or budget.chosen.energy_j < option.energy_j


def test_joules_that_the_model_of_power_contradicts_are_said(tmp_path: Path) -> None:
    text = "ranks,step_s,joules,ranks_per_node\n1,1,100,1\n2,.55,120,1\n4,.3,150,1\n8,.17,190,1\n"
    words = ("--table", table(tmp_path, text), "--steps", "1e6", "--energy", "35kWh")
    made = json.loads(run_plan(*words, "--json").output)
    joules_at = {each["nodes"]: each["energy_j"] for each in made["options"]}
    assert joules_at[4] < joules_at[6] < joules_at[8] < joules_at[12], "between and beyond as measured"
    told = " ".join(run_plan(*words).output.split())
    assert "The model of power contradicts the measured joules: on 8 nodes it tells 79% of them" in told
    assert "as the table says for this size" in told and told.index("contradicts") < told.index("Why:")


def test_joules_of_a_reports_table_are_those_of_a_run(tmp_path: Path) -> None:
    """scaling.csv has the joules of whole runs, beside joules_per_sample, from which a step's follow."""
    per_step = read_table(table(tmp_path, "ranks,step_s,global_batch,joules\n1,1,64,128\n2,1,128,512\n"))
    of_runs = "ranks,step_s,global_batch,joules,joules_per_sample\n1,1,64,9e6,2\n2,1,128,9e6,4\n"
    assert read_table(table(tmp_path, of_runs)).joules_per_step.tolist() == per_step.joules_per_step.tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpus,step_s\n1,2\n", "no column ranks among gpus, step_s"),
        ("ranks,time\n1,2\n", "neither a column step_s nor samples_per_s"),
        ("ranks,step_s\n", "no line of measurements"),
        ("ranks,step_s\n1,0\n", r"scaling.csv:2: step_s = 0, which is not a number above 0"),
        ("ranks,step_s\n1,1\n2,nan\n", r"scaling.csv:3: step_s = nan"),
        ("ranks,step_s\n1,1\n2,-3\n", r"step_s = -3"),
        ("ranks,step_s\n1,1\n2.5,3\n", r"ranks = 2.5, which is not a whole number above 0"),
        ("ranks,step_s\n1,1\n2\n", "1 cells under 2 columns"),
        ("ranks,step_s\n1,1\n2,\n", "an empty cell where a measurement is needed"),
        ("ranks,step_s,scaling\n1,1,weak\n2,1,strong\n", "weak and strong scaling in one table"),
        ("ranks,step_s,scaling\n1,1,up\n", "scaling = 'up'"),
        ("ranks,step_s,ranks_per_node\n1,1,4\n2,1,8\n", "ranks_per_node differs"),
        ("ranks,samples_per_s,joules\n1,1,4\n2,1,8\n", "joules are those of one step"),
        (
            "ranks,step_s,samples_per_s,global_batch\n1,0.5,128,64\n2,0.5,200,128\n",
            r"scaling.csv:3: samples_per_s = 200.0, but global_batch / step_s = 128 / 0.5 = 256.0",
        ),
        (
            "series,ranks,step_s,scaling\na,1,1,weak\nb,2,1,strong\n",
            r"scaling.csv: the column series names 2 of them \(a, b\), and a table is one",
        ),
        ("ranks,step_s,global_batch\n2,1,3\n4,0.5,3\n", r"scaling.csv:3: 4 ranks share a global batch of 3.00"),
        (
            "ranks,step_s,samples_per_s,scaling\n1,1,10,strong\n2,0.55,300,strong\n",
            r"scaling.csv:3: step_s x samples_per_s are 165 samples, and 10.0 in .*scaling.csv:2",
        ),
        ("ranks,step_s,samples_per_s\n1,1,\n2,,20\n", r"scaling.csv:3: samples_per_s where other lines have step_s"),
        ("ranks,step_s,ranks_per_node\n4,1,4\n", "cannot be fitted to 4 ranks: one size says nothing"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(read_table(table(tmp_path, text)))


def test_odd_tables_are_read_and_what_is_odd_is_said(tmp_path: Path) -> None:
    lines = ("16,1.3,4,a", "4,1.0,4,", "", "4,1.1,4,b", "8,1.2,4,", "6,1.15,4,", "")
    text = "\n".join(("# made elsewhere", "ranks, step_s, ranks_per_node, note", *lines))
    measurements = read_table(table(tmp_path, text))
    assert measurements.ranks.tolist() == [4, 6, 8, 16] and measurements.step_s[0] == pytest.approx(1.05)
    assert measurements.nodes(measurements.ranks).tolist() == [1, 2, 2, 4]
    told = " ".join(measurements.notes)
    assert "4 ranks: 2 lines, of which the mean is taken" in told
    assert measurements.weak and "weak scaling, since steps do not get shorter" in " ".join(measurements.assumed)
    assert "6 ranks do not fill whole nodes of 4" in told
    assert "No ranks_per_node" in " ".join(read_table(table(tmp_path, "ranks,step_s\n1,1\n2,1\n")).notes)


def test_what_a_table_leaves_open_is_told_at_the_top(tmp_path: Path) -> None:
    """Steps that halve are strong scaling, though no column says so."""
    halving = table(tmp_path, "ranks,step_s\n1,8\n2,4.1\n4,2.1\n")
    told = " ".join(run_plan("--table", halving, "--steps", "1000").output.split())
    assert told.index("Assumed: strong scaling, since steps get shorter") < told.index("Why: ")
    assert told.index("every rank is a node (the column ranks_per_node, or") < told.index("Why: ")
    # Eight steps of 8 s on one rank, and of 2.1 s on four: in weak scaling these would be four times the samples.
    made = json.loads(run_plan("--table", halving, "--steps", "8", "--predict", "1,4", "--json").output)
    assert [each["time_s"] for each in made["options"]] == pytest.approx([64, 8 * 2.1])
    stated = table(tmp_path, "ranks,step_s,ranks_per_node,global_batch\n1,8,1,64\n2,4.1,1,64\n4,2.1,1,64\n")
    assert "Assumed" not in run_plan("--table", stated, "--steps", "1000").output
    open_table = table(tmp_path, "ranks,step_s\n1,8\n2,6.8\n")
    with pytest.raises(UserError, match=r"step is 85.0% of that on 1 rank, which may be weak or strong") as asked:
        read_table(open_table)
    assert "Add a column scaling" in (asked.value.remedy or "")


def test_no_batch_is_made_up_for_a_table_that_states_none(tmp_path: Path) -> None:
    rates = table(tmp_path, "ranks,samples_per_s,ranks_per_node,scaling\n8,4e3,8,strong\n16,78e2,8,strong\n")
    refused = run_plan("--table", rates, "--steps", "1e5").exception
    assert isinstance(refused, UserError) and "does not say how many samples a step has" in refused.what
    assert "--samples" in (refused.remedy or "") and "global_batch" in (refused.remedy or "")
    told = " ".join(run_plan("--table", rates).output.split())
    assert "step (ms)" not in told and told.index("Assumed: any number of ranks divides the batch") < told.index("Why:")
    made = json.loads(run_plan("--table", rates, "--samples", "1e8", "--json").output)
    assert made["further_run"]["node_hours"] is None and {each["step_s"] for each in made["options"]} == {None}
    assert made["options"][0]["time_s"] == pytest.approx(1e8 / 4e3)
    steps = table(tmp_path, "ranks,step_s,ranks_per_node,scaling\n8,4,8,strong\n16,2.1,8,strong\n")
    refused = run_plan("--table", steps, "--samples", "1e5").exception
    assert isinstance(refused, UserError) and "--steps" in (refused.remedy or "")
    told = " ".join(run_plan("--table", steps, "--steps", "1e6").output.split())
    assert "For 1,000,000 steps, in the training loop" in told
    told = " ".join(run_plan("--table", steps, "--predict", "8").output.split())
    assert told.startswith("1 node (8 ranks): 4000 (") and "ms a step" in told and "samples/s" not in told
    both = table(tmp_path, "ranks,step_s,samples_per_s,ranks_per_node\n8,4,64,8\n16,2.1,122,8\n")
    told = " ".join(run_plan("--table", both, "--steps", "1e6").output.split())
    assert "1,000,000 steps of 256 samples" in told, "as the two columns imply"


@pytest.mark.parametrize("columns", ["global_batch", "samples_per_s"])
@pytest.mark.parametrize("weak", [True, False])
def test_batches_tell_the_kind_of_scaling(tmp_path: Path, columns: str, weak: bool) -> None:
    lines = []
    for ranks, step_s in ((1, 1.0), (2, 0.8), (4, 0.7)):
        batch = 64 * (ranks if weak else 1)
        lines.append(f"{ranks},{step_s},2,{batch if columns == 'global_batch' else batch / step_s}")
    read = read_table(table(tmp_path, "\n".join([f"ranks,step_s,ranks_per_node,{columns}", *lines, ""])))
    assert read.weak == weak and not read.assumed


def test_no_published_series_is_taken_for_the_other_kind(tmp_path: Path) -> None:
    """By its times alone: it is recognised, or asked about."""
    right = asked = 0
    for series in all_series():
        seconds = series.step_s / series.step_s.max()
        lines = [f"{n},{t:.9f}" for n, t in zip(series.ranks.tolist(), seconds.tolist(), strict=True)]
        try:
            read = read_table(table(tmp_path, "\n".join(["ranks,step_s", *lines, ""])))
        except UserError:
            asked += 1
        else:
            assert read.weak == series.weak, series.name
            right += 1
    assert right > 5 * asked


def test_a_rate_that_was_rounded_or_averaged_otherwise_is_no_contradiction(tmp_path: Path) -> None:
    text = "ranks,step_s,samples_per_s,global_batch\n1,0.5,130,64\n2,0.503,255,128\n4,0.51,,256\n"
    measured = read_table(table(tmp_path, text))
    assert measured.step_s.tolist() == [0.5, 0.503, 0.51] and measured.batch == 64


def test_the_network_file_is_read_for_the_runs_strategy(tmp_path: Path) -> None:
    fits = [
        {"strategy": "mpi", "ranks": 4, "nodes": 1, "alpha_s": 1e-6, "beta_s_per_byte": 1e-10},
        {"strategy": "mpi", "ranks": 8, "nodes": 2, "alpha_s": 2e-6, "beta_s_per_byte": 5e-10},
        {"strategy": "horovod", "ranks": 4, "nodes": 1, "alpha_s": 3e-6, "beta_s_per_byte": 2e-10},
        {"strategy": "mpi_bf16", "ranks": 4, "nodes": 1, "alpha_s": 4e-6, "beta_s_per_byte": 6e-11},
    ]
    path = tmp_path / "allreduce.json"
    path.write_text(json.dumps({"schema": 1, "kind": "allreduce", "fits": fits}))
    network = read_network(path, "mpi")
    assert (network.beta_inside_s_per_byte, network.beta_between_s_per_byte) == (1e-10, 5e-10)
    assert read_network(path).alpha_between_s is None
    compressed = read_network(path, "mpi_bf16")
    assert (compressed.alpha_inside_s, compressed.beta_inside_s_per_byte) == (4e-6, 1.2e-10), "of 16 bits on their way"
    assert read_network(path, "horovod_bf16") == read_network(path, "horovod"), "not measured with compression"
    one = table(tmp_path, "ranks,step_s,ranks_per_node\n4,0.1,4\n")
    result = run_plan("--table", one, "--network", path, "--gradient-bytes", "1e8", "--predict", "4", "--json")
    assert result.exit_code == 0 and json.loads(result.output)["model"] == "mechanistic"
    path.write_text("{}")
    with pytest.raises(UserError, match="no measurement of all-reduces"):
        read_network(path)


def test_runs_are_planned_from(tmp_path: Path) -> None:
    hosts = {1: ("a",), 2: ("a",), 4: ("a", "b"), 8: ("a", "b", "c", "d")}
    for size, names in hosts.items():
        write_run(tmp_path, Recipe(size=size, step_s=0.08 / size + 0.004, hosts=names, joules=50.0))
    result = run_plan(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    tree = json.loads(result.output)
    assert tree["ranks_per_node"] == 2 and tree["scaling"] == "strong" and tree["nodes"] >= 4
    assert [each["ranks"] for each in tree["measured"]] == [1, 2, 4, 8]
    assert tree["power"]["quality"] == "measured" and tree["options"][0]["energy_j"] is not None
    assert tree["work"]["steps"] == 210
    group = compare(load_all([tmp_path])).groups[0]
    shown = next_run(group, SectionGuard()).plan
    assert shown is not None and shown.chosen is not None and shown.chosen.nodes == tree["nodes"]
    drawn = shown.prediction.at(curve_sizes(shown.prediction))
    assert drawn[0].ranks == 1 and drawn[-1].ranks == 32 and sum(each.measured_s is not None for each in drawn) == 4
    to_loss = json.loads(run_plan(tmp_path, "--target-loss", "1.0", "--json").output)
    assert to_loss["work"]["steps"] < 210 and "training loss of 1" in to_loss["work"]["words"]
    text = run_plan(tmp_path, "--deadline", "1h").output
    assert text.startswith("Ask for 1 node (2 ranks): ") and "Not more: " in text and "Models, tested on" in text
    assert isinstance(run_plan(tmp_path, "--target-loss", "0.001").exception, UserError)


def test_the_benchmark_beside_runs_of_one_node_says_what_a_second_costs(tmp_path: Path) -> None:
    for size in (1, 2):
        write_run(tmp_path, Recipe(size=size, step_s=0.08 / size + 0.004, joules=None))
    alone = json.loads(run_plan(tmp_path, "--json").output)
    assert alone["nodes"] == 1 and "what a second node costs was not measured" in alone["why_not_larger"]
    refused = run_plan(tmp_path, "--predict", "8").exception
    assert isinstance(refused, UserError) and "nothing is known of the cost of a second one" in refused.what
    fits = [
        {"strategy": "horovod", "ranks": ranks, "nodes": nodes, "alpha_s": 1e-5, "beta_s_per_byte": 1e-9}
        for ranks, nodes in ((2, 1), (4, 2))
    ]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "allreduce-a.json").write_text(json.dumps({"schema": 1, "kind": "allreduce", "fits": fits}))
    with_bench = json.loads(run_plan(tmp_path, "--predict", "4,8", "--json").output)
    assert [each["nodes"] for each in with_bench["options"]] == [2, 4]
    assert any("allreduce-a.json, horovod" in warning for warning in with_bench["warnings"])
    assert all(each["energy_j"] is None for each in with_bench["options"])


def test_larger_batches_take_more_samples() -> None:
    work = Work(samples=1e6, steps=1e3, words="")
    assert work.at(64) == 1e6 + 64e3 and work.at(6400) == 1e6 + 6.4e6


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21600), ("1d12h", 129600), ("90min", 5400), ("2:30:00", 9000), ("1-00:00:00", 86400)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


def test_amounts_that_are_none_are_refused(tmp_path: Path) -> None:
    assert joules("40kWh") == 144e6 and joules("3.6 MJ") == 3.6e6
    path = table(tmp_path, WEAK)
    for option, value, words in (
        ("--deadline", "soon", "write a time"),
        ("--energy", "40", "write an energy"),
        ("--node-hours", "-1", "-1.0 is not in the range 0<x"),
        ("--predict", "a,b", "write numbers of ranks"),
    ):
        result = run_plan("--table", path, option, value)
        assert result.exit_code == 2 and words in result.output
    assert isinstance(run_plan().exception, UserError) and isinstance(
        run_plan(path, "--table", path).exception, UserError
    )


def test_help_and_reports_do_not_load_scipy() -> None:
    code = (
        "import sys, click.testing, hpc_train.cli.main as c, hpc_train.analysis.report.report\n"
        "assert click.testing.CliRunner().invoke(c.cli, ['plan', '--help']).exit_code == 0\n"
        "import hpc_train.analysis.report.sections.plan\n"
        "assert 'scipy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_intervals_grow_beyond_the_data(tmp_path: Path) -> None:
    ahead = predict(read_table(table(tmp_path, WEAK))).at([16, 32, 64, 256])
    widths = [np.log(each.step_interval_s[1] / each.step_interval_s[0]) for each in ahead]
    assert widths[1] < widths[2] < widths[3] and ahead[1].measured_s == pytest.approx(32 / 2780)

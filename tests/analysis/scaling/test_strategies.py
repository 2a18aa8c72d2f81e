"""Strategies side by side on equal work: numbers beside hand-computed ones, and what is missing stays missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import Facts
from hpc_train.analysis.report.model import Section
from hpc_train.analysis.report.notes.scaling import scaling_notes
from hpc_train.analysis.report.notes.strategies import comparison_notes
from hpc_train.analysis.report.renderers.files import summary_tree
from hpc_train.analysis.report.sections.strategies import strategy_section
from hpc_train.analysis.runs.load import load, load_all
from hpc_train.analysis.scaling.compare import compare
from hpc_train.analysis.scaling.strategies import Comparison, compare_strategies, traffic
from hpc_train.core.errors import UserError
from tests.analysis.rendered import Page, notes, page, printed, report_and_facts, section_of, table
from tests.synthetic import SHARES, Recipe, write_run

GRADIENTS = 4 * 7850  # bytes of the synthetic model
SERVER = Recipe(size=4, strategy="parameter_server", servers=1, stamp="20261123T230000Z")
MPI = Recipe(size=4, strategy="mpi", stamp="20261123T220000Z")


def side_by_side(root: Path, *recipes: Recipe) -> Comparison:
    for recipe in recipes:
        write_run(root, recipe)
    (comparison,) = compare_strategies(compare(load_all([root])).groups)
    return comparison


def section(made: Comparison) -> Section:
    return strategy_section(made, False, SectionGuard())


def cells(made: Comparison, id: str, strategy: str) -> dict[str, str]:
    """The row of `strategy` in one of the two tables, by column title."""
    found = table(section(made), id)
    (row,) = [row for row in found.rows if row[0] == strategy]
    return dict(zip([column.title for column in found.columns], row, strict=True))


# ---------------------------------------------------------------------------------------------- parameter server


def test_a_parameter_server_is_told_by_its_workers_and_its_servers_apart(tmp_path: Path) -> None:
    run = load(write_run(tmp_path, replace(SERVER, size=5, servers=2, step_s=0.020, servers_busy=0.3)))
    assert run.num_servers == 2 and run.incomplete is None
    assert run.summary.phase_share == pytest.approx(SHARES, abs=1e-4)
    assert run.summary.num_samples == 210 * 120
    (row,) = compare([run]).groups[0].rows
    assert row.servers_busy == pytest.approx(0.3, abs=1e-4)
    assert sum(row.phase_s.values()) == pytest.approx(0.020, rel=0.02)


def test_a_step_of_a_parameter_server_takes_what_its_workers_take(tmp_path: Path) -> None:
    directory = write_run(tmp_path, replace(SERVER, size=2, noise=0.0))
    header, *lines = directory.timings(1).read_text().splitlines()
    slower = [line.split(",") for line in lines]
    for each in slower:
        each[6] = str(int(each[6]) + 5_000_000)  # the server waits 5 ms more
    directory.timings(1).write_text("\n".join([header, *(",".join(each) for each in slower), ""]))
    run = load(directory)
    assert run.summary.step_s == pytest.approx(0.010)
    assert compare([run]).groups[0].rows[0].servers_busy == pytest.approx(2.5 / 15, abs=1e-4)


def test_the_servers_count_in_the_efficiency_and_are_shown(tmp_path: Path) -> None:
    made, facts = report_and_facts(tmp_path, replace(SERVER, size=2), replace(SERVER, step_s=0.005))
    (group,) = facts.scaling.groups
    assert group.rows[1].speedup == pytest.approx(2.0, rel=0.02)
    assert group.rows[1].efficiency == pytest.approx(1.0, rel=0.02)  # twice as fast on 4 ranks as on 2
    shown = section_of(group)
    scaling, phases = table(shown, "scaling"), table(shown, "phases")
    assert [row[0] for row in scaling.rows] == ["1+1", "3+1"]
    assert phases.columns[-1].title == "servers busy" and phases.rows[0][-1] == "25.0%"
    assert "workers' time" in phases.title
    assert notes(shown, "servers")
    assert "3+1" in printed(made) and "3+1" in Page(page(made, tmp_path)).text


def test_a_run_whose_servers_leave_nobody_to_train_is_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path, replace(SERVER, size=2))
    text = directory.config.read_text().replace("servers = 1", "servers = 2")
    directory.config.write_text(text)
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(directory.config) in error.value.what and "reduce.servers = 2" in error.value.what


def test_a_parameter_server_without_timings_of_its_workers_is_incomplete(tmp_path: Path) -> None:
    directory = write_run(tmp_path, replace(SERVER, size=2))
    directory.timings(0).unlink()
    run = load(directory)
    assert run.incomplete is not None and "no timings of rank 0" in run.incomplete and run.summary.step_s is None


def test_weak_scaling_counts_the_workers_batches(tmp_path: Path) -> None:
    weak = [replace(recipe, global_batch=None, batch_per_rank=30) for recipe in (Recipe(size=4), SERVER)]
    made = side_by_side(tmp_path, *weak)
    assert [entry.row.global_batch for entry in made.entries] == [120, 90]
    assert made.entries[1].ratio == pytest.approx(0.75, rel=0.02)  # the same step, three quarters of the samples
    assert any(
        "global batches differ (horovod 120, parameter server (3+1) 90)" in note for note in comparison_notes(made)
    )


# ---------------------------------------------------------------------------------------------- equal work


@pytest.mark.parametrize(
    ("recipe", "volume", "each_way", "is_least"),
    [
        (Recipe(size=4), 1.5 * GRADIENTS, 1.5 * GRADIENTS, False),
        (Recipe(size=1), 0.0, 0.0, False),
        (Recipe(size=1, strategy="local"), 0.0, 0.0, False),
        (Recipe(size=4, reduce={"compression": "fp16"}), 0.75 * GRADIENTS, 0.75 * GRADIENTS, False),
        (Recipe(size=4, reduce={"adasum": True}), 1.5 * GRADIENTS, 1.5 * GRADIENTS, True),
        (Recipe(size=2, strategy="mpi"), 1.0 * GRADIENTS, 1.0 * GRADIENTS, True),
        (Recipe(size=8, strategy="sharded"), 1.75 * GRADIENTS, 1.75 * GRADIENTS, False),
        (Recipe(size=4, strategy="sharded", reduce={"stage": 3}), 2.25 * GRADIENTS, 2.25 * GRADIENTS, False),
        (
            Recipe(size=4, strategy="sharded", reduce={"stage": 3, "shard_within": 2}),
            2.0 * GRADIENTS,
            2.0 * GRADIENTS,
            False,
        ),
        (replace(SERVER, size=4, servers=1), 6.0 * GRADIENTS, 3.0 * GRADIENTS, False),
        (replace(SERVER, size=5, servers=2), 3.0 * GRADIENTS, 1.5 * GRADIENTS, False),
        (replace(SERVER, size=5, servers=4), 2.0 * GRADIENTS, 1.0 * GRADIENTS, False),  # the worker is the busiest
    ],
)
def test_the_communication_volume_by_theory(
    tmp_path: Path, recipe: Recipe, volume: float, each_way: float, is_least: bool
) -> None:
    (group,) = compare([load(write_run(tmp_path, recipe))]).groups
    theory = traffic(group.rows[0], group.keys)
    assert theory is not None
    told = (theory.volume_bytes, theory.each_way_bytes, theory.is_least)
    assert told == (pytest.approx(volume), pytest.approx(each_way), is_least)


def test_strategies_stand_side_by_side_at_each_number_of_ranks(tmp_path: Path) -> None:
    held = {1: [62800], 4: [62800] * 4}
    recipes = [
        Recipe(size=1, step_s=0.030, meta={"optimizer_bytes": held[1]}),
        Recipe(size=4, step_s=0.010, meta={"optimizer_bytes": held[4]}),
        replace(MPI, step_s=0.0125, meta={"optimizer_bytes": held[4]}),
        replace(SERVER, step_s=0.020, shares={**SHARES, "data": 0.0, "reduce": 0.2}),
        Recipe(size=4, strategy="sharded", step_s=0.010, meta={"optimizer_bytes": [15700] * 4}, stamp="20261123T2330Z"),
    ]
    made = side_by_side(tmp_path, *recipes)
    assert made.reference == "horovod" and made.sizes == [4]
    assert [(e.strategy, e.row.size) for e in made.entries] == [
        ("horovod", 1),
        ("horovod", 4),
        ("mpi", 4),
        ("sharded", 4),
        ("parameter server", 4),
    ]
    ratios = [entry.ratio for entry in made.entries]
    assert ratios[:2] == [1.0, 1.0] and ratios[2:] == pytest.approx([0.8, 1.0, 0.5], rel=0.02)
    for entry in made.entries[2:]:
        assert entry.ratio_interval is not None and entry.ratio is not None
        assert entry.ratio_interval[0] <= entry.ratio <= entry.ratio_interval[1]
    speed, work = section(made).tables
    assert speed.title == "Strategies on equal work (global batch 120, 210 steps)"
    server = cells(made, "strategies", "parameter server")
    assert (server["ranks"], server["speed vs horovod"], server["exposed"]) == ("3+1", "0.50x", "20.0%")
    assert {row[5] for row in speed.rows[:2]} == {"reference"}
    assert [row[2:4] for row in work.rows] == [
        ("0 B", "62.8 kB"),
        ("47.1 kB", "62.8 kB"),
        ("at least 47.1 kB", "62.8 kB"),
        ("47.1 kB", "15.7 kB"),
        ("188 kB", "missing"),
    ]
    assert work.rows[0][4:] == ("0.3100000", "91.00%")
    assert comparison_notes(made) == [
        "Final losses agree within 1e-05 relative at 4 ranks.",
        "Optimizer state missing for parameter server (3+1): meta.json states no optimizer_bytes.",
    ]


def test_the_report_leads_with_the_strategies_and_leaves_no_run_alone(tmp_path: Path) -> None:
    recipes = (Recipe(size=4, step_s=0.010), replace(MPI, step_s=0.0125), replace(SERVER, step_s=0.020))
    made, facts = report_and_facts(tmp_path, *recipes)
    assert made.headlines[0] == (
        "4 ranks on equal work, speed against horovod (95% intervals within one run):"
        f" horovod {_ms(facts)} ms a step, mpi 0.80x (0.79-0.80), parameter server (3+1) 0.50x (0.50-0.50)"
    )
    assert not made.notes  # nothing is left without a comparison
    parsed = Page(page(made, tmp_path))
    assert not parsed.problems and not parsed.open
    labels = [value for tag, name, value in parsed.attributes if tag == "svg" and name == "aria-label"]
    times, moved = [label for label in labels if label.startswith("Strategies on equal work")]
    assert "parameter server (3+1) on 4 ranks: computing" in times and "exposed communication" in times
    assert "parameter server (3+1) on 4 ranks: 188 kB" in moved and "≥ 47.1 kB" in moved
    assert "each of S servers" in " ".join(printed(made).split()) and "Halve it" in parsed.text
    (strategies,) = summary_tree(made)["strategies"]
    assert strategies["reference"] == "horovod" and strategies["config"]["train.global_batch"] == 120
    horovod, mpi, server = strategies["rows"]
    assert mpi["ratio"] == pytest.approx(0.8, rel=0.02) and mpi["ratio_low"] < mpi["ratio"] < mpi["ratio_high"]
    assert (server["volume_bytes"], server["each_way_bytes"]) == (6 * GRADIENTS, 3 * GRADIENTS)
    assert (horovod["ratio"], horovod["optimizer_bytes"], mpi["volume_is_least"]) == (1.0, None, True)
    json.dumps(summary_tree(made), allow_nan=False)


def _ms(facts: Facts) -> str:
    return cells(facts.strategies[0], "strategies", "horovod")["step (ms)"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_cell_of_the_strategies_is_cut_short(tmp_path: Path, width: int) -> None:
    measures = {"loss": 0.25, "accuracy": 0.91}
    recipes = [Recipe(size=4), MPI, SERVER, replace(SERVER, reduce={"asynchronous": True}, stamp="20261123T2340Z")]
    made, facts = report_and_facts(tmp_path, *(replace(recipe, test=measures) for recipe in recipes))
    text = printed(made, width)
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
    for each in section(facts.strategies[0]).tables:
        for row in each.rows:
            assert all(word in text for cell in row for word in cell.split()), row
            if width >= 80:  # the numbers of a row stand on one line
                assert any(
                    " ".join(row[1:]).split() == line.split()[-len(" ".join(row[1:]).split()) :]
                    for line in text.splitlines()
                ), row


def test_strategies_without_a_common_number_of_ranks_have_no_ratio(tmp_path: Path) -> None:
    made, facts = report_and_facts(tmp_path, Recipe(size=1), replace(MPI, size=2))
    assert all(entry.ratio is None for entry in facts.strategies[0].entries if not entry.is_reference)
    assert "No ratio: no number of ranks" in " ".join(printed(made).split())
    assert not any("equal work" in line for line in made.headlines)
    page(made, tmp_path)


def test_one_rank_alone_does_not_lead_the_report(tmp_path: Path) -> None:
    local = Recipe(size=1, strategy="local", stamp="20261123T220000Z")
    made, facts = report_and_facts(tmp_path, Recipe(size=1), Recipe(size=2, step_s=0.006), local)
    assert facts.strategies[0].entries[1].ratio == pytest.approx(1.0, rel=0.02)
    assert [each.label.partition(" ")[0] for each in made.sections] == ["softmax-mnist", "softmax-mnist", "Strategies"]
    assert made.headlines[0].startswith("softmax-mnist (reduce.strategy = horovod): 2 ranks: 1.6")


def test_an_incomplete_run_is_no_reference_and_jobs_that_differ_elsewhere_are_not_side_by_side(tmp_path: Path) -> None:
    made = side_by_side(tmp_path / "a", Recipe(size=4, complete=False), MPI)
    assert [entry.ratio for entry in made.entries] == [None, None]
    assert any("incomplete" in note for note in notes(section(made)))
    for recipe in (Recipe(size=4), replace(MPI, global_batch=60)):
        write_run(tmp_path / "b", recipe)
    found = compare(load_all([tmp_path / "b"]))
    assert not compare_strategies(found.groups)
    assert any("train.global_batch differs: 120 | 60" in note for note in scaling_notes(found))
    assert any("same job on another number of ranks" in note for note in scaling_notes(found))


def test_what_else_sets_strategies_apart_is_named(tmp_path: Path) -> None:
    recipes = [
        Recipe(size=4),
        Recipe(size=4, reduce={"compression": "fp16"}, stamp="20261123T211000Z", meta={"cpu_model": "Xeon"}),
        SERVER,
        replace(SERVER, reduce={"asynchronous": True}, stamp="20261123T231000Z", steps=110),
    ]
    loaded = {"python": "3.12.4", "torch": "2.10.0", "mpi4py": "4.1.0"}  # and no Horovod
    recipes[2:] = [replace(recipe, meta={"versions": loaded}) for recipe in recipes[2:]]
    made = side_by_side(tmp_path, *recipes)
    assert [entry.strategy for entry in made.entries] == [
        "horovod",
        "horovod fp16",
        "parameter server",
        "parameter server asynchronous",
    ]
    notes = " ".join(comparison_notes(made))
    assert "CPU: AMD EPYC 7763 64-Core Processor (horovod, parameter server, parameter server asynchronous)" in notes
    assert "Xeon (horovod fp16)" in notes
    assert "steps: 210 (horovod, horovod fp16, parameter server); 110 (parameter server asynchronous)" in notes
    assert "version of" not in notes
    assert "110 or 210 steps" in table(section(made), "strategies").title
    labels = [group.label for group in compare(load_all([tmp_path])).groups]
    assert "softmax-mnist (reduce.strategy = horovod, reduce.compression = fp16)" in labels
    assert "softmax-mnist (reduce.strategy = parameter_server, reduce.asynchronous = True)" in labels


@pytest.mark.parametrize(("loss", "agrees"), [(0.31 * (1 + 9e-6), True), (0.31 * (1 - 1.2e-5), False), (0.5, False)])
def test_final_losses_that_differ_are_told(tmp_path: Path, loss: float, agrees: bool) -> None:
    made = side_by_side(tmp_path, Recipe(size=4), replace(MPI, loss=loss), SERVER)
    (note,) = [note for note in comparison_notes(made) if "inal losses" in note]
    if agrees:
        assert note == "Final losses agree within 1e-05 relative at 4 ranks."
    else:
        assert note == (
            "4 ranks: final losses differ by more than 1e-05 relative from horovod's 0.31:"
            f" mpi {loss:.7g}; the others agree."
        )


def test_a_loss_that_differs_by_design_says_so_and_nan_agrees_with_nothing(tmp_path: Path) -> None:
    made = side_by_side(tmp_path, Recipe(size=4), replace(SERVER, reduce={"asynchronous": True}, loss=0.4))
    assert any("parameter server (3+1) 0.4 (as asynchronous updates may)." in note for note in comparison_notes(made))
    runs = [write_run(tmp_path / "nan", recipe) for recipe in (Recipe(size=4), MPI)]
    for run in runs:
        run.metrics.write_text("step,loss\n0,2.5\n10,nan\n")
        run.summary.write_text('{"complete": true, "loss": null}')
    (made,) = compare_strategies(compare(load_all([tmp_path / "nan"])).groups)
    assert any("differ" in note and "mpi nan" in note for note in comparison_notes(made))


@pytest.mark.parametrize("held", ["many", [1, 2], [1, 2, 3, -4], [1, 2, 3, "4"], [1, 2, 3, None], None])
def test_odd_counts_are_missing_and_never_zero(tmp_path: Path, held: Any) -> None:
    odd = {"optimizer_bytes": held, "num_parameters": held}
    made = side_by_side(tmp_path, Recipe(size=4), replace(MPI, meta=odd))
    mpi = made.entries[1]
    assert (mpi.traffic, mpi.optimizer_bytes) == (None, None)
    row = cells(made, "strategies-traffic", "mpi")
    assert (row["communication volume"], row["optimizer state"]) == ("missing", "missing")
    assert any("Communication volume missing for mpi:" in note for note in comparison_notes(made))
    assert any("Optimizer state missing for horovod, mpi:" in note for note in comparison_notes(made))

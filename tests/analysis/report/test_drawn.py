"""What each figure draws, read back: bars, lines, intervals and cells have the values of the facts that they show."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hpc_train.analysis.models.predict import curve_sizes, predict
from hpc_train.analysis.planning.budget import measurements_of
from hpc_train.analysis.planning.plan import Limits, make_plan
from hpc_train.analysis.report.allreduce import paint
from hpc_train.analysis.report.facts import Facts, gather
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.arrivals import arrivals_plot
from hpc_train.analysis.report.plots.canvas import BLUE, GREY, styled
from hpc_train.analysis.report.plots.counts import confusion_plot, scatter_plot
from hpc_train.analysis.report.plots.efficiency import efficiency_plot
from hpc_train.analysis.report.plots.energy import energy_by_phase_plot, energy_by_size_plot, energy_by_speedup_plot
from hpc_train.analysis.report.plots.forecast import forecast_plot
from hpc_train.analysis.report.plots.loss import loss_plot
from hpc_train.analysis.report.plots.memory import memory_plot
from hpc_train.analysis.report.plots.rank_phases import rank_phases_plot
from hpc_train.analysis.report.plots.speedup import speedup_plot
from hpc_train.analysis.report.plots.step_series import step_distribution_plot, step_series_plot
from hpc_train.analysis.report.plots.step_time import step_share_plot, step_time_plot
from hpc_train.analysis.report.plots.strategies import strategy_bytes_plot, strategy_times_plot
from hpc_train.analysis.report.plots.target import target_plot
from hpc_train.analysis.report.plots.validation import validation_plot
from hpc_train.analysis.runs.memory import peak_memory
from hpc_train.analysis.runs.step_quantiles import step_quantiles
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import fitted
from hpc_train.core.allreduce_times import Row as Transfer
from hpc_train.core.formatting import percent
from hpc_train.core.timing_log import PHASES
from tests.laws import Laws, Slow, write
from tests.synthetic import Recipe, write_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEMORY = {"peak_anonymous_bytes": [3e9, 2e9], "rank_room_bytes": 8e9}
LAWS = Laws(
    name="job",
    steps=130,
    noise=0.02,
    serial=0.03,
    ranks_per_host=2,
    message_bytes=4e5,
    idle_w={"package-0": 60.0, "dram": 8.0},
    meta=MEMORY,
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """1 to 8 ranks, twice each, rank 5 a fifth slower at the largest size."""
    root = tmp_path_factory.mktemp("drawn")
    for ranks in (1, 2, 4, 8):
        for seed in (0, 1):
            slow = (Slow(5, 1.2),) if ranks == 8 else ()
            write(root, replace(LAWS, ranks=ranks, seed=seed, stamp=f"20261123T21000{seed}Z", slow=slow))
    return gather([root])


@pytest.fixture(scope="module")
def group(facts: Facts) -> Group:
    (only,) = facts.scaling.groups
    return only


@contextmanager
def painted(plot: Plot | None) -> Iterator["Axes"]:
    assert plot is not None
    with styled((4.4, 3.0), 9, {}) as figure:
        axes = figure.subplots()
        plot.paint(axes)
        figure.draw_without_rendering()
        yield axes


def line(axes: "Axes", label: str) -> tuple[list[float], list[float]]:
    """(x, y) of the line with this label."""
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())  # type: ignore[arg-type]


def bars(axes: "Axes") -> dict[str, list[Any]]:
    """The bars of each labelled series."""
    return {str(each.get_label()): list(each) for each in axes.containers if hasattr(each, "patches")}


def spans(axes: "Axes") -> list[tuple[float, float, float]]:
    """(x, low, high) of the vertical lines of error bars and of `vlines`, by x."""
    found = []
    for lines in axes.collections:
        if hasattr(lines, "get_segments"):
            ends = [np.asarray(each) for each in lines.get_segments()]
            found += [(each[0, 0], each[0, 1], each[1, 1]) for each in ends if each[0, 0] == each[1, 0]]
    return sorted(found)


def close(values: Any) -> Any:
    return pytest.approx(np.asarray(values, dtype=float), rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------------------------------------- speed


def test_speedups_with_their_intervals_the_ideal_and_the_law(group: Group) -> None:
    rows, law = group.rows, fitted(group)
    assert law is not None
    with painted(speedup_plot(group)) as axes:
        (points,) = [each for each in axes.containers if each.get_label() == "measured, 95% interval"]
        assert points[0].get_xdata().tolist() == [1, 2, 4, 8]
        assert points[0].get_ydata() == close([row.speedup for row in rows])
        assert all(row.speedup_interval for row in rows[1:])
        expected = [(row.size, *(row.speedup_interval or (1.0, 1.0))) for row in rows]
        assert np.array(spans(axes)) == close(expected)
        assert line(axes, "ideal: T/N") == ([1, 2, 4, 8], [1, 2, 4, 8])
        sizes, curve = line(axes, f"Amdahl, {percent(law.serial)} serial")
        assert curve == close([law.speedup(size) for size in sizes]) and sizes[-1] == close(8)


def test_the_law_is_relative_to_a_baseline_of_two_ranks(tmp_path: Path) -> None:
    for size in (2, 4, 8):
        write_run(tmp_path, Recipe(size=size, step_s=0.1 * (0.2 + 0.8 * 2 / size), noise=1e-4, steps=60))
    (only,) = gather([tmp_path]).scaling.groups
    law = fitted(only)
    assert law is not None
    with painted(speedup_plot(only)) as axes:
        sizes, curve = line(axes, f"Amdahl, {percent(law.serial)} serial")
        assert (sizes[0], curve[0]) == (close(2), close(1))
        assert curve[-1] == pytest.approx(1 / (0.2 + 0.8 / 4), rel=0.02)
        assert line(axes, "ideal: T/N") == ([2, 4, 8], [1, 2, 4])


def test_an_incomplete_size_is_hollow_and_apart(tmp_path: Path) -> None:
    for recipe in (Recipe(), Recipe(size=2, step_s=0.006), Recipe(size=4, step_s=0.004, complete=False)):
        write_run(tmp_path, recipe)
    (only,) = gather([tmp_path]).scaling.groups
    with painted(speedup_plot(only)) as axes:
        shown = {str(each.get_label()): each[0] for each in axes.containers}
        assert shown["incomplete run"].get_xdata().tolist() == [4]
        assert shown["incomplete run"].get_ydata() == close([only.rows[2].speedup])
        assert to_hex(shown["incomplete run"].get_markerfacecolor()) == "#ffffff"
        assert shown["measured, 95% interval"].get_xdata().tolist() == [1, 2]


def test_time_of_a_step_by_phase_stands_on_the_phases_before_it(group: Group) -> None:
    heights = [{name: 1e3 * each for name, each in row.phase_s.items()} for row in group.rows]
    with painted(step_time_plot(group)) as axes:
        assert_stacked(axes, heights)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4", "8"]


def test_shares_of_a_step_add_up_to_the_whole(tmp_path: Path) -> None:
    for recipe in (Recipe(step_s=0.02, steps=40), Recipe(size=2, step_s=0.002, steps=40)):
        write_run(tmp_path, recipe)
    (only,) = gather([tmp_path]).scaling.groups
    with painted(step_share_plot(only)) as axes:
        tops = assert_stacked(axes, [{name: 100 * each for name, each in row.phase_share.items()} for row in only.rows])
    assert tops == close([100, 100])


def assert_stacked(axes: "Axes", heights: list[dict[str, float]]) -> Any:
    """Each series stands on those before it, communication alone is hatched; returns where the bars end."""
    tops = np.zeros(len(heights))
    for phase, drawn in bars(axes).items():
        assert [bar.get_height() for bar in drawn] == close([each.get(phase, 0.0) for each in heights]), phase
        assert [bar.get_y() for bar in drawn] == close(tops)
        assert bool(drawn[0].get_hatch()) == (phase == "reduce")
        tops += [bar.get_height() for bar in drawn]
    assert tops == close([sum(each.values()) for each in heights])
    return tops


def test_exposed_communication_is_written_on_the_bars(group: Group) -> None:
    with painted(step_time_plot(group)) as axes:
        told = [text.get_text() for text in axes.texts]
    assert told == [f"{percent(row.exposed_share, 0)} exposed" for row in group.rows]


def test_steps_in_order_and_their_percentiles(group: Group) -> None:
    run = group.rows[-1].runs[0]
    times_ms = 1e3 * run.step_s
    with painted(step_series_plot(group)) as axes:
        (series,) = [each for each in axes.lines if to_hex(each.get_color()) == GREY]
        assert series.get_ydata() == close(times_ms) and len(times_ms) == 120
        levels = {str(each.get_label()).split()[0]: each.get_ydata() for each in axes.lines if each is not series}
        assert len({each.get_color() for each in axes.lines}) == len(axes.lines), "each its own colour"
        assert {name: float(ends[0]) for name, ends in levels.items()} == {
            "p50": close(np.quantile(times_ms, 0.5)),
            "p95": close(np.quantile(times_ms, 0.95)),
            "p99": close(np.quantile(times_ms, 0.99)),
        }


def test_a_long_run_is_drawn_as_means_within_the_fastest_and_the_slowest(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe(steps=1810, warmup=10, noise=0.1))
    (only,) = gather([tmp_path]).scaling.groups
    times_ms = 1e3 * only.rows[0].runs[0].step_s.reshape(-1, 5)
    with painted(step_series_plot(only)) as axes:
        (series,) = [each for each in axes.lines if to_hex(each.get_color()) == GREY]
        assert series.get_ydata() == close(times_ms.mean(axis=1))
        edges = axes.collections[0].get_paths()[0].vertices
        assert edges[:, 1].max() == close(times_ms.max()) and edges[1:-1, 1].min() == close(times_ms.min())


def test_a_percentile_needs_its_steps() -> None:
    assert set(step_quantiles([np.arange(1.0, 20.0)])) == {"p50"}
    assert set(step_quantiles([np.arange(1.0, 21.0)])) == {"p50", "p95"}
    assert step_quantiles([np.arange(60.0), np.arange(60.0, 101.0)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert step_quantiles([np.zeros(0)]) == {}


def test_slow_steps_stand_above_the_typical_one(group: Group) -> None:
    found = [np.concatenate([run.step_s for run in row.runs]) for row in group.rows]
    over = [each / np.quantile(each, 0.5) for each in found]
    with painted(step_distribution_plot(group)) as axes:
        assert line(axes, "p95") == ([0, 1, 2, 3], close([np.quantile(each, 0.95) for each in over]))
        assert line(axes, "p99") == ([0, 1, 2, 3], close([np.quantile(each, 0.99) for each in over]))
        assert line(axes, "slowest") == ([0, 1, 2, 3], close([each.max() for each in over]))
        assert np.array(spans(axes)) == close([(place, 1, each.max()) for place, each in enumerate(over)])


# ---------------------------------------------------------------------------------------------- ranks


def test_the_tree_of_efficiencies_has_each_factor_in_the_colour_of_its_loss(group: Group) -> None:
    factors = list(group.rows[0].pop.factors)
    with painted(efficiency_plot(group)) as axes:
        cells = {(round(bar.get_x() + 0.47), round(bar.get_y() + 0.44)): bar.get_facecolor() for bar in axes.patches}
        told = {text.xy: text.get_text() for text in axes.texts if hasattr(text, "xy")}
        names = [text.get_text() for text in axes.texts if not hasattr(text, "xy")]
    assert len(told) == len(cells) == len(factors) * len(group.rows) and len(names) == len(factors)
    assert names[0] == "global" and names[-1] == "computation scaling"
    for column, row in enumerate(group.rows):
        for place, name in enumerate(names):
            value = row.pop.factors["computational" if name == "computation scaling" else name.replace(" ", "_")]
            assert told[column, place] == percent(value, 0)
            assert cells[column, place][3] == close(min(1.0, max(0.0, (1 - value) / 0.6)))


def test_the_map_of_ranks_and_phases_shows_the_distance_from_the_mean_rank(group: Group) -> None:
    (balance,) = [
        max(
            (run.load_balance for run in group.rows[-1].runs if run.load_balance),
            key=lambda each: float((each.phases_s - each.phases_s.mean(axis=0)).std()),
        )
    ]
    spent_ms = 1e3 * balance.phases_s / balance.steps.sum()
    spent_ms = spent_ms[:, spent_ms.any(axis=0)]
    plot = rank_phases_plot(group)
    with painted(plot) as axes:
        assert np.asarray(axes.images[0].get_array()) == close((spent_ms - spent_ms.mean(axis=0)).T)
        rank, phase = 5, 2  # the slow one, in its backward pass
        (told,) = [text.get_text() for text in axes.texts if text.xy == (rank, phase)]
        assert float(told) == pytest.approx(spent_ms[rank, phase], rel=5e-3)
        labels = [text.get_text() for text in axes.get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == [phase for phase in PHASES if phase != "sync"]
    assert [float(label.split()[1]) for label in labels] == pytest.approx(spent_ms.mean(axis=0), rel=5e-3)
    assert plot is not None and "rank 5 in backward" in plot.description


def test_the_rank_that_stands_out_is_named_with_its_phase_however_short_that_is(tmp_path: Path) -> None:
    write(tmp_path, replace(LAWS, ranks=4, slow=(Slow(2, 1.1, input_stall=True),)))
    (only,) = gather([tmp_path]).scaling.groups
    plot = rank_phases_plot(only)
    assert plot is not None and "Furthest above the mean rank: rank 2 in data" in plot.description


def test_a_thousand_ranks_are_drawn_as_means_of_neighbours(tmp_path: Path) -> None:
    write(tmp_path, replace(LAWS, ranks=520, ranks_per_host=8, steps=20, slow=(Slow(260, 1.5),)))
    (only,) = gather([tmp_path]).scaling.groups
    balance = only.rows[0].runs[0].load_balance
    assert balance is not None
    apart_ms = 1e3 * (balance.phases_s - balance.phases_s.mean(axis=0)) / balance.steps.sum()
    with painted(rank_phases_plot(only)) as axes:
        drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape[1] == 256
    assert drawn[1, :2] == close([apart_ms[:2, 1].mean(), apart_ms[2:4, 1].mean()])
    assert int(drawn[2].argmax()) == 260 * 256 // 520


def test_late_arrivals_and_the_arrow_at_the_straggler(group: Group) -> None:
    (arrivals,) = [
        max(zip(group.rows[-1].runs, group.rows[-1].stragglers, strict=True), key=lambda pair: pair[1].share)[0]
    ]
    balance = arrivals.load_balance
    assert balance is not None and balance.arrivals is not None
    with painted(arrivals_plot(group)) as axes:
        assert np.asarray(axes.images[0].get_array()) == close(1e3 * balance.arrivals.map_s)
        (arrow,) = [each for each in axes.lines if each.get_marker() == "<"]
        assert list(arrow.get_ydata()) == [5]
        assert axes.figure.axes[1].get_ylabel() == "later than the mean rank (ms)"


def test_memory_beside_what_a_rank_may_take(group: Group) -> None:
    peaks = [(row, peak_memory(row.runs[0])) for row in group.rows]
    with painted(memory_plot(peaks)) as axes:
        assert [bar.get_height() for bar in bars(axes)["taken at the peak"]] == close([3.0] * 4)
        (room,) = [each for each in axes.collections if each.get_label() == "room"]
        assert [each[0, 1] for each in room.get_segments()] == close([8.0] * 4)  # type: ignore[attr-defined]
        assert axes.get_ylabel() == "memory of a rank (GB)"


def test_the_loss_of_every_run(group: Group) -> None:
    with painted(loss_plot(group)) as axes:
        drawn = [(list(each.get_xdata()), list(each.get_ydata())) for each in axes.lines]
    runs = [run for index in (0, 1) for row in group.rows for run in (row.runs[index],)]
    assert drawn == [(list(run.metrics[0]), list(run.metrics[1])) for run in runs]


def test_the_validation_of_every_run_beside_its_training_loss(tmp_path: Path) -> None:
    for size, best in ((1, 20), (2, 30)):
        directory = write_run(tmp_path, Recipe(size=size, steps=60))
        lines = [f"{step},0.01,{1 + abs(step - best) / 10 + size / 100}" for step in (10, 20, 30, 40)]
        directory.validation.write_text("\n".join(["step,seconds,loss", *lines, ""]))
    (only,) = gather([tmp_path]).scaling.groups
    plot = validation_plot(only)
    with painted(plot) as axes:
        drawn = [(list(each.get_xdata()), list(each.get_ydata()), to_hex(each.get_color())) for each in axes.lines]
        assert axes.get_ylabel() == "loss"
    runs = [run for row in only.rows for run in row.runs]
    assert [line[:2] for line in drawn[:2]] == [(list(run.metrics[0]), list(run.metrics[1])) for run in runs]
    assert {line[2] for line in drawn[:2]} == {GREY.lower()}
    for run, curve, mark in zip(runs, drawn[2::2], drawn[3::2], strict=True):
        assert run.validation is not None
        assert curve[:2] == (list(run.validation.steps), list(run.validation.losses))
        assert mark[:2] == ([run.validation.best[0]], [run.validation.best[1]]) and mark[2] == curve[2]
    assert plot is not None and "best: 1 rank 1.010 after 20 steps, 2 ranks 1.020 after 30 steps" in plot.description


def write_counts(path: Path, counts: np.ndarray) -> None:
    """As the recorder writes them."""
    rows = [f"{number},{','.join(map(str, row))}" for number, row in enumerate(counts.tolist())]
    path.write_text("\n".join([",".join(["true", *map(str, range(len(counts)))]), *rows, ""]))


def test_what_the_test_predicted_of_each_class_at_the_largest_size(tmp_path: Path) -> None:
    of_size = {1: np.array([[9, 1], [3, 7]]), 2: np.array([[6, 4], [0, 10]])}
    for size, counts in of_size.items():
        write_counts(write_run(tmp_path, Recipe(size=size, steps=60)).test_table("confusion"), counts)
    (only,) = gather([tmp_path]).scaling.groups
    plot = confusion_plot(only)
    with painted(plot) as axes:
        (image,) = axes.images
        assert np.array_equal(image.get_array(), [[60, 40], [0, 100]])
        assert {(text.xy, text.get_text()) for text in axes.texts} == {((0, 0), "60"), ((1, 0), "40"), ((1, 1), "100")}
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert plot is not None and "80.0% of 20 samples right" in plot.description
    assert "class 0 taken for 1, 4 times" in plot.description
    assert scatter_plot(only) is None


def test_predicted_by_true_values_and_damaged_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path, Recipe(size=1, steps=60))
    counts = np.zeros((64, 64), int)
    counts[10, 10], counts[10, 12], counts[40, 20] = 6, 2, 2
    write_counts(run.test_table("scatter"), counts)
    (only,) = gather([tmp_path]).scaling.groups
    plot = scatter_plot(only)
    with painted(plot) as axes:
        (image,) = axes.images
        assert np.array_equal(image.get_array(), np.log1p(counts.T)) and image.get_extent() == [-4, 4, -4, 4]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("true", "predicted")
    assert plot is not None and "10 values, 80.0% of them less than half a deviation" in plot.description
    for damage in ("", "true,0\n0,x\n", "true,0,1\n0,1,2\n", "true,0\n0,-1\n", "true,0\n0,nan\n", "\xff\xfe"):
        run.test_table("scatter").write_text(damage, encoding="utf-8")
        assert scatter_plot(only) is None


# ---------------------------------------------------------------------------------------------- energy


def test_energy_of_a_sample_idle_on_dynamic(facts: Facts) -> None:
    (energy,) = facts.energies
    with painted(energy_by_size_plot(energy)) as axes:
        drawn = [bar for bar in axes.patches if bar.get_height() > 0]
        dynamic, idle = drawn[::2], drawn[1::2]
        assert axes.get_ylabel() == "energy per sample (mJ), measured"
    assert [bar.get_height() for bar in dynamic] == close([1e3 * row.net_per_sample.known for row in energy.rows])
    assert [bar.get_y() for bar in idle] == close([bar.get_height() for bar in dynamic])
    tops = [bar.get_y() + bar.get_height() for bar in idle]
    assert tops == close([1e3 * row.per_sample.known for row in energy.rows])


def test_energy_by_phase_adds_up_to_the_run(facts: Facts) -> None:
    (energy,) = facts.energies
    with painted(energy_by_phase_plot(energy)) as axes:
        drawn = bars(axes)
    num_samples = [row.row.runs[0].summary.num_samples for row in energy.rows]
    for name in ("forward", "backward", "reduce"):
        expected = [1e3 * row.phases[name].known / num for row, num in zip(energy.rows, num_samples, strict=True)]
        assert [bar.get_height() for bar in drawn[name]] == close(expected), name
    tops = [sum(bar.get_height() for bar in each) for each in zip(*drawn.values(), strict=True)]
    assert tops == close([1e3 * row.per_sample.known for row in energy.rows])


def test_energy_by_phase_has_a_piece_of_validation() -> None:
    (energy,) = gather([Path("tests/runs/mlp-validation")]).energies
    with painted(energy_by_phase_plot(energy)) as axes:
        drawn = bars(axes)
    (row,), num_samples = energy.rows, energy.rows[0].row.runs[0].summary.num_samples
    assert [bar.get_height() for bar in drawn["validation"]] == close(
        [1e3 * row.phases["validation"].known / num_samples]
    )
    assert sum(bar.get_height() for each in drawn.values() for bar in each) == close(1e3 * row.per_sample.known)


def test_energy_by_phase_has_the_servers_share(tmp_path: Path) -> None:
    served = Recipe(size=4, strategy="parameter_server", servers=1, servers_busy=0.25, steps=60)
    write_run(tmp_path, served)
    (energy,) = gather([tmp_path]).energies
    (row,) = energy.rows
    with painted(energy_by_phase_plot(energy)) as axes:
        drawn = {name: each[0].get_height() for name, each in bars(axes).items()}
    scale = 1e3 / row.row.runs[0].summary.num_samples
    for phase in ("reduce", "optimizer"):  # the phases of a server
        of_servers = row.servers[phase].known
        assert of_servers > 0 and drawn[phase] == close(scale * (row.phases[phase].known + of_servers))
    assert drawn["forward"] == close(scale * row.phases["forward"].known)


def test_energy_against_speedup_and_the_line_of_equal_products(facts: Facts) -> None:
    (energy,) = facts.energies
    speedups = [row.row.speedup for row in energy.rows]
    joules = [1e3 * row.per_sample.known for row in energy.rows]
    with painted(energy_by_speedup_plot(energy)) as axes:
        assert line(axes, "measured") == (close(speedups), close(joules))
        (x, y) = line(axes, "equal J s")
        assert y == close([joules[0] * each for each in x])
        assert [text.get_text() for text in axes.texts] == ["1", "2", "4", "8"]


def test_an_estimate_is_hatched_and_a_lower_bound_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe(quality="estimated", source="estimate", assumption="10 W"))
    write_run(tmp_path, Recipe(size=2, step_s=0.006, quality="estimated", source="estimate", assumption="10 W"))
    (energy,) = gather([tmp_path]).energies
    with painted(energy_by_size_plot(energy)) as axes:
        assert [bar.get_hatch() for bar in axes.patches] == ["///"] * 2
        assert all(text.get_text().endswith("est.") for text in axes.texts)


# ---------------------------------------------------------------------------------------------- plans, targets


def test_a_forecast_has_its_curve_its_interval_and_what_was_held_out(group: Group) -> None:
    measurements = measurements_of(group)
    plan = make_plan(predict(measurements), None, Limits(max_nodes=16))
    prediction = plan.prediction
    with painted(forecast_plot(plan, "ask for 4 nodes")) as axes:
        rates = measurements.samples(measurements.ranks) / measurements.step_s
        assert line(axes, "measured") == ([1, 2, 4, 8], close(rates))
        (band,) = [each for each in axes.collections if each.get_label() == "95% interval"]
        most = max(option.forecast.ranks for option in plan.options)
        sizes = curve_sizes(prediction, most / 8, 48)
        curve = {each.ranks: each for each in prediction.fitted(sizes)}
        edges: dict[float, list[float]] = {}
        for x, y in band.get_paths()[0].vertices:
            edges.setdefault(float(x), []).append(float(y))
        assert sorted(edges) == close(sorted(curve)) and most == 32
        for size, ends in edges.items():
            low, high = curve[round(size)].samples_per_s_interval
            assert (min(ends), max(ends)) == (close(low), close(high))
            assert 0 < low <= curve[round(size)].samples_per_s <= high < np.inf
        (dashed,) = [
            each for each in axes.lines if each.get_linestyle() == "--" and to_hex(each.get_color()) == BLUE.lower()
        ]
        beyond = [each for each in curve.values() if each.ranks >= 8]
        assert list(dashed.get_ydata()) == close([each.samples_per_s for each in beyond])
        widths = [np.log(high / low) for low, high in (each.samples_per_s_interval for each in beyond)]
        assert widths[-1] > widths[0], "further away is less certain"
        held_out = prediction.chosen.held_out
        assert held_out
        at, guessed = line(axes, "predicted unseen")
        assert at == [each.ranks for each in held_out]
        assert guessed == close([LAWS.batch / each.predicted_s for each in held_out])
        asked = line(axes, "ask for 4 nodes")[0]
        assert plan.chosen is not None and asked == [plan.chosen.forecast.ranks] * 2


def test_time_to_a_loss_beside_samples_per_second(tmp_path: Path) -> None:
    falling = 2.0 - 0.01 * np.arange(200)
    for seed in (1, 2, 3):
        stamp = f"20261123T21000{seed}Z"
        for recipe, losses in (
            (Recipe(size=1, global_batch=100, step_s=0.010, steps=200, warmup=0, noise=0.01, stamp=stamp), falling),
            (Recipe(size=4, global_batch=400, step_s=0.011, steps=200, warmup=0, noise=0.01, stamp=stamp), falling),
        ):
            run = write_run(tmp_path, replace(recipe, step_s=recipe.step_s * (1 + 0.01 * seed)))
            lines = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses.tolist()))
            run.metrics.write_text("step,loss\n" + lines)
    (study,) = gather([tmp_path]).targets
    rows = study.rows
    assert [row.size for row in rows] == [1, 4]
    assert rows[1].speedup is not None and rows[1].throughput is not None and rows[1].throughput > 3 * rows[1].speedup
    with painted(target_plot(study)) as axes:
        drawn = bars(axes)
        assert [bar.get_height() for bar in drawn["by samples/s"]] == close([row.throughput for row in rows])
        assert [bar.get_height() for bar in drawn["by time to loss"]] == close([row.speedup for row in rows])
        (span,) = spans(axes)
        assert rows[1].speedup_interval is not None
        assert span == close((0.8, *rows[1].speedup_interval))
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1\n(100)", "4\n(400)"]


def test_strategies_side_by_side(tmp_path: Path) -> None:
    for strategy, stamp in (("horovod", "20261123T210000Z"), ("sharded", "20261123T220000Z")):
        for size in (1, 2, 4):
            write_run(tmp_path, Recipe(size=size, step_s=0.01 / size, strategy=strategy, stamp=stamp, steps=60))
    (comparison,) = gather([tmp_path]).strategies
    rows = [entry.row for entry in comparison.entries]
    with painted(strategy_times_plot(comparison)) as axes:
        drawn = bars(axes)
        exposed = [1e3 * row.exposed_s for row in rows]
        computing = [1e3 * sum(row.phase_s.values()) - each for row, each in zip(rows, exposed, strict=True)]
        assert [bar.get_width() for bar in drawn["computing"]] == close(computing)
        assert [bar.get_width() for bar in drawn["exposed"]] == close(exposed)
        assert [bar.get_x() for bar in drawn["exposed"]] == close(computing)
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert names == [f"{entry.strategy}, {entry.row.size}" for entry in comparison.entries]
    with painted(strategy_bytes_plot(comparison)) as axes:
        widths = [bar.get_width() for bar in axes.patches]
        assert axes.get_xlabel() == "communication volume of a step (kB)"
    volumes = [entry.traffic.volume_bytes / 1e3 for entry in comparison.entries if entry.traffic]
    assert widths == close(volumes) and widths[-1] == close(1.5 * 4 * 7.850)


def test_bus_bandwidth_is_drawn_with_its_quartiles_and_limits() -> None:
    seconds = {1024: (1e-5, 2e-5, 4e-5), 65536: (1e-4, 2e-4, 3e-4)}
    rows = [Transfer("mpi", 4, 1, 4, size, samples) for size, samples in seconds.items()]
    rows += [Transfer("memory", 4, 1, 4, size, (1e-6,) * 3) for size in seconds]
    rows += [Transfer("mpi", 8, 2, 4, size, (1.0,) * 3) for size in seconds]  # another place
    with styled((4.4, 3.0), 8, {}) as figure:
        axes = figure.subplots()
        paint(axes, rows, (4, 1, 4))
        figure.draw_without_rendering()
        ring = 2 * 3 / 4 / 1e9
        assert line(axes, "mpi") == ([1024, 65536], close([ring * 1024 / 2e-5, ring * 65536 / 2e-4]))
        assert line(axes, "memory copy") == ([1024, 65536], close([1024 / 1e-6 / 1e9, 65536 / 1e-6 / 1e9]))
        edges: dict[float, set[float]] = {}
        for x, y in axes.collections[0].get_paths()[0].vertices:
            edges.setdefault(float(x), set()).add(float(y))
        # Quartiles of three values are the means of neighbours.
        assert sorted(edges[1024]) == close([ring * 1024 / 3e-5, ring * 1024 / 1.5e-5])

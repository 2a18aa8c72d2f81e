"""Joules of a run and of a size: held against sums made by hand, and against runs that obey known laws."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from hpc_train.analysis.energy.cost import UNKNOWN, GroupEnergy, Tariff, cost_of
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.run_energy import RunEnergy, energy_of
from hpc_train.analysis.report.notes.energy import verdict
from hpc_train.analysis.report.notes.meters import meter_notes
from hpc_train.analysis.report.sections.quantities import COST, record
from hpc_train.analysis.runs.load import load, load_all
from hpc_train.analysis.scaling.compare import compare
from hpc_train.core.energy_records import ENERGY_COLUMNS, container
from hpc_train.core.rundir import RunDir
from tests import laws
from tests.analysis.rendered import energy_section, notes, table
from tests.synthetic import SHARES, Recipe, write_run

# 10 steps of 50 ms and 200 of 10 ms: the loop lasts 2.5 s. Of two hosts ranks take turns.
TWO_NODES = Recipe(size=4, noise=0.0, joules=None, hosts=("a", "b"))
TIMES_S = (0.0, 1.0, 2.0, 2.5)


def traces(run: RunDir, host: str, attempt: int = 1, clock_s: float = 0.0, **domains: tuple[Any, ...]) -> None:
    """Appends readings at TIMES_S; None is one that the meter did not answer. cores are an estimate."""
    path = run.energy(host)
    text = path.read_text() if path.exists() else ",".join(ENERGY_COLUMNS) + "\n"
    for index, time_s in enumerate(TIMES_S):
        for domain, joules in domains.items():
            name = domain.replace("_", "-")
            quality = "missing" if joules[index] is None else "estimated" if name == "cores" else "measured"
            value = "" if joules[index] is None else joules[index]
            text += f"{clock_s + time_s},{name},{value},{quality},RAPL,{attempt}\n"
    path.write_text(text)


def constant(watts: float) -> tuple[float, ...]:
    return tuple(watts * time_s for time_s in TIMES_S)


def tell(run: RunDir, **facts: Any) -> None:
    """Puts facts over those of meta.json; `energy` over its own."""
    meta = json.loads(run.meta.read_text())
    energy = {**meta["energy"], **facts.pop("energy", {})}
    run.meta.write_text(json.dumps({**meta, "energy": energy, **facts}))


def two_nodes(root: Path, **facts: Any) -> RunDir:
    """Host a draws 120 W, 220 W, 120 W in turn, b always 50 W and its clock is 1000 s ahead."""
    run = write_run(root, TWO_NODES)
    traces(run, "a", package_0=(0, 100, 300, 350), dram=constant(20))
    traces(run, "b", clock_s=1000.0, package_0=constant(50))
    tell(run, **facts)
    return run


def energy(run: RunDir) -> RunEnergy:
    return energy_of(load(run))


def joules(parts: dict[Any, EnergyAmount]) -> dict[Any, float | None]:
    return {name: part.total for name, part in parts.items()}


# ---------------------------------------------------------------------------------------------- one run


def test_two_nodes_by_hand(tmp_path: Path) -> None:
    idle = {"a": {"package-0": 40.0, "dram": 10.0}, "b": {"package-0": 30.0}}
    found = energy(two_nodes(tmp_path, energy={"idle_w": idle, "idle_quality": "measured"}))
    assert found.gross == EnergyAmount(measured=350 + 50 + 125)
    assert found.net == EnergyAmount(measured=525 - 2.5 * 80)
    assert found.loop.total == pytest.approx(525) and found.timeline.loop_s == pytest.approx(2.5)
    assert found.outside.known == pytest.approx(0.0, abs=1e-6)
    assert found.mean_w == pytest.approx(525 / 2.5) and found.peak == pytest.approx((270.0, 1.0))
    assert joules(found.nodes) == {"a": 400.0, "b": 125.0}
    assert joules(found.ranks) == {0: 200.0, 1: 62.5, 2: 200.0, 3: 62.5}
    assert {part.quality for part in found.ranks.values()} == {"estimated"} and not found.divided_by_cores
    assert joules(found.phases) == pytest.approx({phase: 525 * share for phase, share in SHARES.items()}, rel=1e-4)
    assert {part.quality for part in found.phases.values()} == {"estimated"}
    assert found.run.summary.joules == 525.0 and "not known" in meter_notes(found)[0]


def test_joules_until_a_step_are_interpolated(tmp_path: Path) -> None:
    found = energy(two_nodes(tmp_path))
    row = found.timeline.of_first(109)  # 0.5 s of warm-up and 100 steps of 10 ms
    assert row is not None and found.timeline.end_s[row] == pytest.approx(1.5)
    assert found.until(row).total == pytest.approx(200 + 30 + 75)


def test_idle_that_was_given_makes_an_estimate_and_an_unknown_one_makes_missing(tmp_path: Path) -> None:
    run = two_nodes(tmp_path, energy={"idle_w": {"a": {"node": 60.0}, "b": {"node": 30.0}}, "idle_quality": "given"})
    assert energy(run).net == EnergyAmount(estimated=525 - 2.5 * 90)
    tell(run, energy={"idle_w": {"a": {"package-0": 40.0, "dram": 10.0}}, "idle_quality": "measured"})
    net = energy(run).net
    assert net.total is None and net.lacking == ("b package-0 when idle",) and net.known == 400 - 2.5 * 50


def test_a_meter_that_stops_leaves_the_part_known(tmp_path: Path) -> None:
    run = write_run(tmp_path, TWO_NODES)
    traces(run, "a", package_0=(0, 100, None, None), dram=constant(20))
    traces(run, "b", package_0=constant(50))
    found = energy(run)
    assert found.gross.total is None and found.gross.quality == "missing" and found.gross.known == 100 + 50 + 125
    assert found.gross.lacking == ("a package-0 after 40% of the time",)
    assert found.gross.text() == "at least 275 J"
    early, late = found.timeline.of_first(50), found.timeline.of_first(200)
    assert early is not None and found.until(early).total == pytest.approx(0.91 * 170)
    assert late is not None and found.until(late).total is None
    assert found.peak is None and found.mean_w is None and found.nodes["b"].total == 125


def test_a_meter_that_skips_a_reading_misses_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, replace(TWO_NODES, hosts=("a",)))
    traces(run, "a", package_0=(0, None, 300, 350))
    assert energy(run).gross == EnergyAmount(measured=350)


def test_a_sampler_that_ended_long_before_the_loop_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, replace(TWO_NODES, hosts=("a",), steps=2000))
    traces(run, "a", package_0=constant(10))
    found = energy(run).gross
    assert found.total is None and found.known == 25 and "after 12% of the time" in found.lacking[0]


def test_measured_and_estimated_stay_apart_in_a_sum(tmp_path: Path) -> None:
    run = write_run(tmp_path, TWO_NODES)
    traces(run, "a", package_0=constant(100))
    traces(run, "b", cores=constant(20))
    tell(run, energy={"shared": {"a": True, "b": True}})
    found = energy(run)
    assert found.gross == EnergyAmount(250.0, 50.0, shared=True) and found.gross.quality == "mixed"
    assert found.gross.text() == "300 J part est. shared"
    assert found.nodes["b"] == EnergyAmount(None, 50.0)  # this job's own cores: others' do not count in it
    assert "other jobs may have used a at the same time" in meter_notes(found)[0]


def test_a_host_without_readings_is_missing_unless_slurm_counts_for_all(tmp_path: Path) -> None:
    run = write_run(tmp_path, TWO_NODES)
    traces(run, "a", package_0=constant(100))
    found = energy(run)
    assert found.gross.lacking == ("b",) and found.gross.known == 250 and found.run.summary.joules is None
    assert found.nodes["b"].total is None and found.ranks[1].total is None
    run.energy("a").unlink()
    traces(run, "a", nodes=constant(300), gpu_0=constant(90))
    tell(run, energy={"idle_w": {"a": {"node": 60.0}, "b": {"node": 30.0}}, "idle_quality": "given"})
    found = energy(run)
    assert found.gross == EnergyAmount(measured=750) and found.run.summary.joules == 750
    assert joules(found.nodes) == {"all nodes together": 750.0}
    assert joules(found.ranks) == dict.fromkeys(range(4), 187.5)
    assert found.net == EnergyAmount(estimated=750 - 2.5 * 90)
    assert "gpu-0" in meter_notes(found)[0]


def test_a_domain_that_holds_another_is_added_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path, replace(TWO_NODES, hosts=("a",)))
    traces(run, "a", node=constant(500), package_0=constant(100), gpu_0=constant(300))
    found = energy(run)
    assert found.gross.total == 1250 and found.run.summary.joules == 1250
    assert "Not added" in meter_notes(found)[0] and "gpu-0, package-0" in meter_notes(found)[0]
    assert container("package-0", ["packages"]) == "packages" and container("gpu-0", ["packages"]) is None
    assert container("nodes", ["node", "nodes"]) is None and container("node", ["nodes"]) == "nodes"


@pytest.mark.parametrize("cores", [[[0], [1]], [[0, 1, 2], [3]]])
def test_a_gpu_belongs_to_its_rank_and_the_rest_is_shared(tmp_path: Path, cores: list[list[int]]) -> None:
    run = write_run(tmp_path, replace(TWO_NODES, size=2, hosts=("a",)))
    traces(run, "a", package_0=constant(80), gpu_0=constant(300), gpu_1=constant(200))
    places = [{"rank": r, "host": "a", "local_rank": r, "cores": cores[r], "threads": 1} for r in range(2)]
    tell(run, device="NVIDIA H100", ranks=places)
    found = energy(run)
    first = 2.5 * 80 * len(cores[0]) / sum(map(len, cores))
    assert found.ranks == {0: EnergyAmount(750.0, first), 1: EnergyAmount(500.0, 200 - first)}
    assert found.divided_by_cores == (first != 100)
    tell(run, device="cpu")  # these GPUs are nobody's
    assert sum(part.known for part in energy(run).ranks.values()) == pytest.approx(1450)


def test_servers_have_their_part(tmp_path: Path) -> None:
    recipe = Recipe(size=4, noise=0.0, joules=None, hosts=("a",), strategy="parameter_server", servers=1)
    run = write_run(tmp_path, recipe)
    traces(run, "a", package_0=constant(100))
    found = energy(run)
    assert sum(part.known for part in found.phases.values()) == pytest.approx(250 * 3 / 4)
    assert joules(found.servers) == pytest.approx({"reduce": 62.5 * 0.75, "optimizer": 62.5 * 0.25}, rel=1e-4)


def test_what_was_metered_before_the_loop_is_not_the_loops(tmp_path: Path) -> None:
    run = write_run(tmp_path, replace(TWO_NODES, hosts=("a",), steps=60))  # its loop lasts 1 s
    traces(run, "a", clock_s=5000.0, package_0=(0, 10, 110, 120))
    tell(run, energy={"epoch_s": {"a": 5001.0 - 0.001}})  # a synthetic loop begins at 1 ms
    found = energy(run)
    assert (
        found.gross.total == 120 and found.loop.total == pytest.approx(100) and found.outside.known == pytest.approx(20)
    )
    assert not any("before the loop" in note for note in meter_notes(found))  # by 1.0 s, no more


def two_attempts(root: Path) -> RunDir:
    """60 steps on host a, of which 20 are taken again on host b, whose meter is none."""
    run = write_run(root, replace(TWO_NODES, size=2, hosts=("b",)))
    for rank in range(2):
        header, *lines = run.timings(rank).read_text().splitlines()
        again = [line.rpartition(",")[0] + ",2" for line in lines[40:]]
        run.timings(rank).write_text("\n".join([header, *lines[:60], *again, ""]))
    traces(run, "a", attempt=1, package_0=constant(100))
    traces(run, "b", attempt=2, cores=constant(20))
    each = [{"attempt": number, "hosts": [host], "first_step": 0} for number, host in ((1, "a"), (2, "b"))]
    tell(run, attempts=each)
    return run


def test_attempts_on_other_hosts_and_meters_add_up(tmp_path: Path) -> None:
    found = energy(two_attempts(tmp_path))
    assert found.gross == EnergyAmount(250.0, 50.0) and found.run.summary.joules == 300
    assert [loop.lasted_s for loop in found.timeline.loops] == pytest.approx([1.0, 1.7])
    # Metered on for longer than the loops: 1.0 s at 100 W, 1.7 s at 20 W.
    assert found.loop.measured == pytest.approx(100) and found.loop.estimated == pytest.approx(34)
    twice = found.timeline.of_first(50)
    assert twice is not None and found.timeline.attempt[twice] == 1
    assert found.ranks == {} and found.metered_s == 5.0


def test_runs_of_known_laws_give_their_watts_back(tmp_path: Path) -> None:
    drawn = laws.Laws(ranks=8, clock_offset_s=5.0, idle_w={"package-0": 60.0, "dram": 10.0}, noise=0.1)
    run, _ = laws.write(tmp_path, drawn)
    found = energy(run)
    span_s = found.metered_s
    assert found.timeline.loop_s == pytest.approx(span_s, rel=0.01)
    assert found.gross.total == pytest.approx(2 * 170 * span_s, rel=0.005)
    assert found.net.total == pytest.approx(2 * 100 * span_s, rel=0.005)
    assert found.mean_w == pytest.approx(340, rel=0.005) and found.peak is not None
    assert found.peak[0] == pytest.approx(340, rel=0.005)
    assert set(joules(found.ranks)) == set(range(8)) and found.ranks[3].total == pytest.approx(42.5 * span_s, rel=0.005)


# ---------------------------------------------------------------------------------------------- sizes


def sizes(
    root: Path, *watts: float, tariff: Tariff = UNKNOWN, repeats: tuple[float, ...] = (1.0,), **facts: Any
) -> GroupEnergy:
    """1, 2, 4 ... ranks of 10 s, 6 s, 4 s: speedups 1, 5/3, 2.5; every run draws constant watts, times `repeats`."""
    for (index, base), (repeat, factor) in product(enumerate(watts), enumerate(repeats)):
        seconds, power = (10.0, 6.0, 4.0)[index], base * factor
        stamp = f"2026112{repeat}T210000Z"
        recipe = Recipe(size=2**index, step_s=seconds / 1000, steps=1000, warmup=0, noise=0.0, joules=None, stamp=stamp)
        run = write_run(root, recipe)
        rows = [f"{t},package-0,{power * t},measured,RAPL,1" for t in (*range(int(seconds)), seconds)]
        run.energy("node01").write_text("\n".join([",".join(ENERGY_COLUMNS), *rows, ""]))
        tell(run, repeat=repeat, **facts)  # else it would be a copy
    (group,) = compare(load_all([root])).groups
    return cost_of(group, tariff)


def test_where_more_hardware_stops_paying(tmp_path: Path) -> None:
    # 1000, 1200 and 2400 J: 300 J, then 1440 J for each 1x; joules times seconds 10000, 7200, 9600.
    found = sizes(tmp_path, 100.0, 200.0, 600.0, repeats=(0.99, 1.0, 1.01))
    assert [row.gross.total for row in found.rows] == pytest.approx([1000.0, 1200.0, 2400.0])
    assert [row.edp_js for row in found.rows] == pytest.approx([10_000, 7200, 9600])
    marginal = [row.marginal.total for row in found.rows if row.marginal]
    assert marginal == pytest.approx([300, 1440], rel=1e-3)
    assert [row.pays for row in found.rows] == [None, True, False]
    assert verdict(found) == (
        "More hardware stops paying beyond 2 ranks (joules times seconds per sample, which fall while it pays: 1.33x,"
        " 95% interval 1.30-1.36): from 2 to 4 ranks each unit of speedup gained costs 1.44 kJ; before that a unit cost"
        " 300 J"
    )
    energies = table(energy_section(found), "energy")
    assert [column.title for column in energies.columns][:3] == ["ranks", "gross", "95% interval"]
    # 1% of 1 kJ by sqrt(3), times Student's 4.30 for two degrees of freedom.
    assert energies.rows[0][1:3] == ("1.00 kJ", "975 J to 1.03 kJ")
    exported = record(COST, found.rows[0])
    assert (exported["joules_low"], exported["joules_high"]) == pytest.approx((975.5, 1025.1), abs=1)
    assert found.rows[0].per_sample.total == pytest.approx(1000 / 120_000)


def test_hardware_that_still_pays_and_that_saves(tmp_path: Path) -> None:
    assert verdict(sizes(tmp_path, 100.0, 100.0, repeats=(0.99, 1.0, 1.01))) == (
        "More hardware still pays at 2 ranks, the largest size (joules times seconds per sample, which fall while it"
        " pays: 0.36x, 95% interval 0.35-0.37): from 1 to 2 ranks each unit of speedup gained saves 600 J"
    )


def test_no_verdict_without_an_interval_behind_it(tmp_path: Path) -> None:
    alone = sizes(tmp_path / "a", 100.0, 200.0)
    assert alone.rows[1].pays is None and alone.rows[1].joules is not None and alone.rows[1].joules.interval is None
    assert verdict(alone).startswith("Whether more hardware still pays at 2 ranks cannot be told without repeats (")
    assert "95% interval" not in [column.title for column in table(energy_section(alone), "energy").columns]
    wide = sizes(tmp_path / "b", 100.0, 250.0, repeats=(0.8, 1.0, 1.25))
    assert wide.rows[1].change is not None and wide.rows[1].change.value == pytest.approx(0.9, abs=0.01)
    assert wide.rows[1].pays is None and verdict(wide).startswith(
        "Whether more hardware still pays at 2 ranks is not measurable (joules times seconds per sample, which fall"
    )


def test_the_centres_figures_are_given_never_assumed(tmp_path: Path) -> None:
    without = sizes(tmp_path / "a", 3600.0)
    row = without.rows[0]
    assert (row.facility_j, row.co2_g, row.price) == (None, None, None)
    assert [table.id for table in energy_section(without).tables] == [
        "energy",
        "power",
        "energy-by-phase",
        "energy-by-node",
    ]
    found = sizes(tmp_path / "b", 3600.0, tariff=Tariff(1.2, 400.0, 0.3, "EUR"))
    row = found.rows[0]  # 36 kJ are 0.01 kWh
    assert row.facility_j == pytest.approx(43_200)
    assert row.co2_g == pytest.approx(0.012 * 400) and row.price == pytest.approx(0.012 * 0.3)
    assert table(energy_section(found), "cost").rows == (("1", "12.0 Wh", "4.80 g", "0.00360 EUR"),)
    alone = sizes(tmp_path / "c", 3600.0, tariff=Tariff(co2_g_per_kwh=400.0))
    assert alone.rows[0].co2_g == pytest.approx(4.0)
    assert any("PUE is unknown" in note for note in notes(energy_section(alone), "tariff"))


def test_every_number_with_a_shared_node_says_so(tmp_path: Path) -> None:
    found = sizes(tmp_path, 100.0, 200.0, tariff=Tariff(1.2, 400.0, 0.3, "EUR"), energy={"shared": {"node01": True}})
    for each in energy_section(found).tables:
        for _, *cells in each.rows:
            assert all("shared" in cell for cell in cells if cell not in ("-", "missing")), cells
    assert all(record(COST, row)["joules_shared"] for row in found.rows)
    assert "shared" in verdict(found)


def test_words_and_records_agree(tmp_path: Path) -> None:
    found = sizes(tmp_path, 100.0, 200.0)
    told = record(COST, found.rows[1])
    assert (told["joules_measured"], told["joules_estimated"], told["joules_dynamic"]) == (1200.0, 0.0, None)
    assert told["mean_w"] == 200.0 and told["joules_reduce"] == pytest.approx(120, rel=1e-3)
    parts, power, phases, places = energy_section(found).tables
    assert (
        parts.rows[1] == ("2", "1.20 kJ", "1.20 kJ", "0 J") and [c.title for c in parts.columns][-1] == "outside steps"
    )
    assert power.rows[1] == ("2", "200 W", "200 W", "7.20 kJs", "300 J") and power.rows[0][-1] == "-"
    assert "by phase, J (estimates" in phases.title and phases.rows[1][1] == "120"
    assert places.rows[1] == ("2", "1.20 kJ", "600 J each") and "divided equally" in places.title


def test_without_any_meter_there_is_nothing_to_show(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe(joules=None))
    (group,) = compare(load_all([tmp_path])).groups
    found = cost_of(group)
    section = energy_section(found)
    assert (section.tables, section.notes, section.plots) == ((), (), ())
    assert record(COST, found.rows[0])["joules_measured"] is None and found.rows[0].gross.lacking == ("node01",)

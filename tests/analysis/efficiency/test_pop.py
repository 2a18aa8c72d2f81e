"""POP efficiencies: what a run's laws say comes back, and what cannot be known is not claimed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.efficiency.pop import FACTORS, Efficiencies, efficiencies
from hpc_train.analysis.report.facts import Facts, gather
from hpc_train.analysis.report.report import build_report
from hpc_train.analysis.runs.load import load, load_all
from hpc_train.analysis.scaling.compare import Group, compare
from tests import laws
from tests.analysis.rendered import notes, table
from tests.analysis.stats.simulated import recorded
from tests.laws import Laws, Slow, Truth
from tests.synthetic import Recipe, write_run

NOISY = Laws(noise=0.04, serial=0.03, slow=(Slow(5, 1.2),), clock_offset_s=5.0, clock_drift=1e-5, clock_error_s=2e-6)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, dict[int, Truth]]:
    """1, 2, 4 and 8 ranks of the same laws; rank 5 is slow where there is one."""
    root = tmp_path_factory.mktemp("study")
    truths = {size: truth for size, (_, truth) in laws.study(root, NOISY, (1, 2, 4, 8)).items()}
    return gather([root]), truths


def one(root: Path, law: Laws) -> Efficiencies:
    run, _ = laws.write(root, law)
    return efficiencies([load(run)], None)


def test_every_factor_is_the_one_that_was_drawn(study: tuple[Facts, dict[int, Truth]]) -> None:
    facts, truths = study
    for row in facts.scaling.groups[0].rows:
        truth, factors = truths[row.size], row.pop.factors
        for name in ("parallel", "load_balance", "input", "serialisation", "transfer"):
            assert factors[name] == pytest.approx(getattr(truth, name), abs=1e-5), (row.size, name)
        drawn = truths[1].useful_s.sum() / truth.useful_s.sum()  # strong scaling; each rank counts by its own clock
        assert factors["computational"] == pytest.approx(drawn, rel=3 * NOISY.clock_drift)


def test_factors_multiply_to_what_stands_above_them(study: tuple[Facts, dict[int, Truth]]) -> None:
    for row in study[0].scaling.groups[0].rows:
        f = row.pop.factors
        assert set(f) == set(FACTORS)
        assert f["communication"] == pytest.approx(f["serialisation"] * f["transfer"])
        assert f["parallel"] == pytest.approx(f["load_balance"] * f["input"] * f["communication"])
        assert f["global"] == pytest.approx(f["parallel"] * f["computational"])


def test_global_efficiency_is_the_measured_one_times_the_baseline_s(study: tuple[Facts, dict[int, Truth]]) -> None:
    rows = study[0].scaling.groups[0].rows
    for row in rows:
        assert row.efficiency == pytest.approx(row.pop.factors["global"] / rows[0].pop.factors["global"], rel=1e-9)


def test_the_headline_and_pop_agree_where_few_steps_take_most_of_the_time(tmp_path: Path) -> None:
    """One step in twenty takes thirty times as long: the mean is what the job took, the median hides it."""
    rare = Laws(noise=0.01, slow=(Slow(0, 30.0, 0.05),), message_bytes=4e5)
    truths = laws.study(tmp_path, rare, (1, 2, 4))
    facts = gather([tmp_path])
    (group,) = facts.scaling.groups
    for row in group.rows:
        truth = truths[row.size][1]
        assert row.step_s == pytest.approx(truth.whole_s / 200, rel=1e-4)
        assert row.step_median_s is not None and row.step_s is not None and row.step_s > 1.8 * row.step_median_s
        assert row.efficiency == pytest.approx(
            row.pop.factors["global"] / group.rows[0].pop.factors["global"], rel=1e-9
        )
        assert row.efficiency == pytest.approx(truths[1][1].whole_s / truth.whole_s / row.size, rel=1e-4), (
            "the same work in the time that the job took"
        )
    (section,) = build_report(facts).sections
    speedup, efficiencies_shown = table(section, "scaling"), table(section, "pop").rows[-1]
    assert efficiencies_shown[0].startswith("speedup efficiency")
    assert speedup.columns[-1].title == "speedup efficiency"
    in_percent = [f"{float(row[-1][:-1]):.0f}" for row in speedup.rows]
    assert [f"{100 * float(cell):.0f}" for cell in efficiencies_shown[1:-1]] == in_percent
    assert any("on average, which counts" in note for note in notes(section))


def test_amdahl_s_serial_part_is_lost_computational_efficiency(study: tuple[Facts, dict[int, Truth]]) -> None:
    """On N ranks the serial part is done N times: 1 / (1 + serial (N - 1)), less what the slow rank adds."""
    for row in study[0].scaling.groups[0].rows:
        slow = 1 + 0.2 / 8 if row.size == 8 else 1
        expected = 1 / ((1 + NOISY.serial * (row.size - 1)) * slow)
        low, high = row.pop.intervals["computational"]
        assert row.pop.factors["computational"] == pytest.approx(expected, rel=0.005)
        assert low <= row.pop.factors["computational"] <= high and (row.is_baseline or low <= expected <= high)


def test_nineteen_of_twenty_intervals_hold_the_truth(tmp_path: Path) -> None:
    """Of what the law comes to in the long run, for one slow rank of two and little noise of theirs."""
    law = Laws(ranks=2, steps=130, noise=0.05, slow=(Slow(1, 1.5),))
    _, long = laws.write(tmp_path, replace(law, steps=20_010, stamp="20261201T000000Z"))
    names = ("parallel", "load_balance", "input", "transfer")
    num_held = dict.fromkeys(names, 0)
    for seed in range(1, 41):
        run, _ = laws.write(tmp_path, replace(law, seed=seed, stamp=f"20261101T0000{seed:02}Z"))
        intervals = efficiencies([load(run)], None).intervals
        for name in names:
            low, high = intervals[name]
            num_held[name] += low < getattr(long, name) < high
            assert high - low < 0.03
    assert min(num_held.values()) >= 34, num_held  # 38 expected; fewer than 34 of 40 happen once in 80 times


def test_repeats_are_pooled_and_widen_the_interval(tmp_path: Path) -> None:
    for index, factor in enumerate((1.1, 1.3, 1.5)):
        laws.write(tmp_path, replace(NOISY, slow=(Slow(index, factor),), stamp=f"2026112{index}T210000Z"))
    (group,) = compare(load_all([tmp_path])).groups
    (row,) = group.rows
    alone = [efficiencies([run], None) for run in row.runs]
    values = [each.factors["load_balance"] for each in alone]
    assert min(values) < row.pop.factors["load_balance"] < max(values)
    low, high = row.pop.intervals["load_balance"]
    assert high - low > 3 * max(np.subtract(*each.intervals["load_balance"][::-1]) for each in alone)
    assert "computational" not in row.pop.factors and "global" not in row.pop.factors  # no baseline


def test_weak_scaling_compares_the_work_of_a_sample(tmp_path: Path) -> None:
    laws.study(tmp_path, Laws(weak=True, batch=64, work_s=0.02), (1, 4))
    (group,) = compare(load_all([tmp_path])).groups
    assert group.weak
    assert group.rows[1].pop.factors["computational"] == pytest.approx(1.0, abs=1e-6)


def test_input_stalls_of_one_rank_are_input_and_not_transfer(tmp_path: Path) -> None:
    law = Laws(work_s=0.08, slow=(Slow(2, 1.5, 0.5, input_stall=True),))
    factors = one(tmp_path, law).factors
    assert factors["load_balance"] == pytest.approx(1.0) and factors["serialisation"] == pytest.approx(1.0)
    assert factors["input"] == pytest.approx(10 / (10 + 0.5 + 2.5), abs=0.02)  # ms: useful, input, half of 5 ms stalls
    assert factors["transfer"] > 0.94  # 0.7 ms of exposed messages


def test_alternating_slow_ranks_are_serialisation_and_not_load_imbalance(tmp_path: Path) -> None:
    law = Laws(ranks=4, work_s=0.04, steps=410, slow=tuple(Slow(rank, 2.0, 0.25) for rank in range(4)))
    factors = one(tmp_path, law).factors
    assert factors["load_balance"] > 0.9
    assert factors["serialisation"] < 0.8


def test_exposed_messages_are_transfer(tmp_path: Path) -> None:
    law = Laws(work_s=0.08, message_bytes=4e7, beta_s_per_byte=1e-10, overlap=0.5, input_s=0.0)
    factors = one(tmp_path, law).factors
    assert law.exposed_s == pytest.approx(7e-3 + 28e-6 - 3e-3)
    assert factors["transfer"] == pytest.approx(law.useful_s / (law.useful_s + law.exposed_s), rel=1e-3)


def test_noise_is_that_of_the_ranks(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, Laws(ranks=32, noise=0.07, steps=310))
    balance = load(run).load_balance
    assert balance is not None and balance.noise is not None and balance.imbalance is not None
    stretch = 0.9**2 + 0.1**2  # two draws make a stretch: 90% of this step's, 10% of the last's
    assert balance.noise == pytest.approx(0.07 * stretch**0.5, rel=0.03)
    assert balance.imbalance < 0.01


def test_several_attempts_leave_no_stretch_across_them(tmp_path: Path) -> None:
    """The same records told as two attempts: nothing but the stretch across the seam may change."""
    run, _ = laws.write(tmp_path, NOISY)
    whole = efficiencies([load(run)], None).factors
    for path in run.timings_dir.iterdir():
        header, *lines = path.read_text().splitlines()
        later = [f"{line.removesuffix(',1')},2" if int(line.split(",")[0]) >= 100 else line for line in lines]
        path.write_text("\n".join([header, *later, ""]))
    cut = load(run)
    assert cut.summary.num_steps == 210
    assert efficiencies([cut], None).factors == pytest.approx(whole, abs=1e-3)


# ---------------------------------------------------------------------------------------------- what is not known


def group_of(root: Path, *recipes: Recipe) -> Group:
    for recipe in recipes:
        write_run(root, recipe)
    (group,) = compare(load_all([root])).groups
    return group


def test_phases_that_were_not_timed_leave_pop_missing_and_say_so(tmp_path: Path) -> None:
    only_steps = {"data": 0.0, "forward": 0.0, "backward": 0.0, "reduce": 0.0, "optimizer": 0.0, "other": 1.0}
    for size in (1, 2):
        write_run(tmp_path, Recipe(size=size, shares=only_steps))
    facts = gather([tmp_path])
    for row in facts.scaling.groups[0].rows:
        assert not row.pop.factors and "was not timed" in (row.pop.missing or "")
        assert not any(each.stragglers for each in row.stragglers)
    (section,) = build_report(facts).sections
    (why,) = notes(section, "pop-missing")
    assert "1 rank, 2 ranks" in why
    assert "pop" not in {table.id for table in section.tables}


def test_servers_are_left_out_and_nobody_waits_for_an_asynchronous_one(tmp_path: Path) -> None:
    servers = {"strategy": "parameter_server", "servers": 1, "size": 4}
    both = [{"asynchronous": True}, {"asynchronous": False}]
    for index, reduce in enumerate(both):
        write_run(tmp_path / str(index), Recipe(**servers, reduce=reduce))  # type: ignore[arg-type]
    alone, together = (compare(load_all([tmp_path / str(index)])).groups[0].rows[0] for index in range(2))
    assert [run.load_balance.ranks.tolist() for run in alone.runs if run.load_balance] == [[0, 1, 2]]
    assert {"serialisation", "transfer", "input"} & set(alone.pop.factors) == set()
    assert {"serialisation", "transfer", "input"} <= set(together.pop.factors)
    assert "no rank waits for another" in (alone.stragglers[0].none_because or "")


def test_a_run_without_a_steady_step_has_none(tmp_path: Path) -> None:
    group = group_of(tmp_path, Recipe(size=2, steps=10, warmup=10))
    assert group.rows[0].pop.missing == "no steady step" and group.rows[0].runs[0].load_balance is None


# ---------------------------------------------------------------------------------------------- recorded runs


def test_recorded_runs_have_factors_that_can_be() -> None:
    """A real MLP on 1, 2 and 4 ranks of a machine with 2 cores, where 4 ranks take turns: they compute half as fast."""
    (group,) = compare(load_all([Path(__file__).parents[2] / "runs" / "mlp-mnist"])).groups
    for row in group.rows:
        factors = row.pop.factors
        assert set(factors) == set(FACTORS)
        assert all(0 < factors[name] < 1.0005 for name in FACTORS)
        assert factors["global"] / group.rows[0].pop.factors["global"] == pytest.approx(row.efficiency, rel=1e-9)
    assert 0.4 < group.rows[2].pop.factors["computational"] < 0.55 and group.rows[1].pop.factors["computational"] > 0.9


def test_one_step_and_useful_time_in_one_block_tell_no_error() -> None:
    law = Laws(ranks=3, noise=0.1, steps=11)
    single = efficiencies([recorded(law)], None)
    assert 0 < single.factors["load_balance"] < 1 and single.intervals == {}
    run = recorded(replace(law, steps=60))
    assert run.load_balance is not None
    useful_s = np.where(np.arange(50) == 3, run.load_balance.useful_blocks_s, 0.0)
    found = efficiencies([replace(run, load_balance=replace(run.load_balance, useful_blocks_s=useful_s))], None)
    assert set(found.factors) > {"parallel", "load_balance"} and "parallel" not in found.intervals

"""Who holds the others up is named, by arrival on aligned clocks; who does not, or may not, is not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.efficiency.pop import efficiencies
from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis, find_stragglers
from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.notes.headlines import time_lost_text
from hpc_train.analysis.report.renderers.files import summary_tree, write_report
from hpc_train.analysis.report.report import build_report, make_report
from hpc_train.analysis.runs.load import Run, load, load_all
from hpc_train.core.rundir import RunDir
from tests import laws
from tests.analysis.rendered import notes, table
from tests.laws import Laws, Slow

SKEWED = Laws(noise=0.03, clock_offset_s=3.0, clock_drift=2e-5, clock_error_s=2e-6)
TWICE = tuple(Slow(rank, 1.3) for rank in (2, 5))


def found(root: Path, law: Laws) -> tuple[Run, StragglerAnalysis]:
    run, _ = laws.write(root, law)
    loaded = load(run)
    return loaded, find_stragglers(loaded)


def edit_meta(run: RunDir, **changes: object) -> None:
    run.meta.write_text(json.dumps({**json.loads(run.meta.read_text()), **changes}))


def test_a_persistent_one_is_named_with_its_host_and_cost(tmp_path: Path) -> None:
    law = replace(SKEWED, slow=(Slow(5, 1.3),))
    run, told = found(tmp_path, law)
    (one,) = told.stragglers
    assert (one.ranks, one.host, one.persistent, one.whole_host) == ((5,), "c1", True, False)
    assert one.share_last > 0.99
    # 0.3 of the useful time, less the latest of 7 others above their mean: 1.35 standard deviations of a stretch
    expected = law.useful_s * (0.3 - 1.35 * law.noise * (0.9**2 + 0.1**2) ** 0.5)
    assert one.cost_s == pytest.approx(expected, rel=0.05)
    assert one.share == pytest.approx(expected / run.step_s.mean(), rel=0.05)
    assert told.share == one.share and told.share_interval == one.share_interval
    assert (one.cause, one.excess) == ("computing", pytest.approx(1.3, abs=0.01))
    assert told.clock_error_s is not None and told.clock_error_s < 5e-6


def test_nineteen_of_twenty_intervals_hold_what_it_costs_in_the_long_run(tmp_path: Path) -> None:
    law = replace(SKEWED, ranks=4, steps=130, slow=(Slow(2, 1.3),))
    _, long = found(tmp_path, replace(law, steps=10_010, stamp="20261201T000000Z"))
    held = 0
    for seed in range(1, 31):
        _, told = found(tmp_path, replace(law, seed=seed, stamp=f"20261101T0000{seed:02}Z"))
        low, high = told.share_interval or (0.0, 0.0)
        held += low < long.share < high
        assert high - low < 0.03
    assert held >= 25, held  # 28.5 expected


def test_a_sporadic_one_is_told_as_such(tmp_path: Path) -> None:
    _, told = found(tmp_path, replace(SKEWED, steps=1010, slow=(Slow(6, 3.0, 0.1),)))
    (one,) = told.stragglers
    assert (one.ranks, one.host, one.persistent) == ((6,), "c1", False)
    assert one.cost_s == pytest.approx(0.1 * 2.0 * 0.01, rel=0.15)  # every tenth step takes 2 x 10 ms more
    assert 0.1 < one.share_last < 0.35


def test_a_rank_that_waits_for_input_is_told_as_such(tmp_path: Path) -> None:
    _, told = found(tmp_path, replace(SKEWED, slow=(Slow(3, 1.4, input_stall=True),)))
    (one,) = told.stragglers
    assert (one.ranks, one.cause) == ((3,), "input")
    assert one.excess == pytest.approx((0.4 * 10 + 0.5) / (1.4 * 10 + 0.5 + 0.728), rel=0.05)  # ms, of the step


def test_two_slow_ranks_are_both_named_though_each_hides_the_other(tmp_path: Path) -> None:
    run, told = found(tmp_path, replace(SKEWED, slow=TWICE))
    assert {one.ranks for one in told.stragglers} == {(2,), (5,)}
    assert told.share == pytest.approx(0.27 * SKEWED.useful_s / run.step_s.mean(), rel=0.1)
    assert told.share == pytest.approx(sum(one.share for one in told.stragglers))


def test_a_slow_host_is_named_rather_than_its_ranks(tmp_path: Path) -> None:
    slow = tuple(Slow(rank, 1.25) for rank in range(8, 12))
    _, told = found(tmp_path, replace(SKEWED, ranks=16, slow=slow))
    (one,) = told.stragglers
    assert one.whole_host and one.host == "c2" and one.ranks == (8, 9, 10, 11) and one.persistent
    assert one.excess == pytest.approx(1.25, abs=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_balanced_job_names_nobody(tmp_path: Path, ranks: int, noise: float) -> None:
    for seed in range(3):
        law = replace(SKEWED, ranks=ranks, noise=noise, seed=seed, stamp=f"2026112{seed}T210000Z")
        _, told = found(tmp_path, law)
        assert (
            not told.stragglers and told.none_because == "no rank costs the others 1% of their time by more than chance"
        )


def test_nobody_is_named_within_the_clocks_error(tmp_path: Path) -> None:
    """Offsets that are wrong by 0.3 ms, 3% of the step, make a host look late on which nobody is."""
    law = replace(SKEWED, noise=0.0, ranks_per_host=1, clock_error_s=3e-4)
    run, told = found(tmp_path, law)
    assert run.load_balance and run.load_balance.arrivals and run.load_balance.arrivals.basis == "arrival"
    late_s = run.load_balance.arrivals.late_s
    assert np.ptp(late_s) > 3e-4 and not told.stragglers
    assert told.clock_error_s is not None and told.clock_error_s > 1e-4


@pytest.mark.parametrize("leaves_late", [False, True])
def test_a_rank_that_leaves_as_late_as_it_arrives_costs_nothing(tmp_path: Path, leaves_late: bool) -> None:
    """On one host, where no clock is to blame: rank 0 is 5 ms behind all the time, or takes 5 ms longer."""
    law = Laws(ranks=2, ranks_per_host=2, noise=0.01, slow=() if leaves_late else (Slow(0, 1.125),))
    directory, _ = laws.write(tmp_path, law)
    if leaves_late:
        header, *lines = directory.timings(0).read_text().splitlines()
        names, rows = header.split(","), [list(map(int, line.split(","))) for line in lines]
        for row in rows:
            for name in ("start_ns", "arrived_ns"):
                row[names.index(name)] += 5_000_000
        directory.timings(0).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows), ""]))
    run = load(directory)
    assert run.load_balance and run.load_balance.arrivals
    assert run.load_balance.arrivals.late_s[0] == pytest.approx(0.0025, rel=0.2), "of the median of two, half of 5 ms"
    assert bool(find_stragglers(run).stragglers) is not leaves_late


def test_the_cost_is_no_more_than_the_factors_of_balance_leave(tmp_path: Path) -> None:
    """Rank 0 takes 8 ms longer and leaves reductions 1 ms late: the others wait 9 ms, of which it may save 8."""
    law = Laws(ranks=4, ranks_per_host=4, noise=0.0, slow=(Slow(0, 1.4),))
    directory, _ = laws.write(tmp_path, law)
    header, *lines = directory.timings(0).read_text().splitlines()
    names, rows = header.split(","), [list(map(int, line.split(","))) for line in lines]
    for row in rows:
        for name in ("start_ns", "arrived_ns"):
            row[names.index(name)] += 1_000_000
    directory.timings(0).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows), ""]))
    run = load(directory)
    told, factors = find_stragglers(run), efficiencies([run], None).factors
    left = factors["transfer"] * (1 - factors["load_balance"] * factors["serialisation"] * factors["input"])
    assert [one.ranks for one in told.stragglers] == [(0,)]
    assert told.share * run.step_s.mean() == pytest.approx(0.008, rel=0.005)
    assert told.share <= left * 4 / 3, "of the four's mean; that of the three others is lower"


def test_clocks_that_jumped_are_found_out_and_waits_are_used_instead(tmp_path: Path) -> None:
    directory, _ = laws.write(tmp_path, replace(SKEWED, slow=(Slow(5, 1.3),)))
    offsets = json.loads(directory.meta.read_text())["clock_offsets_ns"]
    offsets["end"][:4] = [offset + 50_000_000 for offset in offsets["end"][:4]]
    edit_meta(directory, clock_offsets_ns=offsets)
    run = load(directory)
    told = find_stragglers(run)
    assert [one.ranks for one in told.stragglers] == [(5,)]
    assert run.load_balance and run.load_balance.arrivals and run.load_balance.arrivals.basis == "wait"
    assert "would leave reductions" in (told.unaligned or "") and told.clock_error_s is None
    (section,) = make_report([tmp_path]).sections
    assert any(note.startswith("Clocks of 8 ranks ") for note in notes(section, "stragglers"))


@pytest.mark.parametrize("offsets", [None, {"start": [0, 1]}, {"start": "no"}, {"start": [0.5] * 8}])
def test_without_offsets_waits_are_used_and_it_is_said(tmp_path: Path, offsets: object) -> None:
    directory, _ = laws.write(tmp_path, replace(SKEWED, slow=(Slow(5, 1.3),)))
    edit_meta(directory, clock_offsets_ns=offsets)
    told = find_stragglers(load(directory))
    assert [one.ranks for one in told.stragglers] == [(5,)] and "did not record" in (told.unaligned or "")


def test_an_attempt_that_was_killed_has_no_end_of_its_own(tmp_path: Path) -> None:
    """The offsets at the end are those of an attempt before, on other hosts: they would set the clocks wrong."""
    law = replace(SKEWED, clock_drift=0.0, slow=(Slow(5, 1.3),))
    directory, _ = laws.write(tmp_path, law)
    offsets = json.loads(directory.meta.read_text())["clock_offsets_ns"]
    edit_meta(
        directory, ended=None, outcome=None, clock_offsets_ns={**offsets, "end": [rank * 10**9 for rank in range(8)]}
    )
    told = find_stragglers(load(directory))
    assert [one.ranks for one in told.stragglers] == [(5,)] and told.clock_error_s is not None


def test_records_of_another_run_are_found_out(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, SKEWED)
    other, _ = laws.write(tmp_path, replace(SKEWED, seed=1, stamp="20261124T210000Z"))
    shutil.copy(other.timings(6), run.timings(6))
    shutil.copy(other.timings(6), run.timings(8))
    loaded = load(run)
    told = find_stragglers(loaded)
    assert "rank 6 on c1" in (told.unaligned or "") and "another run's" in (told.unaligned or "")
    assert "holds 9 files of a run of 8 ranks" in (loaded.incomplete or "")
    one_host, _ = laws.write(tmp_path / "one", replace(SKEWED, ranks_per_host=8))
    header, *lines = one_host.timings(6).read_text().splitlines()
    cells = [line.split(",") for line in lines]
    moved = [
        ",".join([step, str(int(start) + 10**9), str(int(came) + 10**9), *rest]) for step, start, came, *rest in cells
    ]
    one_host.timings(6).write_text("\n".join([header, *moved, ""]))
    assert "others: its records are another run's" in (find_stragglers(load(one_host)).unaligned or "")


def test_a_run_given_twice_and_its_copy_count_once(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path / "runs", SKEWED)
    copy = tmp_path / "copies" / "laws" / "elsewhere"
    shutil.copytree(run.path, copy)
    (loaded,) = load_all([tmp_path / "runs", run.path, tmp_path / "copies"])
    assert loaded.copies == (copy,)
    made = make_report([tmp_path / "runs", tmp_path / "copies"])
    assert f"Counted once: {copy} is a copy of {loaded.dir.path}." in notes(made.sections[0])


def test_one_rank_waits_for_nobody(tmp_path: Path) -> None:
    run, told = found(tmp_path, replace(SKEWED, ranks=1))
    assert told.none_because == "one rank waits for nobody" and run.load_balance and run.load_balance.noise is None
    assert not notes(make_report([tmp_path]).sections[0], "stragglers")


def test_a_crashed_run_still_names_its_slow_rank(tmp_path: Path) -> None:
    run, _ = laws.write(tmp_path, replace(SKEWED, complete=False, slow=(Slow(5, 1.3),)))
    for rank in range(8):
        lines = run.timings(rank).read_text().splitlines(keepends=True)
        run.timings(rank).write_text("".join(lines[: 120 + rank]) + lines[120 + rank][:17])
    loaded = load(run)
    assert "ranks recorded 119 to 126 steps" in (loaded.incomplete or "")
    assert "the last line of ranks 0, 1, 2, 3, 4 and 3 more is cut short" in (loaded.incomplete or "")
    assert [one.ranks for one in find_stragglers(loaded).stragglers] == [(5,)]


def test_the_report_says_it_in_words_tables_and_records(tmp_path: Path) -> None:
    laws.study(tmp_path, replace(SKEWED, slow=(Slow(5, 1.3),)), (1, 4, 8))
    facts = gather([tmp_path])
    report = build_report(facts)
    (line,) = report.headlines
    assert "; 19% of the time lost to straggler rank 5 on c1" in line
    (section,) = report.sections
    assert [row[:3] for row in table(section, "stragglers").rows] == [("8", "rank 5 on c1", "persistent")]
    assert any("4 ranks" in note for note in notes(section, "stragglers"))
    row = summary_tree(report)["groups"][0]["rows"][-1]
    assert row["stragglers"][0]["ranks"] == [5] and row["straggler"] == "rank 5 on c1"
    assert row["time_lost"] == pytest.approx(0.19, abs=0.01)
    written = write_report(report, tmp_path / "out").parent / "scaling.csv"
    assert "rank 5 on c1" in written.read_text() and "pop_load_balance_low" in written.read_text()
    assert time_lost_text(facts.scaling.groups[0].rows[0]) == ""


def test_the_map_is_bright_where_the_slow_rank_is(tmp_path: Path) -> None:
    run, _ = found(tmp_path, replace(SKEWED, ranks=300, steps=510, work_s=3.0, slow=(Slow(150, 1.5),)))
    assert run.load_balance and run.load_balance.arrivals
    cells = run.load_balance.arrivals.map_s
    assert cells.shape == (256, 167) and np.isfinite(cells).all()
    assert set(np.argmax(cells, axis=0)) == {150 * 256 // 300}

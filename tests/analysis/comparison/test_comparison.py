"""A planted slowdown is found and named; alike runs raise no alarm. Runs have run-to-run and autocorrelated noise."""

import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hpc_train.analysis.comparison.comparison import RunComparison, compare_sides
from hpc_train.analysis.comparison.sides import load_side
from hpc_train.analysis.comparison.significance import holm_levels, p_value, relative_interval
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.report.sections.comparison import headline, metrics_table
from hpc_train.analysis.stats.estimate import of_value, ratio
from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError
from hpc_train.core.records import FloatArray
from hpc_train.core.rundir import RunDir
from tests import laws
from tests.laws import PARTS, Laws

REPEATS = 3


@dataclass(frozen=True)
class Noisy(Laws):
    """Runs that differ: as wholes, by host and by rank; and whose steps resemble the step before."""

    ranks: int = 8
    ranks_per_host: int = 2
    noise: float = 0.03
    autocorrelation: float = 0.8  # of the noise, from one step to the next
    run_noise: float = 0.02  # standard deviation of a run's speed, relative
    host_noise: float = 0.004  # of a host's in a run
    slower: dict[tuple[str, str], float] = field(default_factory=dict)  # (host, phase) -> how many times as long

    def parts(self, rank: int) -> dict[str, float]:
        longer = {part: share * self.slower.get((self.host_of(rank), part), 1.0) for part, share in PARTS.items()}
        return {part: share / sum(longer.values()) for part, share in longer.items()}

    def work(self, rank: int) -> tuple[FloatArray, FloatArray]:
        draws = np.random.default_rng([self.seed, self.ranks, rank])
        useful = self.useful_s * self._speeds[rank // self.ranks_per_host] * (1 + self._autoregressive(draws))
        host = self.host_of(rank)
        useful *= sum(share * self.slower.get((host, part), 1.0) for part, share in PARTS.items())
        useful *= next((slow.factor for slow in self.slow if slow.rank == rank), 1.0)
        useful[: self.warmup] *= 3
        return useful, np.full(self.steps, self.input_s) * (1 + 0.2 * np.abs(draws.standard_normal(self.steps)))

    @cached_property
    def _speeds(self) -> FloatArray:
        draws = np.random.default_rng([self.seed, 99])
        hosts = draws.standard_normal(len(self.hosts))
        return np.asarray(np.exp(self.run_noise * draws.standard_normal() + self.host_noise * hosts))

    def _autoregressive(self, draws: np.random.Generator) -> FloatArray:
        shocks = draws.standard_normal(self.steps) * self.noise * (1 - self.autocorrelation**2) ** 0.5
        shocks[0] = draws.standard_normal() * self.noise
        for step in range(1, self.steps):
            shocks[step] += self.autocorrelation * shocks[step - 1]
        return np.asarray(shocks)


def write_repeats(folder: Path, law: Laws, seed: int, num_runs: int = REPEATS) -> Path:
    folder.mkdir()
    for index in range(num_runs):
        laws.write(folder, replace(law, seed=100 * seed + index, stamp=f"2026112{index}T210000Z"))
    return folder


def compared(before: Path, after: Path, threshold: float = 0.03) -> RunComparison:
    return compare_sides(load_side(before)[0], load_side(after)[0], threshold)


def run_compare(*words: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, words)])


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_phase_that_takes_five_percent_longer_on_one_host_is_found_in_three_repeats(
    tmp_path: Path, phase: str
) -> None:
    found = 0
    for seed in range(5):
        before = write_repeats(tmp_path / f"a{seed}", Noisy(), 2 * seed)
        after = write_repeats(tmp_path / f"b{seed}", Noisy(slower={("c2", phase): 1.05}), 2 * seed + 1)
        comparison = compared(before, after)
        changed = comparison.changed_places
        named = [(each.of.phase, each.of.place.name, each.verdict) for each in changed]
        found += named == [(phase, "c2", "regression")] and comparison.is_regression
        if found:
            low, high = changed[0].interval
            assert 0.03 < changed[0].relative < 0.07 and 0 < low < 0.05 < high < 0.1
    assert found == 5, found


def test_twenty_pairs_of_alike_runs_raise_at_most_one_alarm(tmp_path: Path) -> None:
    alarms = []
    for seed in range(20):
        before = write_repeats(tmp_path / f"a{seed}", Noisy(), 2 * seed)
        after = write_repeats(tmp_path / f"b{seed}", Noisy(), 2 * seed + 1)
        if compared(before, after).is_regression:
            alarms.append(seed)
    assert len(alarms) <= 1, alarms


def test_a_slow_rank_is_named_with_its_host(tmp_path: Path) -> None:
    """Against the other ranks of its host, which is no slower as a whole than a quarter of that."""
    slow = Noisy(ranks_per_host=4, slow=(laws.Slow(5, 1.1),))
    before = write_repeats(tmp_path / "a", Noisy(ranks_per_host=4), 1)
    after = write_repeats(tmp_path / "b", slow, 2)
    places = compared(before, after).changed_places
    assert {each.of.place.name for each in places} == {"5 on c1"}
    assert {each.of.phase for each in places} == set(PARTS) and all(each.verdict == "regression" for each in places)


def test_what_all_hosts_have_in_common_is_a_change_of_the_job(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(run_noise=0.003), 1)
    after = write_repeats(tmp_path / "b", Noisy(run_noise=0.003, work_s=0.088), 2)
    comparison = compared(before, after)
    assert comparison.speed.name == "step time" and comparison.speed.verdict == "regression"
    low, high = comparison.speed.interval or (0.0, 0.0)
    assert low < 0.1 * 0.095 / 0.1 < high and not comparison.changed_places
    throughput = comparison.metrics[1]
    assert throughput.verdict == "regression" and throughput.relative == pytest.approx(
        1 / (1 + (comparison.speed.relative or 0.0)) - 1
    )
    assert compared(after, before).speed.verdict == "improvement"
    assert not compared(after, before).is_regression
    assert compared(before, after, threshold=0.2).speed.verdict == "below the threshold"


def test_a_baseline_holds_what_its_runs_hold(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(), 1)
    after = write_repeats(tmp_path / "b", Noisy(slower={("c2", "forward"): 1.05}), 2)
    baseline = tmp_path / "baseline.json"
    assert run_compare(before, "--save", baseline).exit_code == 0
    of_runs, of_baseline = (run_compare(side, after, "--json") for side in (before, baseline))
    trees = [json.loads(told.stdout) for told in (of_runs, of_baseline)]
    assert of_runs.exit_code == of_baseline.exit_code == 1 and trees[0]["is_regression"]
    assert {**trees[0], "answer": 0, "before": 0} == {**trees[1], "answer": 0, "before": 0}
    (named,) = [place for place in trees[1]["places"] if place["verdict"] == "regression"]
    assert (named["phase"], named["kind"], named["place"]) == ("forward", "host", "c2")


def test_one_new_run_is_judged_by_how_the_baseline_varies(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(run_noise=0.003), 1, num_runs=5)
    same = write_repeats(tmp_path / "b", Noisy(run_noise=0.003), 2, num_runs=1)
    slow = write_repeats(tmp_path / "c", Noisy(run_noise=0.003, work_s=0.088), 3, num_runs=1)
    assert run_compare(before, same).exit_code == 0
    told = run_compare(before, slow)
    assert told.exit_code == 1 and "The single run is taken to vary as the repeats of the other side do." in told.output


def test_one_run_each_judges_nothing(tmp_path: Path) -> None:
    one = write_repeats(tmp_path / "a", Noisy(), 1, num_runs=1)
    slightly = write_repeats(tmp_path / "b", Noisy(work_s=0.085), 2, num_runs=1)
    much = write_repeats(tmp_path / "c", Noisy(work_s=0.120), 3, num_runs=1)
    told = run_compare(one, slightly)
    assert told.exit_code == 0 and "With one run a side" in told.output
    comparison = compared(one, slightly)
    assert {metric.verdict for metric in comparison.metrics} == {"not judged"} and not comparison.places
    low, high = comparison.speed.interval or (0.0, 0.0)
    assert low < (comparison.speed.relative or 0.0) < high < low + 0.05
    told = run_compare(one, much)
    assert told.exit_code == 0 and "more time a step, which one run a side cannot tell from chance" in told.output
    assert "regression" not in told.output


def test_what_differs_is_named_by_kind(tmp_path: Path) -> None:
    git = {"git": {"commit": "1234567890abcdef", "dirty": False}, "cpu_model": "Grace", "environment": {"OMP_X": "1"}}
    before = write_repeats(tmp_path / "a", Noisy(meta={"environment": {"NCCL_Y": "2"}}), 1, 2)
    after = write_repeats(tmp_path / "b", Noisy(reduce={"compression": "fp16"}, meta=git), 2, 2)
    told = {(each.kind, each.name): (each.before, each.after) for each in compared(before, after).differences}
    assert told == {
        ("configuration", "reduce.compression"): ("none", "fp16"),
        ("software", "git commit"): ("b0f1e82c0ffe", "1234567890ab"),
        ("software", "environment OMP_X"): ("not set", "1"),
        ("software", "environment NCCL_Y"): ("2", "not set"),
        ("hardware", "CPU"): ("AMD EPYC 7763 64-Core Processor", "Grace"),
    }


def test_hosts_of_another_allocation_are_compared_by_position(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(), 1)
    after = write_repeats(tmp_path / "b", Noisy(slower={("c2", "forward"): 1.08}), 2)
    for run in after.glob("*/*"):
        meta = RunDir(run).meta
        meta.write_text(meta.read_text().replace('"c', '"node'))
    told = run_compare(before, after)
    assert told.exit_code == 1 and "forward on node 2" in told.output and "different hosts" in told.output


def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path) -> None:
    mixed = write_repeats(tmp_path / "a", Noisy(), 1, 1)
    laws.write(mixed, Noisy(ranks=4, stamp="20261201T000000Z"))
    with pytest.raises(UserError, match="its runs are no repeats: ranks is"):
        load_side(mixed)
    crashed = write_repeats(tmp_path / "b", Noisy(complete=False), 1, 1)
    with pytest.raises(UserError, match=r"nothing to compare: Left out: .*no summary\.json"):
        load_side(crashed)
    damaged = tmp_path / "baseline.json"
    for content, told in (
        ("{", "not JSON"),
        ("[]", "no baseline"),
        ('{"hpc_train_baseline": 99}', "a later hpc-train"),
    ):
        damaged.write_text(content)
        with pytest.raises(UserError, match=told):
            load_side(damaged)
    good = tmp_path / "good.json"
    assert run_compare(write_repeats(tmp_path / "c", Noisy(), 1, 1), "--save", good).exit_code == 0
    tree = json.loads(good.read_text())
    tree["runs"][0]["step_s"] = -1
    damaged.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no baseline: runs\.0\.step_s: "):
        load_side(damaged)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (Noisy(ranks=4, ranks_per_host=1), "ranks: 8 and 4"),
        (Noisy(ranks_per_host=4), "hosts: 4 and 2"),
        (Noisy(batch=8192), "global batch: 4096 and 8192"),
        (Noisy(message_bytes=8e6), "parameters: 1000000 and 2000000"),
        (Noisy(meta={"num_train_samples": 60_000}), "training samples: 50000 and 60000"),
    ],
)
def test_sides_that_did_different_work_are_refused(tmp_path: Path, other: Noisy, differing: str) -> None:
    before, after = write_repeats(tmp_path / "a", Noisy(), 1, 2), write_repeats(tmp_path / "b", other, 2, 2)
    for sides in ((before, after), (after, before)):
        with pytest.raises(UserError) as told:
            compared(*sides)
        one, _, two = differing.partition(": ")[2].partition(" and ")
        swapped = f"{differing.partition(':')[0]}: {two} and {one}"
        assert "are not the same job" in told.value.what
        assert (differing if sides[0] == before else swapped) in told.value.what


def test_what_would_show_is_told_both_ways_and_noise_is_not_told_in_digits(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(run_noise=0.2), 1)
    comparison = compared(before, write_repeats(tmp_path / "b", Noisy(run_noise=0.2), 2))
    low, high = comparison.speed.smallest_shown or (0.0, 0.0)
    assert -1 < low < 0 < high and (1 + low) * (1 + high) == pytest.approx(1)
    assert f"a change of {100 * low:+.1f} or {100 * high:+.1f}% would be" in headline(comparison)
    wild = write_repeats(tmp_path / "c", Noisy(run_noise=1.5), 3, num_runs=2)
    table = metrics_table(compared(wild, write_repeats(tmp_path / "d", Noisy(run_noise=1.5), 4, num_runs=2)))
    cells = [cell for row in table.rows for cell in map(str, row)]
    assert any("too few runs" in cell for cell in cells) and not any("e-" in cell for cell in cells), cells


def test_a_threshold_is_a_percentage_with_its_sign(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(), 1, 2)
    assert run_compare(before, before, "--threshold", "5%").exit_code == 0
    told = run_compare(before, before, "--threshold", "0.05")
    assert told.exit_code == 2 and "0.05: write a percentage with its sign, such as 3%" in " ".join(told.output.split())


def test_a_file_that_is_no_baseline_and_a_folder_that_is_missing_are_named(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(), 1, 1)
    table = tmp_path / "table.csv"
    table.write_text("ranks,step_s\n1,2\n")
    with pytest.raises(UserError, match=r"table\.csv is a file, and neither a run nor a baseline"):
        load_side(table)
    told = run_compare(before, "--save", tmp_path / "none" / "x.json")
    assert isinstance(told.exception, UserError)
    assert "its folder does not exist" in told.exception.what and "Create the folder" in told.exception.remedy


RUNS = Path(__file__).parents[2] / "runs"


@pytest.mark.parametrize(
    ("before", "after", "differing"),
    [
        ("mlp-mnist/20261123T231944Z-np1", "mlp-mnist/20261123T231950Z-np2", "ranks: 1 and 2"),
        ("mlp-two-hosts/20261130T122316Z-np4-job1", "mlp-mnist/20261123T231958Z-np4", "hosts: 2 and 1"),
    ],
)
def test_real_runs_of_unlike_jobs_end_with_2(before: str, after: str, differing: str) -> None:
    told = run_compare(RUNS / before, RUNS / after)
    assert isinstance(told.exception, UserError) and differing in told.exception.what


def test_nineteen_of_twenty_intervals_hold_the_true_change() -> None:
    draws = np.random.default_rng(0)
    for num_before, num_after in ((3, 3), (2, 5), (4, 1)):
        held, num_tests = 0, 0
        for _ in range(1000):
            before = np.exp(0.02 * draws.standard_normal(num_before))
            after = 1.05 * np.exp(0.02 * draws.standard_normal(num_after))
            change = ratio(list(map(of_value, after.tolist())), list(map(of_value, before.tolist())))
            low, high = relative_interval(change, 0.05) or (0.0, 0.0)
            held += low < 0.05 < high
            num_tests += (p_value(change) < 0.05) == (not low < 0 < high)
        assert 900 <= held <= 985, (num_before, num_after, held)
        assert num_tests == 1000, "the test and the interval agree"


def test_holm_rejects_what_the_paper_rejects() -> None:
    """p = 0.01, 0.02, 0.04: at 5% the first is below 0.05 / 3, the second below 0.05 / 2, the third below 0.05."""
    assert holm_levels([0.04, 0.01, 0.02], 0.05) == pytest.approx([0.05, 0.05 / 3, 0.025])
    assert holm_levels([0.04, 0.01, 0.03], 0.05) == pytest.approx([0.025, 0.05 / 3, 0.025]), (
        "none after the first that fails"
    )


def test_intervals_of_places_hold_the_true_change(tmp_path: Path) -> None:
    """Of a host's phase that takes 5% longer; each interval has the level at which Holm tests it, 95% or more."""
    held, widths, num_found = 0, [], 30
    slow = {("c2", "forward"): 1.05}
    for seed in range(num_found):
        before = write_repeats(tmp_path / f"a{seed}", Noisy(steps=60, host_noise=0.01), 2 * seed)
        after = write_repeats(tmp_path / f"b{seed}", Noisy(steps=60, host_noise=0.01, slower=slow), 2 * seed + 1)
        places = compared(before, after).places
        (of,) = [each for each in places if (each.of.phase, each.of.place.name) == ("forward", "c2")]
        low, high = of.interval
        held += low < 0.05 < high
        widths.append(high - low)
    assert held >= 0.9 * num_found and np.mean(widths) < 0.15, (held, widths)


def test_a_report_compares_two_commits_of_one_job(tmp_path: Path) -> None:
    """At the largest size that both ran on; the commit that was run first is the one before."""
    other = {"git": {"commit": "1234567890abcdef", "dirty": False}, "started": "2026-12-01T00:00:00Z"}
    for size in (4, 8):
        write_repeats(tmp_path / f"{size}", Noisy(ranks=size), size)
    slower = Noisy(slower={("c2", "forward"): 1.08}, meta=other)
    after = write_repeats(tmp_path / "after", slower, 20)
    told = make_report([tmp_path / "4", tmp_path / "8", after])
    (section,) = [section for section in told.sections if section.kind == "comparison"]
    assert "git commit: 1234567890ab" in section.label.partition(" against ")[0]
    assert {table.id for table in section.tables} == {"comparison", "comparison-places", "comparison-differences"}
    assert any("forward on c2" in note.text and note.kind == "finding" for note in section.notes)
    assert section.headline in told.headlines and "3 runs against" in section.headline
    alone = make_report([tmp_path / "4", tmp_path / "8"])
    assert not [section for section in alone.sections if section.kind == "comparison"]


def test_a_longer_run_of_a_job_is_no_change_of_it(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(steps=40), 1)
    after = write_repeats(tmp_path / "b", Noisy(steps=60, slower={("c1", "forward"): 9.0}), 2)
    told = make_report([before, after])
    assert not [section for section in told.sections if section.kind == "comparison"]
    assert not any("time a step" in each for each in told.headlines), told.headlines


def test_a_damaged_baseline_is_refused_or_compared_and_nothing_else(tmp_path: Path) -> None:
    """Each number, list, object and text of it in turn is something else."""
    runs = write_repeats(tmp_path / "a", Noisy(ranks=4, steps=20), 1, 2)
    baseline, damaged = tmp_path / "baseline.json", tmp_path / "damaged.json"
    assert run_compare(runs, "--save", baseline).exit_code == 0
    refused = 0
    for key in json.loads(baseline.read_text())["runs"][0]:
        for value in (None, -1.0, 0, 1e300, 1e-300, "text", [], [1.0], {}, {"forward": [1.0]}, True):
            tree = json.loads(baseline.read_text())
            tree["runs"][0][key] = value
            damaged.write_text(json.dumps(tree))
            told = run_compare(damaged, runs)
            assert isinstance(told.exception, UserError | SystemExit | None), (key, value, told.exception)
            refused += isinstance(told.exception, UserError)
    assert refused > 100


def test_a_host_that_always_was_slower_hides_no_change_of_another(tmp_path: Path) -> None:
    """Hosts of two generations: the median of their times would be that of two hosts alone."""
    older = {("c0", part): 1.3 for part in PARTS} | {("c1", part): 1.15 for part in PARTS}
    before = write_repeats(tmp_path / "a", Noisy(slower=older), 1)
    after = write_repeats(tmp_path / "b", Noisy(slower={**older, ("c1", "forward"): 1.15 * 1.06}), 2)
    (found,) = compared(before, after).changed_places
    assert (found.of.phase, found.of.place.name) == ("forward", "c1")
    assert found.interval[0] < 0.06 < found.interval[1] and found.relative > 0.04


def test_alike_hosts_that_vary_by_more_than_the_threshold_raise_at_most_one_alarm(tmp_path: Path) -> None:
    """Three runs a side tell little of how one host varies: the others tell more."""
    alarms = []
    law = Noisy(ranks=24, ranks_per_host=1, steps=40, host_noise=0.03)
    for seed in range(10):
        before = write_repeats(tmp_path / f"a{seed}", law, 2 * seed)
        after = write_repeats(tmp_path / f"b{seed}", law, 2 * seed + 1)
        alarms += [seed] if compared(before, after).changed_places else []
    assert len(alarms) <= 1, alarms


def test_a_change_of_less_than_a_thousandth_of_a_step_is_below_the_threshold(tmp_path: Path) -> None:
    """`other` takes 2.6% of a step, and 3.5% longer."""
    quiet = Noisy(noise=0.001, run_noise=0.0003, host_noise=0.0003, steps=60)
    before = write_repeats(tmp_path / "a", quiet, 1)
    one = write_repeats(tmp_path / "b", replace(quiet, slower={("c2", "other"): 1.035}), 2)
    (of,) = [each for each in compared(before, one).places if (each.of.phase, each.of.place.name) == ("other", "c2")]
    assert of.relative > 0.03 and of.interval[0] > 0 and of.verdict == "below the threshold"
    every = {(host, "other"): 1.035 for host in quiet.hosts}
    after = write_repeats(tmp_path / "c", replace(quiet, slower=every), 3)
    (metric,) = [each for each in compared(before, after).metrics if each.name == "other"]
    assert (metric.relative or 0.0) > 0.03 and (metric.interval or (0.0,))[0] > 0
    assert metric.verdict == "below the threshold"


QUIET = Noisy(noise=0.001, run_noise=0.0003, host_noise=0.0003, steps=60)


def test_a_phase_whose_slowdown_the_step_does_not_feel_is_told_apart(tmp_path: Path) -> None:
    """forward takes as much longer as backward takes less: on all hosts, then on one."""
    longer = 0.1 * PARTS["forward"] / PARTS["backward"]
    before = write_repeats(tmp_path / "a", QUIET, 1)
    for number, hosts in enumerate((QUIET.hosts, ["c2"])):
        slower = {(host, "forward"): 1.1 for host in hosts} | {(host, "backward"): 1 - longer for host in hosts}
        after = write_repeats(tmp_path / f"b{number}", replace(QUIET, slower=slower), 2 + number)
        told = run_compare(before, after)
        assert told.exit_code == 0, told.output
        words = " ".join(told.output.split())
        name = "forward" if len(hosts) > 1 else "forward on c2"
        assert re.search(rf"Slower, though the step is not, and no regression of the job: {name} \+(9\.9|10)", words)
        assert "Improvements beyond 3.0%: backward" in words


def test_a_phase_that_fails_a_comparison_says_why_the_step_does_not(tmp_path: Path) -> None:
    before = write_repeats(tmp_path / "a", Noisy(), 1)
    after = write_repeats(tmp_path / "b", Noisy(slower={("c2", "forward"): 1.05}), 2)
    told = run_compare(before, after)
    words = " ".join(told.output.split())
    assert told.exit_code == 1 and re.search(
        r"shows no regression: a phase adds up to [\d.]+ ms, [\d.]+% of a step", words
    )


def test_measured_joules_are_not_compared_with_estimated_ones(tmp_path: Path) -> None:
    before, after = (write_repeats(tmp_path / name, Noisy(steps=40), seed) for name, seed in (("a", 1), ("b", 2)))
    for path in after.glob("*/*/energy/*.csv"):
        path.write_text(path.read_text().replace("measured", "estimated"))
    (metric,) = [each for each in compared(before, after).metrics if each.name == "energy per sample"]
    assert (metric.verdict, metric.why) == ("not judged", "measured on one side, estimated on the other")
    (metric,) = [each for each in compared(before, before).metrics if each.name == "energy per sample"]
    assert metric.verdict == "no difference shown" and metric.relative == 0

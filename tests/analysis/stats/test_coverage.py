"""How often each interval that the package prints holds the truth of simulated runs: nineteen times of twenty.

The quick form draws a thousand studies, the thorough form several thousands.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.convergence.target import studies_of
from hpc_train.analysis.efficiency.pop import Efficiencies, efficiencies
from hpc_train.analysis.efficiency.stragglers import find_stragglers
from hpc_train.analysis.energy.cost import UNKNOWN, RowEnergy
from hpc_train.analysis.energy.readings import Reading
from hpc_train.analysis.energy.run_energy import RunEnergy
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.step_timeline import EMPTY_TIMELINE, StepTimeline
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row, pooled_row, with_speedup
from hpc_train.core import config
from hpc_train.core.energy_records import Trace
from hpc_train.core.rundir import RunDir
from hpc_train.core.statistics import Interval
from tests.analysis.stats.simulated import Coverage, Steps, oracle_half_width, oracle_of, recorded, template, timed
from tests.laws import Laws, Slow

LEAST, MOST = 0.90, 0.98  # of intervals that hold the truth, at nominal 95%
WIDEST = 1.5  # times an oracle's
NUM_STUDIES = [1000, pytest.param(6000, marks=pytest.mark.thorough)]


def check(found: Coverage, name: str, num_studies: int) -> None:
    """The bounds, and what few studies leave open: one standard deviation of the count."""
    doubt = (0.05 * 0.95 / num_studies) ** 0.5 if num_studies < 1000 else 0.0
    assert LEAST - doubt <= found.held <= MOST + doubt and found.width <= WIDEST, (name, found)


@pytest.mark.parametrize("num_studies", NUM_STUDIES)
@pytest.mark.parametrize("num_runs", [(2, 2), (3, 3), (5, 5), (1, 3), (3, 2)])
@pytest.mark.parametrize("autocorrelation", [0.8, pytest.param(0.0, marks=pytest.mark.thorough)])
def test_speedup_and_efficiency_of_repeats(num_runs: tuple[int, int], autocorrelation: float, num_studies: int) -> None:
    """Of runs that differ by 3%: what the mean of many runs would show."""
    steps = Steps(100, autocorrelation=autocorrelation, run_noise=0.03)
    generator = np.random.default_rng([*num_runs, num_studies])
    intervals: list[Interval] = []
    for _ in range(num_studies):
        baseline = with_row(steps, generator, 1, num_runs[0])
        row = with_speedup(with_row(steps, generator, 4, num_runs[1]), baseline)
        assert row.speedup_interval is not None and row.relative_speed is not None and row.relative_speed.between_runs
        assert row.efficiency_interval == pytest.approx([end / 4 for end in row.speedup_interval])
        intervals.append(row.speedup_interval)
    error = sum(map(steps.squared_error, num_runs))
    check(Coverage.of(intervals, 1.0, oracle_half_width(error, sum(num_runs) - 2)), "speedup", num_studies)


def with_row(steps: Steps, generator: np.random.Generator, ranks: int, num_runs: int) -> Row:
    return pooled_row([timed(ranks, series) for series in steps.draw(generator, num_runs)])


WITHIN = [
    Steps(100),
    Steps(100, autocorrelation=0.5),
    Steps(100, autocorrelation=0.8),
    Steps(1000, autocorrelation=0.8),
    Steps(1000, autocorrelation=0.95),
    Steps(20),
]


@pytest.mark.parametrize("num_studies", NUM_STUDIES)
@pytest.mark.parametrize("steps", WITHIN, ids=str)
def test_speedup_within_single_runs(steps: Steps, num_studies: int) -> None:
    """What these two runs would show if they had gone on."""
    generator = np.random.default_rng(steps.count)
    speedups: list[Interval] = []
    times: list[Interval] = []
    for _ in range(num_studies):
        baseline = with_row(steps, generator, 1, 1)
        row = with_speedup(with_row(steps, generator, 4, 1), baseline)
        assert row.relative_speed is not None and not row.relative_speed.between_runs
        assert row.speedup_interval is not None and row.step_interval_s is not None
        speedups.append(row.speedup_interval)
        times.append(row.step_interval_s)
    check(Coverage.of(speedups, 1.0, oracle_half_width(2 * steps.squared_error(1))), "speedup", num_studies)
    check(Coverage.of(times, 0.010, oracle_half_width(steps.squared_error(1))), "step", num_studies)


FEW_STUDIES = [100, pytest.param(1500, marks=pytest.mark.thorough)]
SLOW = Laws(noise=0.04, slow=(Slow(5, 1.3),))


@pytest.mark.parametrize("num_studies", FEW_STUDIES)
@pytest.mark.parametrize("autocorrelation", [0.0, 0.8])
def test_pop_factors_within_one_run(autocorrelation: float, num_studies: int) -> None:
    """Of what the run would come to if it went on. One rank is slow, so serialisation is 1 all the time."""
    law = replace(SLOW, autocorrelation=autocorrelation)
    long = efficiencies([recorded(replace(law, steps=20_010, seed=10**6))], None)
    found = [efficiencies([recorded(replace(law, seed=seed))], None) for seed in range(num_studies)]
    for factor in ("parallel", "load_balance", "input", "communication", "transfer"):
        oracle = oracle_of([each.factors[factor] for each in found])
        coverage = Coverage.of([each.intervals[factor] for each in found], long.factors[factor], oracle)
        check(coverage, factor, num_studies)


@pytest.mark.parametrize("num_studies", FEW_STUDIES)
@pytest.mark.parametrize("slow", [(), (Slow(5, 1.01),)])
def test_pop_factors_where_chance_decides_who_is_busiest(slow: tuple[Slow, ...], num_studies: int) -> None:
    """The interval of a maximum over ranks that are nearly alike may hold the truth too often, never too rarely."""
    law = replace(SLOW, slow=slow, autocorrelation=0.5)
    long = efficiencies([recorded(replace(law, steps=50_010, seed=10**6))], None)
    found = [efficiencies([recorded(replace(law, seed=seed))], None) for seed in range(num_studies)]
    for factor in ("load_balance", "serialisation", "communication"):
        oracle = oracle_of([each.estimates[factor].value for each in found])
        coverage = Coverage.of([each.intervals[factor] for each in found], long.factors[factor], oracle)
        assert coverage.held >= LEAST and coverage.width <= WIDEST, (factor, coverage)


@pytest.mark.parametrize("num_studies", [100, pytest.param(1000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("num_runs", [(2, 2), (3, 3)])
def test_pop_factors_of_repeats(num_runs: tuple[int, int], num_studies: int) -> None:
    """Against a baseline of one rank, all of them runs that differ by 3%."""
    law = replace(SLOW, steps=60, run_noise=0.03, slow=(), ranks=2)
    global_truth = long_run(law, law.ranks).factors["parallel"]
    found = []
    for study in range(num_studies):
        seeds = iter(range(1000 * study, 1000 * study + sum(num_runs)))
        baseline = [recorded(replace(law, ranks=1, seed=next(seeds))) for _ in range(num_runs[0])]
        found.append(efficiencies([recorded(replace(law, seed=next(seeds))) for _ in range(num_runs[1])], baseline))
    error = sum(1 / count for count in num_runs) * law.run_noise**2
    oracle = oracle_half_width(error, sum(num_runs) - 2)
    for factor, truth in (("computational", 1.0), ("global", global_truth)):
        check(Coverage.of([each.intervals[factor] for each in found], truth, oracle), factor, num_studies)


def long_run(law: Laws, ranks: int) -> Efficiencies:
    return efficiencies([recorded(replace(law, ranks=ranks, run_noise=0.0, steps=20_010, seed=10**6))], None)


STRAGGLERS = [Slow(5, 1.3), Slow(5, 1.05), Slow(5, 3.0, 0.05)]


@pytest.mark.parametrize("num_studies", FEW_STUDIES)
@pytest.mark.parametrize("autocorrelation", [0.8, pytest.param(0.0, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("slow", STRAGGLERS, ids=["always", "slightly", "sometimes"])
def test_a_straggler_s_cost(slow: Slow, autocorrelation: float, num_studies: int) -> None:
    law = Laws(noise=0.03, autocorrelation=autocorrelation, slow=(slow,))
    (truth,) = find_stragglers(recorded(replace(law, steps=20_010, seed=10**6))).stragglers
    runs = [find_stragglers(recorded(replace(law, seed=seed))).stragglers for seed in range(num_studies)]
    found = [stragglers[0] for stragglers in runs if stragglers]
    assert len(found) > 0.85 * num_studies and all(each.ranks == (slow.rank,) for each in found)
    left = [(1 - each.share_interval[1], 1 - each.share_interval[0]) for each in found if each.share_interval]
    coverage = Coverage.of(left, 1 - truth.share, oracle_of([1 - each.share for each in found]))
    check(coverage, "straggler", num_studies)


ALIKE = [
    Laws(steps=210, noise=0.02, bursts=0.004),
    Laws(steps=1010, noise=0.02, bursts=0.002),
    Laws(steps=210, noise=0.02, bursts=0.004, ranks_per_host=8),
    Laws(steps=210, noise=0.02, bursts=0.002, ranks=2),
    Laws(steps=410, noise=0.02, bursts=0.001, ranks=64),
    Laws(steps=210, noise=0.05, autocorrelation=0.8),
    Laws(steps=410, noise=0.05, autocorrelation=0.95),
]


@pytest.mark.parametrize("num_runs", [60, pytest.param(1000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("law", ALIKE, ids=lambda law: f"{law.ranks}-{law.steps}-{law.bursts}-{law.autocorrelation}")
def test_nobody_is_named_among_ranks_that_are_alike(law: Laws, num_runs: int) -> None:
    """In more than 5% of runs, though 20 slow steps of one rank follow each other."""
    named = sum(bool(find_stragglers(recorded(replace(law, seed=seed))).stragglers) for seed in range(num_runs))
    assert named <= 0.05 * num_runs, named


@pytest.mark.parametrize("num_studies", NUM_STUDIES)
@pytest.mark.parametrize("num_runs", [2, 3, 5])
def test_joules(num_runs: int, num_studies: int) -> None:
    """Of runs whose meters tell 100 J, give or take 3%."""
    generator = np.random.default_rng(num_runs)
    intervals: list[Interval] = []
    run = template()
    for _ in range(num_studies):
        totals = 100 * np.exp(0.03 * generator.standard_normal(num_runs))
        row = RowEnergy(pooled_row([run]), tuple(metered(run, float(total)) for total in totals), UNKNOWN)
        assert row.joules is not None and row.joules.interval is not None
        intervals.append(row.joules.interval)
    check(
        Coverage.of(intervals, 100.0, oracle_half_width(0.03**2 / num_runs, num_runs - 1)), f"{num_runs}", num_studies
    )


def metered(run: Run, joules: float) -> RunEnergy:
    trace = Trace("node", 1, "meter", "measured", np.array([0.0, 10.0]), np.array([0.0, joules]), 0.0, 10.0)
    return RunEnergy(run, EMPTY_TIMELINE, (Reading("c0", trace, lead_s=0.0, loop_s=10.0, shared=False),))


@pytest.mark.parametrize("num_studies", [300, pytest.param(3000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("num_runs", [(2, 2), (3, 3), (1, 3)])
def test_the_speedup_to_a_loss(num_runs: tuple[int, int], num_studies: int) -> None:
    """Of runs that differ by 3% in the time of a step and by 2% in how fast their loss falls."""
    steps, generator = Steps(200, run_noise=0.03), np.random.default_rng(num_runs)
    intervals: list[Interval] = []
    for _ in range(num_studies):
        groups = [learning(ranks, count, steps, generator) for ranks, count in zip((1, 4), num_runs, strict=True)]
        energies = {each.run.dir.path: each for group in groups for each in group}
        rows = [pooled_row([each.run for each in group]) for group in groups]
        keys = config.comparable(rows[0].runs[0].config)
        (study,) = studies_of([Group("laws", keys, False, tuple(rows), None)], energies, target=1.0)
        assert study.largest is not None and study.largest.speedup_interval is not None
        intervals.append(study.largest.speedup_interval)
    error = sum((0.03**2 + 0.02**2) / count for count in num_runs)
    coverage = Coverage.of(intervals, 1.0, oracle_half_width(error, sum(num_runs) - 2))
    check(coverage, "time to a loss", num_studies)


def learning(ranks: int, num_runs: int, steps: Steps, generator: np.random.Generator) -> list[RunEnergy]:
    """Runs whose smoothed loss reaches 1 after about 100 steps, with the times of their steps."""
    found = []
    for index, step_s in enumerate(steps.draw(generator, num_runs)):
        pace = 0.01 * np.exp(0.02 * generator.standard_normal())
        losses = 2 - pace * np.arange(steps.count)
        metrics = (list(range(steps.count)), losses.tolist())
        run = replace(timed(ranks, step_s), metrics=metrics, dir=RunDir(Path(f"{ranks}-{index}")))
        numbers = np.arange(steps.count)
        timeline = StepTimeline(
            numbers, np.ones(steps.count, np.int64), np.cumsum(step_s), np.zeros(steps.count), (), 0
        )
        found.append(RunEnergy(run, timeline))
    return found

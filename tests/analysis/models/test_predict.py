"""Prediction: known laws come back out of synthetic points, published series are predicted from their small sizes."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from hpc_train.analysis.models import mechanistic_model, nonnegative_regression
from hpc_train.analysis.models.measurements import Measurements, Network
from hpc_train.analysis.models.nonnegative_regression import NUM_CHAINS, NUM_DRAWS, Posterior, Prior, sample_posterior
from hpc_train.analysis.models.predict import DRIFT, Drift, Prediction, candidate, observed_drift, predict
from hpc_train.analysis.report.notes.prediction import prediction_notes
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.core.errors import UserError
from tests.benchmarks import plan, plan_drift
from tests.published import Series, all_series


def measurements(ranks: list[int], step_s: Any, **facts: Any) -> Measurements:
    known = {"label": "synthetic", "weak": True, "batch": 64.0, "ranks_per_node": 4, **facts}
    blank = np.full(len(ranks), np.nan)
    steps = np.asarray(step_s, dtype=float)
    return Measurements(ranks=np.array(ranks), step_s=steps, error=np.zeros(len(ranks)), joules_per_step=blank, **known)


def noisy(step_s: Any, seed: int, relative: float = 0.005) -> Any:
    return np.asarray(step_s) * np.exp(relative * np.random.default_rng(seed).standard_normal(len(step_s)))


def mechanistic(known: Measurements) -> Prediction:
    """As `predict`, without the other models, which take time."""
    chosen = candidate("mechanistic", known)
    return Prediction(known, chosen, (chosen,), observed_drift(known, chosen), "")


# ---------------------------------------------------------------------------------------------- known laws


@pytest.mark.parametrize("seed", range(3))
def test_an_amdahl_fraction_comes_back(seed: int) -> None:
    n = np.array([1, 2, 4, 8, 16, 32])
    strong = measurements(n.tolist(), noisy(8.0 * (0.03 + 0.97 / n), seed), weak=False, batch=512.0)
    low, value, high = predict(strong, "amdahl").parameters["sigma"]
    assert low <= 0.03 <= high and value == pytest.approx(0.03, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_usl_comes_back(seed: int) -> None:
    n = np.array([1, 2, 4, 8, 16, 32])
    found = predict(
        measurements(n.tolist(), noisy(0.1 * (1 + 0.02 * (n - 1) + 0.001 * n * (n - 1)), seed)), "usl"
    ).parameters
    assert found["sigma"][0] <= 0.02 <= found["sigma"][2]
    assert found["kappa"][0] <= 0.001 <= found["kappa"][2]


def mechanism(n: Any, per_node: int = 4) -> Any:
    """A ring in weak scaling: 2 (N-1)/N transfers, dearer between nodes, and ranks that wait for the slowest."""
    moved = (n - 1) / n
    return 0.1 * (1 + 0.02 * np.log2(n) + moved * (0.05 + 0.2 * (n > per_node)))


@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_a_step_come_back(seed: int) -> None:
    n = np.array([1, 2, 3, 4, 8, 16, 32, 64])
    made = predict(measurements(n.tolist(), noisy(mechanism(n), seed)))
    assert made.chosen.model == "mechanistic" and made.chosen.error is not None and made.chosen.error < 0.03
    assert made.parameters["compute_s"][1] == pytest.approx(0.1, rel=0.02)
    assert made.parameters["transfer_between_s"][1] == pytest.approx(0.02, rel=0.25)
    (far,) = made.at([256])
    low, high = far.step_interval_s
    assert low <= mechanism(np.array([256]))[0] <= high and far.extrapolation == 4
    assert far.step_s == pytest.approx(mechanism(np.array([256]))[0], rel=0.06)


def ring_over(network: Network, n: Any, num_bytes: float, compute_s: float, per_node: int = 4) -> Any:
    """The step of a ring over a measured network, two thirds of the computation the backward pass that hides it."""
    is_between = n > per_node
    alpha = np.where(is_between, network.alpha_between_s or 0.0, network.alpha_inside_s or 0.0)
    beta = np.where(is_between, network.beta_between_s_per_byte or 0.0, network.beta_inside_s_per_byte or 0.0)
    whole = 2 * (n - 1) * alpha + 2 * (n - 1) / n * num_bytes * beta
    return compute_s + 0.05 * whole + np.maximum(0, 0.95 * whole - compute_s * 2 / 3)


def test_a_benchmark_pins_the_network_so_that_one_size_is_enough() -> None:
    network = Network(1e-5, 0.06 / 1e8, 2e-4, 0.11 / 1e8, "bench")
    one = measurements([4], ring_over(network, np.array([4]), 1e8, 0.1), gradient_bytes=1e8, network=network)
    made = predict(one)
    ahead = made.at([8, 16])
    assert [each.step_s for each in ahead] == pytest.approx(ring_over(network, np.array([8, 16]), 1e8, 0.1), rel=0.03)
    assert ahead[1].step_s > 1.3 * one.step_s[0]
    assert made.reachable(64) and made.chosen.error is None
    bench_less = replace(one, network=None)
    with pytest.raises(UserError, match=r"cannot be fitted to 4 ranks: one size says nothing"):
        predict(bench_less)


def test_several_nodes_are_out_of_reach_without_a_run_or_a_benchmark_of_them() -> None:
    made = predict(measurements([1, 2, 4], [0.1, 0.102, 0.104]))
    assert made.chosen.model == "mechanistic" and made.reachable(4) and not made.reachable(8)
    assert [each.ranks for each in made.chosen.held_out] == [4]


def test_too_few_sizes_for_a_model_are_refused_with_the_reason() -> None:
    two = measurements([4, 8], [0.1, 0.11])
    assert predict(two, "amdahl").chosen.model == "amdahl"
    with pytest.raises(UserError, match="usl model cannot be fitted to 4, 8 ranks: 3 parameters need 3 sizes, and 2"):
        predict(two, "usl")
    with pytest.raises(UserError, match="Extra-P's method needs 5 sizes, and there are 2"):
        predict(two, "extra-p")


def test_a_size_that_fits_no_model_is_said() -> None:
    made = predict(measurements([1, 2, 4, 8, 16], [0.1, 0.1, 0.1, 0.2, 0.1]))
    assert any("16 ranks: 100% more samples/s per rank" in note for note in prediction_notes(made))


def test_expected_maxima_are_those_of_the_tables() -> None:
    # Harter, "Expected values of normal order statistics", Biometrika 48, 1961
    known = [0.0, 0.56419, 1.02938, 1.42360, 2.50759]
    assert expected_maximum(np.array([1, 2, 4, 8, 100])) == pytest.approx(known, abs=2e-5)


def test_extra_p_has_its_constant_hypothesis() -> None:
    made = predict(measurements([1, 2, 4, 8, 16], [0.1, 0.1, 0.1, 0.1, 0.1]), "extra-p")
    assert made.chosen.fit is not None and made.chosen.fit.form == "share c0"
    assert made.at([256])[0].step_s == pytest.approx(0.1, rel=0.01)


def test_a_model_that_cannot_be_fitted_hands_over_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(known: Measurements) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("hpc_train.analysis.models.predict.fit_mechanistic", broken)
    made = predict(measurements([1, 2, 4, 8], [0.1, 0.11, 0.12, 0.13]))
    assert made.chosen.model == "amdahl" and "arithmetic failed (did not converge)" in str(made.candidates[0].reason)


def test_the_fullest_rank_sets_the_pace() -> None:
    """10 samples on 4 ranks: two of them have 3."""
    uneven = measurements([1, 2, 4], [10.0, 5.0, 3.0], weak=False, batch=10.0)
    assert uneven.share(np.array([1, 2, 4, 5, 10])).tolist() == [1.0, 0.5, 0.3, 0.2, 0.1]
    assert predict(uneven).at([5])[0].step_s == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_was_measured_has_a_finite_interval(seed: int) -> None:
    """Sizes, times, errors and benchmarks drawn over many powers of ten."""
    random = np.random.default_rng(seed)
    ranks = np.unique(random.integers(1, 10 ** random.integers(1, 7), 6))
    step_s = 10 ** random.uniform(-6, 5) * np.exp(random.normal(0, (0.0, 0.01, 1.0, 8.0)[seed % 4], len(ranks)))
    network = Network(1e-5, 10 ** random.uniform(-12, 0), 1e-3, 10 ** random.uniform(-12, 0), "bench")
    known = measurements(
        ranks.tolist(), step_s, weak=seed < 4, batch=1e9, network=network if seed % 2 else None, gradient_bytes=1e8
    )
    for forecast in predict(known).at([int(ranks[0]), int(ranks[-1]), 4 * int(ranks[-1])]):
        low, high = forecast.step_interval_s
        assert 0 <= low <= forecast.step_s <= high < np.inf and forecast.step_s > 0


# ---------------------------------------------------------------------------------------------- the sampler


def test_the_posterior_is_that_of_a_grid() -> None:
    """One term beside the first: the sampler agrees with sums over a grid of both coefficients and the noise."""
    prior, scale = Prior(presence=1 - 1e-9, degrees=1.0, noise=0.01, noise_degrees=3.0, outlier_degrees=1e6), 0.05
    n = np.array([1.0, 2, 4, 8])
    columns, measured = np.stack([np.ones(4), np.log2(n)], axis=1), np.array([1.0, 1.03, 1.05, 1.09])
    found = sample_posterior(columns, measured, np.zeros(4), np.array([1.0, scale]), prior)
    first, second = np.linspace(0.9, 1.1, 201), np.linspace(0, 0.1, 201)
    noise = np.geomspace(0.001, 0.3, 24)
    guess = first[:, None, None] + second[:, None] * np.log2(n)
    misses = np.sum((guess / measured - 1) ** 2, axis=-1)
    log_density = -misses[..., None] / 2 / noise**2 - 4 * np.log(noise) + np.log(noise)
    log_density -= 2 * np.log1p((noise / prior.noise) ** 2 / 3) + np.log1p((second[:, None] / scale) ** 2)
    density = np.exp(log_density - log_density.max())
    weights = density.sum(axis=(0, 2)) / density.sum()
    mean = float(weights @ second)
    spread = float(np.sqrt(weights @ (second - mean) ** 2))
    assert found.coefficients[:, 1].mean() == pytest.approx(mean, abs=0.15 * spread)
    assert found.coefficients[:, 1].std() == pytest.approx(spread, rel=0.2)


def test_two_terms_that_can_stand_for_each_other_are_there_as_often_as_sums_over_a_grid_say() -> None:
    """log2 N and N - 1 on three sizes: either, both or none, of which the sampler exchanges the first two."""
    prior, scale = Prior(presence=0.4, degrees=1.0, noise=0.01, noise_degrees=3.0, outlier_degrees=1e6), 0.05
    n = np.array([1.0, 2, 4])
    columns = np.stack([np.ones(3), np.log2(n), n - 1], axis=1)
    measured = np.array([1.0, 1.02, 1.05])
    found = sample_posterior(columns, measured, np.zeros(3), np.array([1.0, scale, scale]), prior)
    grid, noise = np.linspace(0, 0.08, 81)[1:], np.geomspace(0.001, 0.3, 24)
    values, first = np.concatenate([[0.0], grid]), np.linspace(0.95, 1.05, 201)
    # Prior mass: that of no term at 0, else the half-Cauchy density times the step of the grid.
    present = 0.4 * 2 / np.pi / scale / (1 + (grid / scale) ** 2) * (grid[1] - grid[0])
    log_mass = np.log(np.concatenate([[0.6], present]))
    guess = first[:, None, None, None] + values[:, None, None] * np.log2(n) + values[None, :, None] * (n - 1)
    misses = np.sum((guess / measured - 1) ** 2, axis=-1)
    log_density = log_mass[:, None] + log_mass[None, :] - misses / 2 / noise[:, None, None, None] ** 2
    log_noise = -3 * np.log(noise) + np.log(noise) - 2 * np.log1p((noise / prior.noise) ** 2 / 3)
    density = np.exp(log_density + log_noise[:, None, None, None]).sum(axis=(0, 1))
    density /= density.sum()
    wanted = [density[1:, 0].sum(), density[0, 1:].sum(), density[1:, 1:].sum()]
    log_is, ring_is = (found.coefficients[:, term] > 0 for term in (1, 2))
    got = [np.mean(log_is & ~ring_is), np.mean(~log_is & ring_is), np.mean(log_is & ring_is)]
    assert min(wanted) > 0.05 and got == pytest.approx(wanted, abs=0.06)


def test_chains_that_disagree_are_told_from_chains_that_agree() -> None:
    random, row = np.random.default_rng(0), np.array([1.0, 2.0])
    alike = np.exp(0.1 * random.standard_normal((NUM_DRAWS, 2)))
    apart = alike * np.tile(np.repeat([1.0, 2.0], NUM_CHAINS // 2), NUM_DRAWS // NUM_CHAINS)[:, None]
    r_hats = [Posterior(each, np.ones(NUM_DRAWS)).r_hat(row) for each in (alike, apart, np.ones_like(alike))]
    # Two halves of a normal distribution: the variance within each is 1 - 2/pi, between them 2/pi.
    assert r_hats == pytest.approx([1.0, np.sqrt(1 + 2 / np.pi / (1 - 2 / np.pi)), 1.0], abs=0.05)


def test_chains_go_on_until_they_agree_and_else_the_next_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that loses half of its efficiency in each doubling, which several sums of parts explain."""
    (series,) = [each for each in all_series() if each.name == "hpc:ramses-cosmo-amr_marenostrum-strong"]
    known = series.measurements.smallest(4)
    assert candidate("mechanistic", known).fit is not None
    monkeypatch.setattr(nonnegative_regression, "_MOST_DOUBLINGS", 0)
    made = predict(known)
    assert made.chosen.model == "amdahl" and "its chains do not agree" in str(made.candidates[0].reason)


def test_a_part_that_nothing_shows_is_absent() -> None:
    """No size takes longer than the first: the simple explanation wins, and 12 times the largest size costs no more."""
    made = predict(measurements([1, 2, 4, 8], [1.0, 1.0, 1.0, 1.0], ranks_per_node=1))
    assert all(value == 0 for name, (_, value, _) in made.parameters.items() if name != "compute_s")
    assert made.at([100])[0].step_s == pytest.approx(1.0, rel=0.02)


def test_the_intervals_of_a_new_run_hold_it() -> None:
    """Amdahl's law with 1% from run to run, 60 times: a new run within the sizes, and one at twice the largest."""
    n = np.array([1, 2, 4, 8, 16])
    truth = 0.02 + 0.98 / n
    inside = []
    for seed in range(60):
        made = mechanistic(measurements(n.tolist(), noisy(truth, seed, 0.01), weak=False, batch=1.0))
        again = noisy(np.array([truth[-1], 0.02 + 0.98 / 32]), 1000 + seed, 0.01)
        for forecast, new in zip(made.at([16, 32]), again, strict=True):
            low, high = forecast.step_interval_s
            inside.append((low <= new <= high, high / low))
    held, widths = np.array(inside).reshape(60, 2, 2).transpose(2, 1, 0)
    assert (held.mean(axis=1) >= 0.9).all() and (widths.mean(axis=1) < [1.15, 2.0]).all()


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_the_interval_around_a_measured_mean_holds_a_new_run(repeats: int) -> None:
    """As above, each size the mean of some runs: one has no error, that of several comes from how they differ."""
    n = np.array([1, 2, 4, 8, 16])
    truth = 0.02 + 0.98 / n
    inside = []
    for seed in range(60):
        runs = np.stack([noisy(truth, 100 * seed + run, 0.01) for run in range(repeats)])
        error = runs.std(axis=0, ddof=1) / truth / np.sqrt(repeats) if repeats > 1 else np.zeros(len(n))
        known = replace(
            measurements(n.tolist(), runs.mean(axis=0), weak=False, batch=1.0),
            error=error,
            num_runs=np.full(len(n), repeats),
        )
        again = noisy(truth, 10_000 + seed, 0.01)
        for forecast, mean, new in zip(mechanistic(known).at(n.tolist()), runs.mean(axis=0), again, strict=True):
            low, high = forecast.step_interval_s
            assert forecast.step_s == pytest.approx(mean)
            inside.append((low <= new <= high, high / low))
    held, widths = np.array(inside).T
    assert held.mean() >= 0.9 and widths.mean() < 1.15


def test_an_interval_is_no_faster_than_linear_speedup_unless_measurements_are() -> None:
    n = np.array([8, 16, 32])
    (far,) = mechanistic(measurements(n.tolist(), 1 / np.array([4.0, 7.8, 15.0]), weak=False, batch=1.0)).at([100_000])
    assert far.step_interval_s[0] > 0.9 * 8 / 4.0 / 100_000, "but for the noise of a run"
    superlinear = mechanistic(measurements(n.tolist(), 1 / np.array([4.0, 8.4, 18.0]), weak=False, batch=1.0))
    (ahead,) = superlinear.at([64])
    assert ahead.step_interval_s[0] < 8 / 4.0 / 64


def test_a_fit_that_contradicts_a_measurement_says_so() -> None:
    n = np.array([1, 2, 4])
    assert not mechanistic(measurements(n.tolist(), 0.02 + 0.98 / n, weak=False, batch=64.0)).missed()
    slower = mechanistic(measurements(n.tolist(), [1.0, 0.52, 0.8], weak=False, batch=64.0))
    assert [each.ranks for each in slower.missed()] == [4]


# ---------------------------------------------------------------------------------------------- published series


def guess(series: Series, share: float) -> tuple[float, bool]:
    """(relative error at the largest size from those up to a share of it, whether its interval holds)."""
    made = mechanistic(series.measurements.smallest(series.num_up_to(share)))
    (ahead,) = made.at([int(series.ranks[-1])])
    low, high = ahead.step_interval_s
    return abs(ahead.step_s / series.step_s[-1] - 1), bool(low <= series.step_s[-1] <= high)


# Those of `make bench-plan`, whose table has the figures of each kind and of constants chosen on other sources.
@pytest.mark.parametrize(
    ("share", "bounds"),
    [
        (0.25, {"training, strong": 0.03, "training, weak": 0.035, "other HPC codes, strong": 0.27}),
        pytest.param(
            0.5,
            {"training, strong": 0.025, "training, weak": 0.04, "other HPC codes, strong": 0.22},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_published_series_are_predicted_from_their_small_sizes(share: float, bounds: dict[str, float]) -> None:
    found: dict[str, list[tuple[float, bool]]] = {}
    for series in all_series():
        if "horovod-azure" not in series.source and "dlperf" not in series.source:
            found.setdefault(series.kind, []).append(guess(series, share))
    for kind, most in bounds.items():
        assert np.median([error for error, _ in found[kind]]) < most, kind
    held = [inside for each in found.values() for _, inside in each]
    assert len(held) == 42 and 0.8 < np.mean(held) < 1


@pytest.mark.parametrize(("kind", "shipped"), [("weak", mechanistic_model.WEAK), ("strong", mechanistic_model.STRONG)])
def test_the_package_has_the_constants_that_were_estimated_on_all_series(kind: str, shipped: Any) -> None:
    estimated = plan.PRIORS["all"][kind]
    assert {
        **shipped.scales,
        **{name: getattr(shipped.regression, name) for name in ("noise", "presence")},
    } == estimated
    assert asdict(DRIFT) == plan.PRIORS["all"]["drift"]


def test_a_wider_drift_holds_more_and_costs_width() -> None:
    """What `plan_drift.py` weighs against each other, on one series."""
    (series,) = [each for each in all_series() if each.name == "hpc:ramses-galaxy_meluxina-strong"]
    case = plan.Case(series, "a half")
    fitted = plan_drift.Fitted(case.known, candidate("mechanistic", case.known), case.ahead, case.truth_s, 1.0)
    narrow, wide = (Drift(least, 0.0, 20.0, 4.0) for least in (0.001, 0.3))
    (held_by_narrow, width), (held_by_wide, wider) = (fitted.outcome(drift) for drift in (narrow, wide))
    assert held_by_wide and not held_by_narrow and wider > width
    assert plan_drift.loss([fitted], wide) == wider


def test_a_model_that_knows_no_node_boundary_misses_it() -> None:
    (series,) = [each for each in all_series() if each.name == "train:horovod-azure p100 resnet50 Open MPI + NCCL"]
    known = series.measurements.smallest(5)
    assert known.largest == 8
    assert abs(predict(known).at([32])[0].step_s / series.step_s[-1] - 1) < 0.05
    assert abs(predict(known, "amdahl").at([32])[0].step_s / series.step_s[-1] - 1) > 0.3

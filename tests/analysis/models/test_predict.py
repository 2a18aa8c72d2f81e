"""Prediction: known laws come back out of synthetic points, published series are predicted from their small sizes."""

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_train.analysis.models import predict as prediction
from hpc_train.analysis.models.analytic_model import fit_analytic_model
from hpc_train.analysis.models.measurements import Measurements, Network
from hpc_train.analysis.models.predict import predict
from hpc_train.analysis.report.notes.prediction import prediction_notes
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.core.errors import UserError

FOLDER = Path(__file__).parents[2] / "scaling"


def measurements(ranks: list[int], step_s: Any, **facts: Any) -> Measurements:
    known = {"label": "synthetic", "weak": True, "batch": 64.0, "ranks_per_node": 4, **facts}
    blank = np.full(len(ranks), np.nan)
    steps = np.asarray(step_s, dtype=float)
    return Measurements(ranks=np.array(ranks), step_s=steps, error=np.zeros(len(ranks)), joules_per_step=blank, **known)


def noisy(step_s: Any, seed: int, relative: float = 0.005) -> Any:
    return np.asarray(step_s) * np.exp(relative * np.random.default_rng(seed).standard_normal(len(step_s)))


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


TRUTH = {
    "compute_s": 0.1,
    "noise_s": 0.004,
    "transfer_inside_s": 0.06,
    "transfer_between_s": 0.05,
    "latency_between_s": 2e-4,
}


def mechanism(n: Any, per_node: int = 4, **truth: float) -> Any:
    """The law, written anew: weak scaling, a ring, the backward pass two thirds of the computation."""
    is_between = n > per_node
    moved = 2 * (n - 1) / n
    whole = moved * (truth["transfer_inside_s"] + is_between * truth["transfer_between_s"])
    whole = whole + is_between * 2 * (n - 1) * truth["latency_between_s"]
    exposed = 0.05 * whole + np.maximum(0, 0.95 * whole - truth["compute_s"] * 2 / 3)
    return truth["compute_s"] + truth["noise_s"] * expected_maximum(n) + exposed


@pytest.mark.parametrize("seed", range(3))
def test_alpha_beta_and_sigma_come_back(seed: int) -> None:
    n = np.array([1, 2, 3, 4, 8, 16, 32, 64])
    made = predict(measurements(n.tolist(), noisy(mechanism(n, **TRUTH), seed)))
    assert made.chosen.model == "mechanistic" and made.chosen.error is not None and made.chosen.error < 0.05
    for name, truth in TRUTH.items():
        low, _, high = made.parameters[name]
        assert low <= truth <= high, name
    (far,) = made.at([256])
    low, high = far.step_interval_s
    assert low <= mechanism(np.array([256]), **TRUTH)[0] <= high and far.extrapolation == 4


def test_a_benchmark_pins_the_network_so_that_one_size_is_enough() -> None:
    network = Network(1e-5, 0.06 / 1e8, 2e-4, 0.11 / 1e8, "bench")
    truth = {**TRUTH, "noise_s": 0.0}
    one = measurements([4], mechanism(np.array([4]), **truth), gradient_bytes=1e8, network=network)
    made = predict(one)
    ahead = made.at([8, 16])
    assert [each.step_s for each in ahead] == pytest.approx(mechanism(np.array([8, 16]), **truth), rel=0.02)
    assert made.reachable(64) and made.chosen.error is None
    bench_less = replace(one, network=None)
    with pytest.raises(UserError, match=r"cannot be fitted to 4 ranks: one size says nothing"):
        predict(bench_less)


def test_several_nodes_are_out_of_reach_without_a_run_or_a_benchmark_of_them() -> None:
    made = predict(measurements([1, 2, 4], [0.1, 0.102, 0.104]))
    assert made.chosen.model == "mechanistic" and made.reachable(4) and not made.reachable(8)
    assert "none can be held out" in made.why


def test_too_few_sizes_for_a_model_are_refused_with_the_reason() -> None:
    two = measurements([4, 8], [0.1, 0.11])
    assert predict(two, "amdahl").chosen.model == "amdahl"
    with pytest.raises(UserError, match="usl model cannot be fitted to 4, 8 ranks: 3 parameters need 3 sizes, and 2"):
        predict(two, "usl")
    with pytest.raises(UserError, match="extra-p"):
        predict(two, "extra-p")


def test_a_size_that_fits_no_model_is_said() -> None:
    made = predict(measurements([1, 2, 4, 8, 16], [0.1, 0.1, 0.1, 0.2, 0.1]))
    assert any("16 ranks: 100% more samples/s per rank" in note for note in prediction_notes(made))


def test_expected_maxima_are_those_of_the_tables() -> None:
    # Harter, "Expected values of normal order statistics", Biometrika 48, 1961
    known = [0.0, 0.56419, 1.02938, 1.42360, 2.50759]
    assert expected_maximum(np.array([1, 2, 4, 8, 100])) == pytest.approx(known, abs=2e-5)


# ---------------------------------------------------------------------------------------------- published series


def published(name: str = "horovod-azure") -> dict[tuple[str, ...], dict[int, float]]:
    """{what was trained, where and how: {ranks: samples/s}}; the source stands in the file."""
    found: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    lines = [line for line in (FOLDER / f"{name}.csv").read_text().splitlines() if not line.startswith("#")]
    for row in csv.DictReader(lines):
        *key, ranks, samples_per_s = row.values()
        found[tuple(key)][int(ranks)] = float(samples_per_s)
    return dict(found)


def log_law(known: Measurements, ranks: int) -> float:
    """The step time a + b log2 N, by least squares: what a mechanism must be better than."""
    columns = np.stack([np.ones(len(known.ranks)), np.log2(known.ranks)], axis=1)
    return float(np.linalg.lstsq(columns, known.step_s, rcond=None)[0] @ [1, np.log2(ranks)])


def series_errors(name: str, most: int, per_node: int) -> dict[str, Any]:
    """At 32 GPUs from sizes up to `most`: errors of the chosen model and of the law, and whether the interval holds."""
    errors: dict[str, list[float]] = defaultdict(list)
    for series in published(name).values():
        sizes = [size for size in sorted(series) if size <= most]
        known = measurements(sizes, [64 * size / series[size] for size in sizes], ranks_per_node=per_node)
        truth = 64 * 32 / series[32]
        (ahead,) = predict(known).at([32])
        errors["chosen"].append(abs(ahead.step_s / truth - 1))
        errors["law"].append(abs(log_law(known, 32) / truth - 1))
        errors["inside"].append(ahead.step_interval_s[0] <= truth <= ahead.step_interval_s[1])
    return {name: np.array(each) for name, each in errors.items()}


# Open MPI on the K80 nodes: throughput falls as GPUs are added and rises again (1, 4, 8, 16, 32 GPUs of resnet101: 151,
# 528, 620, 1,936 and 1,694 images/s). No function of the number of ranks says that; they count in the medians.
def is_disturbed(key: tuple[str, ...]) -> bool:
    return key[0] == "k80" and "Open" in key[2]


@pytest.mark.parametrize(("most", "median"), [(8, 0.03), (16, 0.022)])
def test_published_series_are_predicted_from_their_small_sizes(
    most: int, median: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "NUM_RESAMPLES", 50)
    errors = series_errors("horovod-azure", most, per_node=4)
    chosen, law = errors["chosen"], errors["law"]
    assert len(chosen) == 46
    assert np.median(chosen) < median and np.median(chosen) < 0.6 * np.median(law)
    sound = np.array([not is_disturbed(key) for key in published()])
    assert np.quantile(chosen[sound], 0.9) < 0.1 < np.quantile(law[sound], 0.9)
    assert np.quantile(chosen, 0.9) < np.quantile(law, 0.9)
    assert errors["inside"][sound].mean() > 0.85  # of intervals said to hold 95%


def test_so_are_series_that_no_choice_was_made_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 8 and 16 GPUs, 8 a node, other frameworks, networks and models: the model was made without them."""
    monkeypatch.setattr(prediction, "NUM_RESAMPLES", 50)
    errors = series_errors("dlperf", 16, per_node=8)
    chosen, law = errors["chosen"], errors["law"]
    assert len(chosen) == 42
    assert np.median(chosen) < 0.02 and np.median(chosen) < 0.6 * np.median(law)
    assert np.quantile(chosen, 0.9) < 0.06 < np.quantile(law, 0.9)
    assert errors["inside"].mean() > 0.85


def test_a_model_that_knows_no_node_boundary_misses_it() -> None:
    series = published()["p100", "resnet50", "Open MPI + NCCL"]
    sizes = [1, 2, 3, 4, 8]
    known = measurements(sizes, [64 * size / series[size] for size in sizes])
    truth = 64 * 32 / series[32]
    fit = fit_analytic_model(known, "ring")
    assert abs(fit(np.array([32]))[0] / truth - 1) < 0.05
    assert abs(predict(known, "amdahl").at([32])[0].step_s / truth - 1) > 0.3

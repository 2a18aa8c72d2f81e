"""`make bench-plan`: largest sizes of published series, predicted from those up to a quarter and up to a half of it.

Two tables. In the first the constants of `hpc-train plan` are those estimated on series of other sources
(`plan_priors.py`), in the second those that it ships with. Simple laws and Extra-P stand beside.

Extra-P wants an older NumPy than ours: it runs in a virtual environment of its own, under `runs/bench-plan`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hpc_train.analysis.models import predict
from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.scaling_models import ModelName
from hpc_train.analysis.planning import power
from hpc_train.core.records import FloatArray
from tests.benchmarks import plan_power, plan_priors
from tests.published import PARTS, Series, all_series

FOLDER = Path("runs/bench-plan")
EXTRAP = "extrap==4.2.5"
SHARES = {"a quarter": 0.25, "a half": 0.5}
PRIORS_FILE = Path(__file__).parent / "plan_priors.json"
PRIORS = json.loads(PRIORS_FILE.read_text())
EXTRA_P_SIZES = 5  # fewer are against its method
# Run by Extra-P's own Python: [[sizes], [times], size] on stdin, its model's time at that size on stdout, one a series.
PEER = """
import contextlib, json, sys
from extrap.entities.callpath import Callpath
from extrap.entities.coordinate import Coordinate
from extrap.entities.experiment import Experiment
from extrap.entities.measurement import Measurement
from extrap.entities.metric import Metric
from extrap.entities.parameter import Parameter
from extrap.modelers.model_generator import ModelGenerator
found = []
for sizes, times, ahead in json.load(sys.stdin):
    experiment, callpath, metric = Experiment(), Callpath("step"), Metric("time")
    experiment.add_parameter(Parameter("ranks"))
    experiment.add_callpath(callpath)
    experiment.add_metric(metric)
    for size, time in zip(sizes, times):
        experiment.add_coordinate(Coordinate(size))
        experiment.add_measurement(Measurement(Coordinate(size), callpath, metric, [time]))
    generator = ModelGenerator(experiment)
    with contextlib.redirect_stdout(sys.stderr):
        generator.model_all()
    found.append(float(generator.models[callpath, metric].hypothesis.function.evaluate(ahead)))
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True, eq=False)
class Case:
    """The largest size of a series, to be predicted from its sizes up to a share of it."""

    series: Series
    share: str

    @property
    def known(self) -> Measurements:
        return self.series.measurements.smallest(self.series.num_up_to(SHARES[self.share]))

    @property
    def truth_s(self) -> float:
        return float(self.series.step_s[-1])

    @property
    def ahead(self) -> int:
        return int(self.series.ranks[-1])


@dataclass(frozen=True)
class Guess:
    """error: relative. width: of the 95% interval, relative to the truth; None of a law without one."""

    error: float
    width: float | None = None
    holds: bool | None = None


def by_plan(case: Case) -> Guess:
    """What `hpc-train plan` says: by the first model that can be fitted."""
    return next(guess for model in predict.MODELS if (guess := by_model(case, model)) is not None)


def by_model(case: Case, model: ModelName) -> Guess | None:
    """What `hpc-train plan --model` says; None if the model cannot be fitted."""
    chosen = predict.candidate(model, case.known)
    if chosen.fit is None:
        return None
    drift = predict.observed_drift(case.known, chosen)
    (ahead,) = predict.Prediction(case.known, chosen, (chosen,), drift, "").at([case.ahead])
    low, high = ahead.step_interval_s
    return Guess(ahead.step_s / case.truth_s - 1, (high - low) / case.truth_s, low <= case.truth_s <= high)


# ---------------------------------------------------------------------------------------------- simple laws


def log_law(known: Measurements, ahead: int) -> float:
    """a + b log2 N in weak scaling, its time divided by the growth of ranks in strong scaling."""
    return _least_squares(known, ahead, np.log2)


def linear_law(known: Measurements, ahead: int) -> float:
    return _least_squares(known, ahead, lambda n: n)


def constant_efficiency(known: Measurements, ahead: int) -> float:
    per_sample = known.step_s[-1] / known.share(known.ranks[-1:])[0]
    return float(per_sample * known.share(np.array([ahead]))[0])


def _least_squares(known: Measurements, ahead: int, term: Callable[[np.ndarray], np.ndarray]) -> float:
    columns = np.stack([np.ones(len(known.ranks)), term(known.ranks.astype(float))], axis=1)
    per_sample = known.step_s / known.share(known.ranks)
    found = np.linalg.lstsq(columns, per_sample, rcond=None)[0] @ [1, term(np.array([float(ahead)]))[0]]
    return float(found * known.share(np.array([ahead]))[0])


LAWS = {"a + b log2 N": log_law, "linear": linear_law, "constant efficiency": constant_efficiency}


def extra_p(cases: list[Case]) -> list[Guess | None]:
    """Extra-P's predictions of the time per sample, by its default modeler; None for fewer sizes than it asks for."""
    python = FOLDER / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", EXTRAP], check=True)
    possible = [case for case in cases if len(case.known.ranks) >= EXTRA_P_SIZES]
    asked = []
    for case in possible:
        known = case.known
        asked.append([known.ranks.tolist(), (known.step_s / known.share(known.ranks)).tolist(), case.ahead])
    ran = subprocess.run(
        [python, "-c", PEER], input=json.dumps(asked), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    ran.check_returncode()
    shares = [case.known.share(np.array([case.ahead]))[0] for case in possible]
    errors = [
        guess * share / case.truth_s - 1
        for guess, share, case in zip(json.loads(ran.stdout), shares, possible, strict=True)
    ]
    found = dict(zip(map(id, possible), map(Guess, errors), strict=True))
    return [found.get(id(case)) for case in cases]


# ---------------------------------------------------------------------------------------------- tables


def use_priors(part: str) -> None:
    """The constants that `plan_priors.py` and `plan_drift.py` estimated on a part of the series."""
    plan_priors.use(True, PRIORS[part]["weak"])
    plan_priors.use(False, PRIORS[part]["strong"])
    if "drift" in PRIORS[part]:
        predict.DRIFT = predict.Drift(**PRIORS[part]["drift"])


def errors_text(guesses: Sequence[Guess | None]) -> str:
    known = [abs(guess.error) for guess in guesses if guess is not None]
    if not known:
        return "-"
    fewer = f" ({len(known)})" if len(known) < len(guesses) else ""
    return f"{100 * np.median(known):.1f}/{100 * np.quantile(known, 0.9):.0f}%{fewer}"


def print_errors(title: str, cases: list[Case], columns: dict[str, Sequence[Guess | None]]) -> None:
    """A row for each kind of series and share, all parts and each: median and 90th percentile of absolute errors."""
    table = Table("series", "from sizes up to", "number", *columns, title=title)
    for kind in sorted({case.series.kind for case in cases}):
        for part in ("AB", *PARTS):
            for share in SHARES:
                rows = [
                    i
                    for i, case in enumerate(cases)
                    if case.series.kind == kind and case.series.part in part and case.share == share
                ]
                if rows:
                    cells = [errors_text([guesses[i] for i in rows]) for guesses in columns.values()]
                    table.add_row(kind if part == "AB" else f"  part {part}", share, str(len(rows)), *cells)
    Console(width=170).print(table)


def print_coverage(title: str, cases: list[Case], guesses: list[Guess]) -> None:
    table = Table(
        "series", "from sizes up to", "number", "intervals that hold", "median width", "/ median error", title=title
    )
    for kind in ("", *sorted({case.series.kind for case in cases})):
        for share in SHARES:
            chosen = [
                guess
                for guess, case in zip(guesses, cases, strict=True)
                if case.series.kind.startswith(kind) and case.share == share
            ]
            width = float(np.median([guess.width or 0.0 for guess in chosen]))
            error = float(np.median([abs(guess.error) for guess in chosen]))
            held = np.mean([bool(guess.holds) for guess in chosen])
            table.add_row(
                kind or "all",
                share,
                str(len(chosen)),
                f"{100 * held:.0f}%",
                f"{100 * width:.1f}%",
                f"{width / error:.1f}",
            )
    Console(width=170).print(table)


def print_energy(cases: list[Case]) -> None:
    """Joules at the largest size: as planned, and from the measured time. The constants of the power of a node are
    estimated on the other series."""
    columns = ("as planned", "plan's power, measured time", "same power, measured time")
    table = Table("series", "from sizes up to", *columns, title="Error of the joules of a step at the largest size")
    with_joules, shipped = plan_power.series_with_joules(), (power.SAVED_WHILE_WAITING, power.POWER_DRIFT)
    found: dict[str, list[FloatArray]] = {share: [] for share in SHARES}
    for case in cases:
        if case.series.name not in [each.name for each in with_joules]:
            continue
        others = [each for each in with_joules if each.name != case.series.name]
        power.SAVED_WHILE_WAITING, power.POWER_DRIFT = plan_power.estimate(others)
        errors = _energy_errors(case)
        found[case.share].append(errors)
        table.add_row(case.series.name, case.share, *(f"{100 * error:+.0f}%" for error in errors))
    power.SAVED_WHILE_WAITING, power.POWER_DRIFT = shipped
    for share, errors in found.items():
        medians = np.median(np.abs(errors), axis=0)
        table.add_row("median of absolute errors", share, *(f"{100 * error:.1f}%" for error in medians))
    Console(width=170).print(table)


def _energy_errors(case: Case) -> FloatArray:
    """(3,) relative."""
    known, ranks = case.known, np.array([case.ahead])
    measured_power, chosen = power.power(known), predict.candidate("mechanistic", known)
    assert measured_power is not None and chosen.fit is not None
    nodes, samples = known.nodes(ranks).astype(float), known.samples(ranks)
    planned_s, measured_s = chosen.fit(ranks), np.array([case.truth_s])
    watts = known.joules_per_step[-1] / known.step_s[-1] / known.nodes(known.ranks[-1:])[0]
    guesses = [*(measured_power.joules(nodes, time_s, samples)[0] for time_s in (planned_s, measured_s))]
    guesses.append(watts * nodes[0] * case.truth_s)
    return np.array(guesses) / case.series.joules[-1] - 1


def main() -> None:
    cases = [Case(series, share) for series in all_series() for share in SHARES]
    other = {"A": "B", "B": "A"}
    apart: list[Guess] = []
    for case in cases:
        use_priors(other[case.series.part])
        apart.append(by_plan(case))
    use_priors("all")
    shipped = [by_plan(case) for case in cases]
    laws: dict[str, list[Guess | None]] = {}
    models: tuple[ModelName, ...] = ("amdahl", "usl")
    for model in models:
        laws[model] = [by_model(case, model) for case in cases]
    for name, law in LAWS.items():
        laws[name] = [Guess(law(case.known, case.ahead) / case.truth_s - 1) for case in cases]
    laws["Extra-P"] = extra_p(cases)
    plans = {"plan, chosen on the other part": apart, "plan, as shipped": shipped}
    columns: dict[str, Sequence[Guess | None]] = {**plans, **laws}
    print_errors("Error of the step time at the largest size: median/90th percentile", cases, columns)
    for name, guesses in plans.items():
        print_coverage(f"95% intervals of {name}", cases, guesses)
    print_energy(cases)


if __name__ == "__main__":
    main()

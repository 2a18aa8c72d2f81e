"""Estimates the drift behind the intervals of `hpc-train plan` on published series, and adds it to plan_priors.json.

    python -m tests.benchmarks.plan_drift

A coordinate search for the narrowest intervals that hold 95% of the largest sizes, predicted from those up to a
quarter and a half of it. Run it after `plan_priors.py`. The drift of a part is that of its own series, so that
`make bench-plan` judges it on the other one. The drift of the package is that of all series, each predicted with the
other part's priors.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hpc_train.analysis.models import predict
from hpc_train.analysis.models.measurements import Measurements
from tests.benchmarks.plan import PRIORS, PRIORS_FILE, SHARES, Case, use_priors
from tests.published import PARTS, all_series

_START = predict.Drift(least=0.05, of_growth=0.2, weight=1.0, degrees=4.0)
_FACTORS = (2.0, 1.5, 1.2)  # by which a constant is changed, twice each
_HELD = 0.95
_LEAST_DEGREES, _MOST_DEGREES, _MOST_WEIGHT = 1.5, 30.0, 20.0
_NOTICEABLE = 1e-3


@dataclass(frozen=True, eq=False)
class Fitted:
    """A case with its model, fitted once for all drifts that are tried."""

    known: Measurements
    chosen: predict.Candidate
    ahead: int
    truth_s: float
    weight: float

    def outcome(self, drift: predict.Drift) -> tuple[bool, float]:
        """(whether the interval holds the largest size, the logarithm of its relative width)."""
        observed = predict.observed_drift(self.known, self.chosen, drift)
        made = predict.Prediction(self.known, self.chosen, (self.chosen,), observed, "")
        (forecast,) = made.fitted([self.ahead])
        low, high = forecast.step_interval_s
        return low <= self.truth_s <= high, float(np.log(0.01 + np.log(high / low)))


def fitted(part: str) -> list[Fitted]:
    """The cases of a part with its own priors; "all": each with those of the other part."""
    cases = [Case(series, share) for series in all_series() for share in SHARES if part in ("all", series.part)]
    num_of_origin, found = Counter(case.series.origin for case in cases), []
    for case in cases:
        use_priors(part if part != "all" else PARTS[1 - PARTS.index(case.series.part)])
        chosen = predict.candidate("mechanistic", case.known)
        if chosen.fit is not None:
            weight = num_of_origin[case.series.origin] ** -0.5  # as in `plan_priors.py`
            found.append(Fitted(case.known, chosen, case.ahead, case.truth_s, weight))
    return found


def loss(cases: Sequence[Fitted], drift: predict.Drift) -> float:
    weights = np.array([case.weight for case in cases])
    held, widths = np.array([case.outcome(drift) for case in cases]).T @ weights / weights.sum()
    return float(widths + 30 * max(_HELD - held, 0.0))


def search(cases: Sequence[Fitted]) -> predict.Drift:
    best = asdict(_START)
    least = loss(cases, _START)
    for factor in np.repeat(_FACTORS, 2).tolist():
        for name in best:
            for change in (factor, 1 / factor):
                tried = predict.Drift(**{**best, name: float(f"{best[name] * change:.2g}")})
                if not _LEAST_DEGREES <= tried.degrees <= _MOST_DEGREES or tried.weight > _MOST_WEIGHT:
                    continue
                found = loss(cases, tried)
                if found < least - _NOTICEABLE:
                    least, best = found, asdict(tried)
                    break
        print(f"  factor {factor}: {least:.4f} {best}", file=sys.stderr, flush=True)
    return predict.Drift(**best)


def main() -> None:
    for part in (*PARTS, "all"):
        PRIORS[part]["drift"] = asdict(search(fitted(part)))
    PRIORS_FILE.write_text(json.dumps(PRIORS, indent=1) + "\n")


if __name__ == "__main__":
    main()

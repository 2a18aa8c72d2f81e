"""Estimates the constants of the power of a node behind `hpc-train plan` on published series, and prints them.

    python -m tests.benchmarks.plan_power

All series with joules are of one source, so `make bench-plan` judges the constants on each series as they are estimated
on the others: that source's nodes may save more or less than those of another.
"""

from collections.abc import Iterator

import numpy as np

from hpc_train.analysis.planning import power
from tests.published import Series, all_series

_SHARES = (0.25, 0.5)
_GRID = np.round(np.arange(0.05, 0.61, 0.05), 2)


def series_with_joules() -> list[Series]:
    return [each for each in all_series() if np.isfinite(each.joules).all()]


def errors(series: Series) -> Iterator[tuple[float, float]]:
    """(logarithmic error of the joules for the measured time, doublings of the nodes) at each size beyond the known."""
    for share in _SHARES:
        known = series.measurements.smallest(series.num_up_to(share))
        found = power.power(known)
        assert found is not None
        ahead = series.ranks[len(known.ranks) :]
        nodes = series.measurements.nodes(ahead).astype(float)
        joules = found.joules(nodes, series.step_s[len(known.ranks) :], known.samples(ahead))
        misses = np.log(joules / series.joules[len(known.ranks) :])
        yield from zip(misses.tolist(), np.log2(nodes / found.most_nodes).tolist(), strict=True)


def estimate(series: list[Series]) -> tuple[float, float]:
    """(`SAVED_WHILE_WAITING`, `POWER_DRIFT`): the share with the least mean error, and what drift that error shows."""
    shipped, losses = power.SAVED_WHILE_WAITING, []
    for saved in _GRID.tolist():
        power.SAVED_WHILE_WAITING = saved
        losses.append(np.mean([abs(miss) for each in series for miss, _ in errors(each)]))
    power.SAVED_WHILE_WAITING = best = float(_GRID[int(np.argmin(losses))])
    misses, doublings = np.array([pair for each in series for pair in errors(each)]).T
    power.SAVED_WHILE_WAITING = shipped
    drift = float(np.sqrt(np.mean(misses**2) / np.mean(doublings)))
    return best, round(drift, 3)


def main() -> None:
    saved, drift = estimate(series_with_joules())
    print(f"SAVED_WHILE_WAITING = {saved}, POWER_DRIFT = {drift}")


if __name__ == "__main__":
    main()

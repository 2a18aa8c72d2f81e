"""The time of a step on N ranks, as mean and interval of simulated runs."""

from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.simulation.machine import Machine
from hpc_train.analysis.simulation.noise import Noise
from hpc_train.analysis.simulation.step import Job, simulate_step
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import Interval, half_width

_NUM_RUNS = 8  # each with other ranks: what persists of a rank is drawn once a run
_LEAST_STEPS, _MOST_STEPS = 2, 50  # of a run
_NUM_DRAWS = 2_000_000  # ranks x steps of all runs, about


@dataclass(frozen=True)
class SimulatedStep:
    """Seconds of a step on so many ranks: the mean over runs, steps and ranks, with the 95% interval of a new run.

    Its parts add up to it. The interval holds what was drawn: ranks, steps and the error of the measured computation,
    not what the simulation leaves out.
    """

    ranks: int
    nodes: int
    step_s: float
    step_interval_s: Interval
    input_s: float
    computation_s: float
    imbalance_s: float  # the wait for the last rank to come to the reduction
    transfer_s: float  # exposed communication beyond that
    samples: float = 1.0  # of all ranks

    @property
    def exposed_s(self) -> float:
        return self.imbalance_s + self.transfer_s


def simulate(
    job: Job, machine: Machine, ranks: int, noise: Noise, computation_error: float = 0.0, seed: int = 0
) -> SimulatedStep:
    """computation_error: relative standard error of the job's computation. The same seed gives the same numbers."""
    random = np.random.default_rng([seed, ranks])
    num_steps = int(np.clip(_NUM_DRAWS / _NUM_RUNS / ranks, _LEAST_STEPS, _MOST_STEPS))
    of_rank = noise.rank_factors((_NUM_RUNS, ranks), random)
    of_run = np.maximum(1 + computation_error * random.standard_normal((_NUM_RUNS, 1)), 0.0)
    now = np.zeros((_NUM_RUNS, ranks))
    imbalance_s, transfer_s = np.zeros(_NUM_RUNS), np.zeros(_NUM_RUNS)
    for _ in range(num_steps):
        factors = of_run * of_rank * noise.step_factors((_NUM_RUNS, ranks), random)
        now, waits = simulate_step(job, machine, now, factors)
        imbalance_s += waits.imbalance_s.mean(-1) / num_steps
        transfer_s += waits.transfer_s.mean(-1) / num_steps
    runs_s = now.mean(-1) / num_steps
    step_s, exposed_s = float(runs_s.mean()), float(imbalance_s.mean() + transfer_s.mean())
    return SimulatedStep(
        ranks,
        machine.nodes(ranks),
        step_s,
        _of_a_new_run(runs_s),
        job.input_s,
        step_s - exposed_s - job.input_s,
        float(imbalance_s.mean()),
        float(transfer_s.mean()),
    )


def _of_a_new_run(runs_s: FloatArray) -> Interval:
    """Student's prediction interval."""
    count, mean = len(runs_s), float(runs_s.mean())
    half = half_width(float(runs_s.var(ddof=1)) * (1 + 1 / count), count - 1)
    return max(mean - half, 0.0), mean + half

"""What goes into a plan beside step times: the work to do, the joules it takes, what an all-reduce costs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.analysis.convergence.target import smoothed
from hpc_train.analysis.models.measurements import Measurements, Network, from_group
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import significant
from hpc_train.core.paths import exists, read_text
from hpc_train.core.records import FloatArray
from hpc_train.core.settings import UNKNOWN_STEPS
from hpc_train.core.statistics import nonnegative_least_squares

_MOST_BENCH_BYTES = 1 << 28
_MOST_COST_S = 1e6  # of one message, of one byte: a number beyond is damage


@dataclass(frozen=True)
class Work:
    """Samples to train: `samples` + `steps` times the global batch.

    A number of steps at a fixed global batch is all steps. In weak scaling the batch grows with the ranks: then a loss
    is reached after S = S_min (1 + B_crit/B) steps of batch B, which is S_min B_crit + S_min B samples (McCandlish et
    al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, 2018, equation 2.12).
    """

    samples: float
    steps: float
    words: str
    relative_error: float = 0.0  # standard deviation, where the work itself is estimated

    def at(self, global_batch: float) -> float:
        return self.samples + self.steps * global_batch


@dataclass(frozen=True)
class Power:
    """Joules = static_w x nodes x time + joules_per_sample x samples, and what that rests on."""

    static_w: float  # of one node
    joules_per_sample: float
    relative_error: float
    quality: str  # measured | estimated
    assumed: str

    def joules(self, nodes: FloatArray, time_s: FloatArray, samples: FloatArray) -> FloatArray:
        return np.asarray(self.static_w * nodes * time_s + self.joules_per_sample * samples)


def steps_work(measurements: Measurements, steps: float) -> Work:
    """So many steps of the global batch; in weak scaling their samples at the smallest size, shared by more ranks."""
    if not measurements.weak:
        return Work(0.0, steps, f"{steps:,.0f} steps of {significant(measurements.batch)} samples")
    samples = steps * float(measurements.samples(measurements.ranks[:1])[0])
    return Work(samples, 0.0, f"{samples:,.0f} samples ({steps:,.0f} steps of the smallest size)")


def samples_work(samples: float) -> Work:
    return Work(samples, 0.0, f"{samples:,.0f} samples")


def planned_work(group: Group, measurements: Measurements) -> Work | None:
    """The steps that the runs were set to take; None where they differ, or where a recorded loop did not know."""
    steps = {run.config.train.steps for row in group.rows for run in row.runs}
    known = len(steps) == 1 and UNKNOWN_STEPS not in steps
    return steps_work(measurements, steps.pop()) if known else None


def target_work(group: Group, loss: float) -> Work:
    """What reaches a training loss, by the runs that did. Raises `UserError` where none did."""
    reached = [(run, step) for row in group.rows for run in row.runs if (step := _steps_to(run, loss)) is not None]
    if not reached:
        lowest = [smoothed(run)[1].min(initial=np.inf) for row in group.rows for run in row.runs]
        seen = f"the best smoothed loss is {min(lowest):.4g}" if np.isfinite(min(lowest)) else "no run recorded losses"
        raise UserError(f"--target-loss {loss:g}: no run reached it ({seen})", "Name a loss that a run reached.")
    steps = np.array([step for _, step in reached], dtype=float)
    batches = np.array([run.summary.global_batch for run, _ in reached], dtype=float)
    spread = float(np.std(steps, ddof=1) / np.mean(steps)) if len(steps) > 1 else 0.1
    words = f"to a training loss of {loss:g}"
    if len(set(batches.tolist())) == 1:
        return Work(0.0, float(np.mean(steps)), f"{np.mean(steps):,.0f} steps {words}", spread)
    columns = np.stack([1 / batches, np.ones_like(batches)], axis=1) / steps[:, None]
    samples, least = nonnegative_least_squares(columns, np.ones_like(steps))
    missed = float(np.sqrt(np.mean((columns @ (samples, least) - 1) ** 2)))
    told = f"{samples:,.0f} samples and {least:,.0f} steps {words}: larger batches take more samples"
    return Work(float(samples), float(least), told, max(missed, 0.05))


def _steps_to(run: Run, loss: float) -> int | None:
    """Steps until the smoothed loss was no more than `loss`, as the report tells times to a loss."""
    steps, losses = smoothed(run)
    below = np.flatnonzero(losses <= loss)
    return int(steps[below[0]]) + 1 if len(below) else None


# ---------------------------------------------------------------------------------------------- energy


def power(measurements: Measurements) -> Power | None:
    """The measured joules as a draw of each node and a cost of each sample; None where they are missing."""
    is_known = measurements.joules_per_step > 0  # nan: missing
    if not is_known.any():
        return None
    joules = measurements.joules_per_step[is_known]
    node_seconds = (measurements.nodes(measurements.ranks) * measurements.step_s)[is_known]
    samples = measurements.samples(measurements.ranks)[is_known]
    static, dynamic, assumed = _split(measurements, joules, node_seconds, samples)
    guess = static * node_seconds + dynamic * samples
    missed = float(np.sqrt(np.mean((guess / joules - 1) ** 2)))
    return Power(static, dynamic, max(missed, 0.02), measurements.energy_quality, assumed)


def _split(
    measurements: Measurements, joules: FloatArray, node_s: FloatArray, samples: FloatArray
) -> tuple[float, float, str]:
    """(watts of a node, joules of a sample, what was assumed)."""
    per_node_s = joules / node_s
    if measurements.idle_w is not None:
        static = min(measurements.idle_w, float(per_node_s.min()))
        dynamic = float(np.mean((joules - static * node_s) / samples))
        return (
            static,
            dynamic,
            f"{significant(static)} W of an idle node as given or measured, the rest goes by samples",
        )
    if len(joules) > 1 and np.ptp(node_s / samples) > 0.05 * float(np.mean(node_s / samples)):
        columns = np.stack([node_s, samples], axis=1) / joules[:, None]
        static, dynamic = nonnegative_least_squares(columns, np.ones(len(joules)))
        told = f"{significant(float(static))} W of a node and {significant(float(dynamic))} J a sample, fitted"
        return float(static), float(dynamic), f"{told} to {len(joules)} sizes"
    static = float(np.mean(per_node_s))
    told = f"each node draws the {significant(static)} W that it drew, whether it computes or waits"
    return static, 0.0, told


# ---------------------------------------------------------------------------------------------- network


def measurements_of(group: Group, network: Path | None = None) -> Measurements:
    """A group's step times, and what an all-reduce costs: by the benchmark `network`; else, where these sizes say
    nothing of it, by the newest one beside the runs. Raises `UserError`.
    """
    measurements = from_group(group)
    if network is None and measurements.has_no_network:
        network = benchmark_beside(group)
    if network is None:
        return measurements
    return replace(measurements, network=read_network(network, str(group.keys.get("reduce.strategy"))))


def benchmark_beside(group: Group) -> Path | None:
    """The newest file that `hpc-train bench allreduce` left under the run root of these runs."""
    roots = {run.dir.path.resolve().parents[1] for row in group.rows for run in row.runs}
    found = [path for root in sorted(roots) for path in (root / "bench").glob("allreduce-*.json")]
    return max(filter(exists, found), key=lambda path: path.stat().st_mtime, default=None)


def read_network(path: Path, strategy: str = "horovod") -> Network:
    """Alpha and beta as `hpc-train bench allreduce` wrote them: on most ranks of one node, and of several."""
    remedy = "Give a file that hpc-train bench allreduce wrote."
    text = read_text(path, remedy, _MOST_BENCH_BYTES)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", remedy) from None
    if not isinstance(tree, dict) or tree.get("kind") != "allreduce" or tree.get("schema") != 1:
        raise UserError(f"{path} is no measurement of all-reduces (kind allreduce, schema 1)", remedy)
    told = tree.get("fits")
    fits = [each for each in (told if isinstance(told, list) else ()) if isinstance(each, dict) and _is_fit(each)]
    names = list(dict.fromkeys(str(each.get("strategy")) for each in fits))
    if not fits:
        raise UserError(f"{path} holds no fit of alpha and beta", "Measure two sizes of messages or more.")
    used = strategy if strategy in names else names[0]
    mine = [each for each in fits if each.get("strategy") == used]
    inside = max((each for each in mine if each["nodes"] == 1), key=lambda each: each["ranks"], default=None)
    between = max((each for each in mine if each["nodes"] > 1), key=lambda each: each["ranks"], default=None)
    return Network(*_alpha_beta(inside), *_alpha_beta(between), f"{path.name}, {used}")


def _alpha_beta(each: dict[str, Any] | None) -> tuple[float | None, float | None]:
    return (None, None) if each is None else (float(each["alpha_s"]), float(each["beta_s_per_byte"]))


def _is_fit(each: dict[str, Any]) -> bool:
    counts = [each.get("ranks"), each.get("nodes")]
    costs = [each.get("alpha_s"), each.get("beta_s_per_byte")]
    return all(positive_number(value) for value in counts) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST_COST_S for value in costs
    )


def node_steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is one of them."""
    counts = {1 << bit for bit in range(most.bit_length())} | {3 << bit for bit in range(most.bit_length())}
    return sorted({count for count in counts | {most} if count <= most})

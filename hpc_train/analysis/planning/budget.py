"""The inputs of a plan besides step times: the work to do, the cost of an all-reduce."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.analysis.convergence.target import smoothed
from hpc_train.analysis.models.measurements import Measurements, Network, from_group
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.allreduce_times import COMPRESSED
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import significant
from hpc_train.core.paths import exists, read_text
from hpc_train.core.settings import UNKNOWN_STEPS
from hpc_train.core.statistics import nonnegative_least_squares

_MOST_BENCH_BYTES = 1 << 28
_MOST_COST_S = 1e6  # of one message, of one byte: a larger number is damage
_ONE_RUN_ERROR, _LEAST_ERROR = 0.1, 0.05  # relative, of the work to a loss: of one run, of several batch sizes


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
    relative_error: float = 0.0  # standard deviation, if the work itself is an estimate

    def at(self, global_batch: float) -> float:
        return self.samples + self.steps * global_batch


def steps_work(measurements: Measurements, steps: float) -> Work:
    """So many steps of the global batch; in weak scaling the samples that these have at the smallest size.

    Raises `UserError` if a table does not say how many samples a step has.
    """
    if measurements.stated == "rates":
        raise UserError(
            f"--steps: {measurements.label} has rates, and does not say how many samples a step has",
            "Give --samples, or add a column global_batch.",
        )
    has_batch = measurements.stated == "both"
    if not measurements.weak:
        of_samples = f" of {significant(measurements.batch)} samples" if has_batch else ""
        return Work(0.0, steps, f"{steps:,.0f} steps{of_samples}")
    samples = steps * float(measurements.samples(measurements.ranks[:1])[0])
    if not has_batch:
        return Work(samples, 0.0, f"as many samples as {steps:,.0f} steps of the smallest size have")
    return Work(samples, 0.0, f"{samples:,.0f} samples ({steps:,.0f} steps of the smallest size)")


def samples_work(measurements: Measurements, samples: float) -> Work:
    """Raises `UserError` if a table does not say how many samples a step has."""
    if measurements.stated == "steps":
        raise UserError(
            f"--samples: {measurements.label} has steps, and does not say how many samples they have",
            "Give --steps, or add a column global_batch or samples_per_s.",
        )
    return Work(samples, 0.0, f"{samples:,.0f} samples")


def planned_work(group: Group, measurements: Measurements) -> Work | None:
    """The steps that the runs were set to; None if they differ or a recorded loop did not know them."""
    steps = run_steps(group)
    return None if steps is None else steps_work(measurements, steps)


def run_steps(group: Group) -> float | None:
    """The steps that all runs of a group were set to; None if these differ or are unknown."""
    steps = {run.config.train.steps for row in group.rows for run in row.runs}
    return steps.pop() if len(steps) == 1 and UNKNOWN_STEPS not in steps else None


def target_work(group: Group, loss: float) -> Work:
    """The work to a training loss, from the runs that reached it. Raises `UserError` if none did."""
    runs = [run for row in group.rows for run in row.runs]
    reached = [(run, num_steps) for run in runs if (num_steps := _num_steps_to(run, loss)) is not None]
    if not reached:
        raise UserError(
            f"--target-loss {loss:g}: no run reached it ({_best_loss_text(runs)})", "Name a loss that a run reached."
        )
    steps = np.array([num_steps for _, num_steps in reached], dtype=float)
    batches = np.array([run.summary.global_batch for run, _ in reached], dtype=float)
    mean = float(steps.mean())
    if len(set(batches.tolist())) == 1:
        error = float(steps.std(ddof=1)) / mean if len(steps) > 1 else _ONE_RUN_ERROR
        return Work(0.0, mean, f"{mean:,.0f} steps to a training loss of {loss:g}", error)
    # S = samples / B + least, with relative residuals: runs of many and of few steps count alike.
    columns = np.stack([1 / batches, np.ones_like(batches)], axis=1) / steps[:, None]
    samples, least = nonnegative_least_squares(columns, np.ones_like(steps)).tolist()
    residual = float(np.sqrt(np.mean((columns @ (samples, least) - 1) ** 2)))
    words = f"{samples:,.0f} samples and {least:,.0f} steps to a training loss of {loss:g}: larger batches take more"
    return Work(samples, least, f"{words} samples", max(residual, _LEAST_ERROR))


def _num_steps_to(run: Run, loss: float) -> int | None:
    """Steps until the smoothed loss was at most `loss`, as the report defines times to a loss."""
    steps, losses = smoothed(run)
    below = np.flatnonzero(losses <= loss)
    return int(steps[below[0]]) + 1 if len(below) else None


def _best_loss_text(runs: list[Run]) -> str:
    best = min(float(smoothed(run)[1].min(initial=np.inf)) for run in runs)
    return f"the best smoothed loss is {best:.4g}" if np.isfinite(best) else "no run recorded losses"


# ---------------------------------------------------------------------------------------------- network


def measurements_of(group: Group, network: Path | None = None) -> Measurements:
    """A group's step times with the cost of an all-reduce: from the benchmark `network`, or else, if these sizes say
    nothing about it, from the newest benchmark below the run root. Raises `UserError`.
    """
    measurements = from_group(group)
    if network is None and measurements.has_no_network:
        network = newest_benchmark(group)
    if network is None:
        return measurements
    return replace(measurements, network=read_network(network, benchmark_name(group)))


def benchmark_name(group: Group) -> str:
    """How `hpc-train bench allreduce` calls the way in which these runs add up gradients."""
    is_compressed = group.keys.get("reduce.compression") in ("fp16", "bf16")
    return f"{group.keys.get('reduce.strategy')}{'_bf16' * is_compressed}"


def newest_benchmark(group: Group) -> Path | None:
    """The newest file that `hpc-train bench allreduce` left under the run root of these runs."""
    roots = sorted({run.dir.path.resolve().parents[1] for row in group.rows for run in row.runs})
    found = [path for root in roots for path in (root / "bench").glob("allreduce-*.json") if exists(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def read_network(path: Path, strategy: str = "horovod") -> Network:
    """Alpha and beta as `hpc-train bench allreduce` wrote them: on most ranks of one node, and of several.

    Of the strategy if it was measured, else of the first one. Raises `UserError`. Bytes are those on their way.
    """
    fits = _read_fits(path)
    used = measured_strategy(strategy, [str(fit.get("strategy")) for fit in fits])
    inside = _largest(fits, lambda fit: fit.get("strategy") == used and fit["nodes"] == 1)
    between = _largest(fits, lambda fit: fit.get("strategy") == used and fit["nodes"] > 1)
    compressed = used in COMPRESSED
    return Network(*_alpha_beta(inside, compressed), *_alpha_beta(between, compressed), f"{path.name}, {used}")


def measured_strategy(strategy: str, measured: Sequence[str]) -> str:
    """This one, or the same without compression, or the first that was measured."""
    return next((name for name in (strategy, strategy.removesuffix("_bf16")) if name in measured), measured[0])


def _read_fits(path: Path) -> list[dict[str, Any]]:
    remedy = "Give a file that hpc-train bench allreduce wrote."
    try:
        tree = json.loads(read_text(path, remedy, _MOST_BENCH_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", remedy) from None
    if not isinstance(tree, dict) or tree.get("kind") != "allreduce" or tree.get("schema") != 1:
        raise UserError(f"{path} is no measurement of all-reduces (kind allreduce, schema 1)", remedy)
    listed = tree.get("fits")
    fits = [fit for fit in listed if isinstance(fit, dict) and _is_fit(fit)] if isinstance(listed, list) else []
    if not fits:
        raise UserError(f"{path} holds no fit of alpha and beta", "Measure two sizes of messages or more.")
    return fits


def _is_fit(fit: dict[str, Any]) -> bool:
    has_counts = all(positive_number(fit.get(key)) for key in ("ranks", "nodes"))
    return has_counts and all(_is_cost(fit.get(key)) for key in ("alpha_s", "beta_s_per_byte"))


def _is_cost(value: object) -> bool:
    return (value == 0 and not isinstance(value, bool)) or (positive_number(value) or _MOST_COST_S) < _MOST_COST_S


def _largest(fits: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    return max(filter(wanted, fits), key=lambda fit: float(fit["ranks"]), default=None)


def _alpha_beta(fit: dict[str, Any] | None, compressed: bool) -> tuple[float | None, float | None]:
    if fit is None:
        return None, None
    # The benchmark counts 32 bits a number, of which compression sends half.
    return float(fit["alpha_s"]), float(fit["beta_s_per_byte"]) * (2 if compressed else 1)


def node_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is one of them."""
    bits = range(most.bit_length())
    counts = {1 << bit for bit in bits} | {3 << bit for bit in bits} | {most}
    return sorted(count for count in counts if count <= most)

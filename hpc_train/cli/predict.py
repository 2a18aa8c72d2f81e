"""`hpc-train predict` and `hpc-train evaluate`: what a trained model says of data, and how good that is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpc_train.cli.options import UserPath, overrides_option
from hpc_train.core.errors import UserError, require
from hpc_train.core.formatting import plural
from hpc_train.core.inference_record import InferenceRecord
from hpc_train.core.job_environment import JobEnvironment

if TYPE_CHECKING:
    from hpc_train.core.rundir import RunDir
    from hpc_train.core.settings import Config
    from hpc_train.train.comm.context import Context

F = TypeVar("F", bound=Callable[..., Any])


def _row_range(ctx: click.Context, param: click.Parameter, words: str | None) -> tuple[int | None, int | None]:
    """ "5:20" -> (5, 20), ":20" -> (None, 20)."""
    begin, colon, end = (words or ":").partition(":")
    if not colon or not all(not part or (part.isdecimal() and len(part) < 16) for part in (begin, end)):
        raise click.BadParameter("write rows as A:B, such as 0:1000 or 5000:")
    return int(begin) if begin else None, int(end) if end else None


def _options(command: F) -> F:
    """The options that both commands have, in their order."""
    for option in reversed(
        (
            click.option("--inputs", metavar="NAME", help="Data set of inputs; default: that of the run, to test on."),
            click.option("--targets", metavar="NAME", help="Data set of targets to compare with."),
            click.option("--rows", metavar="A:B", callback=_row_range, help="Rows A to B - 1 alone."),
            click.option("--batch", type=click.IntRange(1), metavar="N", help="Rows that are computed at once."),
            click.option("--checkpoint", metavar="best|newest|STEP", help="Default: the best if the run keeps it."),
            click.option("--json", "as_json", is_flag=True, help="Print the record of this use as JSON."),
            overrides_option,
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("run", type=UserPath())
@click.argument("data", type=click.Path())
@click.option("--output", type=UserPath(), metavar="OUT.h5", help="Where predictions are written.")
@click.option(
    "--latency", type=click.IntRange(1, 1 << 20), metavar="N", help="Only time 1, 2, 4 ... N predictions at once."
)
@click.option("--force", is_flag=True, help="Overwrite OUT.h5, or an unfinished one.")
@_options
def predict(
    run: Path,
    data: str,
    output: Path | None,
    latency: int | None,
    force: bool,
    inputs: str | None,
    targets: str | None,
    rows: tuple[int | None, int | None],
    batch: int | None,
    checkpoint: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Write what RUN's model predicts of each row of DATA, an HDF5 file, to OUT.h5.

    Under mpirun or srun all ranks share the rows and write together; the numbers are the same to the bit on any number
    of ranks. OUT.h5 gets its name when it is whole: the same command continues one that was stopped (exit code 75) or
    killed. To stop mpirun, send it SIGUSR2: after Ctrl-C or SIGTERM, mpirun kills the ranks and ends with 1. OUT.h5
    holds `predicted` and, for classes, `probabilities`.

    \b
    Example: mpirun -n 2 hpc-train predict runs/mlp-mnist new.h5 --output out.h5
    """
    if (output is None) == (latency is None):
        raise UserError(
            f"exactly one of --output and --latency is needed, and {'neither' if output is None else 'both'} is there",
            "Name the file of predictions: --output OUT.h5; or measure how long they take: --latency 64",
        )
    require("torch", "h5py")
    from hpc_train.core import output as streams
    from hpc_train.core import signals

    signals.defer_stop_signal()
    streams.protect_output()
    from hpc_train.train.inference.use import Request

    request = Request(data, checkpoint, inputs, targets, rows, batch)

    def work(
        run: "RunDir", config: "Config", context: "Context", log: Callable[[str], None]
    ) -> tuple[InferenceRecord, int]:
        from hpc_train.train.inference import predict as prediction
        from hpc_train.train.inference.latency import measure_latency

        if latency is not None:
            return measure_latency(run, config, request, latency, context, log), 0
        assert output is not None
        return prediction.predict(run, config, request, output, force, context, log)

    _use(run, overrides, as_json, work)


@click.command()
@click.argument("run", type=UserPath())
@click.option("--data", type=click.Path(), metavar="FILE", help="Default: the data of the run.")
@_options
def evaluate(
    run: Path,
    data: str | None,
    inputs: str | None,
    targets: str | None,
    rows: tuple[int | None, int | None],
    batch: int | None,
    checkpoint: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Print the measures of RUN's model on its test data or on FILE, as the test after training makes them. Without
    test data, those of the samples that it held out or validated on.

    Under mpirun or srun all ranks share the rows; the measures of classes and of regression are the same to the bit on
    any number of ranks. The classes and the scale of the data are those that the run found when it trained.

    \b
    Example: mpirun -n 2 hpc-train evaluate runs/mlp-mnist --data other.h5
    """
    require("torch", "h5py")
    from hpc_train.core import signals

    signals.defer_stop_signal()
    from hpc_train.train.inference.use import Request

    request = Request(data, checkpoint, inputs, targets, rows, batch)

    def work(
        run: "RunDir", config: "Config", context: "Context", log: Callable[[str], None]
    ) -> tuple[InferenceRecord, int]:
        from hpc_train.train.inference import evaluate as evaluation

        return evaluation.evaluate(run, config, request, context, log)

    _use(run, overrides, as_json, work)


Work = Callable[["RunDir", "Config", "Context", Callable[[str], None]], tuple[InferenceRecord, int]]


def _use(path: Path, overrides: tuple[str, ...], as_json: bool, work: Work) -> None:
    """Does `work` on all ranks, prints its record on the first, and ends the process with its exit code."""
    from hpc_train.core import signals
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=JobEnvironment.current().is_launched) as context:
        from hpc_train.train.inference.trained import open_run

        def log(line: str) -> None:
            if context.world.is_root:
                print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

        more = ("run.progress=plain",) if as_json else ()
        run, config = context.on_root(lambda: open_run(path, (*overrides, *more)))
        record, code = work(run, config, context, log)
        if context.world.is_root:
            click.echo(json.dumps(record.as_dict(), indent=1) if as_json else "\n".join(_lines(record)))
    if code:
        signals.ignore_signals()
        sys.exit(code)


def _lines(record: InferenceRecord) -> list[str]:
    """What a person reads at the end."""
    unit = "row" if record.batch else "sample"  # a task that makes its own test counts episodes, say
    lines = [
        f"{name.replace('_', ' ').capitalize()}: {'not finite' if value is None else f'{value:.6g}'}"
        for name, value in record.measures.items()
    ]
    if record.measures:
        num = record.num_targets_missing
        without = f", without {plural(num, 'missing target')}" if num else ""
        lines.append(f"Measured: {plural(record.num_measured, unit)}{without}")
    if record.num_without:
        lines.append(f"{record.num_without:,} rows have no prediction: values are missing in them")
    if record.latencies:
        return [*lines, *_latency_lines(record)]
    if record.samples_per_s is not None:
        per_sample = record.joules_per_sample
        energy = f"{per_sample:.3g} J a {unit}, {record.energy}" if per_sample is not None else str(record.energy)
        lines.append(f"{plural(record.num_rows, unit)}, {record.samples_per_s:,.0f} {unit}s/s, {energy}")
    if record.output and record.complete:
        lines.append(f"Predictions: {record.output}")
    return lines


def _latency_lines(record: InferenceRecord) -> list[str]:
    titles = ("batch", "threads", "calls", "p50 ms", "p95 ms", "p99 ms", "samples/s", "J/sample")
    rows = [
        (
            *(f"{each.batch}", f"{each.num_threads or '-'}", f"{each.num_calls:,}"),
            *(f"{seconds * 1e3:.4g}" for seconds in (each.p50_s, each.p95_s, each.p99_s)),
            f"{each.samples_per_s:,.0f}",
            "missing" if each.joules_per_sample is None else f"{each.joules_per_sample:.3g}",
        )
        for each in record.latencies
    ]
    lines = ["".join(cell.rjust(10) for cell in row) for row in (titles, *rows)]
    device = record.work[-1].device.partition(",")[0]
    return [*lines, f"On {device}; energy {record.energy_quality}: {record.energy_source}"]

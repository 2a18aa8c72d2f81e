"""`hpc-train plan`: how many nodes to ask for."""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from hpc_train.cli.options import MOST_SIMULATED, FiniteNumber, UserPath, on_first_rank, sizes
from hpc_train.core.errors import UserError
from hpc_train.core.redaction import printable

if TYPE_CHECKING:
    from hpc_train.analysis.models.measurements import Measurements
    from hpc_train.analysis.planning.budget import Work
    from hpc_train.analysis.planning.plan import Plan
    from hpc_train.analysis.scaling.compare import Group
    from hpc_train.analysis.simulation.study import Simulation

_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_JOULES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def duration_s(text: str) -> float:
    """ "6h", "1d12h", "90min", "2:30:00" (as sbatch takes it) in seconds. Raises ValueError."""
    _short(text)
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return days * 86400.0 + hours * 3600 + minutes * 60 + seconds
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", text)
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", "", text).strip():
        raise ValueError(text)
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def joules(text: str) -> float:
    """ "40kWh", "3.6 MJ" in joules. Raises ValueError."""
    _short(text)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(Wh|J)", text.strip())
    if not found:
        raise ValueError(text)
    return float(found[1]) * _JOULES[found[2]] * (3600 if found[3] == "Wh" else 1)


def _short(text: str) -> None:
    """Raises ValueError for absurd lengths: thousands of digits are slow to match and overflow a float."""
    if len(text) > 40:
        raise ValueError(text)


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else _positive(duration_s(value))
    except ValueError:
        raise click.BadParameter(f"{value}: write a time, such as 6h, 90min, 1d12h or 12:00:00") from None


def _energy(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else _positive(joules(value))
    except ValueError:
        raise click.BadParameter(f"{value}: write an energy, such as 40kWh or 3.6MJ") from None


def _positive(value: float) -> float:
    if not 0 < value <= 1e18:
        raise ValueError(value)
    return value


# Larger amounts of work overflow when multiplied.
_Amount = FiniteNumber(0, 1e18, min_open=True)


@click.command()
@click.argument("runs", nargs=-1, type=UserPath())
@click.option("--table", type=UserPath(), help="Measurements made elsewhere, as CSV, instead of RUNS.")
@click.option("--deadline", callback=_duration, metavar="TIME", help="Time limit of the training: 6h, 90min, 1d12h.")
@click.option("--energy", callback=_energy, metavar="ENERGY", help="Energy budget: 40kWh, 3.6MJ.")
@click.option("--node-hours", type=_Amount, metavar="HOURS", help="Budget in node-hours.")
@click.option("--max-nodes", type=click.IntRange(1, 10_000_000), metavar="N", help="Consider at most so many nodes.")
@click.option("--steps", type=_Amount, help="Steps to train; default: those that the runs were set to.")
@click.option("--samples", type=_Amount, help="Samples to train, in place of --steps.")
@click.option("--target-loss", type=FiniteNumber(), help="Train to this training loss; some run must have reached it.")
@click.option("--predict", callback=sizes, metavar="N,N,...", help="Predict these numbers of ranks only.")
@click.option("--network", type=UserPath(), help="Measured all-reduces: a file of hpc-train bench allreduce.")
@click.option("--ranks-per-node", type=click.IntRange(1, 100_000), help="For a table without this column.")
@click.option("--gradient-bytes", type=_Amount, help="Bytes of all gradients, for --network with --table.")
@click.option(
    "--model",
    type=click.Choice(["mechanistic", "extra-p", "amdahl", "usl"]),
    help="Model to fit; default: mechanistic.",
)
@click.option(
    "--history", type=UserPath(), help="A folder with earlier plans and their runs: intervals learn from them."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@on_first_rank
def plan(
    runs: tuple[Path, ...],
    table: Path | None,
    deadline: float | None,
    energy: float | None,
    node_hours: float | None,
    max_nodes: int | None,
    steps: float | None,
    samples: float | None,
    target_loss: float | None,
    predict: list[int],
    network: Path | None,
    ranks_per_node: int | None,
    gradient_bytes: float | None,
    model: Literal["mechanistic", "extra-p", "amdahl", "usl"] | None,
    history: Path | None,
    as_json: bool,
) -> None:
    """How many nodes to ask for, from RUNS of several sizes or a table: time, energy and node-hours with intervals.

    The table has the columns ranks and step_s or samples_per_s, and may have ranks_per_node, scaling (weak or strong),
    global_batch, accumulate and joules (of one step, all nodes).

    \b
    Example: hpc-train plan runs/mlp-mnist --steps 1e6 --deadline 6h
             hpc-train plan --table scaling.csv --predict 32,64
    """
    from hpc_train.analysis.models.predict import predict as fit_and_predict
    from hpc_train.analysis.planning.budget import run_steps
    from hpc_train.analysis.planning.followed import site_drift
    from hpc_train.analysis.planning.memory import rank_memory
    from hpc_train.analysis.planning.plan import Limits, make_plan
    from hpc_train.analysis.report.sections.plan import record
    from hpc_train.analysis.report.sections.simulation import simulation_record

    if bool(runs) == (table is not None):
        raise UserError("plan needs run directories or --table, one of them", "hpc-train plan --help has examples.")
    if sum(each is not None for each in (steps, samples, target_loss)) > 1:
        raise UserError("--steps, --samples and --target-loss each say how much to train", "Keep one of them.")
    training = _Training(steps, samples, target_loss)
    memory = num_steps = group = None
    if table is not None:
        measurements = _from_table(table, network, ranks_per_node, gradient_bytes)
        work = training.of_table(measurements)
    else:
        group = only_group(runs, "plan")
        measurements, work = training.of_group(group, network)
        memory, num_steps = rank_memory(group, measurements.ranks_per_node), run_steps(group)
    limits = Limits(deadline, energy, node_hours, max_nodes)
    drift = None if history is None else site_drift(history)
    made = make_plan(fit_and_predict(measurements, model, drift), work, limits, predict, memory, num_steps)
    simulated = None if group is None else _simulated(group, made, network)
    if as_json:
        simulation = None if simulated is None else simulation_record(simulated)
        click.echo(json.dumps({**record(made), "simulation": simulation}, indent=2))
    else:
        _print(made, simulated)
    if made.chosen is None and not made.was_asked:
        sys.exit(1)


@dataclass(frozen=True)
class _Training:
    """How much to train; at most one is given."""

    steps: float | None
    samples: float | None
    target_loss: float | None

    def of_table(self, measurements: "Measurements") -> "Work | None":
        if self.target_loss is not None:
            raise UserError(
                "--target-loss needs runs with their losses; a table has none", "Give --steps or --samples."
            )
        return self._given(measurements)

    def of_group(self, group: "Group", network: Path | None) -> "tuple[Measurements, Work | None]":
        """By default the steps that the runs were set to."""
        from hpc_train.analysis.planning.budget import measurements_of, planned_work, target_work

        measurements = measurements_of(group, network)
        if self.target_loss is not None:
            return measurements, target_work(group, self.target_loss)
        return measurements, self._given(measurements) or planned_work(group, measurements)

    def _given(self, measurements: "Measurements") -> "Work | None":
        from hpc_train.analysis.planning.budget import samples_work, steps_work

        if self.samples is not None:
            return samples_work(measurements, self.samples)
        return None if self.steps is None else steps_work(measurements, self.steps)


def _from_table(
    table: Path, network: Path | None, ranks_per_node: int | None, gradient_bytes: float | None
) -> "Measurements":
    from hpc_train.analysis.models.measurement_table import read_table
    from hpc_train.analysis.planning.budget import read_network

    measured_network = read_network(network) if network else None
    return replace(read_table(table, ranks_per_node, measured_network), gradient_bytes=gradient_bytes)


def only_group(runs: tuple[Path, ...], command: str) -> "Group":
    """Of runs of one job. Raises `UserError` in the name of a command."""
    from hpc_train.analysis.guard import SectionGuard
    from hpc_train.analysis.planning.accumulation import with_any_accumulation
    from hpc_train.analysis.runs.load import load_known
    from hpc_train.analysis.scaling.compare import compare

    known, skipped = load_known(runs, SectionGuard())
    for note in skipped:
        click.echo(printable(note), err=True)
    groups = with_any_accumulation(compare(known).groups)
    if len(groups) != 1:
        found = "; ".join(group.label for group in groups) or "none with steady steps"
        raise UserError(
            f"{command} needs runs of one job that differ in size alone; these are {found}", "Name the runs of one."
        )
    return groups[0]


def _simulated(group: "Group", made: "Plan", network: Path | None) -> "Simulation | None":
    """Steps at the told sizes that are so far beyond the measured ones that the fit knows little of them.

    None without any, and if what would drive the simulation was not measured.
    """
    from hpc_train.analysis.planning.plan import FAR
    from hpc_train.analysis.simulation.study import Wanted, simulate_group

    told = made.options if made.was_asked else [made.answer]
    far = [option.forecast.ranks for option in told if option.forecast.extrapolation > FAR]
    if not far or max(far) > MOST_SIMULATED:
        return None
    try:
        return simulate_group(group, far, Wanted(network))
    except UserError:
        return None


def _print(made: "Plan", simulated: "Simulation | None") -> None:
    from hpc_train.analysis.report.notes.plan import plan_warnings
    from hpc_train.analysis.report.renderers.terminal import fit_table, safe_text
    from hpc_train.analysis.report.sections.plan import answer, plan_tables
    from hpc_train.analysis.report.sections.simulation import simulation_answer
    from hpc_train.core.terminal import open_console

    console = open_console()
    first, *more = answer(made)
    more += [] if simulated is None else simulation_answer(simulated)
    console.print(safe_text(first, "bold"), *map(safe_text, more), "", sep="\n")
    for table in plan_tables(made):
        console.print(safe_text(table.title), fit_table(table, console.width), sep="\n")
    for warning in plan_warnings(made):
        console.print(safe_text(f"- {warning}"))

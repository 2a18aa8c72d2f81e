"""What is known of each row, once: how scaling.csv, summary.json, the documents and the tables call it and show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from statistics import fmean
from typing import Any, Generic, TypeVar

from hpc_train.analysis.comparison.comparison import Metric, PlaceVerdict
from hpc_train.analysis.convergence.target import NOT_REACHED, TargetRow, TargetStudy
from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.energy.cost import RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.run_energy import VALIDATION
from hpc_train.analysis.report.labels import ranks_text, straggler_text, worst_run
from hpc_train.analysis.report.sections.columns import CellColumn, number, text
from hpc_train.analysis.runs.loop_use import loop_use
from hpc_train.analysis.runs.memory import peak_memory
from hpc_train.analysis.runs.step_quantiles import slowest_step, step_quantiles
from hpc_train.analysis.runs.validation import RunValidation, best_run
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import serial_part
from hpc_train.analysis.scaling.mfu import flops_of
from hpc_train.analysis.scaling.rows import Row
from hpc_train.analysis.scaling.strategies import Entry
from hpc_train.core.energy_records import Energy
from hpc_train.core.formatting import amount, energy_text, ms_text, percent, plain, ratio_text, significant
from hpc_train.core.timing_log import COMMUNICATION, PHASES

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Quantity(Generic[T]):
    """A column of scaling.csv and summary.json and, if it has a title, of tables.

    unit: of the exported value; "" for counts, ratios and text. value: None is unknown. cell: the text in a table.
    """

    name: str
    unit: str
    meaning: str
    value: Callable[[T], Any]
    title: str = ""
    cell: Callable[[T], str] | None = None

    @property
    def column(self) -> CellColumn[T]:
        return self.titled(self.title)

    @property
    def text_column(self) -> CellColumn[T]:
        """Of names, which have no other form in a table."""
        return text(self.name, self.value)

    def cell_text(self, row: T) -> str:
        assert self.cell is not None
        return self.cell(row)

    def titled(self, title: str) -> CellColumn[T]:
        assert self.cell is not None
        return number(title, self.cell)

    def of(self, row_of: Callable[[U], T]) -> "Quantity[U]":
        """The same quantity of what has such a row."""
        value, cell = self.value, self.cell
        shown = None if cell is None else partial(_after, cell, row_of)
        return Quantity(self.name, self.unit, self.meaning, partial(_after, value, row_of), self.title, shown)


def _after(outer: Callable[[T], Any], inner: Callable[[U], T], row: U) -> Any:
    return outer(inner(row))


def record(quantities: Sequence[Quantity[T]], row: T) -> dict[str, Any]:
    """The values by name, in base units."""
    return {each.name: each.value(row) for each in quantities}


def names(quantities: Sequence[Quantity[T]]) -> tuple[str, ...]:
    return tuple(each.name for each in quantities)


# ------------------------------------------------------------------------------------------------- the runs

GROUP: tuple[Quantity[tuple[Group, Row]], ...] = (
    Quantity("group", "", "the job, and the keys that tell it from others", lambda pair: pair[0].label),
    Quantity("scaling", "", "strong: one global batch; weak: one batch per rank", lambda pair: _scaling(pair[0])),
    Quantity("strategy", "", "reduce.strategy", lambda pair: pair[0].keys.get("reduce.strategy")),
    Quantity(
        "baseline_ranks",
        "",
        "ranks of the size that speedups are relative to",
        lambda pair: pair[0].baseline.size if pair[0].baseline else None,
    ),
)
RANKS: Quantity[Row] = Quantity(
    "ranks", "", "ranks, a parameter server's servers included", lambda row: row.size, "ranks", ranks_text
)
NUM_RUNS: Quantity[Row] = Quantity(
    "num_runs", "", "runs that are pooled", lambda row: len(row.runs), "runs", lambda row: str(len(row.runs))
)
RUNS: tuple[Quantity[Row], ...] = (
    RANKS,
    Quantity("num_servers", "", "ranks that hold weights and do not train", lambda row: row.num_servers),
    NUM_RUNS,
    Quantity("num_hosts", "", "nodes, the most of any run", lambda row: max(run.summary.num_hosts for run in row.runs)),
    Quantity("global_batch", "", "samples of all ranks in a step", lambda row: row.global_batch),
    Quantity("incomplete", "", "whether the runs ended early", lambda row: row.incomplete),
)

# ------------------------------------------------------------------------------------------------- speed

STEPS: Quantity[Row] = Quantity(
    "num_steps",
    "",
    "steady steps of all runs: without warm-up",
    lambda row: sum(len(run.step_s) for run in row.runs),
    "steps",
    lambda row: str(sum(len(run.step_s) for run in row.runs)),
)
STEP: Quantity[Row] = Quantity(
    "step_s",
    "s",
    "time of a step, mean over steady steps and ranks that train",
    lambda row: row.step_s,
    "step (ms)",
    lambda row: ms_text(row.step_s),
)
SAMPLES: Quantity[Row] = Quantity(
    "samples_per_s",
    "1/s",
    "global batch over the time of a step",
    lambda row: row.samples_per_s,
    "samples/s",
    lambda row: significant(row.samples_per_s, 4),
)
SPEEDUP: Quantity[Row] = Quantity(
    "speedup",
    "",
    "samples per second over the baseline's",
    lambda row: row.speedup,
    "speedup",
    lambda row: _speedup_text(row),
)
EFFICIENCY: Quantity[Row] = Quantity(
    "efficiency",
    "",
    "speedup x baseline ranks / ranks",
    lambda row: row.efficiency,
    "efficiency",
    lambda row: percent(row.efficiency),
)
EXPOSED: Quantity[Row] = Quantity(
    "share_exposed",
    "",
    "share of the time in exposed communication: reduce and sync",
    lambda row: row.exposed_share,
    "exposed",
    lambda row: percent(row.exposed_share),
)
SERVERS_BUSY: Quantity[Row] = Quantity(
    "servers_busy",
    "",
    "share of the servers' time outside of communication",
    lambda row: row.servers_busy,
    "servers busy",
    lambda row: percent(row.servers_busy),
)


def _share(phase: str) -> Quantity[Row]:
    return Quantity(
        f"share_{phase}",
        "",
        f"share of the ranks' time in the phase {phase}",
        lambda row: row.phase_share.get(phase),
        phase,
        lambda row: percent(row.phase_share.get(phase)),
    )


def _quantile(name: str, meaning: str) -> Quantity[Row]:
    return Quantity(
        f"step_{name}_s",
        "s",
        meaning,
        lambda row: step_quantiles([run.step_s for run in row.runs]).get(name),
        name,
        lambda row: ms_text(step_quantiles([run.step_s for run in row.runs]).get(name)),
    )


MEDIAN: Quantity[Row] = replace(
    _quantile("p50", "the median step: a description, nothing is computed from it"), name="step_median_s"
)
SLOWEST: Quantity[Row] = Quantity(
    "step_slowest_s",
    "s",
    "the slowest steady step",
    lambda row: slowest_step([run.step_s for run in row.runs]),
    "slowest",
    lambda row: ms_text(slowest_step([run.step_s for run in row.runs])),
)
DISTRIBUTION = (
    MEDIAN,
    _quantile("p95", "1 step in 20 takes longer; unknown from fewer than 20 steps"),
    _quantile("p99", "1 step in 100 takes longer; unknown from fewer than 100 steps"),
    SLOWEST,
)
SERIAL_PART: Quantity[Row] = Quantity(
    "serial_part",
    "",
    "serial part of the baseline's time by Karp and Flatt, of weak scaling by Gustafson",
    lambda row: _serial(row),
    "serial part",
    lambda row: percent(_serial(row)),
)
SHARES = {phase: _share(phase) for phase in PHASES}
_WITHIN = "95% interval: between runs, or within the one run"
SPEED: tuple[Quantity[Row], ...] = (
    STEPS,
    STEP,
    Quantity("step_low_s", "s", f"lower end of its {_WITHIN}", lambda row: _end(row.step_interval_s, 0)),
    Quantity("step_high_s", "s", "upper end", lambda row: _end(row.step_interval_s, 1)),
    *DISTRIBUTION,
    SAMPLES,
    SPEEDUP,
    Quantity("speedup_low", "", f"lower end of its {_WITHIN}", lambda row: _end(row.speedup_interval, 0)),
    Quantity("speedup_high", "", "upper end", lambda row: _end(row.speedup_interval, 1)),
    EFFICIENCY,
    SERIAL_PART,
    Quantity("serial_low", "", f"lower end of its {_WITHIN}", lambda row: _serial_end(row, 0)),
    Quantity("serial_high", "", "upper end", lambda row: _serial_end(row, 1)),
    *SHARES.values(),
    EXPOSED,
    SERVERS_BUSY,
)


def _serial(row: Row) -> float | None:
    found = serial_part(row)
    return found.part if found else None


def _serial_end(row: Row, index: int) -> float | None:
    found = serial_part(row)
    return _end(found.interval, index) if found else None


def _scaling(group: Group) -> str:
    return "weak" if group.weak else "strong"


def _speedup_text(row: Row) -> str:
    if row.is_baseline:
        return "baseline"
    return "no baseline" if row.speedup is None else ratio_text(row.speedup)


def _end(interval: tuple[float, float] | None, index: int) -> float | None:
    return None if interval is None else interval[index]


# ------------------------------------------------------------------------------------------------- balance


def _factor(factor: str) -> tuple[Quantity[Row], ...]:
    name, words = f"pop_{factor}", f"POP efficiency {factor.replace('_', ' ')}"
    return (
        Quantity(name, "", words, lambda row: row.pop.factors.get(factor)),
        Quantity(f"{name}_low", "", "lower end of its interval", lambda row: _end(row.pop.intervals.get(factor), 0)),
        Quantity(f"{name}_high", "", "upper end", lambda row: _end(row.pop.intervals.get(factor), 1)),
    )


BALANCE: tuple[Quantity[Row], ...] = (
    *(quantity for factor in FACTORS for quantity in _factor(factor)),
    Quantity("straggler", "", "the stragglers of the run that lost most, worst first", lambda row: _stragglers(row)),
    Quantity("time_lost", "", "share of the job's time lost to them", lambda row: _time_lost(row)),
    Quantity("time_lost_low", "", "lower end of its 95% interval", lambda row: _time_lost_end(row, 0)),
    Quantity("time_lost_high", "", "upper end", lambda row: _time_lost_end(row, 1)),
    Quantity("noise", "", "spread of the ranks' useful time in a step, relative", lambda row: _noise(row)),
)


def _stragglers(row: Row) -> str | None:
    worst = worst_run(row)
    return " + ".join(map(straggler_text, worst.stragglers)) if worst and worst.stragglers else None


def _time_lost(row: Row) -> float | None:
    worst = worst_run(row)
    is_known = worst is not None and (worst.stragglers or worst.clock_error_s is not None or worst.unaligned)
    return worst.share if worst and is_known else None


def _time_lost_end(row: Row, index: int) -> float | None:
    worst = worst_run(row)
    return _end(worst.share_interval, index) if worst else None


def _noise(row: Row) -> float | None:
    noises = [run.load_balance.noise for run in row.runs if run.load_balance and run.load_balance.noise is not None]
    return sum(noises) / len(noises) if noises else None


# ------------------------------------------------------------------------------------------------- memory, FLOPs


def _peak(name: str, meaning: str, attribute: str) -> Quantity[Row]:
    def value(row: Row) -> float | None:
        return max(filter(None, (getattr(peak_memory(run), attribute) for run in row.runs)), default=None)

    return Quantity(name, "B", meaning, value)


MEMORY: tuple[Quantity[Row], ...] = (
    _peak("peak_own_bytes", "most memory of its own that a rank took on its node", "own_bytes"),
    _peak("peak_resident_bytes", "the same with files and shared memory", "resident_bytes"),
    _peak("peak_gpu_bytes", "most memory of tensors that a rank took on its GPU", "gpu_bytes"),
    _peak("rank_room_bytes", "what a rank may take: its share of the node, or its GPU", "room_bytes"),
)


def _use(name: str, unit: str, meaning: str, attribute: str, title: str, show: Callable[[float], str]) -> Quantity[Row]:
    """Mean over the runs that recorded it."""

    def value(row: Row) -> float | None:
        known = [found for run in row.runs if (found := getattr(loop_use(run), attribute)) is not None]
        return fmean(known) if known else None

    def cell(row: Row) -> str:
        mean = value(row)
        return "-" if mean is None else show(mean)

    return Quantity(name, unit, meaning, value, title, cell)


def _bytes(num_bytes: float) -> str:
    return amount(num_bytes, "B")


def _rate(bytes_per_s: float) -> str:
    return amount(bytes_per_s, "B/s")


def _or_missing(cell: Callable[[Row], str] | None, row: Row) -> str:
    """A run on GPUs whose driver told nothing has no use of 0."""
    assert cell is not None
    told = cell(row)
    return "missing" if told == "-" else told


_STORAGE = "all ranks during the loop, the last checkpoint included; without the page cache"
USE: tuple[Quantity[Row], ...] = (
    _use("cores_busy", "", "cores that a rank keeps busy, mean", "cores_busy", "cores busy", significant),
    _use("cores_per_rank", "", "cores that a rank may use", "num_cores", "of", significant),
    _use("storage_read_bytes", "B", f"read from storage by {_STORAGE}", "read_bytes", "read", _bytes),
    _use("storage_read_bytes_per_s", "B/s", "that over the loop's time", "read_bytes_per_s", "read rate", _rate),
    _use("storage_written_bytes", "B", f"written to storage by {_STORAGE}", "written_bytes", "written", _bytes),
    _use("storage_written_bytes_per_s", "B/s", "that over the time", "written_bytes_per_s", "write rate", _rate),
)
_BY_DRIVER = "as its driver counts (NVML, AMD SMI)"
GPU_USE: tuple[Quantity[Row], ...] = tuple(
    replace(each, cell=partial(_or_missing, each.cell))
    for each in (
        _use(
            "gpu_busy",
            "",
            f"share of the time in which a rank's GPU computed, mean, {_BY_DRIVER}",
            "gpu_busy",
            "GPU busy",
            percent,
        ),
        _use(
            "gpu_busy_least",
            "",
            "the same of the rank whose GPU computed least",
            "gpu_busy_least",
            "least busy",
            percent,
        ),
        _use(
            "gpu_used_bytes",
            "B",
            f"most memory taken of a GPU, by all processes, {_BY_DRIVER}",
            "gpu_used_bytes",
            "GPU memory",
            _bytes,
        ),
    )
)
FLOPS: tuple[Quantity[Row], ...] = (
    Quantity(
        "flops_per_sample",
        "FLOP",
        "counted operations of forward and backward",
        lambda row: flops_of(row).per_sample,
        "FLOP per sample",
        lambda row: amount(flops_of(row).per_sample, "FLOP"),
    ),
    Quantity(
        "flops_per_s_per_rank",
        "FLOP/s",
        "these times samples per second, over all ranks",
        lambda row: flops_of(row).per_rank_s,
        "FLOP/s per rank",
        lambda row: amount(flops_of(row).per_rank_s, "FLOP/s"),
    ),
    Quantity(
        "peak_flops",
        "FLOP/s",
        "peak of the rank's device in the run's precision",
        lambda row: flops_of(row).peak_s,
        "peak per rank",
        lambda row: amount(flops_of(row).peak_s, "FLOP/s"),
    ),
    Quantity("peak_source", "", "where that peak is from", lambda row: flops_of(row).peak_source),
    Quantity("mfu", "", "share of the peak", lambda row: flops_of(row).mfu, "MFU", lambda row: _mfu(flops_of(row).mfu)),
)


def _mfu(mfu: float | None) -> str:
    return "missing" if mfu is None else f"{significant(100 * mfu)}%"


# ------------------------------------------------------------------------------------------------- energy, result

ENERGY: Quantity[Row] = Quantity(
    "joules",
    "J",
    "of a run on all nodes, mean over runs",
    lambda row: row.energy.joules,
    "energy per run",
    lambda row: row_energy_text(row.energy.joules, row.energy),
)
ENERGY_PER_SAMPLE: Quantity[Row] = Quantity(
    "joules_per_sample",
    "J",
    "that over all samples trained on, warm-up included",
    lambda row: row.joules_per_sample,
    "energy / sample",
    lambda row: row_energy_text(row.joules_per_sample, row.energy),
)
LOSS: Quantity[Row] = Quantity(
    "loss", "", "last training loss", lambda row: row.loss, "loss", lambda row: significant(row.loss, 4)
)


def _best(row: Row) -> RunValidation | None:
    """The validations of the row's run whose best is the best of all."""
    return best_run([found for run in row.runs if (found := run.validation) is not None])


def _of_best(
    name: str, unit: str, meaning: str, of: Callable[[RunValidation], Any], title: str, show: Callable[[Any], str]
) -> Quantity[Row]:
    """Unknown of a row without validations."""

    def value(row: Row) -> Any:
        found = _best(row)
        return None if found is None else of(found)

    return Quantity(name, unit, meaning, value, title, lambda row: "-" if _best(row) is None else show(value(row)))


BEST: Quantity[Row] = _of_best(
    "best_validation",
    "",
    "the best value of validation_measure, of all runs",
    lambda found: found.best[1],
    "best",
    lambda value: significant(value, 4),
)
BEST_STEP: Quantity[Row] = _of_best(
    "best_validation_step", "", "after how many steps it was reached", lambda found: found.best[0], "after steps", str
)
VALIDATED: tuple[Quantity[Row], ...] = (
    _of_best(
        "validation_measure",
        "",
        "what tells the best state: checkpoint.keep_best, else the loss",
        attrgetter("measure"),
        "measure",
        lambda name: plain(name.replace("_", " ")),
    ),
    BEST,
    BEST_STEP,
    _of_best(
        "last_validation",
        "",
        "the measure at that run's last validation",
        attrgetter("last"),
        "last",
        lambda value: significant(value, 4),
    ),
    _of_best("num_validations", "", "validations of that run", lambda found: len(found.steps), "validations", str),
    _of_best(
        "validation_s",
        "s",
        "time of that run's validations, which belongs to no step",
        lambda found: sum(found.seconds),
        "time (s)",
        significant,
    ),
)
RESULT: tuple[Quantity[Row], ...] = (
    ENERGY,
    ENERGY_PER_SAMPLE,
    Quantity("energy_quality", "", "measured, estimated, mixed or missing", lambda row: row.energy.quality),
    Quantity("energy_source", "", "the meters", lambda row: row.energy.source),
    LOSS,
    *VALIDATED,
)


def row_energy_text(joules: float | None, energy: Energy) -> str:
    return energy_text(joules, energy.quality) + " shared" * (joules is not None and energy.is_shared)


def _marked(value: float | None, unit: str, mark: str) -> str:
    return "missing" if value is None else amount(value, unit) + mark


def _total(amounts: dict[str, EnergyAmount]) -> EnergyAmount:
    return sum(amounts.values(), EnergyAmount())


def _known(row: RowEnergy, part: float | None) -> float | None:
    return part or 0.0 if row.gross.known or not row.gross.lacking else None


def _phase_joules(phase: str) -> Quantity[RowEnergy]:
    meaning = f"of the phase {phase}, attributed by time"
    return Quantity(
        f"joules_{phase}", "J", meaning, lambda row: row.phases[phase].total if phase in row.phases else None
    )


GROSS: Quantity[RowEnergy] = Quantity(
    "joules_gross",
    "J",
    "from the meters' first reading to their last: the parts measured and estimated, if none is missing",
    lambda row: row.gross.total,
    "gross",
    lambda row: row.gross.text(),
)
LOOP: Quantity[RowEnergy] = Quantity(
    "joules_loop",
    "J",
    "from the first step to the last, warm-up and the validations between them included",
    lambda row: row.loop.total,
    "loop",
    lambda row: row.loop.text(),
)
GROSS_INTERVAL: Quantity[RowEnergy] = Quantity(
    "joules_low",
    "J",
    "lower end of the 95% interval of gross, from repeats",
    lambda row: _joules_end(row, 0),
    "95% interval",
    lambda row: _joules_interval_text(row),
)
DYNAMIC: Quantity[RowEnergy] = Quantity(
    "joules_dynamic",
    "J",
    "gross less idle: beyond what the same nodes draw at idle for as long",
    lambda row: row.net.total,
    "dynamic",
    lambda row: row.net.text(),
)
OUTSIDE: Quantity[RowEnergy] = Quantity(
    "joules_outside_steps",
    "J",
    "gross less loop and a validation after the last step",
    lambda row: row.outside.total,
    "outside steps",
    # 0 J has no quality of its own: this cell has that of the whole run.
    lambda row: _marked(row.outside.total, "J", row.gross.mark()),
)
MEAN_POWER: Quantity[RowEnergy] = Quantity(
    "mean_w",
    "W",
    "gross joules over the metered time",
    lambda row: row.mean_w,
    "mean power",
    lambda row: _marked(row.mean_w, "W", row.gross.mark()),
)
PEAK_POWER: Quantity[RowEnergy] = Quantity(
    "peak_w",
    "W",
    "highest mean over the slowest meter's interval",
    lambda row: row.peak_w,
    "peak power",
    lambda row: _marked(row.peak_w, "W", row.gross.mark()),
)
DELAY_PRODUCT: Quantity[RowEnergy] = Quantity(
    "edp_js",
    "J s",
    "energy-delay product of the loop",
    lambda row: row.edp_js,
    "energy-delay product",
    lambda row: _marked(row.edp_js, "Js", row.loop.mark()),
)
MARGINAL: Quantity[RowEnergy] = Quantity(
    "joules_per_speedup",
    "J",
    "of each unit of speedup gained over the size before",
    lambda row: row.marginal.total if row.marginal else None,
    "energy per unit of speedup",
    lambda row: _marginal_text(row),
)
FACILITY: Quantity[RowEnergy] = Quantity(
    "facility_joules",
    "J",
    "gross times the PUE",
    lambda row: row.facility_j,
    "facility energy",
    lambda row: _marked(None if row.facility_j is None else row.facility_j / 3600, "Wh", row.gross.mark()),
)
CO2: Quantity[RowEnergy] = Quantity(
    "co2_g",
    "g",
    "of the facility energy",
    lambda row: row.co2_g,
    "CO2",
    lambda row: _marked(row.co2_g, "g", row.gross.mark()),
)
PRICE: Quantity[RowEnergy] = Quantity(
    "price", "currency", "of the facility energy", lambda row: row.price, "price", lambda row: _price_text(row)
)
DYNAMIC_PER_SAMPLE: Quantity[RowEnergy] = Quantity(
    "joules_dynamic_per_sample",
    "J",
    "that over all samples trained on",
    lambda row: row.net_per_sample.total,
    "dynamic per sample",
    lambda row: row.net_per_sample.text(),
)
COST: tuple[Quantity[RowEnergy], ...] = (
    GROSS,
    Quantity("joules_measured", "J", "the part read from meters", lambda row: _known(row, row.gross.measured)),
    Quantity(
        "joules_estimated", "J", "the part that rests on an assumption", lambda row: _known(row, row.gross.estimated)
    ),
    GROSS_INTERVAL,
    Quantity("joules_high", "J", "upper end", lambda row: _joules_end(row, 1)),
    Quantity("joules_shared", "", "whether other jobs may have used the same nodes", lambda row: row.gross.shared),
    LOOP,
    DYNAMIC,
    DYNAMIC_PER_SAMPLE,
    Quantity("joules_dynamic_quality", "", "measured, estimated, mixed or missing", lambda row: row.net.quality),
    MEAN_POWER,
    PEAK_POWER,
    DELAY_PRODUCT,
    MARGINAL,
    *map(_phase_joules, PHASES),
    Quantity(
        "joules_validation",
        "J",
        "of the validations, which belong to no step",
        lambda row: row.phases[VALIDATION].total if VALIDATION in row.phases else None,
    ),
    Quantity(
        "joules_servers",
        "J",
        "of a parameter server's servers",
        lambda row: _total(row.servers).total if row.servers else None,
    ),
    OUTSIDE,
    Quantity("pue", "", "the centre's power usage effectiveness, as given", lambda row: row.tariff.pue),
    FACILITY,
    CO2,
    PRICE,
    Quantity("currency", "", "of the price, as given", lambda row: row.tariff.currency),
)


def _marginal_text(row: RowEnergy) -> str:
    if row.marginal is not None:
        return row.marginal.text()
    if row.change is None:
        return "-"
    return "slower" if row.is_slower else "not measurably faster"


def _joules_interval_text(row: RowEnergy) -> str:
    if row.joules is None or row.joules.interval is None:
        return "-"
    return " to ".join(amount(end, "J") for end in row.joules.interval) + row.gross.mark()


def _joules_end(row: RowEnergy, index: int) -> float | None:
    return _end(row.joules.interval, index) if row.joules else None


def _price_text(row: RowEnergy) -> str:
    if row.price is None:
        return "missing"
    return f"{significant(row.price)} {plain(row.tariff.currency or '')}{row.gross.mark()}"


# ------------------------------------------------------------------------------------------------- time to a loss

Target = tuple[TargetStudy, TargetRow]
TARGET: tuple[Quantity[Target], ...] = (
    Quantity("target_loss", "", "smoothed training loss to reach", lambda pair: pair[0].target),
    Quantity("num_reached", "", "runs that reached it", lambda pair: pair[1].num_reached),
    Quantity("steps_to_target", "", "steps until then, mean over runs", lambda pair: pair[1].num_steps),
    Quantity("samples_to_target", "", "samples until then", lambda pair: pair[1].num_samples),
    Quantity("epochs_to_target", "", "epochs until then", lambda pair: pair[1].epochs),
    Quantity("seconds_to_target", "s", "time in the loop until then", lambda pair: pair[1].seconds),
    Quantity("joules_to_target", "J", "energy until then", lambda pair: pair[1].joules and pair[1].joules.total),
    Quantity(
        "joules_to_target_quality",
        "",
        "measured, estimated, mixed, missing or not reached",
        lambda pair: pair[1].joules.quality if pair[1].joules else NOT_REACHED,
    ),
    Quantity(
        "target_reference_ranks",
        "",
        "ranks of the row that its speedup is relative to",
        lambda pair: pair[0].reference.size if pair[0].reference else None,
    ),
    Quantity("target_speedup", "", "speedup by time to the loss", lambda pair: pair[1].speedup),
    Quantity("target_speedup_low", "", f"lower end of its {_WITHIN}", lambda pair: _end(pair[1].speedup_interval, 0)),
    Quantity("target_speedup_high", "", "upper end", lambda pair: _end(pair[1].speedup_interval, 1)),
    Quantity("target_efficiency", "", "that speedup x reference ranks / ranks", lambda pair: pair[1].efficiency),
    Quantity(
        "statistical_efficiency", "", "samples of the reference / samples taken", lambda pair: pair[1].statistical
    ),
)

# ------------------------------------------------------------------------------------------------- strategies

_ENTRY_OF: Callable[[Entry], Row] = attrgetter("row")
_RELATIVE = "samples per second over the reference's on as many ranks"
STRATEGY_NAME: Quantity[Entry] = Quantity(
    "strategy", "", "reduce.strategy, and what else of reduce.* differs", attrgetter("strategy")
)
RELATIVE_SPEED: Quantity[Entry] = Quantity(
    "ratio", "", f"{_RELATIVE}; 1 of the reference", attrgetter("ratio"), "speed", lambda entry: _relative_text(entry)
)
VOLUME: Quantity[Entry] = Quantity(
    "volume_bytes",
    "B",
    "that the busiest rank must move in a step, in theory",
    lambda entry: entry.traffic.volume_bytes if entry.traffic else None,
    "communication volume",
    lambda entry: _volume_text(entry),
)
OPTIMIZER: Quantity[Entry] = Quantity(
    "optimizer_bytes",
    "B",
    "optimizer state of each rank, as measured",
    attrgetter("optimizer_bytes"),
    "optimizer state",
    lambda entry: amount(max(entry.optimizer_bytes or [], default=None), "B"),
)
ENTRY_LOSS: Quantity[Entry] = replace(LOSS.of(_ENTRY_OF), cell=lambda entry: significant(entry.row.loss, 7))
STRATEGY: tuple[Quantity[Entry], ...] = (
    STRATEGY_NAME,
    RANKS.of(_ENTRY_OF),
    *(each.of(_ENTRY_OF) for each in RUNS if each.name in ("num_servers", "incomplete")),
    STEP.of(_ENTRY_OF),
    *(each.of(_ENTRY_OF) for each in SPEED if each.name in ("step_low_s", "step_high_s")),
    SAMPLES.of(_ENTRY_OF),
    RELATIVE_SPEED,
    Quantity("ratio_low", "", f"lower end of its {_WITHIN}", lambda entry: _end(entry.ratio_interval, 0)),
    Quantity("ratio_high", "", "upper end", lambda entry: _end(entry.ratio_interval, 1)),
    *(SHARES[phase].of(_ENTRY_OF) for phase in COMMUNICATION),
    VOLUME,
    Quantity(
        "each_way_bytes",
        "B",
        "sent, and as many received, in theory",
        lambda entry: entry.traffic.each_way_bytes if entry.traffic else None,
    ),
    Quantity(
        "volume_is_least",
        "",
        "whether these are lower bounds: the library chooses the algorithm",
        lambda entry: entry.traffic.is_least if entry.traffic else None,
    ),
    OPTIMIZER,
    ENTRY_LOSS,
)


def _relative_text(entry: Entry) -> str:
    if entry.is_reference and entry.ratio is not None:
        return "reference"
    return "-" if entry.ratio is None else ratio_text(entry.ratio)


def _volume_text(entry: Entry) -> str:
    if entry.traffic is None:
        return "missing"
    return ("at least " if entry.traffic.is_least else "") + amount(entry.traffic.volume_bytes, "B")


# ------------------------------------------------------------------------------------------------- before and after

METRIC: tuple[Quantity[Metric], ...] = (
    Quantity("name", "", "step time, samples/s, a phase, energy per sample, final loss ...", attrgetter("name")),
    Quantity("unit", "", "of before and after: s, 1/s, J, B, or none", attrgetter("unit")),
    Quantity("before", "", "geometric mean over the repeats; null if not every run has it", attrgetter("before")),
    Quantity("after", "", "the same after the change", attrgetter("after")),
    Quantity("relative", "", "the change: 0.05 for 5% more", attrgetter("relative")),
    Quantity("interval", "", "of the change; of one run a side within these runs alone", attrgetter("interval")),
    Quantity("level", "", "the interval's confidence is 1 less this", attrgetter("level")),
    Quantity(
        "smallest_shown", "", "the smallest decrease and increase that would have shown", attrgetter("smallest_shown")
    ),
    Quantity("verdict", "", "regression, improvement, ...: see hpc-train compare", attrgetter("verdict")),
    Quantity("why", "", "why it is not judged", attrgetter("why")),
)
PLACE: tuple[Quantity[PlaceVerdict], ...] = (
    Quantity("phase", "", "the phase of a step", attrgetter("of.phase")),
    Quantity("kind", "", "host or rank", attrgetter("of.place.kind")),
    Quantity("place", "", "the host, or the rank and its host", attrgetter("of.place.name")),
    Quantity("before_s", "s", "mean of a step", attrgetter("of.before_s")),
    Quantity("after_s", "s", "the same after the change", attrgetter("of.after_s")),
    Quantity("relative", "", "the change against its neighbours", attrgetter("relative")),
    Quantity("interval", "", "of that change", attrgetter("interval")),
    Quantity("level", "", "the interval's confidence is 1 less this", attrgetter("level")),
    Quantity("verdict", "", "regression, improvement, ...: see hpc-train compare", attrgetter("verdict")),
)

FAMILIES: dict[str, Sequence[Quantity[Any]]] = {  # in the order of scaling.csv
    "Runs": (*GROUP, *RUNS),
    "Speed": SPEED,
    "Balance": BALANCE,
    "Memory, processors and storage": (*MEMORY, *USE, *GPU_USE),
    "Model FLOPs": FLOPS,
    "Energy and result": RESULT,
    "Energy in detail": COST,
    "Time to a loss": TARGET,
}
JSON_FAMILIES: dict[str, Sequence[Quantity[Any]]] = {  # of summary.json alone, and of hpc-train compare --json
    "Strategies on equal work (`strategies`)": STRATEGY,
    "Before and after a change (`comparisons`, `metrics`)": METRIC,
    "Hosts and ranks before and after (`comparisons`, `places`)": PLACE,
}

"""The energy of a group: tables, notes, and the sentence on whether more hardware pays."""

from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy, Tariff
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.run_energy import RunEnergy
from hpc_train.analysis.report.labels import communication_text, ranks_text, sizes_by_reason
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.meters import meter_notes
from hpc_train.analysis.report.plots.energy import energy_by_phase_plot, energy_by_size_plot, energy_by_speedup_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.core.formatting import amount, listed, plain, plural, ratio_text, significant
from hpc_train.core.records import PHASES

_MOST_LACKING = 4  # meters of a run that a note names
COST_COLUMNS = (
    "joules_measured",
    "joules_estimated",
    "joules_shared",
    "joules_loop",
    "joules_net",
    "joules_net_quality",
    "mean_w",
    "peak_w",
    "edp_js",
    "joules_per_speedup",
    *(f"joules_{phase}" for phase in PHASES),
    "joules_servers",
    "joules_outside_steps",
    "pue",
    "facility_joules",
    "co2_g",
    "price",
    "currency",
)


def add_energy(section: SectionBuilder, energy: GroupEnergy) -> None:
    section.notes("more-hardware", "finding", _verdict_notes, energy)
    section.notes("meters", "method", _run_notes, energy)
    if not energy.known:
        return
    section.table("energy", run_table, energy)
    section.table("power", power_table, energy)
    section.table("energy-by-phase", phase_table, energy)
    section.table("energy-by-node", node_table, energy)
    section.table("cost", cost_table, energy)
    section.notes("energy-lacking", "caution", _lacking_notes, energy)
    section.notes("energy-mixed", "method", _mixed_notes, energy)
    section.notes("energy-method", "method", _method_notes, energy)
    section.notes("tariff", "method", _tariff_notes, energy)
    section.plot("energy-per-sample", energy_by_size_plot, energy)
    section.plot("energy-by-phase", energy_by_phase_plot, energy)
    section.plot("energy-against-speedup", energy_by_speedup_plot, energy)


def run_table(energy: GroupEnergy) -> Table:
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        number("gross", lambda row: row.gross.text()),
        number("loop", lambda row: row.loop.text()),
        # 0 J has no quality of its own: this cell has that of the whole run.
        number("outside steps", lambda row: _marked(row.outside.total, "J", row.gross.mark())),
    ]
    idle = ""
    if any(row.net.total is not None for row in energy.rows):
        columns.append(number("above idle", lambda row: row.net.text()))
        columns.append(number("above idle per sample", lambda row: row.net_per_sample.text()))
        idle = "; above idle: gross minus the idle draw"
    title = f"Energy per run (gross: the whole run; loop: the steps{idle})"
    return make_table("energy", title, energy.rows, columns)


def power_table(energy: GroupEnergy) -> Table:
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        number("mean power", lambda row: _marked(row.mean_w, "W", row.gross.mark())),
        number("peak power", lambda row: _marked(row.peak_w, "W", row.gross.mark())),
        number("energy-delay product", lambda row: _marked(row.edp_js, "Js", row.loop.mark())),
    ]
    if any(row.pays is not None for row in energy.rows):
        columns.append(number("energy per unit of speedup", _marginal_text))
    return make_table("power", "Power, and what speedup costs", energy.rows, columns)


def _ranks_text(row: RowEnergy) -> str:
    return ranks_text(row.row)


def _marked(value: float | None, unit: str, mark: str) -> str:
    return "missing" if value is None else amount(value, unit) + mark


def _marginal_text(row: RowEnergy) -> str:
    if row.marginal is not None:
        return row.marginal.text()
    return "-" if row.pays is None else "no faster"


def phase_table(energy: GroupEnergy) -> Table:
    """All cells in one unit; the title gives it and says that these are estimates."""
    phases = [phase for phase in PHASES if any(phase in row.phases for row in energy.rows)]
    most = max((joules.known for row in energy.rows for joules in row.phases.values()), default=0.0)
    scale, unit = next((pair for pair in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")) if most >= pair[0]), (1e-3, "mJ"))
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        *(_phase_column(phase, scale) for phase in phases),
    ]
    if any(row.servers for row in energy.rows):
        columns.append(number("servers", lambda row: _number_text(_total(row.servers), scale)))
    explained = f"estimates, attributed by time; {communication_text(phases)}: exposed communication"
    return make_table("energy-by-phase", f"Energy of the loop by phase, {unit} ({explained})", energy.rows, columns)


def _phase_column(phase: str, scale: float) -> CellColumn[RowEnergy]:
    return number(phase, lambda row: _number_text(row.phases.get(phase), scale))


def _number_text(joules: EnergyAmount | None, scale: float) -> str:
    if joules is None:
        return "-"
    return "missing" if joules.total is None else significant(joules.total / scale) + " shared" * joules.shared


def node_table(energy: GroupEnergy) -> Table:
    rules = dict.fromkeys(_rest_rule(run) for row in energy.rows for run in row.runs if run.ranks)
    rest = f"; the rest of its node is divided {' or '.join(rules)} among ranks, which no meter confirms"
    title = f"Energy by node and rank (a rank has its GPU's joules{rest if rules else ''})"
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        text("per node", _nodes_text),
        text("per rank", _per_rank_text),
    ]
    return make_table("energy-by-node", title, energy.rows, columns)


def _rest_rule(run: RunEnergy) -> str:
    return "by the number of their cores" if run.divided_by_cores else "equally"


def _nodes_text(row: RowEnergy) -> str:
    return _range_text([pair for run in row.runs for pair in run.nodes.items()])


def _per_rank_text(row: RowEnergy) -> str:
    ranks = [(f"rank {rank}", joules) for run in row.runs for rank, joules in run.ranks.items()]
    return _range_text(ranks, row.gross.mark())


def _range_text(amounts: Sequence[tuple[str, EnergyAmount]], mark: str | None = None) -> str:
    """ "20.0 J (c0) to 22.0 J (c3)", "20.0 J each", "missing", or "-" for none. mark: replaces each amount's own."""
    known = [(name, joules) for name, joules in amounts if joules.total is not None]
    if not known:
        return "missing" if amounts else "-"
    known.sort(key=lambda pair: pair[1].known)
    (low_name, low), (high_name, high) = known[0], known[-1]
    least, most = (amount(joules.known, "J") + (joules.mark() if mark is None else mark) for joules in (low, high))
    if least == most:
        return f"{most} each" if len(known) > 1 else most
    return f"{least} ({plain(low_name)}) to {most} ({plain(high_name)})"


def cost_table(energy: GroupEnergy) -> Table | None:
    """Facility energy, CO2 and price, each if the centre's figure for it is known."""
    tariffs = [row.tariff for row in energy.rows]
    columns: list[CellColumn[RowEnergy]] = []
    if any(tariff.pue is not None for tariff in tariffs):
        columns.append(number("facility energy", _facility_text))
    if any(tariff.co2_g_per_kwh is not None for tariff in tariffs):
        columns.append(number("CO2", lambda row: _marked(row.co2_g, "g", row.gross.mark())))
    if any(tariff.price_per_kwh is not None for tariff in tariffs):
        columns.append(number("price", _bill_text))
    if not columns:
        return None
    title = "Facility energy, CO2 and price of a run"
    return make_table("cost", title, energy.rows, [number("ranks", _ranks_text), *columns])


def _facility_text(row: RowEnergy) -> str:
    return _marked(None if row.facility_j is None else row.facility_j / 3600, "Wh", row.gross.mark())


def _bill_text(row: RowEnergy) -> str:
    if row.price is None:
        return "missing"
    return f"{significant(row.price)} {plain(row.tariff.currency or '')}{row.gross.mark()}"


def _total(amounts: dict[str, EnergyAmount]) -> EnergyAmount:
    return sum(amounts.values(), EnergyAmount())


# ---------------------------------------------------------------------------------------------- notes


def verdict(energy: GroupEnergy) -> str:
    """Whether more hardware pays, in one sentence: it pays while joules times seconds fall. "" if unknown."""
    judged = [row for row in energy.rows if row.pays is not None]
    if not judged:
        return ""
    complete = [row for row in energy.rows if not row.row.incomplete]
    worse = next((row for row in judged if not row.pays), None)
    row = worse or judged[-1]
    last = complete[complete.index(row) - 1]
    price = f"from {last.row.size} to {plural(row.row.size, 'rank')} {_price_text(row)}"
    if worse is None:
        speed = ratio_text(row.row.speedup or 1.0)
        return f"More hardware still pays at {plural(row.row.size, 'rank')}, the largest size ({speed}): {price}"
    earlier = judged[judged.index(row) - 1] if judged.index(row) else None
    if earlier and earlier.marginal is not None and earlier.marginal.known > 0:
        price += f"; before that a unit cost {earlier.marginal.text()}"
    return f"More hardware stops paying beyond {plural(last.row.size, 'rank')} (joules times seconds grow): {price}"


def _price_text(row: RowEnergy) -> str:
    if row.marginal is None:
        return "nothing is gained"
    if row.marginal.known < 0:
        return f"each unit of speedup gained saves {(row.marginal * -1).text()}"
    return f"each unit of speedup gained costs {row.marginal.text()}"


def _verdict_notes(energy: GroupEnergy) -> list[str]:
    sentence = verdict(energy).removesuffix(".")  # it may end with "est."
    return [f"{sentence}."] if sentence else []


def _run_notes(energy: GroupEnergy) -> list[str]:
    """The notes of single runs, each once with the sizes that it holds for."""
    notes = sizes_by_reason(
        (note, row.row.size) for row in energy.rows for run in row.runs for note in meter_notes(run)
    )
    return [f"{note} ({sizes})." for note, sizes in notes.items()]


def _lacking_notes(energy: GroupEnergy) -> list[str]:
    notes = []
    for row in energy.rows:
        size, lacking = plural(row.row.size, "rank"), row.gross.lacking
        if lacking:
            meters = listed(lacking, _MOST_LACKING)
            notes.append(f"{size}: energy missing of {meters}. Missing is not zero: the known part is a lower bound.")
        idle = tuple(meter for meter in row.net.lacking if meter not in lacking)
        # If no meter at all has its idle draw, the user did not ask to measure it.
        if idle and len(idle) < sum(len(run.readings) for run in row.runs):
            notes.append(f"{size}: energy above idle is missing: no {listed(idle, _MOST_LACKING)}.")
    return notes


def _mixed_notes(energy: GroupEnergy) -> list[str]:
    if not any(row.gross.quality == "mixed" for row in energy.rows):
        return []
    return [
        "Energy marked part est. is a sum of measured and estimated joules; scaling.csv and summary.json have both"
        " parts."
    ]


def _method_notes(energy: GroupEnergy) -> list[str]:
    notes = [
        "Joules of a phase are the loop's, attributed by the phase's share of the ranks' time in steady steps:"
        " phases last milliseconds and meter samples seconds, so no meter separates them. This assumes equal power in"
        " all phases.",
        _peak_note(energy),
    ]
    if len({run.summary.num_samples for row in energy.rows for run in row.row.runs}) > 1:
        notes.append(
            "Runs trained on different numbers of samples: their energy-delay products are not of equal work; the"
            " energy per unit of speedup is for as many samples as the baseline's."
        )
    return notes


def _peak_note(energy: GroupEnergy) -> str:
    periods_s = [run.peak[1] for row in energy.rows for run in row.runs if run.peak]
    span = f" of means over {significant(max(periods_s))} s, the slowest meter's interval" if periods_s else ""
    with_idle = any(row.net.total is not None for row in energy.rows)
    idle = "" if with_idle else " The idle draw of nodes is unknown: energy.idle_s measures it before the loop."
    return f"Peak power is the highest{span}; mean power is gross joules over the metered time.{idle}"


def _tariff_notes(energy: GroupEnergy) -> list[str]:
    tariffs = list(dict.fromkeys(row.tariff for row in energy.rows))
    notes = [f"As given and not measured: {figures}." for tariff in tariffs if (figures := _figures_text(tariff))]
    priced = [tariff for tariff in tariffs if tariff.co2_g_per_kwh is not None or tariff.price_per_kwh is not None]
    if any(tariff.pue is None for tariff in priced):
        notes.append("The PUE is unknown: CO2 and price are of metered energy alone, without cooling and losses.")
    return notes


def _figures_text(tariff: Tariff) -> str:
    figures = []
    if tariff.pue is not None:
        figures.append(f"PUE {tariff.pue:g}")
    if tariff.co2_g_per_kwh is not None:
        figures.append(f"{tariff.co2_g_per_kwh:g} g CO2 per kWh")
    if tariff.price_per_kwh is not None:
        figures.append(f"{tariff.price_per_kwh:g} {plain(tariff.currency or '')} per kWh")
    return ", ".join(figures)


# ---------------------------------------------------------------------------------------------- for programs


def cost_record(row: RowEnergy) -> dict[str, Any]:
    """A row's energy as plain values under `COST_COLUMNS`, in base units."""
    gross, phases, tariff = row.gross, row.phases, row.tariff
    is_known = bool(gross.known) or not gross.lacking
    return {
        "joules_measured": gross.measured or 0.0 if is_known else None,
        "joules_estimated": gross.estimated or 0.0 if is_known else None,
        "joules_shared": gross.shared,
        "joules_loop": row.loop.total,
        "joules_net": row.net.total,
        "joules_net_quality": row.net.quality,
        "mean_w": row.mean_w,
        "peak_w": row.peak_w,
        "edp_js": row.edp_js,
        "joules_per_speedup": row.marginal.total if row.marginal else None,
        **{f"joules_{phase}": phases[phase].total if phase in phases else None for phase in PHASES},
        "joules_servers": _total(row.servers).total if row.servers else None,
        "joules_outside_steps": row.outside.total,
        "pue": tariff.pue,
        "facility_joules": row.facility_j,
        "co2_g": row.co2_g,
        "price": row.price,
        "currency": tariff.currency,
    }


def node_record(row: RowEnergy) -> dict[str, Any]:
    """Joules by node and by rank of each run, None if missing: for JSON alone."""
    return {
        "joules_by_node": [{node: joules.total for node, joules in run.nodes.items()} for run in row.runs],
        "joules_by_rank": [{str(rank): joules.total for rank, joules in run.ranks.items()} for run in row.runs],
        "energy_lacking": list(row.gross.lacking),
    }

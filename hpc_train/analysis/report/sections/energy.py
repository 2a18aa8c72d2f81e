"""The energy of a group: tables, notes, and the sentence on whether more hardware pays."""

from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.run_energy import RunEnergy
from hpc_train.analysis.report.labels import communication_text, ranks_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.energy import (
    lacking_notes,
    method_notes,
    mixed_notes,
    run_notes,
    tariff_notes,
    verdict_notes,
)
from hpc_train.analysis.report.plots.energy import energy_by_phase_plot, energy_by_size_plot, energy_by_speedup_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.core.formatting import amount, plain, significant
from hpc_train.core.timing_log import PHASES

COST_COLUMNS = (
    "joules_measured",
    "joules_estimated",
    "joules_low",
    "joules_high",
    "joules_shared",
    "joules_loop",
    "joules_dynamic",
    "joules_dynamic_quality",
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
    section.part("Energy in detail")
    section.notes("more-hardware", "finding", verdict_notes, energy)
    section.notes("meters", "method", run_notes, energy)
    if not energy.known:
        return
    section.table("energy", run_table, energy)
    section.table("power", power_table, energy)
    section.table("energy-by-phase", phase_table, energy)
    section.table("energy-by-node", node_table, energy)
    section.table("cost", cost_table, energy)
    section.notes("energy-lacking", "caution", lacking_notes, energy)
    section.notes("energy-mixed", "method", mixed_notes, energy)
    section.notes("energy-method", "method", method_notes, energy)
    section.notes("tariff", "method", tariff_notes, energy)
    section.plot("energy-per-sample", energy_by_size_plot, energy)
    section.plot("energy-by-phase", energy_by_phase_plot, energy)
    section.plot("energy-against-speedup", energy_by_speedup_plot, energy)


def run_table(energy: GroupEnergy) -> Table:
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        number("gross", lambda row: row.gross.text()),
        *([number("95% interval", _joules_interval_text)] if _has_repeats(energy) else []),
        number("loop", lambda row: row.loop.text()),
        # 0 J has no quality of its own: this cell has that of the whole run.
        number("outside steps", lambda row: _marked(row.outside.total, "J", row.gross.mark())),
    ]
    idle = ""
    if any(row.net.total is not None for row in energy.rows):
        columns.append(number("dynamic", lambda row: row.net.text()))
        columns.append(number("dynamic per sample", lambda row: row.net_per_sample.text()))
        idle = "; dynamic: gross minus idle"
    title = f"Energy per run (gross: the whole run; loop: the steps{idle})"
    return make_table("energy", title, energy.rows, columns)


def _has_repeats(energy: GroupEnergy) -> bool:
    return any(row.joules is not None and row.joules.interval is not None for row in energy.rows)


def _joules_interval_text(row: RowEnergy) -> str:
    if row.joules is None or row.joules.interval is None:
        return "-"
    return " to ".join(amount(end, "J") for end in row.joules.interval) + row.gross.mark()


def power_table(energy: GroupEnergy) -> Table:
    columns: list[CellColumn[RowEnergy]] = [
        number("ranks", _ranks_text),
        number("mean power", lambda row: _marked(row.mean_w, "W", row.gross.mark())),
        number("peak power", lambda row: _marked(row.peak_w, "W", row.gross.mark())),
        number("energy-delay product", lambda row: _marked(row.edp_js, "Js", row.loop.mark())),
    ]
    if any(row.change is not None for row in energy.rows):
        columns.append(number("energy per unit of speedup", _marginal_text))
    return make_table("power", "Power, and what speedup costs", energy.rows, columns)


def _ranks_text(row: RowEnergy) -> str:
    return ranks_text(row.row)


def _marked(value: float | None, unit: str, mark: str) -> str:
    return "missing" if value is None else amount(value, unit) + mark


def _marginal_text(row: RowEnergy) -> str:
    if row.marginal is not None:
        return row.marginal.text()
    return "-" if row.change is None else "not measurably faster"


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


# ---------------------------------------------------------------------------------------------- for programs


def cost_record(row: RowEnergy) -> dict[str, Any]:
    """A row's energy as plain values under `COST_COLUMNS`, in base units."""
    gross, phases, tariff = row.gross, row.phases, row.tariff
    low, high = (row.joules.interval if row.joules else None) or (None, None)
    is_known = bool(gross.known) or not gross.lacking
    return {
        "joules_measured": gross.measured or 0.0 if is_known else None,
        "joules_estimated": gross.estimated or 0.0 if is_known else None,
        "joules_low": low,
        "joules_high": high,
        "joules_shared": gross.shared,
        "joules_loop": row.loop.total,
        "joules_dynamic": row.net.total,
        "joules_dynamic_quality": row.net.quality,
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

"""The energy of a group: tables, notes, and the sentence on whether more hardware pays."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.readings import ALL_NODES
from hpc_train.analysis.energy.run_energy import VALIDATION, RunEnergy
from hpc_train.analysis.report.labels import communication_text
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
from hpc_train.analysis.report.sections.quantities import (
    CO2,
    DELAY_PRODUCT,
    DYNAMIC,
    DYNAMIC_PER_SAMPLE,
    FACILITY,
    GROSS,
    GROSS_INTERVAL,
    LOOP,
    MARGINAL,
    MEAN_POWER,
    OUTSIDE,
    PEAK_POWER,
    PRICE,
    RANKS,
    Quantity,
)
from hpc_train.core.formatting import amount, plain, significant
from hpc_train.core.timing_log import PHASES

_RANKS: Quantity[RowEnergy] = RANKS.of(lambda energy: energy.row)


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
    has_interval = any(row.joules is not None and row.joules.interval is not None for row in energy.rows)
    columns = [_RANKS.column, GROSS.column, *([GROSS_INTERVAL.column] if has_interval else [])]
    columns += [LOOP.column, OUTSIDE.column]
    idle = ""
    if any(row.net.total is not None for row in energy.rows):
        columns += [DYNAMIC.column, DYNAMIC_PER_SAMPLE.column]
        idle = "; dynamic: gross minus idle"
    title = f"Energy per run (gross: the whole run; loop: the steps{idle})"
    return make_table("energy", title, energy.rows, columns)


def power_table(energy: GroupEnergy) -> Table:
    columns = [_RANKS.column, MEAN_POWER.column, PEAK_POWER.column, DELAY_PRODUCT.column]
    if any(row.change is not None for row in energy.rows):
        columns.append(MARGINAL.column)
    return make_table("power", "Power, and what speedup costs", energy.rows, columns)


def phase_table(energy: GroupEnergy) -> Table:
    """All cells in one unit; the title gives it and says that these are estimates."""
    phases = [phase for phase in (*PHASES, VALIDATION) if any(phase in row.phases for row in energy.rows)]
    most = max((joules.known for row in energy.rows for joules in row.phases.values()), default=0.0)
    scale, unit = next((pair for pair in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")) if most >= pair[0]), (1e-3, "mJ"))
    columns: list[CellColumn[RowEnergy]] = [_RANKS.column, *(_phase_column(phase, scale) for phase in phases)]
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
    together = all(name == ALL_NODES for row in energy.rows for run in row.runs for name in run.nodes)
    columns: list[CellColumn[RowEnergy]] = [
        _RANKS.column,
        text("of all nodes together" if together else "by node", partial(_nodes_text, together)),
        text("by rank", _per_rank_text),
    ]
    return make_table("energy-by-node", title, energy.rows, columns)


def _rest_rule(run: RunEnergy) -> str:
    return "by the number of their cores" if run.divided_by_cores else "equally"


def _nodes_text(together: bool, row: RowEnergy) -> str:
    """together: the title says that no meter tells the nodes apart."""
    nodes = [pair for run in row.runs for pair in run.nodes.items()]
    of_all = f" ({ALL_NODES})" * (not together and any(name == ALL_NODES for name, _ in nodes))
    return _range_text(nodes) + of_all


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
    columns = []
    if any(tariff.pue is not None for tariff in tariffs):
        columns.append(FACILITY.column)
    if any(tariff.co2_g_per_kwh is not None for tariff in tariffs):
        columns.append(CO2.column)
    if any(tariff.price_per_kwh is not None for tariff in tariffs):
        columns.append(PRICE.column)
    title = "Facility energy, CO2 and price of a run"
    return make_table("cost", title, energy.rows, [_RANKS.column, *columns]) if columns else None


def _total(amounts: dict[str, EnergyAmount]) -> EnergyAmount:
    return sum(amounts.values(), EnergyAmount())


# ---------------------------------------------------------------------------------------------- for programs


def node_record(row: RowEnergy) -> dict[str, Any]:
    """Joules by node and by rank of each run, None if missing: for JSON alone."""
    return {
        "joules_by_node": [{node: joules.total for node, joules in run.nodes.items()} for run in row.runs],
        "joules_by_rank": [{str(rank): joules.total for rank, joules in run.ranks.items()} for run in row.runs],
        "energy_lacking": list(row.gross.lacking),
    }

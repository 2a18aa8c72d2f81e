"""The energy of a group in words and numbers: tables, notes, the sentence on where more hardware stops paying."""

from typing import Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.table import Column, Table, made_sheets, ranks_text
from hpc_train.core.formatting import amount, listed, plain, plural, ratio_text, significant
from hpc_train.core.records import PHASES

_MOST_LACKING = 4  # of a run, named one by one
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


def cost_sheets(energy: GroupEnergy, guard: SectionGuard | None = None) -> list[Table]:
    """A group's tables of energy; none where no meter was read and nothing was estimated."""
    if not energy.known:
        return []
    return made_sheets(
        guard,
        {
            "Energy of a run": lambda: [_parts_sheet(energy)],
            "Power": lambda: [_power_sheet(energy)],
            "Energy of the loop by phase": lambda: [_phase_sheet(energy)],
            "Energy by node and rank": lambda: [_place_sheet(energy)],
            "What a run's energy comes to": lambda: _price_sheets(energy),
        },
    )


def _parts_sheet(energy: GroupEnergy) -> Table:
    with_idle = any(row.net.total is not None for row in energy.rows)
    titles = ["ranks", "gross", "loop", "outside steps", *["above idle", "above idle per sample"] * with_idle]
    rows = []
    for row in energy.rows:
        cells = [ranks_text(row.row), row.gross.text(), row.loop.text()]
        cells += [_marked(row.outside.total, "J", row.gross.mark())]  # none of it would have no mark of its own
        rows.append((*cells, *[row.net.text(), row.net_per_sample.text()] * with_idle))
    idle = "; above idle: less the draw at rest" * with_idle
    return Table(f"Energy of a run (gross: all of it; loop: the steps{idle})", tuple(map(Column, titles)), tuple(rows))


def _power_sheet(energy: GroupEnergy) -> Table:
    with_marginal = any(row.pays is not None for row in energy.rows)
    titles = ["ranks", "mean power", "peak power", "energy x delay", *["per unit of speedup gained"] * with_marginal]
    rows = []
    for row in energy.rows:
        mark = row.gross.mark()
        cells = [ranks_text(row.row), _marked(row.mean_w, "W", mark), _marked(row.peak_w, "W", mark)]
        cells += [_marked(row.edp_js, "Js", row.loop.mark()), *[_marginal(row)] * with_marginal]
        rows.append(tuple(cells))
    return Table("Power, and what speed costs", tuple(map(Column, titles)), tuple(rows))


def _marked(value: float | None, unit: str, mark: str) -> str:
    return "missing" if value is None else amount(value, unit) + mark


def _marginal(row: RowEnergy) -> str:
    if row.marginal is not None:
        return row.marginal.text()
    return "-" if row.pays is None else "no faster"


def _phase_sheet(energy: GroupEnergy) -> Table:
    """In one unit, which the title says: that these are estimates is said there, too."""
    with_servers = any(row.servers for row in energy.rows)
    phases = [phase for phase in PHASES if any(phase in row.phases for row in energy.rows)]
    most = max((joules.known for row in energy.rows for joules in row.phases.values()), default=0.0)
    scale, unit = next((pair for pair in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")) if most >= pair[0]), (1e-3, "mJ"))
    rows = []
    for row in energy.rows:
        parts = [row.phases.get(phase) for phase in phases] + [_total(row.servers)] * with_servers
        rows.append((ranks_text(row.row), *(_number_text(part, scale) for part in parts)))
    titles = ["ranks", *phases, *["servers"] * with_servers]
    communication = "reduce and sync" if "sync" in phases else "reduce"
    title = (
        f"Energy of the loop by phase, {unit} (estimates, attributed by time; {communication}: exposed communication)"
    )
    return Table(title, tuple(map(Column, titles)), tuple(rows))


def _number_text(joules: EnergyAmount | None, scale: float) -> str:
    if joules is None:
        return "-"
    return "missing" if joules.total is None else significant(joules.total / scale) + " shared" * joules.shared


def _place_sheet(energy: GroupEnergy) -> Table:
    rows = []
    for row in energy.rows:
        nodes = [part for run in row.runs for part in run.nodes.items()]
        ranks = [(f"rank {rank}", joules) for run in row.runs for rank, joules in run.ranks.items()]
        rows.append((ranks_text(row.row), _spread(nodes), _spread(ranks, row.gross.mark())))
    rules = dict.fromkeys(run.rest_rule for row in energy.rows for run in row.runs if run.ranks)
    rule = (
        f"; the rest of its node is divided {' or '.join(rules)} among ranks, which no meter confirms" if rules else ""
    )
    columns = (Column("ranks"), Column("of a node", is_text=True), Column("of a rank", is_text=True))
    return Table(f"Energy by node and rank (a rank has its GPU's joules{rule})", columns, tuple(rows))


def _spread(parts: list[tuple[str, EnergyAmount]], mark: str | None = None) -> str:
    """ "20.0 J (c0) to 22.0 J (c3)", "20.0 J each", "missing", or "-" for none. mark: in the place of their own."""
    known = [(name, joules) for name, joules in parts if joules.total is not None]
    if not known:
        return "missing" if parts else "-"
    low, high = (end(known, key=lambda part: part[1].known) for end in (min, max))
    least, most = (amount(joules.known, "J") + (joules.mark() if mark is None else mark) for _, joules in (low, high))
    if least == most:
        return f"{most} each" if len(known) > 1 else most
    return f"{least} ({plain(low[0])}) to {most} ({plain(high[0])})"


def _price_sheets(energy: GroupEnergy) -> list[Table]:
    """CO2 and price, where a figure of the centre is known."""
    tariffs = [row.tariff for row in energy.rows]
    shown = {
        "energy of the centre": any(t.pue is not None for t in tariffs),
        "CO2": any(t.co2_g_per_kwh is not None for t in tariffs),
        "price": any(t.price_per_kwh is not None for t in tariffs),
    }
    if not any(shown.values()):
        return []
    rows = []
    for row in energy.rows:
        mark, watt_hours = row.gross.mark(), None if row.facility_j is None else row.facility_j / 3600
        price = "missing" if row.price is None else f"{significant(row.price)} {plain(row.tariff.currency or '')}{mark}"
        cells = (_marked(watt_hours, "Wh", mark), _marked(row.co2_g, "g", mark), price)
        rows.append(
            (ranks_text(row.row), *(cell for cell, is_shown in zip(cells, shown.values(), strict=True) if is_shown))
        )
    titles = [title for title, is_shown in shown.items() if is_shown]
    return [Table("What a run's energy comes to", tuple(map(Column, ["ranks", *titles])), tuple(rows))]


def _total(parts: dict[str, EnergyAmount]) -> EnergyAmount:
    return sum(parts.values(), EnergyAmount())


def cost_notes(energy: GroupEnergy) -> list[str]:
    """Whether more hardware pays, and what the energy of these runs lacks."""
    notes = [f"{verdict(energy).removesuffix('.')}."] if verdict(energy) else []  # it may end with "est."
    told: dict[str, dict[str, None]] = {}
    for row in energy.rows:
        for note in (note for run in row.runs for note in run.notes):
            told.setdefault(note, {})[plural(row.row.size, "rank")] = None
    notes += [f"{note} ({', '.join(sizes)})." for note, sizes in told.items()]
    if not energy.known:
        return notes
    for row in energy.rows:
        notes += _lacking_notes(row)
    if any(row.gross.quality == "mixed" for row in energy.rows):
        notes.append(
            "Energy marked part est. is a sum of measured and estimated joules, which scaling.csv and summary.json"
            " keep apart."
        )
    return notes


def cost_details(energy: GroupEnergy) -> list[str]:
    """What must be known to read the tables of `cost_sheets`."""
    if not energy.known:
        return []
    notes = [
        "Joules of a phase are the loop's, attributed by the phase's share of the ranks' time in steady steps:"
        " phases last milliseconds and samples seconds, so no meter tells them apart; equal power in all is assumed.",
        _peak_note(energy),
    ]
    if len({run.summary.num_samples for row in energy.rows for run in row.row.runs}) > 1:
        notes.append(
            "Runs trained on different numbers of samples: joules times seconds of the loop are not of equal"
            " work; what a unit of speedup costs is, for as many samples as the baseline's."
        )
    return notes + _tariff_notes(energy)


def _lacking_notes(row: RowEnergy) -> list[str]:
    who, gross = plural(row.row.size, "rank"), row.gross.lacking
    notes = []
    if gross:
        of = listed(gross, _MOST_LACKING)
        notes.append(f"{who}: energy missing of {of}. Missing is not zero: what is known is the least.")
    idle = tuple(part for part in row.net.lacking if part not in gross)
    if idle and len(idle) < sum(len(run.readings) for run in row.runs):  # else it was never asked for
        notes.append(f"{who}: above idle is missing, for want of {listed(idle, _MOST_LACKING)}.")
    return notes


def _peak_note(energy: GroupEnergy) -> str:
    over = [run.peak[1] for row in energy.rows for run in row.runs if run.peak]
    span = f" of means over {significant(max(over))} s, as often as the slowest meter was read" if over else ""
    idle = any(row.net.total is not None for row in energy.rows)
    draw = "" if idle else " What nodes draw at rest is not known: energy.idle_s measures it before the loop."
    return f"Peak power is the highest{span}; mean power is gross joules over the metered time.{draw}"


def _tariff_notes(energy: GroupEnergy) -> list[str]:
    tariffs = list(dict.fromkeys(row.tariff for row in energy.rows))
    figures = [t for t in tariffs if t.co2_g_per_kwh is not None or t.price_per_kwh is not None]
    notes = []
    for tariff in tariffs:
        figures_of = {
            "PUE {:g}": tariff.pue,
            "{:g} g CO2 per kWh": tariff.co2_g_per_kwh,
            f"{{:g}} {plain(tariff.currency or '')} per kWh": tariff.price_per_kwh,
        }
        said = [words.format(value) for words, value in figures_of.items() if value is not None]
        notes += [f"As given and not measured: {', '.join(said)}."] * bool(said)
    if any(tariff.pue is None for tariff in figures):
        notes.append("The PUE is not known: CO2 and price are of what the meters read, without cooling and losses.")
    return notes


def verdict(energy: GroupEnergy) -> str:
    """Where more hardware stops paying, in one sentence: paying is to lower joules times seconds. "" where unknown."""
    judged = [row for row in energy.rows if row.pays is not None]
    if not judged:
        return ""
    complete = [row for row in energy.rows if not row.row.incomplete]
    worse = next((row for row in judged if not row.pays), None)
    row = worse or judged[-1]
    last = complete[complete.index(row) - 1]
    step = f"from {last.row.size} to {plural(row.row.size, 'rank')}"
    if row.marginal is None:
        price = f"{step} nothing is gained"
    elif row.marginal.known < 0:
        price = f"{step} each unit of speedup gained saves {(row.marginal * -1).text()}"
    else:
        price = f"{step} each unit of speedup gained costs {row.marginal.text()}"
    earlier = judged[judged.index(row) - 1] if judged.index(row) else None
    if worse and earlier and earlier.marginal is not None and earlier.marginal.known > 0:
        price += f"; before that a unit cost {earlier.marginal.text()}"
    if worse:
        return f"More hardware stops paying beyond {plural(last.row.size, 'rank')} (joules times seconds grow): {price}"
    speed = ratio_text(row.row.speedup or 1.0)
    return f"More hardware still pays at {plural(row.row.size, 'rank')}, the largest size ({speed}): {price}"


def cost_record(row: RowEnergy) -> dict[str, Any]:
    """A row's energy as plain values under `COST_COLUMNS`, in base units."""
    gross, servers = row.gross, _total(row.servers)
    by_phase = {f"joules_{phase}": row.phases[phase].total if phase in row.phases else None for phase in PHASES}
    known = bool(gross.known) or not gross.lacking
    return {
        "joules_measured": gross.measured or 0.0 if known else None,
        "joules_estimated": gross.estimated or 0.0 if known else None,
        "joules_shared": gross.shared,
        "joules_loop": row.loop.total,
        "joules_net": row.net.total,
        "joules_net_quality": row.net.quality,
        "mean_w": row.mean_w,
        "peak_w": row.peak_w,
        "edp_js": row.edp_js,
        "joules_per_speedup": row.marginal.total if row.marginal else None,
        **by_phase,
        "joules_servers": servers.total if row.servers else None,
        "joules_outside_steps": row.outside.total,
        "pue": row.tariff.pue,
        "facility_joules": row.facility_j,
        "co2_g": row.co2_g,
        "price": row.price,
        "currency": row.tariff.currency,
    }


def places_record(row: RowEnergy) -> dict[str, Any]:
    """Joules by node and by rank of each run, None where missing: for JSON alone."""
    return {
        "joules_by_node": [{node: joules.total for node, joules in run.nodes.items()} for run in row.runs],
        "joules_by_rank": [{str(rank): joules.total for rank, joules in run.ranks.items()} for run in row.runs],
        "energy_lacking": list(row.gross.lacking),
    }

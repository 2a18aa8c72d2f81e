"""Whether more hardware pays, which energy is missing or estimated, and how its tables are to be read."""

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy, Tariff
from hpc_train.analysis.report.labels import interval_words, sizes_by_reason
from hpc_train.analysis.report.notes.meters import meter_notes
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.energy_records import NO_METER
from hpc_train.core.formatting import listed, plain, plural, ratio_text, sentence, significant

_MOST_LACKING = 4  # meters of a run that a note names


def verdict(energy: GroupEnergy) -> str:
    """Whether more hardware pays, in one sentence: it pays while joules times seconds fall. "" if unknown."""
    judged = [row for row in energy.rows if row.change is not None]
    if not judged:
        return ""
    complete = [row for row in energy.rows if not row.row.incomplete]
    worse = next((row for row in judged if row.pays is False), None)
    row = worse or judged[-1]
    last = complete[complete.index(row) - 1]
    price = f"from {last.row.size} to {plural(row.row.size, 'rank')} {_price_text(row)}"
    if row.is_slower and row.speed is not None:
        speed = f"{ratio_text(row.speed.value)} the speed, {interval_words(row.speed)}"
        price = f"{plural(row.row.size, 'rank')} are slower than {last.row.size} ({speed})"
    assert row.change is not None
    change = f"joules times seconds per sample, which fall while it pays: {ratio_text(row.change.value)}"
    if row.change.interval is None:
        at = plural(row.row.size, "rank")
        return f"Whether more hardware still pays at {at} cannot be told without repeats ({change}): {price}"
    change += f", {interval_words(row.change)}"
    if row.pays is None:
        return (
            f"Whether more hardware still pays at {plural(row.row.size, 'rank')} is not measurable ({change}): {price}"
        )
    if worse is None:
        return f"More hardware still pays at {plural(row.row.size, 'rank')}, the largest size ({change}): {price}"
    earlier = judged[judged.index(row) - 1] if judged.index(row) else None
    if earlier and earlier.marginal is not None and earlier.marginal.known > 0:
        price += f"; before that a unit cost {earlier.marginal.text()}"
    return f"More hardware stops paying beyond {plural(last.row.size, 'rank')} ({change}): {price}"


def _price_text(row: RowEnergy) -> str:
    if row.marginal is None:
        return "no speed is measurably gained"
    if row.marginal.known < 0:
        return f"each unit of speedup gained saves {(row.marginal * -1).text()}"
    return f"each unit of speedup gained costs {row.marginal.text()}"


def verdict_notes(energy: GroupEnergy) -> list[str]:
    answer = verdict(energy)
    return [sentence(answer)] if answer else []


def run_notes(energy: GroupEnergy) -> list[str]:
    """The notes on single runs' meters, each once with the sizes that it holds for."""
    notes = sizes_by_reason(
        (note, row.row.size) for row in energy.rows for run in row.runs for note in meter_notes(run)
    )
    return [f"{note} ({sizes})." for note, sizes in notes.items()]


def lacking_notes(energy: GroupEnergy) -> list[str]:
    notes = []
    for row in energy.rows:
        size, lacking = plural(row.row.size, "rank"), row.gross.lacking
        if lacking:
            meters = listed(lacking, _MOST_LACKING)
            notes.append(f"{size}: energy missing of {meters}. Missing is not zero: the known part is a lower bound.")
        idle = tuple(meter for meter in row.net.lacking if meter not in lacking)
        # If no meter at all has its idle power, the user did not ask to measure it.
        if idle and len(idle) < sum(len(run.readings) for run in row.runs):
            notes.append(f"{size}: dynamic energy is missing: no {listed(idle, _MOST_LACKING)}.")
    return notes


def mixed_notes(energy: GroupEnergy) -> list[str]:
    if not any(row.gross.quality == "mixed" for row in energy.rows):
        return []
    return [
        "Energy marked part est. is a sum of measured and estimated joules; scaling.csv and summary.json have both"
        " parts."
    ]


def method_notes(energy: GroupEnergy) -> list[str]:
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
    idle = "" if with_idle else " The idle power of nodes is unknown: energy.idle_s measures it before the loop."
    return f"Peak power is the highest{span}; mean power is gross joules over the metered time.{idle}"


def tariff_notes(energy: GroupEnergy) -> list[str]:
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


def missing_notes(group: Group) -> list[str]:
    missing = [row for row in group.rows if row.energy.quality == "missing"]
    reasons = sizes_by_reason((_missing_reason(row), row.size) for row in missing)
    return [f"Energy missing for {sizes}: {why}. Missing is not zero." for why, sizes in reasons.items()]


def _missing_reason(row: Row) -> str:
    return "not every host's meter was read" if row.energy.source == NO_METER else row.energy.source


def estimate_notes(group: Group) -> list[str]:
    if not any(row.energy.quality == "estimated" for row in group.rows):
        return []
    runs = [run for row in group.rows for run in row.runs if run.summary.energy_quality == "estimated"]
    assumptions = dict.fromkeys(run.assumption or "the run does not state its assumption" for run in runs)
    return [sentence(f"Energy marked est. is estimated, not measured: {assumption}") for assumption in assumptions]

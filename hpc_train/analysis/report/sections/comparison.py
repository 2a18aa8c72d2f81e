"""A comparison of two sides as sentences, tables and plain values, for `hpc-train compare`."""

from dataclasses import asdict, replace
from typing import Any

from hpc_train.analysis.comparison.comparison import (
    ONE_RUN_EACH,
    THROUGHPUT,
    Metric,
    PlaceVerdict,
    RunComparison,
    Verdict,
    added_s,
)
from hpc_train.analysis.comparison.differences import Difference
from hpc_train.analysis.comparison.sides import Side
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Section, Table
from hpc_train.analysis.report.sections import quantities
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.report.sections.quantities import METRIC, PLACE
from hpc_train.core.formatting import amount, listed, ms_text, percent, plural, significant
from hpc_train.core.statistics import Interval
from hpc_train.core.timing_log import PHASES

SCHEMA = 1
_MOST_PLACES, _MOST_ROWS = 3, 20  # in the answer, in the table
_MOST_OVERVIEW = 6  # metrics in a short report


def comparison_section(comparison: RunComparison, guard: SectionGuard) -> Section:
    """One kind of runs of a job against another, for a report."""
    section = SectionBuilder("comparison", f"{comparison.after.name} against {comparison.before.name}", guard)
    section.headline(headline, comparison)
    section.overview(overview_table, comparison)
    section.notes("comparison-verdicts", "finding", verdicts, comparison)
    section.notes("comparison-cautions", "caution", cautions, comparison)
    section.table("comparison", metrics_table, comparison)
    section.table("comparison-places", places_table, comparison)
    section.table("comparison-differences", differences_table, comparison)
    return section.build()


def answer(comparison: RunComparison) -> list[str]:
    """The answer in sentences, the verdict first."""
    return [headline(comparison), *verdicts(comparison), *cautions(comparison)]


def headline(comparison: RunComparison) -> str:
    runs = f"{_runs_text(comparison.after)} against {_runs_text(comparison.before)}"
    return f"{_speed_text(comparison.speed)} ({runs})"


def verdicts(comparison: RunComparison) -> list[str]:
    beyond = f"beyond {percent(comparison.threshold, 1)}"
    kinds: tuple[tuple[Verdict, str], ...] = (
        ("regression", f"Regressions {beyond}"),
        ("improvement", f"Improvements {beyond}"),
        ("slower, step unaffected", "Slower, though the step is not, and no regression of the job"),
    )
    named = [(words, _names(comparison, kind)) for kind, words in kinds]
    lines = [f"{words}: {names}." for words, names in named if names]
    return [*lines, *_unfelt(comparison)]


def _unfelt(comparison: RunComparison) -> list[str]:
    """Why phases fail a comparison in which the step time does not."""
    speed, step_s = comparison.speed, comparison.speed.before
    phases = [each for each in comparison.metrics if each.name in PHASES]
    judged: list[Metric | PlaceVerdict] = [*phases, *comparison.places]
    slower = [each for each in judged if each.verdict == "regression"]
    if not slower or not step_s or speed.verdict == "regression" or speed.interval is None:
        return []
    most = max(map(added_s, slower))
    return [
        f"The step time shows no regression: a phase adds up to {ms_text(most)} ms, {percent(most / step_s)} of a step,"
        f" and the step's interval is {_interval_text(speed.interval)}. The comparison fails, since the step may take"
        " that much longer."
    ]


def _speed_text(speed: Metric) -> str:
    if speed.relative is None or speed.interval is None:
        return f"The {speed.name} is not judged: {speed.why}"
    if speed.verdict == "no difference shown":
        return f"No difference of the {speed.name} is shown; a change of {_shown_text(speed.smallest_shown)} would be"
    change = f"{percent(abs(speed.relative))} {'more' if speed.relative > 0 else 'less'} time a step"
    if speed.why == ONE_RUN_EACH:
        return f"{change}, which one run a side cannot tell from chance" if speed.relative else "The same time a step"
    return f"{change}, 95% interval {_interval_text(speed.interval)}: {speed.verdict}"


def _runs_text(side: Side) -> str:
    return f"{side.name}: {plural(len(side.runs), 'run')}"


def _names(comparison: RunComparison, verdict: Verdict) -> str:
    metrics = [f"{each.name} {_change_text(each.relative or 0.0)}" for each in comparison.metrics]
    named = [name for name, each in zip(metrics, comparison.metrics, strict=True) if each.verdict == verdict]
    places = [each for each in comparison.changed_places if each.verdict == verdict]
    found = [f"{_place_text(each)} {_change_text(each.relative)}" for each in places]
    return ", ".join(named + ([listed(found, _MOST_PLACES)] if found else []))


def _place_text(each: PlaceVerdict) -> str:
    place = each.of.place
    return f"{each.of.phase} on {'rank ' if place.kind == 'rank' else ''}{place.name}"


def cautions(comparison: RunComparison) -> list[str]:
    if comparison.one_run_each:
        return [
            "With one run a side nothing is judged: by how much runs differ by chance is unknown, and intervals hold"
            " within these runs alone. Take three repeats a side, or three before and one after."
        ]
    lines = []
    speed = comparison.speed
    if speed.smallest_shown is not None and speed.smallest_shown[1] > comparison.threshold:
        lines.append(
            f"Runs of a side differ: a change of the {speed.name} shows from {_shown_text(speed.smallest_shown)} on."
            " More repeats, or a quieter machine, show smaller ones."
        )
    if 1 in (len(comparison.before.runs), len(comparison.after.runs)):
        lines.append("The single run is taken to vary as the repeats of the other side do.")
    if not comparison.same_hosts and comparison.places:
        lines.append("The runs used different hosts: node 0 is the host of rank 0, and so on.")
    return lines


def comparison_tables(comparison: RunComparison) -> list[Table]:
    tables = [metrics_table(comparison), places_table(comparison), differences_table(comparison)]
    return [table for table in tables if table is not None]


def overview_table(comparison: RunComparison) -> Table:
    """Of the metrics of the whole job those that differ: what a first look needs."""
    whole = metrics_table(comparison)
    rows = [
        row
        for row, each in zip(whole.rows, comparison.metrics, strict=True)
        if each is comparison.speed or each.verdict in ("regression", "improvement", "slower, step unaffected")
    ]
    return replace(whole, id="overview", rows=tuple(rows[:_MOST_OVERVIEW]))


def metrics_table(comparison: RunComparison) -> Table:
    columns: list[CellColumn[Metric]] = [
        text("metric", lambda each: f"{each.name} (ms)" if each.unit == "s" else each.name),
        number("before", lambda each: _value_text(each, each.before)),
        number("after", lambda each: _value_text(each, each.after)),
        number("change", lambda each: "-" if each.relative is None else _change_text(each.relative)),
        number("interval", lambda each: "-" if each.interval is None else _interval_text(each.interval)),
        number("shows from", lambda each: _increase_text(each.smallest_shown)),
        text("verdict", _verdict_text),
    ]
    kind = "within these runs" if comparison.one_run_each else f"below {THROUGHPUT} 95% for all together, by Holm"
    return make_table("comparison", f"The whole job (95% intervals; {kind})", comparison.metrics, columns)


def _verdict_text(metric: Metric) -> str:
    of_all = metric.why == ONE_RUN_EACH  # a caution says it
    return f"{metric.verdict}: {metric.why}" if metric.why and not of_all else metric.verdict


def places_table(comparison: RunComparison) -> Table | None:
    if not comparison.changed_places:
        return None
    columns: list[CellColumn[PlaceVerdict]] = [
        text("phase", lambda each: _place_text(each)),
        number("before (ms)", lambda each: ms_text(each.of.before_s)),
        number("after (ms)", lambda each: ms_text(each.of.after_s)),
        number("change", lambda each: _change_text(each.relative)),
        number("interval", lambda each: _interval_text(each.interval)),
        text("verdict", lambda each: each.verdict),
    ]
    changed = comparison.changed_places
    cut = f"; the costliest {_MOST_ROWS} of {len(changed)}" if len(changed) > _MOST_ROWS else ""
    title = f"Hosts and ranks that changed against their neighbours (intervals of 95% or more, by Holm{cut})"
    return make_table("comparison-places", title, changed[:_MOST_ROWS], columns)


def differences_table(comparison: RunComparison) -> Table | None:
    if not comparison.differences:
        return None
    columns: list[CellColumn[Difference]] = [
        text("what differs", lambda each: f"{each.kind}: {each.name}"),
        text("before", lambda each: each.before),
        text("after", lambda each: each.after),
    ]
    title = "What differs in configuration, software and hardware"
    return make_table("comparison-differences", title, comparison.differences, columns)


def _value_text(metric: Metric, value: float | None) -> str:
    if value is None:
        return "-"
    if metric.unit == "s":
        return ms_text(value)
    return amount(value, metric.unit) if metric.unit in ("J", "B") else significant(value, 4)


_LARGE = 1.995  # from a factor of 3 on, "x 3.4" reads better than "+240%"


def _change_text(relative: float) -> str:
    return f"{100 * relative:+.1f}%" if relative < _LARGE else _factor_text(relative)


_UNTOLD = 99.0  # an interval that reaches a factor of 100 tells nothing, and its digits are noise


def _interval_text(interval: Interval) -> str:
    low, high = interval
    if high > _UNTOLD or (1 + low) * (1 + _UNTOLD) < 1:
        return "too few runs"
    if high < _LARGE:
        return f"{100 * low:+.1f} to {100 * high:+.1f}%"
    return f"{_factor_text(low)} to {significant(1 + high, 2)}"


def _shown_text(shown: Interval | None) -> str:
    """-4.8 or +5.0%: less shows at another size than more."""
    if shown is None or shown[1] > _UNTOLD:
        return "a factor of 100 or more"
    low, high = shown
    return f"{100 * low:+.1f} or {100 * high:+.1f}%" if high < _LARGE else f"a factor of {significant(1 + high, 2)}"


def _increase_text(shown: Interval | None) -> str:
    return "-" if shown is None or shown[1] > _UNTOLD else _change_text(shown[1])


def _factor_text(relative: float) -> str:
    return f"x {significant(1 + relative, 2)}"


# ---------------------------------------------------------------------------------------------- for programs


def record(comparison: RunComparison) -> dict[str, Any]:
    """The comparison as plain values for JSON; None is what is not known."""
    return {
        "schema": SCHEMA,
        "answer": answer(comparison),
        "is_regression": comparison.is_regression,
        "threshold": comparison.threshold,
        "before": _side_record(comparison.before),
        "after": _side_record(comparison.after),
        "metrics": [quantities.record(METRIC, metric) for metric in comparison.metrics],
        "places": [quantities.record(PLACE, place) for place in comparison.places],
        "differences": [asdict(difference) for difference in comparison.differences],
    }


def _side_record(side: Side) -> dict[str, Any]:
    return {"name": side.name, "ranks": side.size, "runs": [run.label for run in side.runs]}

"""A comparison in words and numbers: what the terminal, the page and the programs are told alike."""

from dataclasses import dataclass
from math import floor, isfinite, log10

from hpc_train.analysis.load import Run, section
from hpc_train.analysis.scaling import Group, Interval, Row, Scaling, num_ranks
from hpc_train.records import PHASES, Energy

MARK = "*"  # on the number of ranks of an incomplete row


@dataclass(frozen=True)
class Column:
    """A table's column. Text is aligned left and may be broken, numbers right and never."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table in words, the same in the terminal and on the page."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(group: Group) -> list[Sheet]:
    """A group's tables: how it scaled, where the time went, what it cost and came to."""
    return [_scaling_sheet(group), _phase_sheet(group), _energy_sheet(group)]


def _ranks(row: Row) -> str:
    return f"{row.size}{MARK if row.incomplete else ''}"


def _scaling_sheet(group: Group) -> Sheet:
    against = f"speedup vs {num_ranks(group.baseline.size)}" if group.baseline else "speedup"
    span = "95% interval"
    titles = ("ranks", "runs", "step (ms)", span, "samples/s", against, span, "efficiency")
    rows = tuple(
        (
            _ranks(row),
            str(len(row.runs)),
            _ms(row.step_s),
            interval_text(row.step_interval_s, 1e3),
            significant(row.samples_per_s, 4),
            *_speedup_cells(row),
        )
        for row in group.rows
    )
    kind = f"{'weak' if group.weak else 'strong'} scaling"
    batch = (
        f"batch per rank {group.keys['train.batch_per_rank']}"
        if group.weak
        else f"global batch {group.rows[0].global_batch}"
    )
    return Sheet(f"Scaling ({kind}, {batch})", tuple(Column(title) for title in titles), rows)


def _speedup_cells(row: Row) -> tuple[str, str, str]:
    if row.is_baseline:
        return "baseline", "-", percent(row.efficiency)
    if row.speedup is None:
        return "no baseline", "-", "-"
    return times_text(row.speedup), speedup_interval_text(row), percent(row.efficiency)


def _phase_sheet(group: Group) -> Sheet:
    columns = (Column("ranks"), *(Column(phase) for phase in PHASES))
    rows = tuple((_ranks(row), *(percent(row.phase_share.get(phase)) for phase in PHASES)) for row in group.rows)
    title = "Where a step's time goes (share of all ranks' time; reduce: exposed communication)"
    return Sheet(title, columns, rows)


def _energy_sheet(group: Group) -> Sheet:
    columns = [Column("ranks"), Column("energy per run"), Column("per sample"), Column("meter", is_text=True)]
    with_loss = any(row.loss is not None for row in group.rows)
    with_accuracy = any(row.test_accuracy is not None for row in group.rows)
    columns += [Column("loss")] * with_loss + [Column("test accuracy")] * with_accuracy
    rows = []
    for row in group.rows:
        cells = [_ranks(row), energy_text(row.energy.joules, row.energy)]
        cells += [energy_text(row.joules_per_sample, row.energy), plain(row.energy.source)]
        cells += [significant(row.loss, 4)] * with_loss
        cells += [percent(row.test_accuracy, 2)] * with_accuracy
        rows.append(tuple(cells))
    return Sheet("Energy and result", tuple(columns), tuple(rows))


def group_notes(group: Group) -> list[str]:
    """What must be known to read a group's tables: incomplete runs, mismatches, what an estimate assumes."""
    notes = list(group.notes)
    if any(row.incomplete for row in group.rows):
        notes.insert(0, f"{MARK} incomplete: shown, never a baseline, never pooled with complete runs.")
    unmarked = [
        phase for phase in PHASES if any(row.phase_share and phase not in row.phase_share for row in group.rows)
    ]
    if unmarked:
        communication = "; exposed communication was not measured" * ("reduce" in unmarked)
        notes.append(
            f"The recorded loop did not mark {', '.join(unmarked)}: their time is in the phases that it did, or in"
            f" other{communication}."
        )
    if any(row.energy.quality == "estimated" for row in group.rows):
        assumed = dict.fromkeys(
            (run.assumption or "the run does not say what it assumes").rstrip(".")
            for row in group.rows
            for run in row.runs
            if run.summary.energy_quality == "estimated"
        )
        notes += [f"Energy marked est. is estimated, not measured: {assumption}." for assumption in assumed]
    lacking = [num_ranks(row.size) for row in group.rows if row.energy.quality == "missing"]
    if lacking:
        sizes = ", ".join(dict.fromkeys(lacking))
        notes.append(f"Energy missing for {sizes}: not every host's meter was read. Missing is not zero.")
    return notes


# ---------------------------------------------------------------------------------------------- words


def headlines(scaling: Scaling) -> list[str]:
    """One sentence a group; the group is named where there are several."""
    several = len(scaling.groups) > 1
    return [(f"{plain(group.label)}: " if several else "") + headline(group) for group in scaling.groups]


def headline(group: Group) -> str:
    """The group's answer in one sentence: the largest complete size against the baseline."""
    row, baseline = group.largest, group.baseline
    if row is None or baseline is None:
        shown = next((row for row in reversed(group.rows) if not row.incomplete), group.rows[-1])
        speed = (
            f"{_ms(shown.step_s)} ms a step, {significant(shown.samples_per_s, 4)} samples/s"
            if shown.step_s
            else "no steady step recorded"
        )
        return f"{num_ranks(shown.size)}: {speed}; no baseline, so no speedup{_exposed(shown)}"
    assert row.speedup is not None
    low, high = row.speedup_interval or (row.speedup, row.speedup)
    over, efficiency = num_ranks(baseline.size), f"{percent(row.efficiency, 0)} efficiency"
    times = times_text(row.speedup)
    if low <= 1 <= high:
        return (
            f"{num_ranks(row.size)}: no faster than {over} as far as can be told ({times}, 95% interval"
            f" {speedup_interval_text(row)}, {efficiency}){_exposed(row)}{_grown(row, baseline)}"
        )
    if row.speedup < 1:
        return (
            f"{num_ranks(row.size)}: slower than {over}, {times} its speed ({efficiency})"
            f"{_exposed(row)}{_grown(row, baseline)}"
        )
    work = " in samples/s" if group.weak else ""
    return f"{num_ranks(row.size)}: {times} over {over}{work} ({efficiency}){_exposed(row)}"


def _exposed(row: Row) -> str:
    share = row.phase_share.get("reduce")
    return "" if share is None else f"; {percent(share, 0)} of the step is exposed communication"


def _grown(row: Row, baseline: Row) -> str:
    """The other phases that take longer per step and rank than at the baseline, by 5% of its step or more."""
    before, after = baseline.phase_s, row.phase_s
    notable = 0.05 * sum(before.values())
    grown = [
        f", {phase} grew from {_ms(before[phase])} to {_ms(after[phase])} ms"
        for phase in PHASES
        if phase != "reduce" and after[phase] - before[phase] > notable
    ]
    return "".join(grown)


def plain(text: str) -> str:
    """Text from a file, safe for a terminal: control characters are shown as a replacement character."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def significant(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; integers above that keep all theirs."""
    if value is None:
        return "-"
    if not isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def percent(share: float | None, decimals: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{decimals}f}%"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else significant(seconds * 1e3, 4)


def times_text(speedup: float) -> str:
    return f"{speedup:.2f}x" if speedup >= 0.1 else f"{significant(speedup, 2)}x"


def speedup_interval_text(row: Row) -> str:
    if row.speedup_interval is None:
        return "-"
    return "-".join(times_text(end).removesuffix("x") for end in row.speedup_interval)


def interval_text(interval: Interval | None, scale: float) -> str:
    """ "4.81-5.02", both ends with the decimals of four significant digits of the larger."""
    if interval is None:
        return "-"
    low, high = (value * scale for value in interval)
    decimals = max(0, 3 - floor(log10(high))) if high > 0 else 3
    return f"{low:.{min(decimals, 6)}f}-{high:.{min(decimals, 6)}f}"


def energy_text(joules: float | None, energy: Energy) -> str:
    """ "123 J", "123 J est." or "missing": a figure never stands without its quality."""
    if joules is None or energy.quality == "missing":
        return "missing"
    powers = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))
    power, prefix = next((pair for pair in powers if abs(joules) >= pair[0]), (1.0, ""))
    return f"{significant(joules / power)} {prefix}J" + (" est." if energy.quality == "estimated" else "")


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of one run."""
    meta = run.meta
    versions = ", ".join(f"{name} {version}" for name, version in section(meta, "versions").items())
    git = section(meta, "git")
    modified = " with uncommitted changes" if git.get("dirty") else ""
    hosts = meta["hosts"][:8] + ([f"and {len(meta['hosts']) - 8} more"] if len(meta["hosts"]) > 8 else [])
    facts = {
        "name": run.summary.name,
        "started": meta.get("started", "unknown"),
        "ended": meta.get("ended", "not recorded"),
        "ranks": run.size,
        "hosts": ", ".join(hosts),
        "CPU": meta.get("cpu_model", "unknown"),
        "steps": f"{run.summary.num_steps}, {run.summary.num_warmup} of them warm-up" + _attempts_text(run),
        "global batch": run.summary.global_batch,
        "reduction": run.config.reduce.strategy,
        "versions": versions,
        "MPI": section(meta, "mpi").get("version", "unknown"),
        "git commit": str(git.get("commit", "unknown"))[:12] + modified,
        "Slurm job": section(meta, "slurm").get("job_id"),
        "incomplete": run.incomplete,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _attempts_text(run: Run) -> str:
    attempts, repeated = run.summary.num_attempts, run.summary.num_repeated
    return f"; in {attempts} attempts, {repeated} steps taken twice" if attempts > 1 else ""

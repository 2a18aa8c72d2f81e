"""A comparison as tables and notes: what the terminal, the page and the programs are told alike."""

from collections import defaultdict
from collections.abc import Sequence

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.load_balance_tables import balance_notes, balance_sheets
from hpc_train.analysis.report.table import MARK, Column, Table, made_sheets, ranks_text
from hpc_train.analysis.scaling.compare import Group, Row, timed_phases
from hpc_train.analysis.scaling.mfu import GIVEN, counts_flops, flops_notes, flops_of
from hpc_train.analysis.scaling.strategies import Comparison, Entry, Traffic
from hpc_train.core.formatting import (
    amount,
    energy_text,
    interval_text,
    ms_text,
    percent,
    plain,
    plural,
    ratio_interval_text,
    ratio_text,
    significant,
)
from hpc_train.core.records import NO_METER, PHASES


def sheets(group: Group, guard: SectionGuard | None = None) -> list[Table]:
    """A group's tables: how it scaled, where the time went and what was lost, what the device did, what it cost."""
    flops = {"Model FLOPs": lambda: [_flops_sheet(group)]} if counts_flops(group) else {}
    return made_sheets(
        guard,
        {
            "Scaling": lambda: [_scaling_sheet(group)],
            "Where a step's time goes": lambda: [_phase_sheet(group)],
            "Efficiencies, and whom the others wait for": lambda: balance_sheets(group),
            **flops,
            "Energy and result": lambda: [_energy_sheet(group)],
        },
    )


def _scaling_sheet(group: Group) -> Table:
    against = f"speedup vs {plural(group.baseline.size, 'rank')}" if group.baseline else "speedup"
    span = "95% interval"
    titles = ("ranks", "runs", "step (ms)", span, "samples/s", against, span, "speedup efficiency")
    rows = tuple(
        (
            ranks_text(row),
            str(len(row.runs)),
            ms_text(row.step_s),
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
    return Table(f"Scaling ({kind}, {batch})", tuple(Column(title) for title in titles), rows)


def _speedup_cells(row: Row) -> tuple[str, str, str]:
    if row.is_baseline:
        return "baseline", "-", percent(row.efficiency)
    if row.speedup is None:
        return "no baseline", "-", "-"
    return ratio_text(row.speedup), ratio_interval_text(row.speedup_interval), percent(row.efficiency)


def _phase_sheet(group: Group) -> Table:
    with_servers = any(row.num_servers for row in group.rows)
    phases = timed_phases(group.rows)
    columns = [Column("ranks"), *(Column(phase) for phase in phases), *[Column("servers busy")] * with_servers]
    rows = []
    for row in group.rows:
        cells = [ranks_text(row), *(percent(row.phase_share.get(phase)) for phase in phases)]
        rows.append((*cells, *[percent(row.servers_busy)] * with_servers))
    whose = "the workers' time; servers busy: not in communication" if with_servers else "all ranks' time"
    communication = "reduce and sync" if "sync" in phases else "reduce"
    title = f"Where a step's time goes (share of {whose}; {communication}: exposed communication)"
    return Table(title, tuple(columns), tuple(rows))


def _flops_sheet(group: Group) -> Table:
    titles = ("ranks", "FLOP per sample", "FLOP/s per rank", "peak per rank", "MFU")
    rows = []
    for row in group.rows:
        flops = flops_of(row)
        source = {None: "-", GIVEN: f"given ({GIVEN})"}.get(flops.peak_source, plain(flops.peak_source or ""))
        figures = (amount(flops.per_sample, "FLOP"), amount(flops.per_rank_s, "FLOP/s"), amount(flops.peak_s, "FLOP/s"))
        rows.append((ranks_text(row), *figures, mfu_text(flops.mfu), source))
    title = "Model FLOPs (counted, forward and backward) and MFU, their share of the peak"
    return Table(title, (*(Column(each) for each in titles), Column("peak from", is_text=True)), tuple(rows))


def _energy_sheet(group: Group) -> Table:
    columns = [Column("ranks"), Column("energy per run"), Column("per sample"), Column("meter", is_text=True)]
    with_loss = any(row.loss is not None for row in group.rows)
    measures = measures_of(group.rows)
    columns += [Column("loss")] * with_loss + [Column(f"test {_words(measure)}") for measure in measures]
    rows = []
    for row in group.rows:
        cells = [ranks_text(row), energy_text(row.energy.joules, row.energy)]
        cells += [energy_text(row.joules_per_sample, row.energy), plain(row.energy.source)]
        cells += [significant(row.loss, 4)] * with_loss
        cells += [measure_text(measure, row.test.get(measure)) for measure in measures]
        rows.append(tuple(cells))
    return Table("Energy and result", tuple(columns), tuple(rows))


def mfu_text(mfu: float | None) -> str:
    return "missing" if mfu is None else f"{significant(100 * mfu)}%"


def strategy_sheets(comparison: Comparison, guard: SectionGuard | None = None) -> list[Table]:
    """Strategies on equal work: how fast each is, then what each must move and hold and comes to."""
    return made_sheets(
        guard,
        {
            "Strategies on equal work": lambda: [_strategy_speed_sheet(comparison)],
            "What must be moved": lambda: [_strategy_work_sheet(comparison)],
        },
    )


def _strategy_speed_sheet(comparison: Comparison) -> Table:
    span = "95% interval"
    titles = ("ranks", "step (ms)", span, "samples/s", f"speed vs {comparison.reference}", span, "exposed")
    rows = tuple(
        (
            entry.strategy,
            ranks_text(entry.row),
            ms_text(entry.row.step_s),
            interval_text(entry.row.step_interval_s, 1e3),
            significant(entry.row.samples_per_s, 4),
            _ratio_text(entry),
            ratio_interval_text(entry.ratio_interval),
            percent(entry.row.exposed_share),
        )
        for entry in comparison.entries
    )
    columns = (Column("strategy", is_text=True), *(Column(title) for title in titles))
    return Table(f"Strategies on equal work ({_work_text(comparison)})", columns, rows)


def _work_text(comparison: Comparison) -> str:
    """ "global batch 120, seed 0, 210 steps"."""
    keys = comparison.keys
    weak = keys.get("train.batch_per_rank")
    batch = f"batch per rank {weak}" if weak else f"global batch {keys.get('train.global_batch')}"
    steps = sorted({run.config.train.steps for entry in comparison.entries for run in entry.row.runs})
    return f"{batch}, seed {keys.get('seed')}, {' or '.join(map(str, steps))} steps"


def _ratio_text(entry: Entry) -> str:
    if entry.is_reference and entry.ratio is not None:
        return "reference"
    return "-" if entry.ratio is None else ratio_text(entry.ratio)


def _strategy_work_sheet(comparison: Comparison) -> Table:
    measures = measures_of([entry.row for entry in comparison.entries])
    titles = ("ranks", "must move", "optimizer state", "loss", *(f"test {_words(measure)}" for measure in measures))
    rows = []
    for entry in comparison.entries:
        held = entry.optimizer_bytes
        cells = [entry.strategy, ranks_text(entry.row), _traffic_text(entry.traffic)]
        cells += [amount(max(held) if held else None, "B"), significant(entry.row.loss, 7)]
        rows.append((*cells, *(measure_text(measure, entry.row.test.get(measure)) for measure in measures)))
    columns = (Column("strategy", is_text=True), *(Column(title) for title in titles))
    title = "What the busiest rank must move in a step, what the fullest holds, and what comes out"
    return Table(title, columns, tuple(rows))


def _traffic_text(traffic: Traffic | None) -> str:
    if traffic is None:
        return "missing"
    return ("at least " if traffic.is_least else "") + amount(traffic.must_move_bytes, "B")


def strategy_notes(comparison: Comparison) -> list[str]:
    """What must be known to read the strategies' tables."""
    notes = list(comparison.notes)
    servers = any(entry.row.num_servers for entry in comparison.entries)
    notes.append(
        "Theory: each of N ranks of a ring sends 2(N-1)/N of the gradients' bytes and receives as many; sharded is the"
        " ring's two halves; an all-reduce of MPI's choice does not do with less."
    )
    if servers:
        notes.append(
            "Theory: each of S servers receives and sends 2W/S of the gradients' bytes for W workers, both ways"
            " together: halve it to set it beside a ring, which is told one way."
        )
    if servers:
        notes.append("A parameter server's ranks are workers + servers; exposed is the workers' share.")
    if any(entry.row.incomplete for entry in comparison.entries):
        notes.append(f"{MARK} incomplete: shown, never the reference.")
    return notes


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Every test measure of the rows, in the order in which runs state them."""
    return list(dict.fromkeys(measure for row in rows for measure in row.test))


def measure_text(measure: str, value: float | None) -> str:
    """An accuracy in percent, any other measure as a number."""
    return percent(value, 2) if measure.split("_")[-1] == "accuracy" else significant(value, 4)


def _words(measure: str) -> str:
    return plain(measure.replace("_", " "))


def group_notes(group: Group) -> list[str]:
    """What must be known to read a group's tables: incomplete runs, mismatches, what an estimate assumes."""
    notes = list(group.notes)
    if any(row.incomplete for row in group.rows):
        notes.insert(0, f"{MARK} incomplete: shown, never a baseline, never pooled with complete runs.")
    unmarked = [
        phase
        for phase in PHASES
        if phase != "sync" and any(row.phase_share and phase not in row.phase_share for row in group.rows)
    ]
    if unmarked:
        communication = "; exposed communication was not measured" * ("reduce" in unmarked)
        notes.append(
            f"These runs did not time {', '.join(unmarked)}: their time is in the phases that it did, or in"
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
    lacking: dict[str, list[str]] = defaultdict(list)
    for row in group.rows:
        if row.energy.quality == "missing":
            unread = row.energy.source == NO_METER
            lacking["not every host's meter was read" if unread else row.energy.source].append(plural(row.size, "rank"))
    for why, sizes in lacking.items():
        notes.append(f"Energy missing for {', '.join(dict.fromkeys(sizes))}: {why}. Missing is not zero.")
    if any(row.num_servers for row in group.rows):
        notes.append("Ranks are workers + servers, and both count in the efficiency.")
    return notes + balance_notes(group) + (flops_notes(group) if counts_flops(group) else [])

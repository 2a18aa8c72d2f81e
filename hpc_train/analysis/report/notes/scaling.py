"""What limits a comparison of sizes: missing baselines, incomplete runs, runs on unequal terms."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

from hpc_train.analysis.report.labels import MARK, WITHIN
from hpc_train.analysis.runs.clocks import hosts_of
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.placement import SharedHost, crowded_hosts, shared_hosts
from hpc_train.analysis.runs.repeats import differing_facts
from hpc_train.analysis.scaling.compare import Group, Scaling, equal_work
from hpc_train.analysis.scaling.labels import differing_keys, work
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import listed, ms_text, plain, plural, significant
from hpc_train.core.settings import RECORDED
from hpc_train.core.timing_log import PHASES

_UNEVEN = 0.1  # the mean step over the median one, relative
_SUPERLINEAR = 1.05  # speedup efficiency
_MOST_INCOMPLETE = 5  # runs whose reason a sentence gives; the page's list of runs has all
_MOST_UNEQUAL = 2  # facts that a sentence names


def group_notes(group: Group) -> list[str]:
    return [
        *_baseline_notes(group),
        *_run_notes(group.runs),
        *mismatch_notes(group.runs),
        *(note for row in group.rows for note in _row_notes(row)),
        *_foreign_work_notes(group),
        *_ranks_per_host_notes(group.runs),
    ]


def interval_notes(group: Group) -> list[str]:
    """Why an interval holds within one run only, and what would tell more."""
    alone = [row for row in group.rows if row.step is not None and len(row.runs) == 1]
    if not alone:
        return []
    return [
        f"An interval {WITHIN} is from how the run's steps vary: the next run may lie outside. Two more runs of"
        f" {_sizes_text({row.size for row in alone})} would tell how runs differ."
    ]


def _baseline_notes(group: Group) -> list[str]:
    if group.baseline is None:
        sizes = " and ".join(plural(size, "rank") for size in sorted({row.size for row in group.rows}))
        if all(row.incomplete for row in group.rows):
            return [f"No baseline: no run of {sizes} is complete. A speedup needs steady steps of two sizes."]
        return [f"No baseline: complete runs of {sizes} only. A speedup needs steady steps of two sizes."]
    if group.baseline.size == 1:
        return []
    return [f"The baseline is {plural(group.baseline.size, 'rank')}, not 1 rank: all speedups are relative to that."]


def _run_notes(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for copy in run.copies:
            yield f"Counted once: {copy} is a copy of {run.dir.path}."
    for run in runs:
        if not run.incomplete and not len(run.step_s):
            yield f"{run.label}: no steady step, all of its {run.summary.num_steps} steps are warm-up."


def _row_notes(row: Row) -> Iterator[str]:
    size = plural(row.size, "rank")
    if row.step_s and row.step_median_s and abs(row.step_s / row.step_median_s - 1) > _UNEVEN:
        yield (
            f"{size}: steps take {ms_text(row.step_s)} ms on average, which counts, and {ms_text(row.step_median_s)} ms"
            " in the median: few of them cause most of the difference."
        )
    if _is_above_ideal(row):
        yield (
            f"{size}: sharing the work does not explain a speedup efficiency above 100%. Smaller shares may fit the"
            " caches, or the baseline was disturbed: repeat the baseline to tell."
        )
    if crowded := crowding_text(row):
        yield f"{crowded} and wait for each other's computing (runs of {size})."


def _is_above_ideal(row: Row) -> bool:
    return bool(row.efficiency_interval and row.efficiency_interval[0] > 1 and (row.efficiency or 0.0) > _SUPERLINEAR)


def not_to_quote_text(row: Row, baseline: Row) -> str:
    """Why an efficiency above 100% says nothing about scaling; "" if it is not above, or only by chance."""
    if row is baseline or (row.efficiency or 0.0) <= _SUPERLINEAR:
        return ""
    unequal = mismatch_values([*baseline.runs, *row.runs])
    if unequal:
        return f"do not quote an efficiency above 100% on unequal terms ({listed(unequal, _MOST_UNEQUAL)})"
    return "repeat the baseline before you quote an efficiency above 100%" if _is_above_ideal(row) else ""


def crowding_text(row: Row) -> str:
    """ "4 ranks share 2 cores of vm" on the most crowded host of any run; "" if no host has fewer cores than ranks."""
    hosts = [host for run in row.runs for host in crowded_hosts(run)]
    worst = max(hosts, key=lambda host: host.num_ranks / host.num_cores, default=None)
    if worst is None:
        return ""
    return f"{plural(worst.num_ranks, 'rank')} share {plural(worst.num_cores, 'core')} of {plain(worst.host)}"


def foreign_work_text(rows: Sequence[Row]) -> str:
    """ "other programs kept 1.56 of the 2 cores of vm busy" on the host that they used most; "" if on none."""
    hosts = [host for row in rows for run in row.runs for host in shared_hosts(run)]
    worst = max(hosts, key=lambda host: host.foreign_cores, default=None)
    return "" if worst is None else f"other programs kept {_foreign_text(worst)} busy"


def _foreign_text(host: SharedHost) -> str:
    of_all = f" of the {host.num_cpus}" if host.num_cpus else ""
    return f"{significant(host.foreign_cores)}{of_all} cores of {plain(host.host)}"


def _foreign_work_notes(group: Group) -> Iterator[str]:
    for row in group.rows:
        if text := foreign_work_text([row]):
            yield f"{plural(row.size, 'rank')}: {text}: steps wait for cores, and vary. A node of its own tells more."


def mismatch_notes(runs: Sequence[Run]) -> list[str]:
    """What differs between runs besides their size."""
    return [f"Configuration mismatch: {values}." for values in mismatch_values(runs)]


def mismatch_values(runs: Sequence[Run]) -> list[str]:
    """Each fact that differs, with its values and the sizes that have them."""
    found = []
    for name, values in differing_facts(runs).items():
        sizes: dict[str, set[int]] = defaultdict(set)
        for run, value in zip(runs, values, strict=True):
            sizes[value].add(run.size)
        found.append(_values_text(name, dict(sorted(sizes.items(), key=lambda item: min(item[1])))))
    return found


def _ranks_per_host_notes(runs: Sequence[Run]) -> list[str]:
    """If runs fill their hosts unequally: their ranks share memory and network with more or fewer others.

    A run on one host has all its ranks there. That is a mismatch only if they are more than those of runs on several.
    """
    hosts = {run: hosts_of(run.meta, run.size) for run in runs}
    fullest = {run: max(Counter(names).values()) for run, names in hosts.items() if None not in names}
    on_several = [num for run, num in fullest.items() if run.summary.num_hosts > 1]
    usual = max(on_several, default=max(run.size for run in runs))
    sizes: dict[int, set[int]] = defaultdict(set)
    for run, num in fullest.items():
        if run.summary.num_hosts > 1 or num > usual:
            sizes[num].add(run.size)
    if len(sizes) < 2:
        return []
    values = _values_text("rank placement, ranks per host", {str(num): sizes[num] for num in sorted(sizes)})
    return [f"Configuration mismatch: {values}."]


def _values_text(name: str, sizes_by_value: dict[str, set[int]]) -> str:
    """ "threads per rank: 2 (1 rank); 1 (2 and 4 ranks)"."""
    values = "; ".join(f"{value} ({_sizes_text(sizes)})" for value, sizes in sizes_by_value.items())
    return f"{name}: {values}"


def _sizes_text(sizes: set[int]) -> str:
    """ "1, 2 and 4 ranks"."""
    *most, last = sorted(sizes)
    return f"{', '.join(map(str, most))} and {plural(last, 'rank')}" if most else plural(last, "rank")


# ---------------------------------------------------------------------------------------------- between groups


def scaling_notes(scaling: Scaling, compared: Collection[str] = ()) -> list[str]:
    """What could not be computed, why runs are no repeats, why groups are not compared.

    compared: labels of groups of which another section says what changed.
    """
    groups = scaling.groups
    lone = _lone_notes(groups, compared)
    return [*scaling.not_made, *_not_pooled_notes(groups), *_not_compared_notes(groups), *lone]


def _not_pooled_notes(groups: Sequence[Group]) -> list[str]:
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for group in groups:
        for name, value in group.distinguished_by.items():
            values[name][value] = None
    return [f"Runs that differ in {name} ({' | '.join(seen)}) are not averaged." for name, seen in values.items()]


def _not_compared_notes(groups: Sequence[Group]) -> list[str]:
    """The keys that keep groups apart. Groups that differ in `reduce.*` alone are compared as strategies."""
    works = [work(group.keys) for group in groups]
    recorded = [keys for keys in works if keys["task.kind"] == RECORDED]  # these lack keys that the others have
    notes = []
    for key in differing_keys(works):
        if recorded and not any(key in keys for keys in recorded):
            continue
        values = " | ".join(dict.fromkeys(str(keys.get(key, "unset")) for keys in works))
        notes.append(f"Not compared across groups, {key} differs: {values}.")
    return notes


def _lone_notes(groups: Sequence[Group], compared: Collection[str]) -> list[str]:
    on_equal_work = {group for members in equal_work(groups) for group in members}
    alone = [group for group in groups if group.baseline is None and group not in on_equal_work]
    lone = [run.label for group in alone if group.label not in compared for run in group.runs]
    return [f"No other run here is the same job on another number of ranks: {', '.join(lone)}."] if lone else []


def incomplete_notes(group: Group) -> list[str]:
    runs = [run for run in group.runs if run.incomplete]
    if not runs:
        return []
    reasons = [f"{run.label} ({plural(run.size, 'rank')}): {run.incomplete}" for run in runs]
    return [
        f"{MARK} incomplete: {listed(reasons, _MOST_INCOMPLETE)}. Shown, never a baseline, never pooled with complete"
        " runs."
    ]


def server_notes(group: Group) -> list[str]:
    if not any(row.num_servers for row in group.rows):
        return []
    return ["Ranks are workers + servers, and both count in the efficiency."]


def untimed_notes(group: Group) -> list[str]:
    timed = [row.phase_share for row in group.rows if row.phase_share]
    # Only strategies that send weights have a sync phase.
    expected = [phase for phase in PHASES if phase != "sync"]
    untimed = [phase for phase in expected if any(phase not in share for share in timed)]
    if not untimed:
        return []
    communication = " Exposed communication was not measured." if "reduce" in untimed else ""
    return [f"These runs did not time {', '.join(untimed)}; other phases or 'other' contain that time.{communication}"]

"""Which runs are repeats: alike in everything that their times, losses and energy depend on, except for the seed.

Repeats are pooled in one row. Runs on other software, hardware or settings are no repeats, even of the same job file:
they form a group of their own, whose label says how it differs.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import dict_at, text_at
from hpc_train.core import config
from hpc_train.core.config import flatten

_MOST_COUNTED = 10**15  # a number beyond is damage
Facts = dict[str, str]  # what a run did not record is absent: unknown, and no difference
_NO_MATTER = re.compile(  # variables that name a location or a launch and do not affect the computation
    r"TMPDIR|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|SRUN_.*|.*_(RANK|SIZE|HOSTNAME|ADDR|PORT)"
)
_TARIFF = (
    "energy.pue",
    "energy.co2_g_per_kwh",
    "energy.price_per_kwh",
    "energy.currency",
)  # figures of a centre, not of a run


def facts_of(run: Run) -> Facts:
    """What a step's duration depends on besides the configuration and the number of ranks. Runs of other sizes are
    compared even if these differ; the report then says so.
    """
    meta = run.meta
    git, ranks = dict_at(meta, "git"), meta["ranks"] if isinstance(meta.get("ranks"), list) else []
    threads = {str(_count(rank.get("threads"))) for rank in ranks if isinstance(rank, dict)} - {"None"}
    facts = {
        **{f"version of {name}": text_at(dict_at(meta, "versions"), name) for name in dict_at(meta, "versions")},
        "MPI": (text_at(dict_at(meta, "mpi"), "version") or "").partition("\n")[0],
        "CPU": text_at(meta, "cpu_model"),
        "device": text_at(meta, "device"),
        "threads per rank": "/".join(sorted(threads)),
        "steps": run.config.train.steps,
        "training samples": _count(meta.get("num_samples", meta.get("num_train_samples"))),
        "parameters": _count(meta.get("num_parameters")),
        "hpc-train": text_at(meta, "hpc_train"),
        "git commit": _commit(git),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_COUNTED else None


def _commit(git: dict[str, Any]) -> str | None:
    commit = text_at(git, "commit")
    return f"{commit[:12]}{' with uncommitted changes' if git.get('dirty') else ''}" if commit else None


def _more_facts(run: Run) -> Facts:
    """What repeats must have in common, too. Between sizes it differs by nature (hosts, variables of a launcher), or it
    affects energy and checkpoints only, not a step.
    """
    git, shown = dict_at(run.meta, "git"), run.meta.get("environment")
    settings = flatten(config.as_dict(run.config))
    facts = {
        "hosts": run.summary.num_hosts,
        "kernel": text_at(run.meta, "kernel"),
        "precision": text_at(run.meta, "precision"),
        # Two dirty trees of one commit are the same only if their changes are.
        "uncommitted changes": text_at(git, "changes") if git.get("dirty") else None,
        **{key: settings[key] for key in settings if key.startswith(("checkpoint.", "energy.")) and key not in _TARIFF},
    }
    if isinstance(shown, dict):
        facts |= {f"environment {name}": text_at(shown, name) for name in shown if not _NO_MATTER.fullmatch(name)}
    return {name: str(value) for name, value in facts.items() if value is not None}


def recorded_facts(run: Run) -> Facts:
    """All facts of one run that decide whether another is its repeat."""
    return facts_of(run) | _more_facts(run)


def all_facts(runs: Sequence[Run]) -> list[Facts]:
    """The recorded facts of each run. A variable that a run did not record was unset."""
    facts = [recorded_facts(run) for run in runs]
    variables = {name for each in facts for name in each if name.startswith("environment ")}
    for run, each in zip(runs, facts, strict=True):
        if isinstance(run.meta.get("environment"), dict):
            each |= {name: "not set" for name in variables if name not in each}
    return facts


def assign_series(runs: Sequence[Run]) -> list[int]:
    """The number of each run's series; 0 if no facts differ.

    Runs of one job, one size and one series are repeats. If a job was run on unequal terms at any size, its sizes are
    sorted into series by what they have in common; a job without such a conflict is one series as a whole.
    """
    facts, usual = all_facts(runs), {name for run in runs for name in facts_of(run)}
    jobs: dict[str, dict[tuple[int, bool], list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, run in enumerate(runs):
        jobs[json.dumps(config.comparable(run.config), sort_keys=True)][run.size, run.incomplete is not None].append(
            index
        )
    slots, wholes = [], []  # of jobs with a conflict: the kinds of each size; of the others: all of their runs
    for by_size in jobs.values():
        kinds = [_kinds(facts, members) for _, members in sorted(by_size.items())]
        if any(len(each) > 1 for each in kinds):
            slots += kinds
        else:
            wholes.append([index for (kind,) in kinds for index in kind])
    numbers = [0] * len(runs)
    seen: list[dict[str, set[str]]] = []  # of each series: the values of its facts
    for group in [*slots, *([each] for each in wholes)]:
        for number, kind in _matched(group, facts, usual, seen):
            if number == len(seen):
                seen.append(defaultdict(set))
            for index in kind:
                numbers[index] = number
                for name, value in facts[index].items():
                    seen[number][name].add(value)
    return numbers


def _kinds(facts: Sequence[Facts], members: Sequence[int]) -> list[list[int]]:
    """Groups of members without differences; a run that recorded less joins the largest group that it may belong to."""
    kinds: list[list[int]] = []
    for index in sorted(members, key=lambda index: -len(facts[index])):
        fitting = [kind for kind in kinds if all(not _apart(facts[index], facts[other]) for other in kind)]
        if fitting:
            max(fitting, key=len).append(index)
        else:
            kinds.append([index])
    return kinds


def _apart(one: Facts, other: Facts) -> list[str]:
    """The facts that both recorded and that differ."""
    return [name for name, value in one.items() if other.get(name, value) != value]


def _matched(
    kinds: list[list[int]], facts: Sequence[Facts], usual: set[str], seen: Sequence[dict[str, set[str]]]
) -> list[tuple[int, list[int]]]:
    """Assigns each kind of one size a series of its own: the best match first, new series for the rest."""
    free, left, found = list(range(len(seen))), list(kinds), []
    while left and free:
        places = [(place, number) for place in range(len(left)) for number in free]
        place, number = min(places, key=lambda pair: _misfit(facts[left[pair[0]][0]], usual, seen[pair[1]]))
        free.remove(number)
        found.append((number, left.pop(place)))
    return found + [(len(seen) + place, kind) for place, kind in enumerate(left)]


def _misfit(facts: Facts, usual: set[str], seen: dict[str, set[str]]) -> tuple[int, int]:
    """How many facts differ from a series: of those that all sizes should share, and of all."""
    names = [name for name, value in facts.items() if seen.get(name) and value not in seen[name]]
    return len(usual.intersection(names)), len(names)


def distinguishing_facts(members: Sequence[Sequence[Run]]) -> list[Facts]:
    """For each of several series of one job, the facts in which they differ."""
    flat = iter(all_facts([run for runs in members for run in runs]))
    facts = [[next(flat) for _ in runs] for runs in members]
    names = dict.fromkeys(name for some in facts for each in some for name in each)
    values = [{name: _values(some, name) for name in names} for some in facts]
    differing = [name for name in names if len({each[name] for each in values}) > 1]
    return [{name: each[name] for name in differing} for each in values]


def _values(facts: Sequence[Facts], name: str) -> str:
    return " or ".join(dict.fromkeys(each.get(name, "unknown") for each in facts))


def differing_facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The facts (`facts_of`) that are not the same for all runs, each with its value for every run."""
    facts = [facts_of(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    values = {name: [each.get(name, "unknown") for each in facts] for name in names}
    return {name: seen for name, seen in values.items() if len(set(seen)) > 1}

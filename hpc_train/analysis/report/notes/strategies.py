"""What limits a comparison of strategies: unequal results, unequal terms, missing figures."""

from collections.abc import Iterator, Sequence

from hpc_train.analysis.report.labels import MARK
from hpc_train.analysis.scaling.strategies import (
    LOSS_TOLERANCE,
    Comparison,
    Entry,
    differing_facts_by_strategy,
    entries_by_size,
)
from hpc_train.core.formatting import plural


def comparison_notes(comparison: Comparison) -> list[str]:
    entries = comparison.entries
    return [
        *_loss_notes(entries),
        *_ratio_notes(comparison),
        *_mismatch_notes(entries),
        *_batch_notes(entries),
        *_missing_notes(entries),
    ]


def _loss_notes(entries: Sequence[Entry]) -> list[str]:
    """At which sizes the final losses of equal work agree, and where they differ."""
    notes, agreeing = [], []
    for size, members in entries_by_size(entries).items():
        complete = [entry for entry in members if not entry.row.incomplete and entry.row.loss is not None]
        num_steps = {run.config.train.steps for entry in complete for run in entry.row.runs}
        if len(complete) < 2 or len(num_steps) > 1:
            continue
        reference, *others = complete
        differing = [entry for entry in others if not _is_close(entry, reference)]
        if differing:
            notes.append(_differing_losses(size, reference, differing, len(differing) < len(others)))
        else:
            agreeing.append(size)
    if agreeing:
        *most, last = agreeing
        sizes = f"{', '.join(map(str, most))} and {plural(last, 'rank')}" if most else plural(last, "rank")
        notes.append(f"Final losses agree within {LOSS_TOLERANCE:g} relative at {sizes}.")
    return notes


def _is_close(entry: Entry, reference: Entry) -> bool:
    loss, expected = entry.row.loss or 0.0, reference.row.loss or 0.0
    return abs(loss - expected) <= LOSS_TOLERANCE * abs(expected)  # nan is close to nothing


def _differing_losses(size: int, reference: Entry, differing: Sequence[Entry], others_agree: bool) -> str:
    losses = ", ".join(f"{entry.where} {entry.row.loss:.7g}{_by_design(entry)}" for entry in differing)
    rest = "; the others agree" if others_agree else ""
    return (
        f"{plural(size, 'rank')}: final losses differ by more than {LOSS_TOLERANCE:g} relative from"
        f" {reference.where}'s {reference.row.loss or 0.0:.7g}: {losses}{rest}."
    )


def _by_design(entry: Entry) -> str:
    """Settings that change the result by design, and not only its transport."""
    changing = []
    if entry.keys.get("reduce.asynchronous"):
        changing.append("asynchronous updates")
    if entry.keys.get("reduce.adasum"):
        changing.append("Adasum")
    if entry.keys.get("reduce.compression", "none") != "none":
        changing.append("compressed gradients")
    return f" (as {' and '.join(changing)} may)" if changing else ""


def _ratio_notes(comparison: Comparison) -> Iterator[str]:
    if not any(entry.ratio is not None and not entry.is_reference for entry in comparison.entries):
        reference = comparison.reference
        yield f"No ratio: no number of ranks has steady steps of both a complete {reference} run and another."


def _mismatch_notes(entries: Sequence[Entry]) -> Iterator[str]:
    for name, strategies_by_value in differing_facts_by_strategy(entries).items():
        values = "; ".join(f"{value} ({', '.join(names)})" for value, names in strategies_by_value.items())
        yield f"Configuration mismatch: {name}: {values}."


def _batch_notes(entries: Sequence[Entry]) -> Iterator[str]:
    for size, members in entries_by_size(entries).items():
        batches = {entry.where: entry.row.global_batch for entry in members}
        if len(set(batches.values())) > 1:
            listed = ", ".join(f"{where} {batch}" for where, batch in batches.items())
            yield f"{plural(size, 'rank')}: global batches differ ({listed}): compare samples/s, not step times."


def _missing_notes(entries: Sequence[Entry]) -> Iterator[str]:
    without_traffic = dict.fromkeys(entry.where for entry in entries if entry.traffic is None)
    if without_traffic:
        yield f"Communication volume missing for {', '.join(without_traffic)}: meta.json states no num_parameters."
    without_state = dict.fromkeys(entry.where for entry in entries if entry.optimizer_bytes is None)
    if without_state:
        yield f"Optimizer state missing for {', '.join(without_state)}: meta.json states no optimizer_bytes."


def theory_notes(comparison: Comparison) -> list[str]:
    notes = [
        "Theory: each of N ranks of a ring sends 2(N-1)/N of the gradients' bytes and receives as many; the sharded"
        " strategy's reduce-scatter and all-gather are the two halves of a ring all-reduce, and stage 3 gathers twice."
        " With reduce.shard_within, both stay within a copy, and parts are summed between copies. For MPI this is a"
        " lower bound: its library chooses the algorithm."
    ]
    if any(entry.row.num_servers for entry in comparison.entries):
        notes += [
            "Theory: each of S servers receives and sends 2W/S of the gradients' bytes for W workers, both directions"
            " together. Halve it to compare with a ring, which is given per direction.",
            "A parameter server's ranks are workers + servers; exposed is the workers' share.",
        ]
    if any(entry.row.incomplete for entry in comparison.entries):
        notes.append(f"{MARK} incomplete: shown, never the reference.")
    return notes

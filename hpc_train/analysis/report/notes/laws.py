"""A fitted law in words, or why none is drawn."""

from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import Law, fitted, law_name
from hpc_train.core.formatting import percent, plural


def law_text(group: Group) -> str:
    """A sentence for below the figure. "" without a baseline."""
    if group.baseline is None:
        return ""
    law = fitted(group)
    return f"{_described(law)}." if law else f"{law_name(group.weak)}'s law is not drawn: {_why_none(group)}."


def _described(law: Law) -> str:
    fit = f"fitted to {law.num_sizes} sizes, which it misses by {_up_to(law.worst)}"
    if law.num_sizes == 2:
        fit = "drawn through both measurements, so nothing checks it"
    return f"{law.name}'s law with a serial part of {percent(law.serial)} of the baseline's time, {fit}"


def _up_to(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"up to {percent(share, 0)}"


def _why_none(group: Group) -> str:
    assert group.baseline is not None
    largest = group.largest
    if largest is None:
        return "only one size is complete"
    if (largest.speedup or 0) < 1:
        return f"it describes no speedup below 1 over {plural(group.baseline.size, 'rank')}"
    return "these speedups show no serial part"

"""Whether an order that mixes samples within windows alone would show a model one class after the other."""

import numpy as np

from hpc_train.core.formatting import plural
from hpc_train.core.sampling import Order, rank_span
from hpc_train.train.comm.context import Context
from hpc_train.train.data.reader_interface import Reader

_SCAN_ROWS = 1 << 20
_SORTED = 2.0  # times as long as in a random order are the runs of equal labels
_PIECES_PER_CLASS = 4  # in a window: with fewer, the share of a class varies by half of itself and more


def poor_mixing(labels: Reader, name: str, order: Order, num_classes: int, context: Context) -> str:
    """Collective. What is wrong with the order of labels `name`; "" if each window holds all classes.

    labels: class numbers. Chunks come in random order, so a window holds P pieces: runs of equal labels, cut at the
    edges of chunks. The share of a class in it varies by sqrt(num_classes / P) of that share.
    """
    edges = order.chunk_edges
    if edges is None or num_classes < 2 or order.window >= len(edges) - 1:
        return ""
    num_changes, num_inside, counts = _changes_and_counts(labels, edges, num_classes, context)
    num_samples = len(labels)
    run_length = num_samples / (num_changes + 1)
    num_pieces = order.num_window_samples * (len(edges) - 1 + num_inside) / num_samples
    same_if_random = float(((counts / num_samples) ** 2).sum())  # chance that the next label is the same
    is_sorted = run_length * (1 - same_if_random) > _SORTED
    if not is_sorted or num_pieces >= _PIECES_PER_CLASS * num_classes:
        return ""
    return (
        f"{name} is sorted: {plural(round(run_length), 'equal label')} follow each other on average, and samples are "
        f"mixed within {order.num_window_samples:,} neighbours, so that batches lack classes"
    )


def _changes_and_counts(
    labels: Reader, edges: np.ndarray, num_classes: int, context: Context
) -> tuple[int, int, np.ndarray]:
    """Collective. How often a label differs from the one before it, how often so within a chunk, samples by class."""
    start, stop = rank_span(len(labels), context.world.rank, context.world.size)
    num_changes, num_inside, counts = 0, 0, np.zeros(num_classes, np.int64)
    for begin in range(start, stop, _SCAN_ROWS):
        before = max(0, begin - 1)
        part = labels[before : min(begin + _SCAN_ROWS, stop)]
        changes = before + 1 + np.flatnonzero(np.diff(part))
        num_changes += len(changes)
        num_inside += int(np.count_nonzero(~np.isin(changes, edges)))
        counts += np.bincount(part[begin - before :], minlength=num_classes)
    total = context.sum(np.concatenate([counts, [num_changes, num_inside]]))
    return int(total[-2]), int(total[-1]), total[:-2]

"""One pass of a trained model over the rows of a file, on all ranks, in rounds."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from time import perf_counter, perf_counter_ns

import numpy as np
import torch
from torch import nn

from hpc_train.core.progress import StepProgress
from hpc_train.core.signals import StopRequest
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.watchdog import Watchdog
from hpc_train.train.data.dataset import Batch
from hpc_train.train.data.device_queue import moved
from hpc_train.train.inference.blocks import Blocks, in_order
from hpc_train.train.inference.outputs import Meaning, Predictions
from hpc_train.train.inference.samples import Samples
from hpc_train.train.inference.trained import Place
from hpc_train.train.metrics import Sums, finished, total

_ROUND_S = 0.5  # that a round should take: ranks wait for each other after each
_MOST_STRIPES = 1 << 10  # of a rank in a round


@dataclass(frozen=True)
class Tally:
    """What came of the rows before `row`. sums: of each measure over `num_measured` rows, see `metrics`."""

    row: int
    num_without: int = 0  # predictions, since values are missing
    num_measured: int = 0
    num_targets_missing: int = 0  # values, in rows that have a prediction
    sums: Sums = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, float]:
        """Means over the rows that were measured; {} if none were."""
        return finished(self.sums, self.num_measured)


@dataclass(frozen=True)
class Done:
    """A block of rows. `tally.row` is one after its last."""

    begin: int
    predictions: Predictions
    tally: Tally


@dataclass(frozen=True)
class Pass:
    """The model, and the rows that it goes over."""

    model: nn.Module
    samples: Samples
    meaning: Meaning
    blocks: Blocks
    place: Place

    def block(self, rows_and_batch: tuple[range, Batch]) -> Done:
        """Any thread may call it."""
        rows, batch = rows_and_batch
        has_inputs = self.samples.has_inputs(batch)
        is_measured = has_inputs & self.samples.has_targets(batch)
        with torch.no_grad(), self.place.autocast():
            outputs = self.model(moved(batch, self.place.device).floats()).float()  # of bf16, sums lose digits
        sums: Sums = {}
        if is_measured.any():
            mask = torch.from_numpy(is_measured)
            sums = self.meaning.measures(outputs[mask.to(outputs.device)], batch.targets[mask].to(outputs.device))
        predictions = self.meaning.predictions(outputs, has_inputs)
        num_without, num_measured = int((~has_inputs).sum()), int(is_measured.sum())
        num_missing = int(self.samples.num_targets_missing(batch)[has_inputs].sum())
        return Done(rows.start, predictions, Tally(rows.stop, num_without, num_measured, num_missing, sums))

    def read(self, stripes: range) -> Iterator[tuple[range, Batch]]:
        """The rows of this rank's stripes, block by block."""
        for number, following in zip(stripes, [*stripes[1:], None], strict=True):
            if following is not None:
                self.samples.split.prefetch(np.asarray(self.blocks.stripe(following)))
            for rows in self.blocks.blocks(number):
                yield rows, self.samples.split.batch(np.asarray(rows))


Keep = Callable[[list[Done], Tally, bool], None]
"""Collective. (this rank's blocks of a round, what came of all rows so far, whether it is the last round)."""


def go_over(
    work: Pass, tally: Tally, keep: Keep, context: Context, stop: StopRequest, watchdog: Watchdog, shown: StepProgress
) -> tuple[Tally, bool]:
    """Collective. Goes on after the rows of `tally`; returns what came of all rows, and whether it was stopped.

    Sums are added block by block, in the order of rows: they are the same to the bit on any number of ranks.
    """
    world, blocks = context.world, work.blocks
    left = blocks.stripes_from(tally.row)
    mine = iter(left[world.rank :: world.size])
    num_ahead, num_stripes, number = 2 * work.place.num_at_once, 1, 0
    one_thread = partial(torch.set_num_threads, 1) if work.place.device.type == "cpu" else None
    with ThreadPoolExecutor(work.place.num_at_once, "predict", one_thread) as pool:
        results = in_order(pool, work.read(left[world.rank :: world.size]), work.block, num_ahead)
        while left:
            watchdog.step, number = number, number + 1
            began_s = perf_counter()
            stripes = islice(mine, num_stripes)
            done = [block for stripe in stripes for block in islice(results, len(blocks.blocks(stripe)))]
            left = left[num_stripes * world.size :]
            told = (bool(stop), perf_counter() - began_s, [(block.begin, block.tally) for block in done])
            everyone = context.all_gather(told)
            row = blocks.stripe(left[0]).start if left else blocks.rows.stop
            of_blocks = sorted((each for _, _, theirs in everyone for each in theirs), key=lambda each: each[0])
            num_before = tally.row
            tally = _added(tally, [block for _, block in of_blocks], row)
            stopped = any(asks for asks, _, _ in everyone) and bool(left)
            keep(done, tally, stopped or not left)
            shown.advance(row - blocks.rows.start, row - num_before, perf_counter_ns())
            if stopped:
                watchdog.step = None
                return tally, True
            slowest_s = max(seconds for _, seconds, _ in everyone)
            num_stripes = min(_MOST_STRIPES, 2 * num_stripes) if slowest_s < _ROUND_S / 2 else num_stripes
            num_stripes = max(1, num_stripes // 2) if slowest_s > 2 * _ROUND_S else num_stripes
    watchdog.step = None
    return tally, False


def _added(tally: Tally, blocks: list[Tally], row: int) -> Tally:
    sums = total(each.sums for each in (tally, *blocks))
    return Tally(
        row,
        tally.num_without + sum(block.num_without for block in blocks),
        tally.num_measured + sum(block.num_measured for block in blocks),
        tally.num_targets_missing + sum(block.num_targets_missing for block in blocks),
        sums,
    )

"""When numbers go wrong: a loss, a gradient or a test that is not finite, weights that differ between ranks."""

import math
import zlib
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context

MAX_SKIPPED_IN_A_ROW = 32  # updates in a row, then the run ends: see train.on_nonfinite in configs/README.md
_REMEDY = "Lower train.lr or look at the data of that step; --set train.on_nonfinite=skip leaves it out."
_STANDS_STILL = "Lower train.lr, look at the data, or use more bits: train.precision, reduce.compression."


class SkippedUpdate(NamedTuple):
    """An update that was not made."""

    step: int
    loss: torch.Tensor  # this rank's share
    total: float  # the loss of all ranks
    overflowed: bool  # the loss is a number, and a gradient of it is not finite
    num_in_a_row: int  # updates left out, this one included

    @property
    def why(self) -> str:
        if self.overflowed:
            return f"a gradient is not finite (the loss is {self.total:.5f})"
        return f"the loss is {self.total}"


def raise_on_this_rank(left_out: SkippedUpdate, context: Context) -> None:
    """Raises UserError on the rank that met it, which ends the job; nothing elsewhere."""
    place = f"on rank {context.world.rank} on {context.world.host}"
    if left_out.overflowed:
        raise UserError(f"step {left_out.step}: {left_out.why}, {place}", _REMEDY)
    if not math.isfinite(loss := left_out.loss.item()):
        raise UserError(f"the loss of step {left_out.step} is {loss} {place}", _REMEDY)


def raise_for_update(left_out: SkippedUpdate, saved: str, context: Context) -> None:
    """Collective. Raises UserError that names what is wrong, and the rank whose share of the loss is no number."""
    step, total, mine, world = left_out.step, left_out.total, left_out.loss.item(), context.world
    remedy = f"{saved} {_REMEDY}"

    def look() -> None:
        if not math.isfinite(mine):
            raise UserError(f"the loss of step {step} is {mine} on rank {world.rank} on {world.host}", remedy)

    if left_out.num_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        what = f"{left_out.num_in_a_row} updates in a row were left out; in the last, at step {step}, {left_out.why}"
        _refuse(what, f"{saved} {_STANDS_STILL}", context)
    if left_out.overflowed:
        _refuse(f"step {step}: {left_out.why}", remedy, context)
    context.on_all(look)
    _refuse(f"the loss of step {step} is {total}, though each rank's share is a number", remedy, context)


def raise_for_run_without_updates(num_steps: int, context: Context) -> NoReturn:
    """Collective. Raises UserError: no step of the run changed the weights."""
    what = f"none of the run's {num_steps} updates was made: in each step the loss or a gradient was not finite"
    more = "With train.precision = 'fp16' each such step halves the loss scale: more steps may be enough."
    _refuse(what, f"{_STANDS_STILL} {more}", context)


def test_fault(test: dict[str, float]) -> str | None:
    """In words, which measures of the test are no numbers; None where all are."""
    wrong = {name.replace("_", " "): value for name, value in test.items() if not math.isfinite(value)}
    return " and ".join(f"the test {name} is {value}" for name, value in wrong.items()) or None


def raise_for_test(fault: str, saved: str, context: Context) -> NoReturn:
    """Collective. Raises UserError: the run reached its last step, and its test says nothing of the model."""
    remedy = (
        "Compare the test data with the training data (hpc-train data check FILE; their attributes, such as "
        "scale_factor, too), or lower train.lr."
    )
    _refuse(f"{fault} after the run's last step", f"{saved} {remedy}", context)


def _refuse(what: str, remedy: str, context: Context) -> NoReturn:
    """Collective. One message for all ranks."""

    def refuse() -> None:
        raise UserError(what, remedy)

    context.on_root(refuse)
    raise AssertionError


def check_weights_agree(step: int, model: nn.Module, context: Context) -> None:
    """Collective. Raises UserError naming the ranks whose weights are not those of the most ranks, bit by bit.

    With two ranks nobody can tell which is right: then rank 1 is named, as differing from rank 0.
    """
    mine = 0
    for tensor in model.parameters():
        mine = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, mine)
    sums = context.all_gather(mine)
    values, counts = np.unique(sums, return_counts=True)
    if len(values) == 1:
        return
    most = values[counts == counts.max()]
    right = sums[0] if sums[0] in most else most[0]
    places = context.all_gather(context.world.host)
    wrong = [f"rank {rank} on {places[rank]}" for rank, value in enumerate(sums) if value != right]

    def refuse() -> None:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(
            f"the weights after {step} steps differ between ranks: {shown} differ{'s' * (len(wrong) == 1)} from rank "
            f"{sums.index(right)} and {len(sums) - len(wrong) - 1} more",
            "Its memory or its network may be broken: leave that node out (sbatch --exclude) and continue from a "
            "checkpoint before it. A task that draws other numbers on each rank does this, too.",
        )

    context.on_root(refuse)

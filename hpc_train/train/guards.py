"""When numbers go wrong: a loss that is none, weights that differ between ranks."""

import math
import zlib

import numpy as np
import torch
from torch import nn

from hpc_train.errors import UserError
from hpc_train.train.context import Context

_REMEDY = "Lower train.lr or look at the data of that step; --set train.on_nonfinite=skip leaves it out."


def refuse_loss_alone(step: int, loss: torch.Tensor, context: Context) -> None:
    """Raises UserError on the rank that met it, which ends the job; nothing elsewhere."""
    if not math.isfinite(loss.item()):
        world = context.world
        raise UserError(f"the loss of step {step} is {loss.item()} on rank {world.rank} on {world.host}", _REMEDY)


def refuse_loss(step: int, loss: torch.Tensor, total: float, saved: str, context: Context) -> None:
    """Collective. Raises UserError that names the rank whose share of the loss is no number; `total` is none."""
    mine, world = loss.item(), context.world
    remedy = f"{saved} {_REMEDY}"

    def look() -> None:
        if not math.isfinite(mine):
            raise UserError(f"the loss of step {step} is {mine} on rank {world.rank} on {world.host}", remedy)

    def add_up() -> None:
        raise UserError(f"the loss of step {step} is {total}, though each rank's share is a number", remedy)

    context.on_all(look)
    context.on_root(add_up)


def compare_weights(step: int, model: nn.Module, context: Context) -> None:
    """Collective. Raises UserError naming the ranks whose weights are not those of the most ranks, bit by bit.

    With two ranks nobody can tell which is right: then rank 1 is named, as differing from rank 0.
    """
    mine = 0
    for tensor in model.parameters():
        mine = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, mine)
    sums = context.all(mine)
    values, counts = np.unique(sums, return_counts=True)
    if len(values) == 1:
        return
    most = values[counts == counts.max()]
    right = sums[0] if sums[0] in most else most[0]
    places = context.all(context.world.host)
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

"""When numbers go wrong: a loss, gradient or test result that is not finite, or weights that differ between ranks."""

import math
import zlib
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import torch

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context

MAX_SKIPPED_IN_A_ROW = 32  # updates; then the run ends: see train.on_nonfinite in configs/README.md
_REMEDY = "Lower train.lr or look at the data of that step; --set train.on_nonfinite=skip skips its update."
_NO_PROGRESS_REMEDY = "Lower train.lr, look at the data, or use more bits: train.precision, reduce.compression."


class SkippedUpdate(NamedTuple):
    """An update that was not made."""

    step: int
    own_loss: torch.Tensor  # this rank's share
    global_loss: float
    overflowed: bool  # the loss is finite, but one of its gradients is not
    num_in_a_row: int  # skipped updates, this one included

    @property
    def why(self) -> str:
        if self.overflowed:
            return f"a gradient is not finite (the loss is {self.global_loss:.5f})"
        return f"the loss is {self.global_loss}"


def raise_on_this_rank(skipped: SkippedUpdate, context: Context) -> None:
    """Raises UserError on the rank whose own numbers are at fault, which ends the job; does nothing elsewhere."""
    place = f"on rank {context.world.rank} on {context.world.host}"
    if skipped.overflowed:
        raise UserError(f"step {skipped.step}: {skipped.why}, {place}", _REMEDY)
    if not math.isfinite(loss := skipped.own_loss.item()):
        raise UserError(f"the loss of step {skipped.step} is {loss} {place}", _REMEDY)


def raise_for_update(skipped: SkippedUpdate, saved: str, context: Context) -> None:
    """Collective. Raises UserError that names the cause, and the rank whose share of the loss is not finite."""
    step, own_loss, world = skipped.step, skipped.own_loss.item(), context.world
    remedy = f"{saved} {_REMEDY}"

    def check_own_loss() -> None:
        if not math.isfinite(own_loss):
            raise UserError(f"the loss of step {step} is {own_loss} on rank {world.rank} on {world.host}", remedy)

    if skipped.num_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        what = f"{skipped.num_in_a_row} updates in a row were skipped; in the last, at step {step}, {skipped.why}"
        _raise_together(what, f"{saved} {_NO_PROGRESS_REMEDY}", context)
    if skipped.overflowed:
        _raise_together(f"step {step}: {skipped.why}", remedy, context)
    context.on_all(check_own_loss)
    _raise_together(
        f"the loss of step {step} is {skipped.global_loss}, though each rank's share is finite", remedy, context
    )


def raise_for_run_without_updates(num_steps: int, context: Context) -> NoReturn:
    """Collective. Raises UserError: no step of the run changed the weights."""
    what = f"none of the run's {num_steps} updates was made: in each step the loss or a gradient was not finite"
    more = "With train.precision = 'fp16' each such step halves the loss scale: more steps may be enough."
    _raise_together(what, f"{_NO_PROGRESS_REMEDY} {more}", context)


def fault_in_test(test: dict[str, float]) -> str | None:
    """Which test results are not finite, in words; None if all are finite."""
    wrong = {name.replace("_", " "): value for name, value in test.items() if not math.isfinite(value)}
    return " and ".join(f"the test {name} is {value}" for name, value in wrong.items()) or None


def raise_for_test(fault: str, saved: str, context: Context) -> NoReturn:
    """Collective. Raises UserError: the run reached its last step, but its test result is not finite."""
    remedy = (
        "Compare the test data with the training data (hpc-train data check FILE; their attributes, such as "
        "scale_factor, too), or lower train.lr."
    )
    _raise_together(f"{fault} after the run's last step", f"{saved} {remedy}", context)


def _raise_together(what: str, remedy: str, context: Context) -> NoReturn:
    """Collective. One message for all ranks."""

    def raise_error() -> None:
        raise UserError(what, remedy)

    context.on_root(raise_error)
    raise AssertionError("unreachable")


def check_weights_agree(step: int, weights: Iterable[torch.Tensor], context: Context, part: int = 0) -> None:
    """Collective. Raises UserError naming the ranks whose weights differ in any bit from those of the majority.

    With two ranks there is no majority: then rank 1 is named, as differing from rank 0.
    part: which part of all weights these are; those of ranks with equal numbers are compared.
    """
    everyone = context.all_gather((part, _checksum(weights)))
    by_part: dict[int, dict[int, int]] = {}  # part -> rank -> checksum
    for rank, (each, checksum) in enumerate(everyone):
        by_part.setdefault(each, {})[rank] = checksum
    for checksums in by_part.values():
        if len(set(checksums.values())) > 1:
            _raise_for_weights(step, checksums, context)


def _raise_for_weights(step: int, checksums: dict[int, int], context: Context) -> NoReturn:
    """Collective. checksums: by rank, of weights that should be equal."""
    values = list(checksums.values())
    expected = max(values, key=values.count)  # of several, that of the lowest rank
    hosts = context.all_gather(context.world.host)
    wrong = [f"rank {rank} on {hosts[rank]}" for rank, value in checksums.items() if value != expected]
    right = [rank for rank, value in checksums.items() if value == expected]
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    _raise_together(
        f"the weights after {step} steps differ between ranks: {shown} differ{'s' * (len(wrong) == 1)} from rank "
        f"{right[0]} and {len(right) - 1} more",
        "Its memory or its network may be broken: exclude that node (sbatch --exclude) and continue from a "
        "checkpoint before it. A task that draws different numbers on each rank has the same effect.",
        context,
    )


def _checksum(weights: Iterable[torch.Tensor]) -> int:
    checksum = 0
    for tensor in weights:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
        checksum = zlib.crc32(data, checksum)
    return checksum

"""One step of training on N ranks: computation, collectives that overlap with it, and who waits for whom."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from hpc_train.analysis.simulation.collectives import Algorithm, all_gather, all_reduce, reduce_scatter
from hpc_train.analysis.simulation.machine import Machine
from hpc_train.core.records import FloatArray

Stage = Literal[0, 1, 2, 3]  # reduce.stage of the strategy sharded; 0: an all-reduce, nothing is divided
Collective = Literal["all-reduce", "reduce-scatter", "all-gather"]
_MOST_MESSAGES = 8  # simulated one by one: of more, neighbours are sent together


@dataclass(frozen=True)
class Job:
    """What a rank does in a step, in seconds, and how its gradients travel.

    num_messages: the gradients leave in so many equal messages, one each time that a part of backward is done; at stage
    3 they are the blocks of the weights. weight_bytes: of all weights, as they are gathered. overlap: the share of its
    full rate at which a collective proceeds while its rank computes. own_s: optimizer and the rest of the loop.
    """

    input_s: float
    forward_s: float
    backward_s: float
    own_s: float
    gradient_bytes: float
    weight_bytes: float
    num_messages: int
    algorithm: Algorithm
    stage: Stage = 0
    overlap: float = 1.0


@dataclass(frozen=True, eq=False)
class Waits:
    """(runs, N) seconds of a step in which a rank waits: for the last rank to come so far, and longer than that."""

    imbalance_s: FloatArray
    transfer_s: FloatArray


def simulate_step(job: Job, machine: Machine, began: FloatArray, factors: FloatArray) -> tuple[FloatArray, Waits]:
    """When each rank ends a step that it begins at `began`, and its waits. factors: of its computation; all (runs, N).

    Each rank computes `factors` times as long as the job says.
    """
    ranks = _Ranks(job, machine, began, factors)
    ranks.now = ranks.now + job.input_s
    if job.stage == 3:
        _with_gathered_weights(job, ranks)
    else:
        _with_whole_weights(job, ranks)
    return ranks.now, Waits(ranks.imbalance_s, ranks.transfer_s)


def _with_whole_weights(job: Job, ranks: "_Ranks") -> None:
    """Messages leave while backward computes; divided weights come back once the optimizer has updated them."""
    count, together = _grouped(job.num_messages)
    size, part_s = job.gradient_bytes / job.num_messages, job.backward_s / count
    ranks.compute(job.forward_s)
    sent = []
    for number in range(count):
        ranks.compute(part_s)
        kind: Collective = "reduce-scatter" if job.stage else "all-reduce"
        sent.append(ranks.begin(kind, size, together, computing_s=(count - 1 - number) * part_s))
    ranks.wait(sent[-1])
    ranks.compute(job.own_s)
    if job.stage:
        ranks.wait(ranks.begin("all-gather", job.weight_bytes / job.num_messages, job.num_messages, computing_s=0.0))


def _with_gathered_weights(job: Job, ranks: "_Ranks") -> None:
    """Each block's weights are gathered before its forward and its backward pass, always one block ahead."""
    count, together = _grouped(job.num_messages)
    forward_s, backward_s = job.forward_s / count, job.backward_s / count
    gradients, weights = job.gradient_bytes / job.num_messages, job.weight_bytes / job.num_messages
    gathered = ranks.begin("all-gather", weights, together, computing_s=0.0)
    for block in range(count):
        ranks.wait(gathered)
        if block < count - 1:
            gathered = ranks.begin("all-gather", weights, together, computing_s=forward_s)
        ranks.compute(forward_s)
    # The last block's weights are still there when its backward pass begins.
    sent = gathered
    for block in reversed(range(count)):
        ranks.wait(gathered)
        if block > 0:
            gathered = ranks.begin("all-gather", weights, together, computing_s=backward_s)
        ranks.compute(backward_s)
        sent = ranks.begin("reduce-scatter", gradients, together, computing_s=block * backward_s)
    ranks.wait(sent)
    ranks.compute(job.own_s)


def _grouped(num_messages: int) -> tuple[int, int]:
    """(groups that are simulated, messages in each)"""
    count = min(num_messages, _MOST_MESSAGES)
    return count, -(-num_messages // count)


class _Ranks:
    """The clocks of all ranks: `now`, and when the collectives that they have begun are over, (runs, N)."""

    def __init__(self, job: Job, machine: Machine, began: FloatArray, factors: FloatArray) -> None:
        self._job, self._machine, self._factors = job, machine, factors
        self.now = self._free = began
        self.imbalance_s = self.transfer_s = np.zeros_like(began)

    def compute(self, seconds: float) -> None:
        self.now = self.now + seconds * self._factors

    def begin(self, kind: Collective, num_bytes: float, repeats: int, computing_s: float) -> FloatArray:
        """Begins equal collectives, after those before them, and goes on to compute; returns when they are over."""
        entered = np.maximum(self.now, self._free)
        took_s = _in_step_s(kind, self._job.algorithm, entered.shape[-1], num_bytes, self._machine)
        over = _FUNCTIONS[kind](self._job.algorithm, entered, num_bytes, self._machine)
        over = over + (repeats - 1) * took_s  # after the first one the ranks are in step
        if self._job.overlap < 1:
            over = self._slowed(over, repeats * took_s, self.now + computing_s * self._factors)
        self._free = over
        return over

    def _slowed(self, over: FloatArray, took_s: float, until: FloatArray) -> FloatArray:
        """Over later if the rank computes meanwhile: the rate is `overlap` until then."""
        hidden_s = np.clip(until - (over - took_s), 0.0, took_s / max(self._job.overlap, 1e-6))
        return over + (1 - self._job.overlap) * hidden_s

    def wait(self, until: FloatArray) -> None:
        waited_s = np.maximum(until - self.now, 0.0)
        imbalance_s = np.minimum(waited_s, self.now.max(-1, keepdims=True) - self.now)
        self.imbalance_s = self.imbalance_s + imbalance_s
        self.transfer_s = self.transfer_s + waited_s - imbalance_s
        self.now = self.now + waited_s


_FUNCTIONS = {"all-reduce": all_reduce, "reduce-scatter": reduce_scatter, "all-gather": all_gather}


@lru_cache(maxsize=256)
def _in_step_s(kind: Collective, algorithm: Algorithm, ranks: int, num_bytes: float, machine: Machine) -> float:
    """Of one collective that all ranks enter together."""
    return float(_FUNCTIONS[kind](algorithm, np.zeros((1, ranks)), num_bytes, machine).max())

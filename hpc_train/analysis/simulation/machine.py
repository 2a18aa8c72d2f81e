"""The machine of a simulation: nodes of several ranks, and what a message costs within a node and between two."""

from dataclasses import dataclass

import numpy as np

from hpc_train.core.records import FloatArray, IntArray


@dataclass(frozen=True)
class Link:
    """A message of S bytes takes latency_s + S s_per_byte (Hockney, "The communication challenge for MPP: Intel
    Paragon and Meiko CS-2", Parallel Computing 20(3), 1994).
    """

    latency_s: float
    s_per_byte: float

    def seconds(self, num_bytes: float, num_sharing: float | FloatArray = 1.0) -> FloatArray:
        """num_sharing: messages that divide its bandwidth."""
        return np.asarray(self.latency_s + num_bytes * self.s_per_byte * num_sharing)


@dataclass(frozen=True)
class Machine:
    """Ranks fill nodes one after the other, each with one link to the network, which all its ranks share.

    The network between nodes has no limit of its own. overhead_s: of each collective, whatever the ranks and bytes.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    overhead_s: float = 0.0

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.ranks_per_node)

    def message_s(self, senders: IntArray, receivers: IntArray, num_bytes: float) -> FloatArray:
        """(n,) seconds of messages that are sent at once, one from each sender.

        A message between nodes shares the links at both ends, and is no faster than one inside.
        """
        source, target = senders // self.ranks_per_node, receivers // self.ranks_per_node
        crosses = source != target
        within_s = self.inside.seconds(num_bytes)
        if not crosses.any():
            return np.full(len(senders), float(within_s))
        num_nodes = int(max(source.max(), target.max())) + 1
        leaving, arriving = (np.bincount(each[crosses], minlength=num_nodes) for each in (source, target))
        sharing = np.maximum(leaving[source], arriving[target]).astype(float)
        return np.where(crosses, np.maximum(self.between.seconds(num_bytes, sharing), within_s), within_s)

"""Every strategy sums right and is timed on every team of ranks, whatever the number of ranks."""

from collections.abc import Iterator

import pytest
import torch

from hpc_train.bench import allreduce
from hpc_train.core.allreduce_times import COMPRESSED, LIMITS, OURS, PEERS, Row, fits, rank_groups
from hpc_train.core.errors import UserError
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.data import node_memory
from hpc_train.train.reduce.transports import MpiTransport

SIZES = (4, 4096, 3 << 20)  # in a bucket with the notes, alone and in pieces


@pytest.fixture(scope="module")
def rows(context: Context) -> Iterator[list[Row]]:
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    asked: list[int] = []

    def go_on(place: int) -> bool:
        asked.append(place)
        return place < 3

    yield allreduce.measure((*SIZES, 1 << 40), (*OURS, *COMPRESSED, *PEERS), 2, context, go_on)
    assert asked == ([0, 1, 2, 3] if context.world.is_root else []), "the root is asked before each size"


def test_all_strategies_and_limits_are_measured_in_all_places(context: Context, rows: list[Row]) -> None:
    hosts = context.all_gather(context.world.host)
    counts = [len(team) for team in rank_groups(hosts) if context.world.rank in team]
    found = {(row.strategy, row.ranks, row.message_bytes) for row in rows}
    names = {*OURS, *COMPRESSED, *PEERS, "memory", "convert"}
    assert found == {(name, n, size) for name in names for n in counts for size in SIZES} | {
        ("link", 2, size) for size in SIZES if 2 in counts
    }
    assert all(len(row.samples_s) == 2 and min(row.samples_s) > 0 and row.nodes == 1 for row in rows)
    if context.world.is_root:
        assert max(counts) == context.world.size and {each.strategy for each in fits(rows)} == {
            *OURS,
            *COMPRESSED,
            *PEERS,
        }
        assert not {each.strategy for each in fits(rows)} & set(LIMITS)


def test_the_ranks_of_a_row_agree(context: Context, rows: list[Row]) -> None:
    for team in rank_groups(context.all_gather(context.world.host)):
        found = context.all_gather([row.samples_s for row in rows if row.ranks == len(team)])
        assert found[0] and all(found[rank] == found[0] for rank in team)


def test_a_wrong_sum_is_found(context: Context) -> None:
    message = torch.zeros(1 << 19)
    team = allreduce.RankGroup(context, 1, context.world.size, context, None)
    off_by_one = message.numel() - 1

    def wrong(update: bool) -> None:
        messages.all_reduce_in_place(context.comm, message.numpy())
        message[off_by_one] += 1

    way = allreduce.Method(wrong, lambda: message, context.world.size)
    with pytest.raises(UserError, match=f"{message.nbytes} bytes summed over {context.world.size} ranks are not"):
        allreduce._check("mpi", way, team, message)


@pytest.mark.parametrize("length", [1, 3 << 18, (3 << 18) + 1])
def test_mpi_sums_in_pieces_what_one_message_would(context: Context, length: int) -> None:
    """Long and short sums, the last one blocking, exchanges in between: all in one order on all ranks."""
    transport, size = MpiTransport(context), context.world.size
    messages = [torch.arange(length, dtype=torch.float32) + context.world.rank for _ in range(3)]
    sent = torch.full((size,), context.world.rank, dtype=torch.uint8)
    pending = [transport.sum(messages[0], "0"), transport.all_to_all(sent, "x"), transport.sum(messages[1], "1")]
    pending.append(transport.all_gather(sent[:1], "y"))
    pending.append(transport.sum(messages[2], "2", is_last=True))
    summed = torch.arange(length, dtype=torch.float32) * size + size * (size - 1) / 2
    ranks = torch.arange(size, dtype=torch.uint8)
    for each, expected in zip(pending, (summed, ranks, summed, ranks, summed), strict=True):
        assert torch.equal(each.wait(), expected)


def test_memory_is_that_of_the_fullest_node(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_memory, "available_bytes", lambda: (1 + context.world.rank) << 30)
    assert node_memory.available_bytes_per_rank(context) == (1 << 30) // context.world.local_size
    monkeypatch.undo()
    assert 0 < node_memory.available_bytes() < 1 << 50

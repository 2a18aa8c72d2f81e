"""Messages that are longer than MPI can count go in pieces, and what arrives is what was sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi
from hpc_train.train.reduce.horovod_library import load_horovod
from hpc_train.train.reduce.torch_distributed import TorchTransport, open_torch_distributed
from hpc_train.train.reduce.transports import HorovodTransport, MpiTransport, SplittingTransport, Transport
from tests import checkpoints
from tests.parallel.test_train import losses, run

ABOVE_BYTES = (1 << 31) + (1 << 20)  # more than 32 bits with a sign count


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_BYTES", 64)


def mine(context: Context, num: int, dtype: type = np.float64) -> np.ndarray:
    return (np.arange(num) * 10 + context.world.rank).astype(dtype)


@pytest.mark.parametrize("num", [0, 1, 8, 9, 100])
def test_sums_and_broadcasts(context: Context, short: None, num: int) -> None:
    size = context.world.size
    expected = np.arange(num) * 10.0 * size + sum(range(size))
    assert np.array_equal(context.sum(mine(context, num)), expected)
    assert np.array_equal(context.sum(mine(context, num).reshape(1, num)), expected[None])
    of_root = mine(context, num, np.uint8)
    context.broadcast_array(of_root)
    assert np.array_equal(of_root, (np.arange(num) * 10).astype(np.uint8))
    of_last = mine(context, num)
    context.broadcast_array(of_last, size - 1)
    assert np.array_equal(of_last, np.arange(num) * 10.0 + size - 1)


def test_arrays_of_different_lengths_are_gathered_in_rank_order(context: Context) -> None:
    size, rank = context.world.size, context.world.rank
    counts = [3 * (each != 1) + each for each in range(size)]
    request, received = context.begin_gather(mine(context, counts[rank], np.uint64), counts)
    while not request.Test():
        pass
    expected = [number * 10 + each for each in range(size) for number in range(counts[each])]
    assert received.tolist() == (expected if rank == 0 else [])


def test_messages_between_two_ranks(context: Context, short: None) -> None:
    size, rank = context.world.size, context.world.rank
    following, before = (rank + 1) % size, (rank - 1) % size
    found = np.zeros(100)
    requests = messages.begin_receive(context.comm, found, before, 3)
    requests += messages.begin_send(context.comm, mine(context, 100), following, 3)
    assert len(requests) == 26
    for request in requests:
        request.Wait()
    assert np.array_equal(found, np.arange(100) * 10.0 + before)


@pytest.mark.parametrize("shape, dtype", [((), np.uint8), ((3,), np.float32), ((40,), np.float64), ((0,), np.int16)])
def test_rows_are_exchanged(context: Context, short: None, shape: tuple[int, ...], dtype: type) -> None:
    """In rounds, as many of them as the longest part of any rank needs; some ranks send nothing."""
    size, rank = context.world.size, context.world.rank
    counts = np.array([(rank * 7 + to * 13) % 50 * (to != 2) for to in range(size)])
    to = np.repeat(np.arange(size), counts)
    rows = np.broadcast_to((rank * 10 + to).reshape(-1, *(1 for _ in shape)), (len(to), *shape)).astype(dtype)
    received, theirs = context.exchange(rows, counts)
    assert theirs.tolist() == [(of * 7 + rank * 13) % 50 * (rank != 2) for of in range(size)]
    expected = np.repeat(np.arange(size) * 10 + rank, theirs)
    assert received.shape == (len(expected), *shape) and received.dtype == dtype
    assert np.array_equal(received, np.broadcast_to(expected.reshape(-1, *(1 for _ in shape)), received.shape))


@contextmanager
def opened(kind: str, context: Context) -> Iterator[Transport]:
    if kind == "torch":
        with open_torch_distributed(context, torch.device("cpu")):
            yield TorchTransport(context.world.size)
    elif kind == "horovod":
        hvd = load_horovod(Reduce())
        hvd.init()
        yield HorovodTransport(hvd, context.world.size)
    else:
        yield MpiTransport(context)


@pytest.mark.parametrize("kind", ["mpi", "horovod", "torch"])
def test_gradients_are_reduced_in_pieces(context: Context, short: None, kind: str) -> None:
    with opened(kind, context) as transport:
        check_reductions(context, SplittingTransport(transport))


def check_reductions(context: Context, transport: Transport) -> None:
    size, rank = context.world.size, context.world.rank
    message = torch.arange(101.0) + rank
    expected = torch.arange(101.0) * size + sum(range(size))
    assert torch.equal(transport.sum(message.clone(), "a").wait(), expected)
    assert torch.equal(transport.sum(message.clone(), "b", is_last=True).wait(), expected)
    rows = torch.stack([torch.arange(101.0) + 1000 * to + rank for to in range(size)])
    came = transport.all_to_all(rows.view(-1), "c").wait().view(size, -1)
    assert torch.equal(came, torch.stack([torch.arange(101.0) + 1000 * rank + of for of in range(size)]))
    gathered = transport.all_gather(message.half(), "d").wait().view(size, -1)
    assert torch.equal(gathered, torch.stack([torch.arange(101.0) + of for of in range(size)]).half())
    part = transport.reduce_scatter(rows.view(-1), "e").wait()
    assert torch.equal(part, (torch.arange(101.0) + 1000 * rank) * size + sum(range(size)))


@pytest.mark.parametrize(
    "keys",
    [
        {"reduce__strategy": "sharded", "train__optimizer": "adamw"},
        {"reduce__strategy": "parameter_server", "train__optimizer": "adamw"},
        {"reduce__strategy": "mpi", "reduce__compression": "bf16"},
        {"data__read": "memory"},
    ],
)
def test_a_training_in_pieces_is_one_of_whole_messages(
    context: Context, shared_path: Path, digits: Path, keys: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, the optimizer's state in the checkpoint, and what is continued from it."""
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    keys = {**keys, "train__steps": 4, "task__options": "{hidden=[16]}", "train__threads": 1, "train__lr": 0.001}
    train_in = partial(run, context, digits=digits, job="mlp-mnist.toml", **keys)
    whole = train_in(root=shared_path / "whole")
    monkeypatch.setattr(messages, "MOST_BYTES", 4096)
    cut = train_in(root=shared_path / "cut")
    assert np.allclose(losses(cut), losses(whole), rtol=1e-6 if "reduce__compression" not in keys else 1e-2)
    states = [checkpoints.state(each.checkpoint(4)) for each in (whole, cut)]
    for name, weights in states[0]["model"].items():
        assert torch.allclose(states[1]["model"][name], weights, atol=1e-4)
    for name, kept in states[0]["optimizer"].items():
        for key, value in kept.items():
            assert torch.allclose(states[1]["optimizer"][name][key], value, atol=1e-4), (name, key)


@pytest.mark.slow
def test_messages_above_what_32_bits_count(context: Context) -> None:
    """2 ranks, 5 GB each. MPI's own methods refuse or damage them."""
    if context.world.size != 2:
        pytest.skip("memory: for 2 ranks")
    long = np.full(ABOVE_BYTES, context.world.rank + 1, np.uint8)
    context.broadcast_array(long)
    assert long[0] == long[-1] == 1 and long[1 << 31] == 1
    long[-1] = 5 + context.world.rank
    if context.world.is_root:
        place = np.zeros(ABOVE_BYTES, np.uint8)
        messages.receive(context.comm, place, source=1)
        assert place[0] == place[1 << 31] == 1 and place[-1] == 6
        del place
    else:
        messages.send(context.comm, long, dest=0)
    received, theirs = context.exchange(long, np.array([0, ABOVE_BYTES]) if context.world.is_root else np.array([0, 0]))
    if not context.world.is_root:
        assert theirs.tolist() == [ABOVE_BYTES, 0] and received[1 << 31] == 1 and received[-1] == 5


@pytest.mark.parametrize("strategy", ["mpi", "parameter_server"])
def test_messages_of_others_are_not_taken_for_a_trainings_own(
    context: Context, shared_path: Path, digits: Path, strategy: str
) -> None:
    """Each part of the program has a communicator of its own: what else is under way, with any tag, does not matter."""
    size, rank = context.world.size, context.world.rank
    keys = {"train__steps": 3, "task__options": "{hidden=[16]}", "train__threads": 1, "data__read": "memory"}
    if strategy == "parameter_server":
        if size == 1:
            pytest.skip("no worker")
        keys.pop("data__read")
    keys["reduce__strategy"] = strategy
    usual = losses(run(context, shared_path / "usual", digits, "mlp-mnist.toml", **keys))
    following, before = (rank + 1) % size, (rank - 1) % size
    tags = [*range(8), 1 << 14, (1 << 14) + 1]
    world = mpi().COMM_WORLD  # a task may talk on it
    strangers = [world.isend("for nobody here", following, tag) for tag in tags]
    with context.duplicate() as other:
        assert not other.comm.iprobe() and np.array_equal(other.sum(np.ones(3)), np.full(3, size))
    disturbed = losses(run(context, shared_path / "disturbed", digits, "mlp-mnist.toml", **keys))
    assert np.allclose(disturbed, usual, rtol=1e-6)
    assert {world.recv(source=before, tag=tag) for tag in tags} == {"for nobody here"}
    for request in strangers:
        request.wait()

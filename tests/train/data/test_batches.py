"""The batches of the training loop: the sampler's, in order, in parts, on the device."""

import threading
from collections import deque
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpc_train.core.sampling import BatchSampler, Order, Shares, regular_chunk_edges
from hpc_train.train.data.batches import Batches
from hpc_train.train.data.device_queue import DeviceQueue, release_copied

CPU = torch.device("cpu")
SAMPLER = BatchSampler(Order(101), 20, 5, Shares(3), 1)


def task(in_step: bool = False, delay_s: float = 0.0) -> Any:
    """Its batches are the step and the rows; `heard` has the rows of all hints."""
    heard: list[list[int]] = []

    def batch(rows: np.ndarray, step: int) -> tuple[int, list[int]]:
        sleep(delay_s)
        return step, rows.tolist()

    return SimpleNamespace(batch=batch, in_step=in_step, prefetch=lambda rows: heard.append(rows.tolist()), heard=heard)


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("first", [0, 7])
def test_they_are_the_samplers(in_step: bool, first: int) -> None:
    steps = range(first, 20)
    found = list(Batches(task(in_step), SAMPLER, steps, 1, CPU))
    expected = [
        ([(step, rows.tolist())], len(rows), num_global)
        for step, (rows, num_global) in zip(steps, SAMPLER.batches(steps), strict=True)
    ]
    assert found == expected


def test_a_look_at_the_coming_batch_leaves_it() -> None:
    batches = Batches(task(), SAMPLER, range(3), 1, CPU)
    first = batches.peek()
    assert first is not None and batches.peek() is first and next(batches) is first
    assert [step for ((step, _),), _, _ in batches] == [1, 2] and batches.peek() is None
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("num_parts, num_found", [(1, 1), (3, 3), (50, 7)])
def test_parts_of_a_share_are_all_of_it(num_parts: int, num_found: int) -> None:
    batch = next(Batches(task(), SAMPLER, range(1), num_parts, CPU))
    rows = [row for _, part in batch.parts for row in part]
    assert len(batch.parts) == num_found and rows == SAMPLER.batch(0).rows.tolist() and batch.num_samples == 7


def test_an_empty_share_is_one_empty_part() -> None:
    last = BatchSampler(Order(21), 20, 5, Shares(3), 2)  # the epoch's last batch has one sample
    batch = next(Batches(task(), last, range(1, 2), 4, CPU))
    assert batch == ([(1, [])], 0, 1)


def test_a_server_reads_nothing_and_counts_on() -> None:
    by_chunks = BatchSampler(Order(101, regular_chunk_edges(101, 10), 2), 20, 5, Shares(3), 1)
    server = task()
    server.batch = None
    assert list(Batches(server, by_chunks, range(6), 0, CPU)) == [([], 0, 20)] * 5 + [([], 0, 1)]
    assert server.heard == []


def test_rows_of_chunks_are_hinted_at_before_they_are_read() -> None:
    sampler = BatchSampler(Order(101, regular_chunk_edges(101, 10), 2), 8, 5, Shares(2), 1)
    steps, one = range(3, 20), task(in_step=True)
    expected = [rows.tolist() for rows, _ in sampler.batches(steps)]
    num_ahead = sampler.order.steps_ahead(8)
    for number, (((_, rows),), _, _) in enumerate(Batches(one, sampler, steps, 1, CPU)):
        assert rows == expected[number] and len(one.heard) == min(len(steps), number + 1 + num_ahead)
    assert one.heard == expected
    mixed = task()
    assert len(list(Batches(mixed, SAMPLER, range(9), 1, CPU))) == 9 and mixed.heard == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "hpc-train-prefetch"]


@pytest.mark.parametrize("forget", [False, True])
def test_no_thread_is_left_behind(forget: bool) -> None:
    batches = Batches(task(delay_s=0.002), SAMPLER, range(10_000), 1, CPU)
    for _ in range(60):
        next(batches)
        sleep(0.004)
    assert threads()
    if not forget:
        batches.close()
    del batches
    assert not threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_reach_a_gpu_while_the_one_before_is_computed_with() -> None:
    device, size = torch.device("cuda"), 1 << 20
    for in_step in (False, True):
        one = task(in_step)
        one.batch = lambda rows, step: torch.full((size,), float(step))
        for number, ((batch,), _, _) in enumerate(Batches(one, SAMPLER, range(5), 1, device)):
            assert batch.is_cuda and (batch * 2).sum().item() == 2 * number * size


def test_batches_stay_on_a_cpu() -> None:
    queue = DeviceQueue[torch.Tensor](CPU)
    sent = [torch.zeros(1), torch.ones(1)]
    for batch in sent:
        queue.send(batch)
    assert len(queue) == 2 and queue.receive() is sent[0] and queue.receive() is sent[1] and len(queue) == 0


class Copy:
    """An event after a copy to a GPU, without a GPU."""

    def __init__(self) -> None:
        self.has_ended = False

    def query(self) -> bool:
        return self.has_ended


def test_a_batch_is_held_until_its_copy_has_ended() -> None:
    """For any number of later batches: pinned memory that nobody holds is reused."""
    copies = [Copy() for _ in range(6)]
    waiting: Any = deque(enumerate(copies))
    release_copied(waiting)
    assert len(waiting) == 6
    copies[1].has_ended = True
    release_copied(waiting)
    assert len(waiting) == 6, "copies of a stream end in their order"
    copies[0].has_ended = True
    release_copied(waiting)
    assert [number for number, _ in waiting] == [2, 3, 4, 5]

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_train.core.sampling import Order, chunk_edges, global_batch, rank_batches, rank_samples, rank_span, shuffled

COUNTS = st.integers(1, 3000)


@given(COUNTS, st.integers(1, 64))
def test_spans_cover_everything_once_and_evenly(count: int, size: int) -> None:
    spans = [rank_span(count, rank, size) for rank in range(size)]
    assert spans[0][0] == 0 and spans[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1


@given(COUNTS, st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=50)
def test_an_epochs_order_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(num_samples), num_samples, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(COUNTS, st.data())
@settings(max_examples=50)
def test_every_rank_count_sees_the_same_global_batch(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    step = data.draw(st.integers(0, 10_000))
    size = data.draw(st.integers(1, 9))
    batch = global_batch(step, num_samples, batch_size)
    alone = rank_samples(batch, Order(num_samples), 7, 0, 1)
    together = np.concatenate([rank_samples(batch, Order(num_samples), 7, rank, size) for rank in range(size)])
    assert np.array_equal(alone, together)


@given(COUNTS, st.data())
@settings(max_examples=50)
def test_an_epoch_trains_on_every_sample_exactly_once(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(max(1, num_samples // 50), num_samples))
    steps = -(-num_samples // batch_size)
    for epoch in (0, 3):
        batches = [global_batch(epoch * steps + k, num_samples, batch_size) for k in range(steps)]
        assert {batch.epoch for batch in batches} == {epoch}
        rows = np.concatenate([rank_samples(batch, Order(num_samples), 0, 0, 1) for batch in batches])
        assert np.array_equal(np.sort(rows), np.arange(num_samples))


@given(COUNTS, st.data())
@settings(max_examples=50)
def test_many_steps_at_once_are_the_steps_one_by_one(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    first, size = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 5))
    steps = range(first, first + data.draw(st.integers(0, 40)))
    found = list(rank_batches(steps, Order(num_samples), batch_size, 3, size - 1, size))
    assert len(found) == len(steps)
    for step, (rows, num_global) in zip(steps, found, strict=True):
        batch = global_batch(step, num_samples, batch_size)
        assert num_global == batch.num_samples
        assert np.array_equal(rows, rank_samples(batch, Order(num_samples), 3, size - 1, size))


def test_a_trillion_samples_take_no_memory() -> None:
    rows = rank_samples(global_batch(12_345, 10**12, 1024), Order(10**12), 1, 5, 8)
    assert len(rows) == 128 and rows.min() >= 0 and rows.max() < 10**12 and len(set(rows.tolist())) == 128


@pytest.mark.parametrize("num_samples", [4000, 60_000, 65_536])
def test_orders_look_random(num_samples: int) -> None:
    """Against what uniform permutations do: neighbours lie far apart, epochs and seeds are unrelated."""
    order = shuffled(np.arange(num_samples), num_samples, 0, 0)
    gaps = np.abs(np.diff(order)) / num_samples
    assert gaps.mean() == pytest.approx(1 / 3, abs=0.02)
    for seed, epoch in ((0, 1), (1, 0)):
        other = shuffled(np.arange(num_samples), num_samples, seed, epoch)
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(num_samples)
        assert (order == other).sum() < 12  # of uniform ones: Poisson with mean 1
    counts = np.histogram2d(np.arange(num_samples), order, bins=20)[0]
    expected = num_samples / 400
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 361 - 5 * np.sqrt(2 * 361) < chi2 < 361 + 5 * np.sqrt(2 * 361)


@given(COUNTS, st.data())
@settings(max_examples=50)
def test_by_chunks_an_epoch_is_a_permutation_that_mixes_within_windows(num_samples: int, data: st.DataObject) -> None:
    chunk, window = data.draw(st.integers(1, num_samples)), data.draw(st.integers(1, 20))
    edges, epoch = chunk_edges(num_samples, chunk), data.draw(st.integers(0, 9))
    rows = Order(num_samples, edges, window).rows(np.arange(num_samples), 5, epoch)
    chunks = shuffled(np.arange(len(edges) - 1), len(edges) - 1, 5, epoch)
    begin = 0
    for first in range(0, len(chunks), window):
        whole = [np.arange(edges[each], edges[each + 1]) for each in chunks[first : first + window]]
        stop = begin + sum(map(len, whole))
        assert np.array_equal(np.sort(rows[begin:stop]), np.sort(np.concatenate(whole)))
        begin = stop
    assert begin == num_samples


@given(COUNTS, st.data())
@settings(max_examples=50)
def test_by_chunks_every_rank_count_sees_the_same_global_batch(num_samples: int, data: st.DataObject) -> None:
    batch_size, size = data.draw(st.integers(1, num_samples)), data.draw(st.integers(1, 5))
    edges = chunk_edges(num_samples, data.draw(st.integers(1, num_samples)))
    order = Order(num_samples, edges, data.draw(st.integers(1, 9)))
    first = data.draw(st.integers(0, 1000))
    steps = range(first, first + 5)
    alone = [rows for rows, _ in rank_batches(steps, order, batch_size, 7, 0, 1)]
    shares = [list(rank_batches(steps, order, batch_size, 7, rank, size)) for rank in range(size)]
    for step, rows, *parts in zip(steps, alone, *shares, strict=True):
        batch = global_batch(step, num_samples, batch_size)
        assert np.array_equal(rows, np.concatenate([part for part, _ in parts]))
        assert {num for _, num in parts} == {batch.num_samples}
        positions = np.arange(batch.start, batch.stop)
        assert np.array_equal(rows, np.sort(order.rows(positions, 7, batch.epoch)))
        assert np.array_equal(parts[0][0], rank_samples(batch, order, 7, 0, size))


def test_by_chunks_a_rank_reads_its_own_part_of_a_window() -> None:
    order = Order(64 * 100, chunk_edges(6400, 100), window=16)
    steps = range(1600 // 160)  # the first window
    read = [set(np.concatenate([r for r, _ in rank_batches(steps, order, 160, 1, k, 4)]) // 100) for k in range(4)]
    assert all(4 <= len(chunks) <= 8 for chunks in read)
    assert order.window_samples == 1600

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_train.core.sampling import BatchSampler, Order, Shares, global_batch, rank_span, regular_chunk_edges, shuffled

COUNTS = st.integers(1, 3000)


@given(COUNTS, st.integers(1, 64))
@settings(deadline=None)
def test_spans_cover_everything_once_and_evenly(count: int, size: int) -> None:
    spans = [rank_span(count, rank, size) for rank in range(size)]
    assert spans[0][0] == 0 and spans[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1


@given(COUNTS, st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_epochs_order_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(num_samples), num_samples, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(COUNTS, st.data())
@settings(max_examples=50, deadline=None)
def test_every_rank_count_sees_the_same_global_batch(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    step = data.draw(st.integers(0, 10_000))
    size = data.draw(st.integers(1, 9))
    alone = BatchSampler(Order(num_samples), batch_size, 7).batch(step)
    parts = [BatchSampler(Order(num_samples), batch_size, 7, Shares(size), rank).batch(step) for rank in range(size)]
    assert np.array_equal(alone.rows, np.concatenate([part.rows for part in parts]))
    assert {part.num_global for part in parts} == {alone.num_global}


@given(COUNTS, st.data())
@settings(max_examples=50, deadline=None)
def test_an_epoch_trains_on_every_sample_exactly_once(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(max(1, num_samples // 50), num_samples))
    steps = -(-num_samples // batch_size)
    for epoch in (0, 3):
        batches = [global_batch(epoch * steps + k, num_samples, batch_size) for k in range(steps)]
        assert {batch.epoch for batch in batches} == {epoch}
        sampler = BatchSampler(Order(num_samples), batch_size, 0)
        rows = np.concatenate([sampler.batch(batch.step).rows for batch in batches])
        assert np.array_equal(np.sort(rows), np.arange(num_samples))


@given(COUNTS, st.data())
@settings(max_examples=50, deadline=None)
def test_many_steps_at_once_are_the_steps_one_by_one(num_samples: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    first, size = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 5))
    steps = range(first, first + data.draw(st.integers(0, 40)))
    order, rank = Order(num_samples), size - 1
    found = list(BatchSampler(order, batch_size, 3, Shares(size), rank).batches(steps))
    assert len(found) == len(steps)
    for step, (rows, num_global) in zip(steps, found, strict=True):
        batch = global_batch(step, num_samples, batch_size)
        assert num_global == batch.num_samples
        start, stop = rank_span(batch.num_samples, rank, size)
        positions = batch.start + np.arange(start, stop)
        assert np.array_equal(rows, order.rows(positions, 3, batch.epoch))


def test_a_trillion_samples_take_no_memory() -> None:
    rows, _ = BatchSampler(Order(10**12), 1024, 1, Shares(8), 5).batch(12_345)
    assert len(rows) == 128 and rows.min() >= 0 and rows.max() < 10**12 and len(set(rows.tolist())) == 128


@pytest.mark.parametrize("num_samples", [4000, 60_000, 65_536])
def test_orders_look_random(num_samples: int) -> None:
    """As uniform permutations: neighbours are far apart, epochs and seeds are uncorrelated."""
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
@settings(max_examples=50, deadline=None)
def test_by_chunks_an_epoch_is_a_permutation_that_mixes_within_windows(num_samples: int, data: st.DataObject) -> None:
    chunk, window = data.draw(st.integers(1, num_samples)), data.draw(st.integers(1, 20))
    edges, epoch = regular_chunk_edges(num_samples, chunk), data.draw(st.integers(0, 9))
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
@settings(max_examples=50, deadline=None)
def test_by_chunks_every_rank_count_sees_the_same_global_batch(num_samples: int, data: st.DataObject) -> None:
    batch_size, size = data.draw(st.integers(1, num_samples)), data.draw(st.integers(1, 5))
    edges = regular_chunk_edges(num_samples, data.draw(st.integers(1, num_samples)))
    order = Order(num_samples, edges, data.draw(st.integers(1, 9)))
    first = data.draw(st.integers(0, 1000))
    steps = range(first, first + 5)
    alone = [rows for rows, _ in BatchSampler(order, batch_size, 7).batches(steps)]
    samplers = [BatchSampler(order, batch_size, 7, Shares(size), rank) for rank in range(size)]
    shares = [list(sampler.batches(steps)) for sampler in samplers]
    for step, rows, *parts in zip(steps, alone, *shares, strict=True):
        batch = global_batch(step, num_samples, batch_size)
        assert np.array_equal(rows, np.concatenate([part for part, _ in parts]))
        assert {num for _, num in parts} == {batch.num_samples}
        positions = np.arange(batch.start, batch.stop)
        assert np.array_equal(rows, np.sort(order.rows(positions, 7, batch.epoch)))
        assert np.array_equal(parts[0][0], samplers[0].batch(step).rows)


def test_by_chunks_a_rank_reads_its_own_part_of_a_window() -> None:
    order = Order(64 * 100, regular_chunk_edges(6400, 100), window=16)
    steps = range(1600 // 160)  # the first window
    samplers = [BatchSampler(order, 160, 1, Shares(4), rank) for rank in range(4)]
    read = [set(np.concatenate([rows for rows, _ in each.batches(steps)]) // 100) for each in samplers]
    assert all(4 <= len(chunks) <= 8 for chunks in read)
    assert order.num_window_samples == 1600


WEIGHTS = st.floats(0, 1e6) | st.floats(0, 1) | st.integers(0, 8)


def weights(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(WEIGHTS, min_size=size, max_size=size).filter(any)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_shares_of_any_weights_divide_a_batch_in_proportion(data: st.DataObject) -> None:
    size, count = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3000))
    given = data.draw(weights(size))
    spans = [Shares(size).change(0, given).span(9, count, rank) for rank in range(size)]
    assert spans[0][0] == 0 and spans[-1][1] == count
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    for (start, stop), weight in zip(spans, given, strict=True):
        assert abs(stop - start - count * Fraction(weight) / sum(map(Fraction, given))) < 1


@given(COUNTS, st.integers(1, 64), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_equal_weights_are_equal_shares(count: int, size: int, weight: float) -> None:
    weighted = Shares(size).change(0, [weight] * size)
    assert all(weighted.span(3, count, rank) == rank_span(count, rank, size) for rank in range(size))


@given(COUNTS, st.booleans(), st.data())
@settings(max_examples=50, deadline=None)
def test_weights_that_change_leave_global_batches_as_they_are(
    num_samples: int, by_chunks: bool, data: st.DataObject
) -> None:
    batch_size, size = data.draw(st.integers(1, num_samples)), data.draw(st.integers(1, 5))
    order = Order(num_samples, regular_chunk_edges(num_samples, 1 + num_samples // 9) if by_chunks else None, 2)
    shares, changes = Shares(size), sorted(data.draw(st.sets(st.integers(0, 30), max_size=3)))
    for step in changes:
        shares = shares.change(step, data.draw(weights(size)))
    steps = range(20)
    alone = BatchSampler(order, batch_size, 7).batches(steps)
    ranks = [BatchSampler(order, batch_size, 7, shares, rank).batches(steps) for rank in range(size)]
    before = [BatchSampler(order, batch_size, 7, Shares(size), rank).batches(steps) for rank in range(size)]
    for step, whole, *parts in zip(steps, alone, *ranks, *before, strict=True):
        parts, equal = parts[:size], parts[size:]
        assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
        if not changes or step < changes[0]:
            assert all(np.array_equal(one.rows, other.rows) for one, other in zip(parts, equal, strict=True))


def test_shares_change_at_their_step_and_ties_go_to_lower_ranks() -> None:
    shares = Shares(3).change(5, [1, 1, 2]).change(8, [0, 1, 1])
    spans = {step: [shares.span(step, 9, rank) for rank in range(3)] for step in (4, 5, 7, 8, 100)}
    assert spans[4] == [(0, 3), (3, 6), (6, 9)]
    assert spans[5] == spans[7] == [(0, 2), (2, 4), (4, 9)]  # of 2.25, 2.25, 4.5
    assert spans[8] == spans[100] == [(0, 0), (0, 5), (5, 9)]
    assert shares.change(5, [1, 1, 1]).changes == ((5, (1, 1, 1)),), "what was planned after it is void"

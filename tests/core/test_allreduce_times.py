"""Latency and bandwidth recovered from synthetic times; which ranks are measured; what is saved."""

import json

import numpy as np
import pytest

from hpc_train.core.allreduce_times import (
    LIMITS,
    Row,
    fit,
    fits,
    interpolated_s,
    pair_ratios,
    rank_groups,
    read_rows,
    record,
    sizes,
)
from hpc_train.core.formatting import binary_size

ALPHA_S, BETA = 3e-6, 1 / 5e9
ALL = sizes(4, 1 << 30)


def row(strategy: str, ranks: int, num_bytes: int, *, noise: float = 0.0, seed: int = 0, nodes: int = 1) -> Row:
    draw = np.random.default_rng((seed, ranks, num_bytes))
    time_s = 2 * (ranks - 1) * (ALPHA_S + num_bytes / ranks * BETA)
    samples = time_s * np.exp(noise * draw.standard_normal(11))
    return Row(strategy, ranks, nodes, ranks // nodes, num_bytes, tuple(samples.tolist()))


@pytest.mark.parametrize("ranks", [2, 3, 64, 4096])
def test_exact_times_give_the_law_back(ranks: int) -> None:
    found = fit([row("mpi", ranks, size) for size in ALL])
    assert found.alpha_s == pytest.approx(ALPHA_S, rel=1e-6)
    assert found.beta_s_per_byte == pytest.approx(BETA, rel=1e-6)
    assert found.error < 1e-6
    assert found.seconds(1e6) == pytest.approx(2 * (ranks - 1) * (ALPHA_S + 1e6 / ranks * BETA))


def test_noisy_times_give_it_within_its_interval() -> None:
    for seed in range(20):
        found = fit([row("mpi", 8, size, noise=0.3, seed=seed) for size in ALL])
        assert found.alpha_s == pytest.approx(ALPHA_S, rel=0.25) and 0 < found.error < 0.3


@pytest.mark.parametrize("num_sizes", [3, 5, 14])
def test_nineteen_of_twenty_intervals_hold_alpha_and_beta(num_sizes: int) -> None:
    chosen = [ALL[index] for index in np.linspace(0, len(ALL) - 1, num_sizes).astype(int)]
    inside = np.zeros(2)
    for seed in range(600):
        found = fit([row("mpi", 8, size, noise=0.1, seed=seed) for size in chosen])
        ends = found.alpha_interval_s, found.beta_interval_s_per_byte
        inside += [
            each is not None and each[0] <= truth <= each[1] for each, truth in zip(ends, (ALPHA_S, BETA), strict=True)
        ]
    assert (inside / 600 >= 0.92).all() and (inside / 600 <= 0.98).all(), inside / 600


def test_two_sizes_fit_exactly_and_tell_no_error() -> None:
    found = fit([row("mpi", 8, size, noise=0.1) for size in ALL[:2]])
    assert found.alpha_interval_s is None and found.beta_interval_s_per_byte is None


def test_a_latency_alone_has_no_bandwidth() -> None:
    flat = [Row("horovod", 2, 1, 2, size, (1e-3,) * 5) for size in (4, 64, 1024)]
    assert fit(flat).alpha_s == pytest.approx(5e-4, rel=1e-3)
    assert fit(flat).beta_s_per_byte * 1024 < 1e-6, "never below 0"


def test_a_place_and_a_strategy_have_a_fit_each_and_one_size_has_none() -> None:
    rows = [
        row(name, ranks, size) for name in ("mpi", "horovod", "memory") for ranks in (2, 4) for size in (4, 1 << 20)
    ]
    found = fits([*rows, row("sharded", 2, 4)])
    assert {(each.strategy, each.ranks) for each in found} == {(s, n) for s in ("mpi", "horovod") for n in (2, 4)}


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert Row("mpi", 4, 1, 4, 10**9, (0.5,)).bytes_per_s == pytest.approx(2e9 * 1.5)
    assert Row("memory", 4, 1, 4, 10**9, (0.5,)).bytes_per_s == pytest.approx(2e9)


@pytest.mark.parametrize(
    "hosts, expected",
    [
        ("a", []),
        ("aa", [(0, 1)]),
        ("aaaaa", [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4)]),
        ("abc", [(0, 1), (0, 1, 2)]),
        ("aabb", [(0, 1), (0, 2), (0, 1, 2, 3)]),
        ("abab", [(0, 2), (0, 1), (0, 1, 2, 3)]),
        ("aaab", [(0, 1), (0, 1, 2), (0, 3), (0, 1, 2, 3)]),
    ],
)
def test_teams_are_inside_a_node_between_nodes_and_all(hosts: str, expected: list[tuple[int, ...]]) -> None:
    assert rank_groups(hosts) == expected


def test_sizes_include_those_that_are_judged() -> None:
    assert sizes(4, 1 << 30)[0] == 4 and sizes(4, 1 << 30)[-1] == 1 << 30
    assert {64 << 10, 64 << 20} <= set(sizes(4, 1 << 30))
    assert sizes(64, 63 * 4) == [64]
    assert [binary_size(size) for size in (4, 1 << 10, 3 << 19, 1 << 30, 2e12)] == [
        *("4 B", "1 KiB", "1.5 MiB", "1 GiB", "1.819 TiB")
    ]


def test_ratios_are_of_the_same_turn() -> None:
    ours, plain = Row("mpi", 2, 1, 2, 64, (2.0, 4.0)), Row("plain_mpi", 2, 1, 2, 64, (1.0, 4.0))
    assert pair_ratios([ours, plain], "mpi", 64) == {(2, 1, 2): [0.5, 1.0]}
    assert pair_ratios([ours], "mpi", 64) == {}


def test_what_is_saved_reads_back() -> None:
    rows = [row(name, 4, size, nodes=2) for name in ("mpi", *LIMITS) for size in (4, 1 << 20)]
    saved = json.loads(json.dumps(record(rows, {"hosts": ["a", "b"], "mpi": "Open MPI"})))
    assert (saved["schema"], saved["kind"], saved["hosts"]) == (1, "allreduce", ["a", "b"])
    (fitted,) = saved["fits"]
    assert {"strategy": "mpi", "ranks": 4, "nodes": 2, "ranks_per_node": 2}.items() <= fitted.items()
    assert fitted["alpha_s"] == pytest.approx(ALPHA_S) and fitted["beta_s_per_byte"] == pytest.approx(BETA)
    assert [each["bytes"] for each in saved["rows"]] == [4, 1 << 20]
    assert saved["rows"][0]["low_s"] <= saved["rows"][0]["time_s"] <= saved["rows"][0]["high_s"]
    assert saved["rows"][1]["bus_bytes_per_s"] == pytest.approx(1.5 * (1 << 20) / saved["rows"][1]["time_s"])
    assert {name: len(found) for name, found in saved["link"].items()} == dict.fromkeys(LIMITS, 2)


def test_times_between_measured_sizes_are_in_proportion() -> None:
    rows = [row("mpi", 4, size) for size in (1 << 16, 1 << 20, 1 << 22)]
    for size in (1 << 16, 1 << 19, 3 << 20):
        exact = 2 * 3 * (ALPHA_S + size / 4 * BETA)
        assert interpolated_s(rows, size) == pytest.approx(exact), "a line through a line"
    assert interpolated_s(rows, 4) == rows[0].time_s
    assert interpolated_s(rows, 1 << 24) == pytest.approx(4 * rows[-1].time_s)


def test_a_record_is_read_back_and_what_is_damaged_left_out() -> None:
    rows = [row(name, 4, size) for name in ("mpi", *LIMITS) for size in (4, 64)]
    tree = json.loads(json.dumps(record(rows, {})))
    assert read_rows(tree) == rows
    for damage in ({"bytes": -4}, {"ranks": "4"}, {"samples_s": []}, {"samples_s": [1.0, "x"]}, {"nodes": True}):
        tree["rows"][0] |= damage
        assert read_rows(tree) == rows[1:]
    for nothing in ({}, {"rows": 3, "link": []}, {"rows": [3], "link": {"memory": None}}):
        assert read_rows(nothing) == []

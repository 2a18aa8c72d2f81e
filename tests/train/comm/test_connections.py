"""The root's port while ranks connect: whatever knocks, ranks get in, and nothing costs memory or time."""

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from time import monotonic, sleep

import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Run
from hpc_train.core.world import World
from hpc_train.train.comm import connections, watchdog
from hpc_train.train.comm.connections import Link, RankListener, call
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.watchdog import Watchdog

TOKEN = bytes(range(16))
SIZE = 2001


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[RankListener]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 8192), before[1]))
    server = connections._listen(["127.0.0.1"], SIZE)
    assert server
    server.listen(getattr(request, "param", SIZE))  # the system's queue of callers
    listener = RankListener(server, TOKEN, SIZE)
    yield listener
    for link in listener.close().values():
        link.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def knock(listener: RankListener, *words: bytes) -> socket.socket:
    link = socket.create_connection(listener.address, timeout=20)
    for word in words:
        link.sendall(word)
    return link


def assert_ranks_get_in(listener: RankListener, *ranks: int) -> None:
    began_s = monotonic()
    for rank in ranks:
        mine = call(listener.address, TOKEN, rank)
        assert mine is not None, f"rank {rank} is left out"
        mine.close()
    assert monotonic() - began_s < 5


def test_ranks_get_in_beside_callers_that_are_none(listener: RankListener) -> None:
    with (
        closing(knock(listener)),  # says nothing, as a port scan does
        closing(knock(listener, TOKEN[:8])),
        closing(knock(listener, TOKEN, b"\0\0")),
        closing(knock(listener, b"GET / HTTP/1.1\r\n\r\n")),
    ):
        for wrong in (bytes(16) + (1).to_bytes(4), TOKEN + bytes(4), TOKEN + SIZE.to_bytes(4)):
            with closing(knock(listener, wrong)) as link, suppress(ConnectionError):
                assert link.recv(1) == b"", "no token, the root's own rank, none of the ranks"
        knock(listener).close()
        assert_ranks_get_in(listener, 1, 2, SIZE - 1)
    assert listener.close().keys() == {1, 2, SIZE - 1}


def test_a_caller_is_hung_up_on_after_some_seconds(listener: RankListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HELLO_S", 0.2)
    with closing(knock(listener, TOKEN[:8])) as link:
        assert link.recv(1) == b""


def test_a_gigabyte_of_bytes_is_not_read(listener: RankListener) -> None:
    block, num_sent = bytes(1 << 20), 0
    with closing(knock(listener)) as link, suppress(ConnectionError):
        for _ in range(1024):
            link.sendall(block)
            num_sent += len(block)
    assert num_sent < 64 << 20, "what the system's buffers took"
    assert_ranks_get_in(listener, 1)


def test_ten_thousand_connections_cost_nothing(listener: RankListener) -> None:
    held: list[socket.socket] = []
    done = threading.Event()

    def knock_on() -> None:
        for _ in range(10_000):
            held.append(knock(listener))
            if len(held) > 2000:  # of this process's descriptors
                held.pop(0).close()
        done.set()

    thread = threading.Thread(target=knock_on)
    thread.start()
    while not done.is_set():
        assert_ranks_get_in(listener, 1, 2, 3)
        assert len(listener._strangers) <= connections._MAX_STRANGERS + 1
    thread.join()
    for link in held:
        link.close()


@pytest.mark.parametrize("listener", [8], indirect=True)
def test_two_thousand_ranks_at_once_are_let_in_through_a_short_queue(listener: RankListener) -> None:
    mine: dict[int, socket.socket | None] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: mine.update({rank: call(listener.address, TOKEN, rank)}))
        for rank in range(1, SIZE)
    ]
    began_s = monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = monotonic() - began_s
    let_in = listener.close()
    assert all(mine.values()) and let_in.keys() == set(range(1, SIZE))
    assert took_s < connections._CONNECT_S / 2, took_s
    for rank, link in let_in.items():
        watchdog._send(link, {"ends": True})
        assert b"ends" in mine[rank].recv(100)
        mine[rank].close()


def test_a_rank_that_calls_again_takes_the_place_of_its_first_call(listener: RankListener) -> None:
    first, second = (call(listener.address, TOKEN, 5) for _ in range(2))
    assert first.recv(1) == b""
    (link,) = listener.close().values()
    assert link.getpeername() == second.getsockname()
    first.close(), second.close()


def test_the_root_listens_on_one_interface_alone() -> None:
    assert connections._address_of("lo") == "127.0.0.1"
    with pytest.raises(UserError, match=r"run.interface = 'ib7' has no address"):
        connections._address_of("ib7")
    with closing(connections._listen(["192.0.2.1", "127.0.0.1"], 2)) as server:  # the first is no address of this host
        assert server.getsockname()[0] == "127.0.0.1"
    assert connections._listen(["192.0.2.1"], 2) is None
    assert connections._resolve("no-such-host.invalid") is None


def test_what_no_rank_would_say_is_passed_over() -> None:
    """Of what comes over a connection no more is kept than the longest line."""
    ours, theirs = socket.socketpair()
    with Watchdog(Context(World(1, 2)), 600.0, {0: Link(ours, "here")}) as watching:
        peer = watching._peers[0]
        for noise in (
            b"\n\n\xff\xfe\n",
            b"[" * 100_000 + b"\n",
            b'{"rank": 0, "step": "x", "waits": 1, "stack": [], "ago_s": 0, "lowest": 3}\n'
            b'{"ends": 3}\n7\n{"step": 1}\n',
            b"x" * (1 << 20),
        ):
            theirs.sendall(noise)
        assert peer.lowest is None
        theirs.sendall(b'\n{"rank": 0, "step": 3, "waits": true, "stack": "here", "ago_s": 0.5, "lowest": 3}\n')
        end_s = monotonic() + 20
        while peer.lowest is None and monotonic() < end_s:
            sleep(0.01)
        seen = peer.suspect
        assert (seen.rank, seen.step, seen.waits, seen.stack) == (0, 3, True, "here") and seen.ago_s >= 0.5
        assert len(watching._received[0]) <= watchdog._MAX_LINE_BYTES
    ours.close(), theirs.close()


def test_a_stall_that_any_step_would_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run.stall_s = 0.001: a healthy step may take longer; set 1 or more"):
        Run(stall_s=0.001)
    assert Run(stall_s=0).stall_s == 0 and Run(stall_s=1).stall_s == 1


def test_the_root_hears_of_a_node_the_rank_that_is_most_likely_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks: rank 3 speaks to rank 2 alone, and rank 2 passes on who keeps the others waiting."""
    monkeypatch.setattr(watchdog, "_MAX_BEAT_S", 0.05)
    contexts = [Context(World(rank, 4, rank % 2, 2, "ab"[rank // 2], rank // 2 * 2)) for rank in range(4)]
    ends = {pair: socket.socketpair() for pair in [(0, 1), (0, 2), (2, 3)]}
    links: list[dict[int, Link]] = [{} for _ in contexts]
    for (upper, lower), (down, up) in ends.items():
        links[upper][lower], links[lower][upper] = Link(down, contexts[lower].world.host), Link(up, "ab"[upper // 2])
    with ExitStack() as stack:
        dogs = [
            stack.enter_context(Watchdog(context, 600.0, mine)) for context, mine in zip(contexts, links, strict=True)
        ]
        node = dogs[0]._peers[2]

        def becomes(step: int | None, waits: bool, rank: int, lowest: int | None) -> None:
            until_s = monotonic() + 20
            while monotonic() < until_s:
                seen = node.suspect
                if (seen.step, seen.waits, seen.rank, node.lowest) == (step, waits, rank, lowest):
                    return
                sleep(0.01)
            raise AssertionError((node, step, waits, rank, lowest))

        for dog in dogs:
            dog.step = 7
        with contexts[2].waiting:
            becomes(7, False, 3, 7)
            dogs[3].step = 8
            becomes(8, False, 3, 7)
            with contexts[3].waiting:
                becomes(7, True, 2, 7)
        with contexts[3].waiting:
            becomes(7, False, 2, 7)
    for pair in ends.values():
        for end in pair:
            end.close()

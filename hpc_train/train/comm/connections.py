"""TCP connections between ranks, beside MPI, in a tree of two levels: each node's ranks with the first of them, and
the first ranks of all nodes with the root. A port is open to any caller while ranks connect.
"""

import fcntl
import hmac
import resource
import secrets
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic, sleep

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context

_CONNECT_S = 20.0
_RETRY_S = 5.0  # a rank that gets no answer for so long calls again
_HELLO_S = 5.0  # the root drops a caller that has not identified itself for so long
_MAX_STRANGERS = 256  # callers that have not identified themselves; for one more, the root drops the oldest
_POLL_S = 0.02
_MIN_BACKLOG = 1024  # calls that wait to be accepted; the system may allow fewer
_TOKEN_BYTES, _RANK_BYTES = 16, 4
_WELCOME = b"!"
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


@dataclass(frozen=True, eq=False)
class Link:
    """A connection to another rank."""

    socket: socket.socket
    host: str  # of the other rank


def connect(context: Context, interface: str | None, log: Callable[[str], None]) -> dict[int, Link]:
    """Collective. This rank's connections, by rank: that towards the root and, on the first rank of a node, others.

    interface: the root's network interface to listen on; None for the one by which the other hosts reach it. Ranks
    that cannot be connected are skipped, and `log` receives a warning on the root.
    """
    world = context.world
    if world.size == 1:
        return {}
    links: dict[int, Link] = {}
    lost: list[str] = []
    with context.split(world.node_root) as node:
        links |= _star(node, world.rank, lambda: [_LOOPBACK], lost)
    is_first = world.rank == world.node_root
    with context.split(0 if is_first else 1) as firsts:
        if is_first:
            links |= _star(firsts, world.rank, lambda: _addresses(firsts, interface), lost)
    num_lost = int(context.sum(np.array([len(lost)]))[0])
    if num_lost:
        log("\n".join(warning for of_rank in context.gather(lost) for warning in of_rank))
    return links


def _star(context: Context, rank: int, addresses: Callable[[], Sequence[str]], lost: list[str]) -> dict[int, Link]:
    """Collective. Connects all ranks of `context` with its root.

    rank: this one's number in the whole job, by which the connections are named. addresses: where the root may
    listen; collective. `lost` receives the root's warning of ranks that cannot be connected.
    """
    world = context.world
    if world.size == 1:
        return {}
    may_listen = addresses()
    token = context.on_root(partial(secrets.token_bytes, _TOKEN_BYTES))
    listener = RankListener(_listen(may_listen, world.size), token, world.size) if world.is_root else None
    address = context.on_root(lambda: listener.address if listener else None)
    root, root_host = context.on_root(lambda: (rank, world.host))
    own = call(address, token, world.rank) if address and not world.is_root else None
    told = context.gather((rank, world.host, world.is_root or own is not None))
    if listener is None:
        return {} if own is None else {root: Link(own, root_host)}
    links = listener.close()
    unseen = [number for number, (_, _, is_connected) in enumerate(told) if not is_connected]
    for number in set(unseen) & links.keys():
        links.pop(number).close()  # accepted too late: the rank has given up
    if unseen:
        lost.append(_lost_warning([told[number][0] for number in unseen], rank, address[0] if address else world.host))
    return {told[number][0]: Link(link, told[number][1]) for number, link in links.items()}


def _lost_warning(ranks: list[int], root: int, host: str) -> str:
    others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return (
        f"warning: rank {ranks[0]}{others} cannot reach rank {root} at {host} over TCP: the watchdog does not see them"
    )


# ------------------------------------------------------------------------------------------- where to listen


def root_addresses(context: Context, interface: str | None) -> list[str]:
    """Collective. Where other ranks may reach the root, the best address first; on one host its loopback."""
    is_first = context.world.rank == context.world.node_root
    with context.split(0 if is_first else 1) as firsts:
        is_one_host = firsts.world.size == 1
        found = [] if not is_first else [_LOOPBACK] if is_one_host else _addresses(firsts, interface)
    return context.on_root(lambda: found)


def _addresses(context: Context, interface: str | None) -> list[str]:
    """Collective over the first ranks of all nodes. Where the root may listen, the best address first."""
    if interface is not None:
        return context.on_root(lambda: [_address_of(interface)])
    root_host = context.on_root(lambda: context.world.host)
    # Each other host looks up the root's, and the address that most of them find is tried first.
    found = context.gather(_resolve(root_host) if context.world.host != root_host else _LOOPBACK)[1:]
    return [address for address, _ in Counter(filter(None, found)).most_common()]


def _resolve(host: str) -> str | None:
    with suppress(OSError, UnicodeError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def _address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this host. Raises UserError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"run.interface = '{interface}' has no address on {socket.gethostname()}: {error.strerror}",
                f"Set it to one with an address, of {known}, or remove it.",
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _listen(addresses: Sequence[str], size: int) -> socket.socket | None:
    """Listens at the first address that belongs to this host; None if none does."""
    _allow_open_files(size + _MAX_STRANGERS + 512)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=max(size, _MIN_BACKLOG))
    return None


def _allow_open_files(num_files: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, num_files) if hard > 0 else num_files, hard))


# ----------------------------------------------------------------------------------------------- connecting


class _Stranger:
    """A caller that has not identified itself yet."""

    def __init__(self) -> None:
        self.received = b""
        self.until_s = monotonic() + _HELLO_S


class RankListener:
    """The root's end while ranks connect: a thread that accepts callers with the token. Other callers cost little.

    At most a token and a rank are read from a caller. It has some seconds for that, and is dropped earlier if there
    are too many others; a rank then calls again.
    """

    def __init__(self, server: socket.socket | None, token: bytes, size: int) -> None:
        self._server, self._token, self._size = server, token, size
        self.address: tuple[str, int] | None = server.getsockname()[:2] if server else None
        self._links: dict[int, socket.socket] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}  # the oldest first
        self._selector = selectors.DefaultSelector()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-listener", daemon=True)
        if server:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            self._thread.start()

    def close(self) -> dict[int, socket.socket]:
        """Stops accepting. Returns the connections by rank."""
        self._closed.set()
        if self._server:
            self._thread.join()
            self._server.close()
        for link in list(self._strangers):
            self._drop(link)
        self._selector.close()
        return self._links

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_POLL_S):
                if key.fileobj is self._server:
                    self._accept(self._server)
                elif key.fileobj in self._strangers:  # not dropped since
                    self._identify(key.fileobj)
            now_s = monotonic()
            for link in [link for link, stranger in self._strangers.items() if stranger.until_s < now_s]:
                self._drop(link)

    def _accept(self, server: socket.socket) -> None:
        try:
            link, _ = server.accept()
        except OSError:  # the caller has gone, or file descriptors are short
            sleep(0.001)
            return
        link.setblocking(False)
        self._strangers[link] = _Stranger()
        self._selector.register(link, selectors.EVENT_READ)
        if len(self._strangers) > _MAX_STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _identify(self, link: socket.socket) -> None:
        stranger = self._strangers[link]
        try:
            data = link.recv(_TOKEN_BYTES + _RANK_BYTES - len(stranger.received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        stranger.received += data
        if not data:
            self._drop(link)
        elif len(stranger.received) == _TOKEN_BYTES + _RANK_BYTES:
            token, rank = stranger.received[:_TOKEN_BYTES], int.from_bytes(stranger.received[_TOKEN_BYTES:])
            if hmac.compare_digest(token, self._token) and 0 < rank < self._size:
                self._admit(link, rank)
            else:
                self._drop(link)

    def _admit(self, link: socket.socket, rank: int) -> None:
        self._selector.unregister(link)
        del self._strangers[link]
        with suppress(OSError):  # without this answer the rank calls again
            link.send(_WELCOME)
        _configure(link)
        if rank in self._links:
            self._links[rank].close()
        self._links[rank] = link

    def _drop(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        del self._strangers[link]
        link.close()


def call(address: tuple[str, int], token: bytes, rank: int) -> socket.socket | None:
    """This rank's connection to the root; None if the root does not answer."""
    end_s = monotonic() + _CONNECT_S
    while monotonic() < end_s:
        with suppress(OSError):
            link = socket.create_connection(address, timeout=_RETRY_S)
            with suppress(OSError):
                link.sendall(token + rank.to_bytes(_RANK_BYTES))
                if link.recv(len(_WELCOME)) == _WELCOME:
                    _configure(link)
                    return link
            link.close()
        sleep(0.2)
    return None


def _configure(link: socket.socket) -> None:
    link.settimeout(_CONNECT_S)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

"""TCP connections of all ranks with the root, beside MPI; made while anybody else may knock on the root's port, too."""

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
from functools import partial
from time import monotonic, sleep

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context

_CONNECT_S = 20.0
_TRY_S = 5.0  # until a rank that gets no answer calls again
_HELLO_S = 5.0  # until the root hangs up on a caller that has not said who it is
_MOST_STRANGERS = 256  # callers that have not said it yet; for one more, the root hangs up on the oldest
_LOOK_S = 0.02  # for the end, and for those to hang up on
_MOST_WAITING = 1024  # to be answered, at least; the system may allow fewer
_TOKEN_BYTES, _RANK_BYTES = 16, 4
_WELCOME = b"!"
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def connect(context: Context, interface: str | None, say: Callable[[str], None]) -> dict[int, socket.socket]:
    """Collective. Connections by rank: the root's to all others, theirs to the root.

    interface: the root's network interface to listen on; None: that by which the other hosts reach it. Ranks that
    cannot be connected are named to `say` and left out.
    """
    world = context.world
    if world.size == 1:
        return {}
    addresses = _addresses(context, interface)
    token = context.on_root(partial(secrets.token_bytes, _TOKEN_BYTES))
    door = Door(_listen(addresses, world.size), token, world.size) if world.is_root else None
    address = context.on_root(lambda: door.address if door else None)
    mine = call(address, token, world.rank) if address and not world.is_root else None
    reached = context.all_gather(world.is_root or mine is not None)
    if door is None:
        return {} if mine is None else {0: mine}
    links = door.close()
    lost = [rank for rank in range(world.size) if not reached[rank]]
    for rank in set(lost) & links.keys():
        links.pop(rank).close()  # it has given up
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        at = address[0] if address else world.host
        say(f"warning: rank {lost[0]}{others} cannot reach rank 0 at {at} over TCP: nobody watches over them")
    return links


# ------------------------------------------------------------------------------------------- where to listen


def _addresses(context: Context, interface: str | None) -> list[str]:
    """Collective. Where the root may listen, the best first."""
    world = context.world
    hosts = context.all_gather(world.host)
    if len(set(hosts)) == 1:
        return [_LOOPBACK]
    if interface is not None:
        return context.on_root(lambda: [_address_of(interface)])
    asks = world.host != hosts[0] and world.local_rank == 0
    seen = context.all_gather(_resolved(hosts[0]) if asks else None)
    return [address for address, _ in Counter(filter(None, seen)).most_common()]


def _resolved(host: str) -> str | None:
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
                f"Name one that has, of {known}, or leave it out.",
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _listen(addresses: Sequence[str], size: int) -> socket.socket | None:
    """At the first address that is one of this host's; None where none is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = size + _MOST_STRANGERS + 512
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted) if hard > 0 else wanted, hard))
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=max(size, _MOST_WAITING))
    return None


# ----------------------------------------------------------------------------------------------- connecting


class _Stranger:
    """A caller that has not said yet who it is."""

    def __init__(self) -> None:
        self.said = b""
        self.until_s = monotonic() + _HELLO_S


class Door:
    """The root's end while ranks connect. A thread accepts who sends the token; other callers cost next to nothing.

    What a caller says is read up to the length of a token and a rank. It has some seconds for that, and is hung up on
    earlier where there are too many of its kind; a rank calls again then.
    """

    def __init__(self, server: socket.socket | None, token: bytes, size: int) -> None:
        self._server, self._token, self._size = server, token, size
        self.address: tuple[str, int] | None = server.getsockname()[:2] if server else None
        self._links: dict[int, socket.socket] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}  # the oldest first
        self._selector = selectors.DefaultSelector()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        if server:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            self._thread.start()

    def close(self) -> dict[int, socket.socket]:
        """Accepts nobody from now on. Returns the connections by rank."""
        self._closed.set()
        if self._server:
            self._thread.join()
            self._server.close()
        for link in list(self._strangers):
            self._hang_up(link)
        self._selector.close()
        return self._links

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_LOOK_S):
                if key.fileobj is self._server:
                    self._accept(self._server)
                elif key.fileobj in self._strangers:  # not hung up on since
                    self._hear(key.fileobj)
            for link in [link for link, each in self._strangers.items() if each.until_s < monotonic()]:
                self._hang_up(link)

    def _accept(self, server: socket.socket) -> None:
        try:
            link, _ = server.accept()
        except OSError:  # it has gone again, or descriptors are short
            sleep(0.001)
            return
        link.setblocking(False)
        self._strangers[link] = _Stranger()
        self._selector.register(link, selectors.EVENT_READ)
        if len(self._strangers) > _MOST_STRANGERS:
            self._hang_up(next(iter(self._strangers)))

    def _hear(self, link: socket.socket) -> None:
        caller = self._strangers[link]
        try:
            data = link.recv(_TOKEN_BYTES + _RANK_BYTES - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        caller.said += data
        if not data:
            self._hang_up(link)
        elif len(caller.said) == _TOKEN_BYTES + _RANK_BYTES:
            rank = int.from_bytes(caller.said[_TOKEN_BYTES:])
            if hmac.compare_digest(caller.said[:_TOKEN_BYTES], self._token) and 0 < rank < self._size:
                self._let_in(link, rank)
            else:
                self._hang_up(link)

    def _let_in(self, link: socket.socket, rank: int) -> None:
        self._selector.unregister(link)
        del self._strangers[link]
        with suppress(OSError):  # it calls again
            link.send(_WELCOME)
        _settle(link)
        if rank in self._links:
            self._links[rank].close()
        self._links[rank] = link

    def _hang_up(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        del self._strangers[link]
        link.close()


def call(address: tuple[str, int], token: bytes, rank: int) -> socket.socket | None:
    """This rank's connection with the root; None where the root does not answer."""
    end_s = monotonic() + _CONNECT_S
    while monotonic() < end_s:
        with suppress(OSError):
            link = socket.create_connection(address, timeout=_TRY_S)
            try:
                link.sendall(token + rank.to_bytes(_RANK_BYTES))
                if link.recv(len(_WELCOME)) == _WELCOME:
                    _settle(link)
                    return link
            except OSError:
                pass
            link.close()
        sleep(0.2)
    return None


def _settle(link: socket.socket) -> None:
    link.settimeout(_CONNECT_S)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

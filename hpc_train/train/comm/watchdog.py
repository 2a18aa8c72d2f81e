"""Dead and stuck ranks: who they are and where they stand, told within seconds instead of a silent hang.

MPI cannot tell: a rank that waits for a dead one waits for ever. Each rank keeps a TCP connection to the root and says
now and then which step it is at and where in the program. A connection that breaks is a rank that died. Where no step
ends for `run.stall_s`, the ranks that do not wait for others are those that others wait for.
"""

import json
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

from hpc_train.core import settings
from hpc_train.train.comm.connections import connect
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.startup import end_job

_MOST_BEAT_S = 15.0
_FAILING_S = 10.0  # a rank that said it fails ends the job by itself within this time
_ONE_SPEAKS_S = 2.0
_NUM_FRAMES = 15
_MOST_LINE_BYTES = 1 << 17  # of what a rank says at once
_MESSAGES: list[dict[str, Any]] = [{"ends": bool}, {"step": int | None, "waits": bool, "stack": str}]


@dataclass
class Peer:
    """What is known of another rank."""

    host: str
    step: int | None = None  # None: not in the loop, where silence alone is judged
    heard_s: float = field(default_factory=monotonic)
    waits: bool = False
    stack: str = ""
    ended: bool = False
    failing_s: float | None = None


class Watchdog:
    """This rank's end: `step` is what it is at, set by the loop; None outside it. Use as a context manager."""

    def __init__(self, context: Context, stall_s: float, links: dict[int, socket.socket]) -> None:
        self.step: int | None = None
        self._context, self._stall_s, self._links = context, stall_s, links
        self._beat_s = min(_MOST_BEAT_S, stall_s / 4) if stall_s else _MOST_BEAT_S
        self._is_root = context.world.is_root
        self._main = threading.get_ident()
        self._peers = {
            rank: Peer(host) for rank, host in enumerate(context.all_gather(context.world.host)) if rank in links
        }
        self._received = dict.fromkeys(links, b"")
        self._ended, self._wake = threading.Event(), socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._links:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._wake[0].send(b"!")
        if self._thread.is_alive():
            self._thread.join()
        for link in self._links.values():
            _send(link, {"ends": kind is None})
        for end in self._wake:
            end.close()

    def _state(self) -> dict[str, Any]:
        """What this rank says of itself. Without the source's lines: reading them would ask the file system."""
        frame = sys._current_frames().get(self._main)
        codes = []
        for each, line in traceback.walk_stack(frame) if frame else ():
            if each.f_globals.get("__name__", "").startswith("hpc_train.cli."):
                break  # what called the training tells nothing
            codes.append((each.f_code, line))
        lines = [f"  {code.co_filename}:{line} {code.co_name}" for code, line in codes[:_NUM_FRAMES]]
        return {"step": self.step, "waits": bool(self._context.waiting), "stack": "\n".join(lines)}

    def _run(self) -> None:
        """The root hears all ranks, rank 1 the root alone: who else could tell that the root is late?"""
        speaks_to = self._links.get(1 if self._is_root else 0)
        next_beat_s, moved_s, awake_s, longest_s = 0.0, monotonic(), monotonic(), 0.0
        lowest: int | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[1], selectors.EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while not self._ended.is_set():
                if monotonic() >= next_beat_s and speaks_to is not None:
                    _send(speaks_to, self._state())
                    next_beat_s = monotonic() + self._beat_s
                ready = selector.select(self._beat_s)
                # This rank itself was stopped, and heard nobody: as long as others may take to say so of it (`_judge`),
                # less the beat in which they had heard of it last.
                if monotonic() - awake_s > self._beat_s + 1:
                    self._ended.wait(_ONE_SPEAKS_S)  # if the job is being ended for that, let it
                    moved_s = monotonic()
                    for peer in self._peers.values():
                        peer.heard_s = moved_s
                for key, _ in ready:
                    if key.data is not None and not self._hear(key.data):
                        selector.unregister(key.fileobj)
                steps = [step for step in (self.step, *(p.step for p in self._peers.values())) if step is not None]
                awake_s = monotonic()
                if min(steps, default=None) != lowest:
                    if lowest is not None:
                        longest_s = max(longest_s, awake_s - moved_s)
                    lowest, moved_s = min(steps, default=None), awake_s
                self._judge(awake_s - moved_s, longest_s)

    def _hear(self, rank: int) -> bool:
        """Takes in what a rank says; whether more is to be expected. A broken connection is a dead rank."""
        peer = self._peers[rank]
        try:
            data = self._links[rank].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if peer.failing_s is None and not self._ended.wait(0.1):
                self._accuse(rank, "has died: its connection broke")
            return False
        *lines, begun = (self._received[rank] + data).split(b"\n")
        self._received[rank] = begun[-_MOST_LINE_BYTES:]
        for message in filter(None, map(_understood, lines)):
            if "ends" in message:
                peer.ended, peer.step = message["ends"], None
                peer.failing_s = None if peer.ended else monotonic()
                return not peer.ended
            peer.heard_s, peer.step = monotonic(), message["step"]
            peer.waits, peer.stack = message["waits"], message["stack"]
        return True

    def _judge(self, still_s: float, longest_s: float) -> None:
        """Ends the job if no step ends or a rank is silent for too long, or one that fails does not end.

        longest_s: of the steps so far. One that takes as long again is no reason.
        """
        for rank, peer in self._peers.items():
            if peer.failing_s is not None and monotonic() - peer.failing_s > _FAILING_S:
                self._accuse(rank, "failed and did not end the job")
        if not self._stall_s:
            return
        in_loop = self.step is not None and still_s >= max(self._stall_s, 2 * longest_s)
        for rank, peer in self._peers.items():
            quiet_s = monotonic() - peer.heard_s
            most_s = 2 * self._beat_s + 1 if in_loop else self._stall_s + self._beat_s + 1
            if quiet_s > most_s and not peer.ended and (self._is_root or self._context.world.rank == 1):
                self._accuse(rank, f"is late: nothing heard of it for {quiet_s:.0f} s")
        if not in_loop or not self._is_root:
            return
        for rank, peer in self._peers.items():
            if not peer.waits:
                self._accuse(rank, f"is late: at step {peer.step} for {still_s:.0f} s, while others wait for it")
        mine = self._state()
        words = "and all others wait for each other" if mine["waits"] else "is late"
        self._accuse(0, f"{words}: no step has ended for {still_s:.0f} s", mine["stack"])

    def _accuse(self, rank: int, what: str, stack: str | None = None) -> None:
        """Says which rank is at fault, in the last line, and ends the job."""
        if not self._is_root and self._context.world.rank > 1:
            sleep(_ONE_SPEAKS_S)  # rank 1 ends the job meanwhile
        host = self._peers[rank].host if rank in self._peers else self._context.world.host
        ago_s = monotonic() - self._peers[rank].heard_s if stack is None else 0
        stack = self._peers[rank].stack if stack is None else stack
        head = [f"hpc-train: where rank {rank} was {ago_s:.0f} s ago, innermost first:", stack] if stack else []
        try:
            sys.stderr.write("\n".join([*head, f"hpc-train: rank {rank} on {host} {what}", ""]))
            sys.stderr.flush()
            for link in self._links.values():
                _send(link, {"ends": False})  # or they would find next that this rank has died, and say so last
        finally:  # even where nothing can be written any more
            end_job(self._context, 1)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    try:
        link.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # its other end is gone: hearing from it tells so, too


def _understood(line: bytes) -> dict[str, Any]:
    """What a rank says; {} for what none of them would say."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    for kinds in _MESSAGES:
        if isinstance(message, dict) and message.keys() == kinds.keys():
            fits = all(isinstance(message[name], kind) for name, kind in kinds.items())
            return message if fits else {}
    return {}


@contextmanager
def open_watchdog(context: Context, run: settings.Run, say: Callable[[str], None]) -> Iterator[Watchdog]:
    """Collective. Connects every rank with the root; ranks that cannot be are named and left unwatched."""
    links = connect(context, run.interface, say)
    try:
        with Watchdog(context, run.stall_s, links) as watch:
            yield watch
    finally:
        for link in links.values():
            link.close()

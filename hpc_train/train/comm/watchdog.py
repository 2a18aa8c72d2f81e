"""The watchdog: names a rank that has died or hangs, with its stack, and ends the job within seconds.

MPI does not help: a rank that waits for a dead one waits for ever. Each rank keeps a TCP connection to the first rank
of its node, and these to the root. Along them travel heartbeats: the step, the stack, and whether the rank waits for
other ranks (`Context.waiting`). The first rank of a node passes on only the one of its ranks that is most likely at
fault, so that the root hears nodes and not ranks. A connection that breaks is a rank that died. If no step ends for
`run.stall_s`, the root names a rank that does not wait.
"""

import faulthandler
import json
import os
import re
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

from hpc_train.core.settings import Run
from hpc_train.train.comm.connections import Link, connect
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.startup import end_job

_MAX_BEAT_S = 15.0
_CHECKS_PER_BEAT = 8
_FAILING_S = 10.0  # a rank that announced its failure ends the job itself within this time
_RANK_1_FIRST_S = 2.0
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)  # as faulthandler writes it
_MAX_STACK_BYTES = 1 << 20  # of all threads
_MAX_FRAMES = 15
_MAX_LINE_BYTES = 1 << 17
_MESSAGES: list[dict[str, Any]] = [
    {"ends": bool},
    {"rank": int, "step": int | None, "waits": bool, "stack": str, "ago_s": int | float, "lowest": int | None},
]


@dataclass(frozen=True)
class Sighting:
    """What a rank was last seen doing."""

    rank: int
    step: int | None = None  # None outside the loop, where only silence counts
    waits: bool = False
    stack: str = ""
    seen_s: float = field(default_factory=monotonic)  # by this rank's clock

    @property
    def ago_s(self) -> float:
        return monotonic() - self.seen_s


@dataclass
class Peer:
    """The other end of a connection: a rank, and those that it speaks for."""

    host: str
    suspect: Sighting  # the one of them that is most likely at fault
    lowest: int | None = None  # their lowest step
    heard_s: float = field(default_factory=monotonic)
    ended: bool = False
    failing_s: float | None = None

    @property
    def silent_s(self) -> float:
        return monotonic() - self.heard_s


class _Progress:
    """How long the slowest rank has been at its step, and the longest time that a step took so far."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._lowest: int | None = None
        self._since_s = monotonic()

    @property
    def stalled_s(self) -> float:
        return monotonic() - self._since_s

    def update(self, steps: list[int]) -> None:
        """steps: of the ranks in the loop."""
        lowest = min(steps, default=None)
        if lowest != self._lowest:
            if self._lowest is not None:
                self.longest_s = max(self.longest_s, self.stalled_s)
            self._lowest = lowest
            self.restart()

    def restart(self) -> None:
        self._since_s = monotonic()


class Watchdog:
    """This rank's end. The loop sets `step`; None outside it. Use as a context manager.

    links: to the rank's parent in the tree, and to its children. num_outer_frames: frames of the main thread that
    called the loop, which stacks omit.
    """

    def __init__(self, context: Context, stall_s: float, links: dict[int, Link], num_outer_frames: int = 0) -> None:
        self.step: int | None = None
        self._context, self._stall_s = context, stall_s
        self._links = {rank: link.socket for rank, link in links.items()}
        self._num_outer_frames = num_outer_frames
        self._beat_s = min(_MAX_BEAT_S, stall_s / 4) if stall_s else _MAX_BEAT_S
        world = context.world
        self._is_root = world.is_root
        self._parent = world.node_root if world.rank != world.node_root else 0
        # Heartbeats go towards the root, and from the root to rank 1, which detects a root that hangs.
        self._listener = self._links.get(1 if self._is_root else self._parent)
        self._main_thread = threading.get_ident()
        self._peers = {rank: Peer(link.host, Sighting(rank)) for rank, link in links.items()}
        self._children = [peer for rank, peer in self._peers.items() if self._is_root or rank != self._parent]
        self._received = dict.fromkeys(links, b"")
        self._progress = _Progress()
        self._next_beat_s, self._next_check_s, self._awake_s = 0.0, 0.0, monotonic()
        self._ended, self._wake = threading.Event(), socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

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

    # ----------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[1], selectors.EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while not self._ended.is_set():
                self._send_heartbeat()
                ready = selector.select(self._beat_s / _CHECKS_PER_BEAT)
                self._excuse_own_pause()
                for key, _ in ready:
                    if key.data is not None and not self._receive(key.data):
                        selector.unregister(key.fileobj)
                self._awake_s = monotonic()
                if self._awake_s >= self._next_check_s:  # not at each message: there are as many as nodes
                    self._next_check_s = self._awake_s + self._beat_s / _CHECKS_PER_BEAT
                    self._progress.update(self._steps())
                    self._check()

    def _steps(self) -> list[int]:
        """The lowest steps of this rank and of those below it."""
        return [step for step in (self.step, *(peer.lowest for peer in self._children)) if step is not None]

    def _send_heartbeat(self) -> None:
        if self._listener is None or monotonic() < self._next_beat_s:
            return
        suspect = self._sight_self() if self._is_root else self._suspect()
        _send(
            self._listener,
            {
                "rank": suspect.rank,
                "step": suspect.step,
                "waits": suspect.waits,
                "stack": suspect.stack,
                "ago_s": suspect.ago_s,
                "lowest": min(self._steps(), default=None),
            },
        )
        self._next_beat_s = monotonic() + self._beat_s

    def _suspect(self) -> Sighting:
        """Of this rank and those below it the one most likely at fault: silent, else not waiting, else the slowest."""
        seen = [self._sight_self(), *(peer.suspect for peer in self._children if not peer.ended)]
        return min(seen, key=lambda each: (not self._is_silent(each), each.waits, each.step is None, each.step or 0))

    def _sight_self(self) -> Sighting:
        stack = _stack_of(self._main_thread, self._num_outer_frames)
        return Sighting(self._context.world.rank, self.step, bool(self._context.waiting), stack)

    def _is_silent(self, sighting: Sighting) -> bool:
        """Whether heartbeats are missing: on the way to the root a rank is seen up to two beats ago."""
        return sighting.ago_s > 2 * self._beat_s + 1

    def _excuse_own_pause(self) -> None:
        """If this process itself was stopped (SIGSTOP, a suspended guest), it received nothing: no peer is silent."""
        if monotonic() - self._awake_s <= self._beat_s + 1:
            return
        self._ended.wait(_RANK_1_FIRST_S)  # another rank may be ending the job because of this pause: let it
        self._progress.restart()
        for peer in self._peers.values():
            peer.heard_s = monotonic()
            peer.suspect = replace(peer.suspect, seen_s=peer.heard_s)

    def _receive(self, rank: int) -> bool:
        """Reads what a rank has sent. Returns whether more is expected; a broken connection is a dead rank."""
        peer = self._peers[rank]
        try:
            data = self._links[rank].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if peer.failing_s is None and not self._ended.wait(0.1):
                self._end_job_for(rank, "has died: its connection broke")
            return False
        *lines, begun = (self._received[rank] + data).split(b"\n")
        self._received[rank] = begun[-_MAX_LINE_BYTES:]
        for message in filter(None, map(_parse, lines)):
            if "ends" in message:
                peer.ended, peer.lowest = message["ends"], None
                peer.failing_s = None if peer.ended else monotonic()
                return not peer.ended
            peer.heard_s, peer.lowest = monotonic(), message["lowest"]
            seen_s = peer.heard_s - message["ago_s"]
            peer.suspect = Sighting(message["rank"], message["step"], message["waits"], message["stack"], seen_s)
        return True

    # ----------------------------------------------------------------------------------------------- the verdict

    def _check(self) -> None:
        """Ends the job if no step ends or a rank is silent for too long, or if a failing rank does not end it."""
        for rank, peer in self._peers.items():
            if peer.failing_s is not None and monotonic() - peer.failing_s > _FAILING_S:
                self._end_job_for(rank, "failed and did not end the job")
        if not self._stall_s:
            return
        # Twice the longest step so far: a healthy one may take as long again.
        limit_s = max(self._stall_s, 2 * self._progress.longest_s)
        is_stalled = self.step is not None and self._progress.stalled_s >= limit_s
        self._check_silence(2 * self._beat_s + 1 if is_stalled else self._stall_s + self._beat_s + 1)
        if is_stalled and self._is_root:
            self._end_stalled_job()

    def _check_silence(self, limit_s: float) -> None:
        if not self._is_root and self._context.world.rank != 1:
            return  # the root sends heartbeats to rank 1 alone
        for rank, peer in self._peers.items():
            if peer.ended or not (self._is_root or rank == self._parent):
                continue
            seen = peer.suspect
            if peer.silent_s > limit_s:
                self._end_job_for(rank, f"is late: no heartbeat for {peer.silent_s:.0f} s")
            elif seen.rank != rank and seen.ago_s > limit_s + self._beat_s:  # it reached us a beat later
                self._end_job(seen, peer.host, f"is late: no heartbeat for {seen.ago_s:.0f} s")

    def _end_stalled_job(self) -> None:
        stalled_s = self._progress.stalled_s
        for peer in self._peers.values():
            seen = peer.suspect
            if not seen.waits:
                late = f"is late: at step {seen.step} for {stalled_s:.0f} s, while others wait for it"
                self._end_job(seen, peer.host, late)
        own = self._sight_self()
        what = "and all others wait for each other" if own.waits else "is late"
        self._end_job(own, self._context.world.host, f"{what}: no step has ended for {stalled_s:.0f} s")

    def _end_job_for(self, rank: int, what: str) -> None:
        """Ends the job for the rank at the other end of a connection."""
        if rank == self._parent and self._context.world.rank > 1:
            sleep(_RANK_1_FIRST_S)  # the parent's own parent, or rank 1 for the root, ends the job meanwhile
        peer = self._peers[rank]
        seen = peer.suspect if peer.suspect.rank == rank else Sighting(rank)
        self._end_job(seen, peer.host, what)

    def _end_job(self, seen: Sighting, host: str, what: str) -> None:
        """Prints which rank is at fault, in the last line, and ends the job."""
        at = "outside the steps" if seen.step is None else f"at step {seen.step}"
        where = f"hpc-train: where rank {seen.rank} was {seen.ago_s:.0f} s ago, {at}, innermost first:"
        lines = [where, seen.stack] if seen.stack else []
        try:
            sys.stderr.write("\n".join([*lines, f"hpc-train: rank {seen.rank} on {host} {what}", ""]))
            sys.stderr.flush()
            for link in self._links.values():
                _send(link, {"ends": False})  # or they would report next that this rank has died
        finally:  # even if nothing can be written any more
            end_job(self._context, 1)


def _stack_of(thread: int, num_outer_frames: int) -> str:
    """Innermost first. Without the source's lines: reading them would access the file system, which may hang.

    faulthandler writes the stacks in one call. Walking the frames of a thread that runs meanwhile made Python 3.11.2
    crash.
    """
    file = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        stacks = os.pread(file, _MAX_STACK_BYTES, 0).decode(errors="replace")
    finally:
        os.close(file)
    stack = stacks.partition(f"Thread 0x{thread:016x} ")[2].partition("\n\n")[0]
    frames = _FRAME.findall(stack)
    is_cut = stack.endswith("  ...")  # after 100 frames: the outer ones are missing already
    inner = frames[: len(frames) if is_cut else max(1, len(frames) - num_outer_frames)][:_MAX_FRAMES]
    return "\n".join(f"  {file_name}:{line} {name}" for file_name, line, name in inner)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # the other end is gone, and receiving from it says so
        link.sendall(json.dumps(message).encode() + b"\n")


def _parse(line: bytes) -> dict[str, Any]:
    """The message in a line; {} for anything that no rank sends."""
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
def open_watchdog(context: Context, run: Run, log: Callable[[str], None]) -> Iterator[Watchdog]:
    """Collective. Connects the ranks in a tree. `log` receives a warning of ranks that cannot be watched."""
    links = connect(context, run.interface, log)
    caller = sys._getframe(2)  # 1 is contextlib's
    num_outer_frames = sum(1 for _ in traceback.walk_stack(caller)) - 1
    try:
        with Watchdog(context, run.stall_s, links, num_outer_frames) as watchdog:
            yield watchdog
    finally:
        for link in links.values():
            link.socket.close()

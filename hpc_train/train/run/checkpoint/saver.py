"""Saves checkpoints while the loop trains on: every rank writes its share of one file from a thread.

What a step trains on is a pure function of its number: the state after a step and that number are all that a resumed
run needs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

import numpy as np

from hpc_train.core.errors import UserError, room
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint
from hpc_train.train.comm.context import Context, raised_on_all_ranks
from hpc_train.train.run.checkpoint.copy import HostCopy
from hpc_train.train.run.checkpoint.encoding import Encoded, encode
from hpc_train.train.run.checkpoint.format import Layout
from hpc_train.train.run.checkpoint.retention import newest_in_words, remove_old
from hpc_train.train.run.checkpoint.shares import Part, Share, UnusableCheckpoint
from hpc_train.train.run.checkpoint.together import write_parts_together
from hpc_train.train.run.checkpoint.writing import Draft, Extent, Target, own_parts, write_parts

_POLL_S = 0.002
_FAULT_WORDS = 64  # of 8 bytes, for the reason why a rank could not write
_BY_DISK = "could not be written to"


class Saver:
    """Writes the checkpoints of one run. All ranks call its methods, in the same order.

    A save takes five stages. The root drafts the file and broadcasts where its data sets begin, each rank copies its
    share, writes it from a thread and sends the checksums, and the root seals the file from a thread. `poll` goes on
    with whatever can go on without waiting.

    manifest: what each checkpoint states besides its step. context: with a communicator of its own. log: receives lines
    for the user. sync_records: called on every rank before a checkpoint gets its name; raises UserError if it must not
    get it.
    """

    def __init__(
        self,
        run: RunDir,
        settings: Checkpoint,
        manifest: dict[str, Any],
        context: Context,
        log: Callable[[str], None],
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._settings, self._manifest, self._context, self.log = run, settings, manifest, context, log
        self._sync_records = sync_records
        self._is_root = context.world.is_root
        self._host_copy = HostCopy()
        self._draft: Draft | None = None  # on the root, as is `_layout`
        self._layout: Layout | None = None  # of the save before
        self._thread: threading.Thread | None = None
        self._under_way: Iterator[bool] = iter(())  # the stages to come: see `_stages`
        self._is_under_way = False
        self._is_collective = settings.write == "collective" and context.comm is not None
        self._error: UserError | None = None
        self._has_told_of_room = False
        self.best_step: int | None = None  # whose checkpoint stays, however old
        self._saved_step = -1  # on the root
        self._saved_s = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes a save under way if all ranks end together.

        A rank that fails alone ends the job at once: the newest checkpoint that is whole counts then.
        """
        if error is not None and not raised_on_all_ranks(error) and self._context.world.size > 1:
            return
        self._finish()
        self._report()

    @property
    def is_enabled(self) -> bool:
        """Whether this run keeps checkpoints at all."""
        return self._settings.keep > 0

    @property
    def is_due_by_time(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed. Only the root knows; the others learn it from the root."""
        every_s = self._settings.every_minutes * 60
        return self._is_root and self.is_enabled and 0 < every_s <= monotonic() - self._saved_s

    def is_due_after(self, step: int) -> bool:
        """Whether `checkpoint.every_steps` asks for the state after `step` steps."""
        every = self._settings.every_steps
        return self.is_enabled and every > 0 and step % every == 0

    def save(self, step: int, share: Share) -> None:
        """Collective. Starts to save the state after `step` steps. Waits only while this rank's share is copied.

        A rank without memory for a copy waits until its share is written.
        """
        if not self.is_enabled:
            return
        is_writing = self._thread is not None and self._thread.is_alive()
        num_local = self._context.world.local_size
        has_room = self._is_collective or self._host_copy.has_room(share.parts, num_local)
        told = self._context.all_gather((is_writing, has_room))
        if any(is_writing for is_writing, _ in told):
            if self._is_root:
                last = self._saved_step
                self.log(f"Checkpoint of step {step} skipped: that of step {last} is still being written")
            return
        self._finish()
        self._report()
        self._tell_of_room([rank for rank, (_, has_room) in enumerate(told) if not has_room])
        self._begin(step, share, copies=has_room and not self._is_collective)
        if not self._is_under_way:
            self._report()
        elif not has_room and self._thread is not None:
            self._thread.join()

    def poll(self) -> None:
        """After each step: takes the next stage of a save under way if that needs no waiting."""
        if self._is_under_way and next(self._under_way, None) is None:
            self._is_under_way = False
            self._report()

    def save_now(self, step: int, share: Share) -> str:
        """Collective. Saves, waits, and returns where, in words. Raises UserError if it cannot be written."""
        if not self.is_enabled:
            return "Nothing is saved: checkpoint.keep = 0."
        self._finish()
        self._report()
        self._begin(step, share, copies=False)
        self._finish()
        return self._context.on_root(partial(self._saved_in_words, step))

    def save_now_or_explain(self, step: int, share: Share) -> str:
        """Collective. `save_now` beside another fault, which the user must hear of: returns why it was not saved."""
        try:
            return self.save_now(step, share)
        except UserError as error:
            return f"{error.what[:1].upper()}{error.what[1:]}. {error.remedy}"

    def _tell_of_room(self, without: list[int]) -> None:
        """without: the ranks that have no memory for a copy."""
        if without and self._is_root and not self._has_told_of_room:
            self._has_told_of_room = True
            whose = f"rank {without[0]} saves" if len(without) == 1 else f"{len(without)} ranks save"
            self.log(f"No memory for a copy of what {whose}: training waits while checkpoints are written")

    # ------------------------------------------------------------------------------------------------ stages

    def _begin(self, step: int, share: Share, copies: bool) -> None:
        """Collective. Drafts the file and starts to write it, unless the root finds a reason not to.

        copies: whether to write from a copy of this rank's share, so that training may go on.
        """
        encoded, parts = _encoded(share)
        extents = self._context.gather([Extent.of(part) for part in parts])
        target = self._context.on_root(partial(self._target, step, encoded, extents))
        if target is not None:
            num_pieces = [sum(each.num_pieces for each in of_rank) for of_rank in extents]
            if copies or any(part.numbers.is_cuda for part in parts):
                parts = self._host_copy.take(parts)
            self._under_way = self._stages(step, target, parts, num_pieces)
            self._is_under_way = next(self._under_way, None) is not None

    def _target(self, step: int, encoded: Encoded | TypeError | None, extents: list[list[Extent]]) -> Target | None:
        """On the root: creates the file. None if nothing is to be written."""
        if step == self._saved_step:
            return None
        self._saved_step, self._saved_s = step, monotonic()
        try:
            if isinstance(encoded, TypeError):
                raise encoded
            assert encoded is not None
            manifest = {"step": step, **self._manifest}
            self._draft = Draft(self._run.checkpoint(step), encoded, extents, manifest, self._layout)
            self._layout = self._draft.layout
        except Exception as error:  # noqa: BLE001  training goes on without this checkpoint
            num_bytes = sum(each.end - each.begin for of_rank in extents for each in of_rank)
            self._error = self._as_user_error(step, self._in_words(error, num_bytes))
            return None
        return self._draft.target

    def _stages(self, step: int, target: Target, parts: list[Part], num_pieces: list[int]) -> Iterator[bool]:
        """One save from the copy to its end. Yields where it would have to wait: whether for other ranks.

        num_pieces: of each rank, on the root.
        """
        outcome = np.zeros(_FAULT_WORDS + sum(Extent.of(part).num_pieces for part in parts), np.uint64)
        write = partial(self._write, target, parts, outcome)
        if self._is_collective:
            write()
        else:
            yield from self._in_thread(write)
        counts = [_FAULT_WORDS + num for num in num_pieces]
        request, received = self._context.begin_gather(outcome, counts)
        while not request.Test():
            yield True
        if self._is_root:
            outcomes = np.split(received, np.cumsum(counts)[:-1])
            yield from self._in_thread(partial(self._seal, step, outcomes))

    def _in_thread(self, work: Callable[[], None]) -> Iterator[bool]:
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        yield False
        while self._thread.is_alive():
            yield False

    def _write(self, target: Target, parts: list[Part], outcome: np.ndarray) -> None:
        # Every exception is kept: nobody hears a thread's, and a checkpoint that failed must not pass for saved.
        try:
            outcome[_FAULT_WORDS:] = self._write_parts(target, parts)
            if not self._is_root:
                with suppress(UserError):  # the root reports a lost lock; this rank meets it at its next step
                    self._sync_records()
        except Exception as error:  # noqa: BLE001
            world = self._context.world
            where = f" (rank {world.rank} on {world.host})" if world.size > 1 else ""
            text = (self._in_words(error, target.num_bytes) + where).encode()[: 8 * _FAULT_WORDS]
            outcome.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)

    def _write_parts(self, target: Target, parts: list[Part]) -> np.ndarray:
        if self._is_collective:
            return write_parts_together(target, parts, self._context)
        return write_parts(target, parts)

    def _seal(self, step: int, outcomes: list[np.ndarray]) -> None:
        assert self._draft is not None
        draft, self._draft = self._draft, None
        for outcome in outcomes:
            if fault := outcome[:_FAULT_WORDS].tobytes().rstrip(b"\0").decode(errors="ignore"):
                draft.discard()
                self._error = self._as_user_error(step, fault)
                return
        try:
            draft.seal(np.concatenate([outcome[_FAULT_WORDS:] for outcome in outcomes]), self._sync_records)
            remove_old(self._run, self._settings.keep, step, self.best_step)
        except UserError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001
            self._error = self._as_user_error(step, self._in_words(error, draft.target.num_bytes))

    def _finish(self) -> None:
        """Collective. Takes all stages to come."""
        for waits_for_others in self._under_way:
            if waits_for_others:
                with self._context.waiting:
                    sleep(_POLL_S)
            else:
                sleep(_POLL_S)
        self._is_under_way = False

    # ------------------------------------------------------------------------------------------------ faults in words

    def _saved_in_words(self, step: int) -> str:
        if self._error is not None:
            error, self._error, self._saved_step = self._error, None, -1
            raise error
        return f"Saved: {self._run.checkpoint(step)}."

    def _report(self) -> None:
        if self._error is not None:
            self.log(f"warning: {self._error}")
            self._error, self._saved_step = None, -1

    def _in_words(self, error: Exception, num_bytes: int) -> str:
        """What follows "the checkpoint of step 7"."""
        if isinstance(error, OSError):
            folder = self._run.checkpoints_dir
            return f"{_BY_DISK} {folder}: {error.strerror}; {room(folder, error, num_bytes)}"
        is_explained = isinstance(error, UnusableCheckpoint)
        return f"was not written: {error}" if is_explained else f"was not written: {type(error).__name__}: {error}"

    def _as_user_error(self, step: int, fault: str) -> UserError:
        remedy = newest_in_words(self._run)
        if fault.startswith(_BY_DISK):
            remedy += " Make room, or set run.root to another file system."
        return UserError(f"the checkpoint of step {step} {fault}", remedy)


def _encoded(share: Share) -> tuple[Encoded | TypeError | None, list[Part]]:
    """(the state on the root, or why it cannot be written; all parts of this rank)."""
    if share.state is None:
        return None, share.parts
    try:
        encoded = encode(share.state)
    except TypeError as error:
        return error, share.parts
    return encoded, own_parts(share, encoded)

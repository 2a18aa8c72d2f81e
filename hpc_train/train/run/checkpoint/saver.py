"""Saves checkpoints from a thread while the loop trains on.

All ranks hold the same weights, so the root writes for all. What a step trains on is a pure function of its number: the
state after a step and that number are all that a resumed run needs.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Self

from hpc_train.core.errors import UserError, room
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint
from hpc_train.train.comm.context import raised_on_all_ranks
from hpc_train.train.run.checkpoint.copy import HostCopy
from hpc_train.train.run.checkpoint.format import write
from hpc_train.train.run.checkpoint.pieces import UnusableCheckpoint, assemble, local_pieces, skeleton
from hpc_train.train.run.checkpoint.retention import newest_in_words, remove_old


class Saver:
    """Writes the checkpoints of one run from a thread of the root.

    manifest: what each checkpoint states besides its step. log: receives lines for the user. sync_records: called on
    every rank before a checkpoint gets its name; raises UserError if it must not get it.
    """

    def __init__(
        self,
        run: RunDir,
        settings: Checkpoint,
        manifest: dict[str, Any],
        is_root: bool,
        log: Callable[[str], None],
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._settings, self._manifest, self._is_root, self.log = run, settings, manifest, is_root, log
        self._sync_records = sync_records
        self._thread: threading.Thread | None = None
        self._host_copy = HostCopy()
        self._error: UserError | None = None
        self._saved_step = -1
        self._saved_s = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes a write under way if all ranks end together.

        A rank that fails alone ends the job at once: the newest checkpoint that is whole counts then.
        """
        if error is not None and not raised_on_all_ranks(error) and self._manifest.get("size", 1) > 1:
            return
        self._wait()
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

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts to save the state after `step` steps. The caller waits only while the tensors are copied."""
        if not self.is_enabled or step == self._saved_step:
            return
        if not self._is_root:
            self._wait()
            self._start(self._sync_alone)
            return
        self._saved_s = monotonic()
        if self._thread is not None and self._thread.is_alive():
            self.log(f"Checkpoint of step {step} skipped: that of step {self._saved_step} is still being written")
            return
        self._report()
        copies = self._host_copy.take(local_pieces(state))
        self._saved_step = step
        self._start(self._write, step, assemble(skeleton(state), copies))

    def save_now(self, step: int, state: dict[str, Any]) -> str:
        """Saves, waits, and returns where, in words. Only on the root. Raises UserError if it cannot be written."""
        self._wait()
        self._report()
        self.save(step, state)
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return f"Saved: {self._run.checkpoint(step)}." if self.is_enabled else "Nothing is saved: checkpoint.keep = 0."

    def save_now_or_explain(self, step: int, state: dict[str, Any]) -> str:
        """`save_now` beside another fault, which the user must hear of: returns why if nothing could be saved."""
        try:
            return self.save_now(step, state)
        except UserError as error:
            return f"{error.what[:1].upper()}{error.what[1:]}. {error.remedy}"

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=work, args=arguments, name="checkpoint")
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self) -> None:
        if self._error is not None:
            self.log(f"warning: {self._error}")
            self._error, self._saved_step = None, -1

    def _sync_alone(self) -> None:
        with suppress(UserError):  # the root reports a lost lock or a full disk; this rank meets it at its next step
            self._sync_records()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        # Every exception is kept: nobody hears a thread's, and a checkpoint that failed must not pass for saved.
        try:
            write(self._run.checkpoint(step), state, {"step": step, **self._manifest}, self._sync_records)
            remove_old(self._run, self._settings.keep, step)
        except UserError as error:
            self._error = error
        except OSError as error:
            self._error = self._refused_by_disk(step, state, error)
        except UnusableCheckpoint as error:
            self._error = self._not_written(step, str(error))
        except Exception as error:  # noqa: BLE001
            self._error = self._not_written(step, f"{type(error).__name__}: {error}")

    def _not_written(self, step: int, why: str) -> UserError:
        return UserError(f"the checkpoint of step {step} was not written: {why}", newest_in_words(self._run))

    def _refused_by_disk(self, step: int, state: dict[str, Any], error: OSError) -> UserError:
        folder = self._run.checkpoints_dir
        num_bytes = sum(piece.tensor.nbytes for piece in local_pieces(state))
        return UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error.strerror};"
            f" {room(folder, error, num_bytes)}",
            f"{newest_in_words(self._run)} Make room, or set run.root to another file system.",
        )

"""Checkpoints: saved behind the training's back, whole or not at all, and read back to the bit.

A checkpoint is a folder `step-00001000/` with the tensors in `state.pt` and, in `checkpoint.json`, what they are, their
checksum and its own. All ranks hold the same weights, so the root writes and reads for all. What a step trains on is a
pure function of its number: the state after a step and that number are all that continuing needs.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

import torch
from torch import nn

from hpc_train import __version__
from hpc_train.core.errors import UserError, room
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint
from hpc_train.train.comm.context import Context, raised_on_all_ranks

FORMAT = 2  # 2: the optimizer by names of parameters, the loss scale, a task's own state
STATE, FACTS = "state.pt", "checkpoint.json"


class Unusable(Exception):
    """Why a checkpoint cannot be used, in words."""


# ------------------------------------------------------------------------------------------------ writing


class Saver:
    """Writes checkpoints of one run from a thread of the root.

    facts: what is stated in each checkpoint besides its step. say: called with a line for the user. secure: called
    before a checkpoint comes to have its name, raises UserError where it must not; all that happens on other ranks.
    """

    def __init__(
        self,
        run: RunDir,
        settings: Checkpoint,
        facts: dict[str, Any],
        is_root: bool,
        say: Callable[[str], None],
        secure: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._settings, self._facts, self._is_root, self.say = run, settings, facts, is_root, say
        self._secure = secure
        self._thread: threading.Thread | None = None
        self._copy: dict[str, Any] = {}  # of the state that was saved last
        self._error: UserError | None = None
        self._saved_step = -1
        self._saved_s = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes a write under way where the ranks end together. One that fails alone ends the job at once: the
        newest whole checkpoint counts then.
        """
        if error is not None and not raised_on_all_ranks(error) and self._facts.get("size", 1) > 1:
            return
        self._wait()
        self._report()

    @property
    def keeps(self) -> bool:
        """Whether this run keeps checkpoints at all."""
        return self._settings.keep > 0

    @property
    def is_time(self) -> bool:
        """Whether the root finds that `checkpoint.every_minutes` have passed; the others learn it from the root."""
        every_s = self._settings.every_minutes * 60
        return self._is_root and self.keeps and 0 < every_s <= monotonic() - self._saved_s

    def is_step(self, step: int) -> bool:
        """Whether `checkpoint.every_steps` wants the state after `step` steps."""
        every = self._settings.every_steps
        return self.keeps and every > 0 and step % every == 0

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts to save `state`, that after `step` steps: the caller waits while the tensors are copied, no longer.

        The copy's memory is kept for the next one: new memory takes five times as long as the copy into it.
        """
        if not self.keeps or step == self._saved_step:
            return
        if not self._is_root:
            self._wait()
            self._thread = threading.Thread(target=self._secure_alone, name="checkpoint")
            self._thread.start()
            return
        self._saved_s = monotonic()
        if self._thread is not None and self._thread.is_alive():
            self.say(f"Checkpoint of step {step} left out: the one of step {self._saved_step} is still being written")
            return
        self._report()
        self._copy = _copied(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are under way
        self._saved_step = step
        self._thread = threading.Thread(target=self._write, args=(step, self._copy), name="checkpoint")
        self._thread.start()

    def save_now(self, step: int, state: dict[str, Any]) -> str:
        """Saves and waits for it; says where. Raises UserError where it could not be written. The root only."""
        self._wait()
        self._report()
        self.save(step, state)
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return f"Saved: {self._run.checkpoint(step)}." if self.keeps else "Nothing is saved: checkpoint.keep = 0."

    def try_now(self, *step_and_state: Any) -> str:
        """`save_now` beside a fault that is what the user must hear of: where nothing could be saved, it says why."""
        try:
            return self.save_now(*step_and_state)
        except UserError as error:
            return f"{error.what[:1].upper()}{error.what[1:]}. {error.remedy}"

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self) -> None:
        if self._error is not None:
            self.say(f"warning: {self._error}")
            self._error, self._saved_step = None, -1

    def _secure_alone(self) -> None:
        with suppress(UserError):  # the root's word counts; this rank learns of its own at the next step
            self._secure()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            write(self._run.checkpoint(step), state, {"step": step, **self._facts}, self._secure)
            _keep_newest(self._run, self._settings.keep, step)
        except Unusable as error:
            self._error = UserError(f"the checkpoint of step {step} was not written: {error}", _stands(self._run))
        except UserError as error:
            self._error = error
        except OSError as error:
            folder = self._run.checkpoints_dir
            what = f"the checkpoint of step {step} could not be written to {folder}: {error.strerror}"
            needed = room(folder, error, sum(each.nbytes for each in _tensors(state)))
            remedy = f"{_stands(self._run)} Make room, or set run.root to another file system."
            self._error = UserError(f"{what}; {needed}", remedy)
        except Exception as error:  # noqa: BLE001  nobody hears a thread's error, and not saved must not pass for saved
            what = f"the checkpoint of step {step} was not written: {type(error).__name__}: {error}"
            self._error = UserError(what, _stands(self._run))


def write(
    folder: Path, state: dict[str, Any], facts: dict[str, Any], secure: Callable[[], None] = lambda: None
) -> None:
    """Writes a checkpoint that is never seen half-written: temporary name, checksum, sync, rename.

    secure: called before the rename. Raises `Unusable` for weights that are no numbers, OSError where the disk
    refuses, and what `secure` raises.
    """
    broken = [name for name, value in state["model"].items() if not _is_finite(value)]
    if broken:
        raise Unusable(f"{broken[0]} holds NaN or infinity")
    folder.parent.mkdir(exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")  # never that of another job
    try:
        partial.mkdir()
        with (partial / STATE).open("wb") as file:
            digest = _Digest(file)
            try:
                torch.save(state, cast(IO[bytes], digest))
            except RuntimeError:  # torch wraps what its writer's file raised
                if digest.error is None:
                    raise
                raise digest.error from None
            _flush(file)
        with (partial / FACTS).open("w") as text:
            sums = {"bytes": digest.num_bytes, "sha256": digest.hash.hexdigest()}
            facts = {"format": FORMAT, "hpc_train": __version__, **facts, "files": {STATE: sums}}
            json.dump({**facts, "sha256": _sum(facts)}, text, indent=1)
            _flush(text)
        _sync(partial)
        aside = folder.with_name(f".{folder.name}.old")
        secure()
        if folder.exists():  # a damaged one of the same step
            os.rename(folder, aside)
        os.rename(partial, folder)
        _sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Digest:
    """A file for torch.save that sums up what passes through."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def _sum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep_newest(run: RunDir, keep: int, step: int) -> None:
    """Of the checkpoints up to `step`: later ones were refused when the run went on before them, and count for none."""
    for folder in [each for each in found(run) if _step_of(each) <= step][keep:]:
        hidden = folder.with_name(f".{folder.name}.old")  # never half a checkpoint under its name
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def clean(run: RunDir) -> None:
    """Removes what a killed job left half-written. For the holder of the run's lock only."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for folder in run.checkpoints_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for final in (run.meta, run.metrics, run.summary):
        for temporary in run.path.glob(f".{final.name}.*"):
            temporary.unlink(missing_ok=True)


def _mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    """A state with `fn` applied to whatever is neither a dict nor a list."""
    if isinstance(value, dict):
        return {key: _mapped(fn, item) for key, item in value.items()}
    return [_mapped(fn, item) for item in value] if isinstance(value, list) else fn(value)


def _copied(value: Any, place: Any) -> Any:
    """A state's copy in the CPU's memory: in the tensors of `place`, an earlier copy, where these are alike."""
    if isinstance(value, dict):
        known = place if isinstance(place, dict) else {}
        return {key: _copied(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        places = place if isinstance(place, list) and len(place) == len(value) else [None] * len(value)
        return [_copied(item, each) for item, each in zip(value, places, strict=True)]
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(place, torch.Tensor) or (place.shape, place.dtype) != (value.shape, value.dtype):
        place = torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda)
    return place.copy_(value.detach(), non_blocking=value.is_cuda)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _is_finite(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _stands(run: RunDir) -> str:
    kept = found(run)
    return f"The newest valid checkpoint stays {kept[0].name}." if kept else "There is no older checkpoint."


# ------------------------------------------------------------------------------------------------ reading


def found(run: RunDir) -> list[Path]:
    """The checkpoints of a run, the newest first; whether they are whole, only reading them tells."""
    folders = run.checkpoints_dir.glob("step-*")
    return sorted((each for each in folders if each.name[5:].isdecimal()), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


def read_facts(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint. Raises `Unusable`."""
    try:
        facts = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{FACTS} cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise Unusable(f"{FACTS} is not of format {FORMAT}")
    if facts.pop("sha256", None) != _sum(facts):
        raise Unusable(f"{FACTS} is damaged: its checksum differs")
    if type(facts.get("step")) is not int or facts["step"] != _step_of(folder):
        raise Unusable(f"{FACTS} is of step {facts.get('step')}")
    return facts


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, facts) of a checkpoint whose every byte is as it was written. Raises `Unusable`."""
    facts, path = read_facts(folder), folder / STATE
    with ThreadPoolExecutor(1) as beside:  # summing up takes as long as loading, and holds no lock of Python's
        try:
            expected = facts["files"][STATE]
            if (num_bytes := path.stat().st_size) != expected["bytes"]:
                raise Unusable(f"{STATE} has {num_bytes} of {expected['bytes']} bytes")
            digest = beside.submit(_digest, path)
            try:
                state: Any = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # noqa: BLE001  for what it did not write torch raises what it likes
                state = error
            if digest.result() != expected["sha256"]:
                raise Unusable(f"{STATE} is damaged: its checksum differs")
        except (OSError, KeyError, TypeError) as error:
            raise Unusable(f"it is not whole: {error!r}") from None
    if isinstance(state, Exception):
        raise Unusable(f"{STATE} holds no tensors: {state!r}")
    if not isinstance(state, dict) or set(state) != {"model", "optimizer", "loss_scale", "task"}:
        raise Unusable(f"{STATE} holds no model and optimizer")
    for name, value in _leaves(state, ""):
        if isinstance(value, torch.Tensor) and not _is_plain(value, expected["bytes"]):
            raise Unusable(f"{STATE}: {name} is no plain tensor of the CPU")
    return state, facts


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in a state that is neither a dict nor a list, with where it stands."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _is_plain(tensor: torch.Tensor, most_bytes: int) -> bool:
    """Whether it is as `write` leaves them; others (sparse, of no device, larger than their file) need care or room."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return is_dense and not tensor.requires_grad and tensor.numel() * tensor.element_size() <= most_bytes


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_newest(
    run: RunDir,
    model: nn.Module,
    say: Callable[[str], None],
    misfit: Callable[[dict[str, Any]], str | None] = lambda state: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, facts) of the newest good checkpoint that fits `model`; ({}, {}) where a run has none at all.

    misfit: why the rest of a state does not fit, None where it does. Those passed over are told to `say`. Raises
    UserError where there are some and none is good: beginning anew in silence would throw work away.
    """
    refused = []
    for folder in found(run):
        try:
            state, facts = read(folder)
            _check_fits(state, model)
            if why := misfit(state):
                raise Unusable(f"{STATE}: {why}")
        except Unusable as error:
            refused.append(f"{folder}: {error}")
            say(f"warning: checkpoint passed over: {refused[-1]}")
            continue
        return state, facts
    if refused:
        raise UserError(
            f"no checkpoint of {run.path} can be used:\n    " + "\n    ".join(refused),
            "Begin another run (--resume never), or move these away to begin this one again.",
        )
    return {}, {}


def _check_fits(state: dict[str, Any], model: nn.Module) -> None:
    if not isinstance(state["model"], dict):
        raise Unusable(f"{STATE} holds no model")
    theirs, ours = (
        {name: _kind(each) for name, each in known.items()} for known in (state["model"], model.state_dict())
    )
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise Unusable(f"it is of another model: {name} is {theirs.get(name)} there and {ours.get(name)} here")


def _kind(value: Any) -> object:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def broadcast(state: dict[str, Any], context: Context) -> dict[str, Any]:
    """Collective. The root's state on every rank, by way of MPI: a thousand ranks reading one file would queue."""
    skeleton = context.on_root(lambda: _mapped(_described, state))
    copy = state if context.world.is_root else _mapped(_allocated, skeleton)
    for tensor in _tensors(copy):
        context.broadcast_array(tensor.reshape(-1).view(torch.uint8).numpy())
    return copy


def _described(value: Any) -> Any:
    return _Blank(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _allocated(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, _Blank) else value


class _Blank(NamedTuple):
    """A tensor's place, before its values have come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

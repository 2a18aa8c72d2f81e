"""Format 2: one checkpoint is a folder `step-00001000/`, written whole or not at all and verified to the bit.

`state.pt` holds the tensors (torch.save); `checkpoint.json`, the manifest, says which step and job they belong to and
holds the checksum of `state.pt` and its own. Format 1 kept the optimizer by position; it is no longer read.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch

from hpc_train import __version__
from hpc_train.train.run.checkpoint.pieces import leaves
from hpc_train.train.run.checkpoint.retention import hidden_name, step_of

FORMAT = 2  # the optimizer by names of parameters, the loss scale, a task's own state
STATE, MANIFEST = "state.pt", "checkpoint.json"
_PARTS = {"model", "optimizer", "loss_scale", "task"}  # of a state


class UnusableCheckpoint(Exception):
    """Why a checkpoint cannot be written or used, in words."""


# ------------------------------------------------------------------------------------------------ writing


def write(
    folder: Path, state: dict[str, Any], manifest: dict[str, Any], before_rename: Callable[[], None] = lambda: None
) -> None:
    """Writes a checkpoint: temporary name, checksums, fsync, rename. `before_rename` may raise to prevent it.

    Raises `UnusableCheckpoint` if a weight is NaN or infinite, and OSError if the disk refuses.
    """
    for name, value in state["model"].items():
        if not _is_finite(value):
            raise UnusableCheckpoint(f"{name} holds NaN or infinity")
    folder.parent.mkdir(exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")  # not the name another job uses
    try:
        partial.mkdir()
        checksum = _write_state(partial / STATE, state)
        _write_manifest(partial / MANIFEST, {**manifest, "files": {STATE: checksum}})
        _sync_folder(partial)
        before_rename()
        hidden = hidden_name(folder)
        if folder.exists():  # a damaged checkpoint of the same step
            os.rename(folder, hidden)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
        shutil.rmtree(hidden, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Writes and syncs the tensors; returns their size and checksum."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, cast(IO[bytes], hashing))
        except RuntimeError:  # torch hides the OSError of the file that it writes to
            if hashing.error is None:
                raise
            raise hashing.error from None
        _flush(file)
    return {"bytes": hashing.num_bytes, "sha256": hashing.sha256.hexdigest()}


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    manifest = {"format": FORMAT, "hpc_train": __version__, **content}
    with path.open("w") as file:
        json.dump({**manifest, "sha256": manifest_checksum(manifest)}, file, indent=1)
        _flush(file)


class _HashingFile:
    """A file for torch.save that computes the checksum of what passes through: a second pass would read it back."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_finite(value: Any) -> bool:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return not is_float or bool(torch.isfinite(value).all())


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------ reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """The verified content of checkpoint.json. Raises `UnusableCheckpoint`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableCheckpoint(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UnusableCheckpoint(f"{MANIFEST} is not of format {FORMAT}")
    if manifest.pop("sha256", None) != manifest_checksum(manifest):
        raise UnusableCheckpoint(f"{MANIFEST} is damaged: its checksum differs")
    if type(manifest.get("step")) is not int or manifest["step"] != step_of(folder):
        raise UnusableCheckpoint(f"{MANIFEST} is of step {manifest.get('step')}")
    return manifest


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of a checkpoint whose every byte is as it was written. Raises `UnusableCheckpoint`."""
    manifest = read_manifest(folder)
    try:
        expected = manifest["files"][STATE]
        num_bytes, checksum = expected["bytes"], expected["sha256"]
        state = _read_state(folder / STATE, num_bytes, checksum)
    except (OSError, KeyError, TypeError) as error:
        raise UnusableCheckpoint(f"it is incomplete: {error!r}") from None
    if isinstance(state, Exception):
        raise UnusableCheckpoint(f"{STATE} holds no tensors: {state!r}")
    if not isinstance(state, dict) or set(state) != _PARTS:
        raise UnusableCheckpoint(f"{STATE} holds no model and optimizer")
    for name, value in leaves(state):
        if isinstance(value, torch.Tensor) and not _is_plain(value, num_bytes):
            raise UnusableCheckpoint(f"{STATE}: {name} is no plain tensor of the CPU")
    return state, manifest


def _read_state(path: Path, num_bytes: int, checksum: str) -> Any:
    """What torch loads, or the exception it raised. Raises `UnusableCheckpoint` if the checksum differs."""
    if (found := path.stat().st_size) != num_bytes:
        raise UnusableCheckpoint(f"{STATE} has {found} of {num_bytes} bytes")
    # Hashing takes as long as loading, and releases Python's lock.
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_sha256, path)
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file makes torch raise any kind of exception
            state = error
        if hashed.result() != checksum:
            raise UnusableCheckpoint(f"{STATE} is damaged: its checksum differs")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_plain(tensor: torch.Tensor, most_bytes: int) -> bool:
    """Whether `write` could have written it: others (sparse, meta, expanded) claim memory that their file never had."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return is_dense and not tensor.requires_grad and tensor.numel() * tensor.element_size() <= most_bytes

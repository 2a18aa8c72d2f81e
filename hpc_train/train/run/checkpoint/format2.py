"""Format 2, which earlier versions wrote: a folder `step-00001000/`. It is still read, and no longer written.

`state.pt` holds the tensors (torch.save); `checkpoint.json`, the manifest, says which step and job they belong to and
holds the checksum of `state.pt` and its own.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hpc_train.train.run.checkpoint.retention import step_of
from hpc_train.train.run.checkpoint.shares import STATE_KEYS, UnusableCheckpoint, leaves

FORMAT = 2
STATE, MANIFEST = "state.pt", "checkpoint.json"


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
    if not isinstance(state, dict) or set(state) != STATE_KEYS:
        raise UnusableCheckpoint(f"{STATE} holds no model and optimizer")
    for name, value in leaves(state):
        if isinstance(value, torch.Tensor) and not _is_plain(value, num_bytes):
            raise UnusableCheckpoint(f"{STATE}: {name} is no plain tensor of the CPU")
    return state, manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path, num_bytes: int, checksum: str) -> Any:
    """What torch loads, or the exception it raised. Raises `UnusableCheckpoint` if the checksum differs."""
    if (found := path.stat().st_size) != num_bytes:
        raise UnusableCheckpoint(f"{STATE} has {found} of {num_bytes} bytes")
    # Hashing takes as long as loading, and releases Python's lock.
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_sha256, path)
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001  a damaged file makes torch raise any kind of exception
            state = error
        if hashed.result() != checksum:
            raise UnusableCheckpoint(f"{STATE} is damaged: its checksum differs")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_plain(tensor: torch.Tensor, most_bytes: int) -> bool:
    """Whether a job could have written it: others (sparse, meta, expanded) claim memory that their file never had."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return is_dense and not tensor.requires_grad and tensor.numel() * tensor.element_size() <= most_bytes


def mapped_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint that `read` found intact, with its tensors mapped: only what is used is read."""
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    return state

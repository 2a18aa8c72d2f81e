"""What a checkpoint of a run holds, for comparison; and one of the format that earlier versions wrote."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_train.core.rundir import RunDir
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.run.checkpoint.reading import StoredTensor, read
from hpc_train.train.run.checkpoint.restore import Plan, check_fits, load_newest
from hpc_train.train.run.checkpoint.shares import map_leaves


def state(path: Path) -> dict[str, Any]:
    """The verified state, of either format."""
    return read(path)[0]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return state(path)["model"]


def write_format_2(folder: Path, content: Any, facts: dict[str, Any]) -> None:
    """Writes a folder as versions before format 3 did, to the byte. content: bytes, or what torch.save takes."""
    folder.mkdir(parents=True)
    path = folder / "state.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    files = {"state.pt": {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}}
    manifest = {"format": 2, "hpc_train": "0.1.0", **facts, "files": files}
    checksum = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "sha256": checksum}, indent=1))


def as_format_2(path: Path) -> Path:
    """Replaces a checkpoint by the folder that an earlier version would have written; returns that."""
    content, manifest = read(path)
    facts = {key: value for key, value in manifest.items() if key not in ("format", "hpc_train")}
    path.unlink()
    write_format_2(path.with_suffix(""), content, facts)
    return path.with_suffix("")


def read_newest(
    run: RunDir, model: nn.Module, log: Callable[[str], None], check: Callable[[dict[str, Any]], None] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of the newest intact checkpoint that fits `model`; ({}, {}) if a run has none."""
    found: dict[str, Any] = {}

    def checked(state: dict[str, Any], manifest: dict[str, Any]) -> None:
        check_fits(state, model)
        if check:
            check(state)

    def plan(state: dict[str, Any]) -> Plan:
        found.update(map_leaves(lambda leaf: leaf.whole() if isinstance(leaf, StoredTensor) else leaf, state))
        return Plan([], lambda: None)

    return found, load_newest(run, Context(World()), checked, plan, log)

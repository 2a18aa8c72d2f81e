"""meta.json of earlier attempts, as far as a further attempt needs it."""

import json
from collections.abc import Iterator
from typing import Any

from hpc_train.core.errors import UserError
from hpc_train.core.paths import read_text
from hpc_train.core.rundir import RunDir

_MAX_BYTES = 1 << 30  # thousands of ranks
_REMEDY = "Repair it if you know what it held (JSON), or begin another run: --resume never"
_TYPES = {"size": int, "started": str, "attempts": list, "energy": dict}
_ENERGY_BY_HOST = ("meters", "unreadable", "shared", "epoch_s", "idle_w", "foreign_cores", "num_cpus")


def read_meta(run: RunDir) -> dict[str, Any]:
    """meta.json, {} if no attempt has written it yet. Raises UserError for a damaged entry that is needed."""
    if not run.meta.exists():
        return {}
    try:
        meta = json.loads(read_text(run.meta, _REMEDY, _MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{run.meta} cannot be read: {error}", _REMEDY) from None
    if not isinstance(meta, dict):
        raise UserError(f"{run.meta} holds {meta!r:.60} instead of an object", _REMEDY)
    for entry, value in _damaged_entries(meta):
        raise UserError(f"{run.meta}: {entry} is {value!r:.60}", _REMEDY)
    return meta


def _damaged_entries(meta: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of entries whose type is not what the recorder wrote; absent ones are those of older versions."""
    wrong = [(entry, meta[entry]) for entry, kind in _TYPES.items() if not isinstance(meta.get(entry, kind()), kind)]
    if wrong:
        yield from wrong
        return
    for number, attempt in enumerate(meta.get("attempts", [])):
        first = attempt.get("first_step") if isinstance(attempt, dict) else None
        if type(first) is not int or first < 0:
            yield f"attempts[{number}]", attempt
        elif not isinstance(attempt.get("continues"), str | None):
            yield f"attempts[{number}].continues", attempt["continues"]
    for entry in _ENERGY_BY_HOST:
        if not isinstance(meta.get("energy", {}).get(entry), dict | None):
            yield f"energy.{entry}", meta["energy"][entry]

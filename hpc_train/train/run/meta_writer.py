"""Writes meta.json at the start and at the end of an attempt."""

import json
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hpc_train.core.resume_rules import said
from hpc_train.core.rundir import write_atomic
from hpc_train.train.comm.clocks import clock_offsets_ns
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement
from hpc_train.train.run.attempt import Attempt
from hpc_train.train.run.provenance import provenance

_OF_ONE_ATTEMPT = ("outcome", "ended", "clock_offsets_ns", "output_lost", "test_until_stop")


class MetaWriter:
    """meta.json of a run while an attempt works on it. `content` is complete on the root, and not used elsewhere."""

    def __init__(self, attempt: Attempt, context: Context, places: list[RankPlacement]) -> None:
        self._attempt, self._context, self._places = attempt, context, places
        self.content: dict[str, Any] = dict(attempt.meta)

    def write_start(self, first_step: int, energy: dict[str, Any], more: dict[str, Any]) -> None:
        """Collective. Adds this attempt, and the offsets of the ranks' clocks now."""
        offsets_ns = clock_offsets_ns(self._context)
        self._context.on_root(partial(self._write_start, first_step, offsets_ns, energy, more))

    def write_end(self, energy: dict[str, Any], more: dict[str, Any]) -> None:
        """Collective. Adds how this attempt ended, and the offsets of the ranks' clocks now."""
        offsets_ns = clock_offsets_ns(self._context)
        self._context.on_root(partial(self._write_end, offsets_ns, energy, more))

    def amend(self, more: dict[str, Any]) -> None:
        """Only on the root. Adds to what `write_end` wrote."""
        self.content.update(more)
        self.content["attempts"][-1].update(more)
        self._write()

    def _write_start(self, first_step: int, offsets_ns: Any, energy: dict[str, Any], more: dict[str, Any]) -> None:
        content, attempt = self.content, self._attempt
        for key in _OF_ONE_ATTEMPT:
            content.pop(key, None)
        content.update(provenance(self._context, self._places))
        content["energy"] = _merged_by_host(content.get("energy", {}), energy)
        content.setdefault("attempts", []).append(
            {
                "attempt": attempt.number,
                "first_step": first_step,
                "started": now(),
                "hosts": content["hosts"],
                "slurm": content["slurm"],
                "continues": str(attempt.source.path.resolve()) if attempt.source else None,
                "changed": {change.key: [change.before, change.now] for change in said(attempt.changes)},
            }
        )
        content.update(more)
        content["clock_offsets_ns"] = {"start": offsets_ns}
        self._write()

    def _write_end(self, offsets_ns: Any, energy: dict[str, Any], more: dict[str, Any]) -> None:
        content = self.content
        content.update(more)
        content["clock_offsets_ns"]["end"] = offsets_ns
        content["energy"] = _merged_by_host(content["energy"], energy)
        content["attempts"][-1].update(more)
        self._write()

    def _write(self) -> None:
        self._attempt.lease.confirm()
        write_atomic(self._attempt.run.meta, json.dumps(self.content, indent=1) + "\n")


def _merged_by_host(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Keeps the entries of hosts that only earlier attempts used; a host that was shared once stays shared."""
    merged = dict(earlier)
    for key, value in new.items():
        if not isinstance(value, dict):
            merged[key] = value
            continue
        before = earlier.get(key) or {}
        merged[key] = {**before, **value}
        if key == "shared":
            merged[key].update({host: True for host, was_shared in before.items() if was_shared is True})
    return merged


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

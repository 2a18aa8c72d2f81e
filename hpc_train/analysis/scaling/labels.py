"""Which configuration keys set groups of runs apart, and the names that say so."""

import json
from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.runs.load import Run

Keys = dict[str, Any]  # config.comparable: "train.global_batch" -> 120


def work(keys: Keys) -> Keys:
    """The keys that decide what is computed, without those that decide how gradients are reduced."""
    return {key: value for key, value in keys.items() if not key.startswith("reduce.")}


def differing_keys(groups: Sequence[Keys]) -> list[str]:
    """The keys that do not have the same value in all groups."""
    every = dict.fromkeys(key for keys in groups for key in keys)
    return [key for key in every if len({json.dumps(keys.get(key)) for keys in groups}) > 1]


def labels(members: Sequence[Sequence[Run]], keys: Sequence[Keys]) -> list[str]:
    """A name for each group: the names of its jobs, and the keys that set it apart from groups of the same name."""
    names = [" + ".join(dict.fromkeys(run.config.name for run in runs)) for runs in members]
    namesakes: dict[str, list[Keys]] = {}
    for name, own in zip(names, keys, strict=True):
        namesakes.setdefault(name, []).append(own)
    return [_label(name, own, namesakes[name]) for name, own in zip(names, keys, strict=True)]


def _label(name: str, own: Keys, namesakes: Sequence[Keys]) -> str:
    strategy = own.get("reduce.strategy")
    # Most keys of [reduce] mean something to one strategy only: they name a group among those of the same strategy.
    of_strategy = differing_keys([keys for keys in namesakes if keys.get("reduce.strategy") == strategy])
    named = [
        key
        for key in differing_keys(namesakes)
        if not key.startswith("reduce.") or key == "reduce.strategy" or key in of_strategy
    ]
    settings = [f"{key} = {own[key]}" if key in own else f"{key} unset" for key in named]
    return f"{name} ({', '.join(settings)})" if settings else name

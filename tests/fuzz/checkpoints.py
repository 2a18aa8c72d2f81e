"""Checkpoints: damaged ones, which must not be used, and ones with valid checksums whose content is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from hpc_train.train.run.checkpoint.reading import read
from hpc_train.train.run.checkpoint.writing import write
from tests import checkpoints
from tests.fuzz.damage import Damage, byte_damages, text_damages
from tests.fuzz.play import Case, Fault, Play, finite_losses

Change = Callable[[dict[str, Any], dict[str, Any]], None]  # of (state, facts)


def _begin(play: Play) -> Path:
    """The folder of a run that was stopped before its last checkpoint."""
    shutil.copytree(play.materials / "runs", play.folder / "runs")
    (play.folder / "job.toml").write_bytes((play.materials / "job.toml").read_bytes())
    (play.folder / "data.h5").symlink_to(play.materials / "data-plain.h5")
    (run,) = (play.folder / "runs/job").iterdir()
    (run / "checkpoints/step-00000004.h5").unlink()
    (run / "summary.json").unlink()
    return run


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.weights(run / "checkpoints/step-00000004.h5")


def _damaged(file: str, damages: list[Damage]) -> Case:
    """file: of a folder of format 2, or "" for a checkpoint of format 3.

    Whatever the damage, the run resumes from the checkpoint before, and ends like an undamaged one.
    """

    def act(play: Play) -> None:
        run = _begin(play)
        path = run / "checkpoints/step-00000002.h5"
        if file:
            path = checkpoints.as_format_2(path) / file
        for _, damage in damages:
            path.write_bytes(damage(path.read_bytes()))
        if play.hpc_train("train", "job.toml", "--resume", "auto").code == 0:
            (undisturbed,) = (play.materials / "runs/job").iterdir()
            (newest,) = [each for each in (play.folder / "runs/job").iterdir() if (each / "summary.json").exists()]
            ours, theirs = _weights(newest), _weights(undisturbed)
            if not all(torch.equal(ours[name], theirs[name]) for name in theirs):
                raise Fault("the weights are not those of a run that nobody damaged")

    return f"{file or 'h5'}: {', '.join(what for what, _ in damages)}", act


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


_VALUES: dict[str, Callable[[Any], Any]] = {
    "lost": lambda old: None,
    "None": lambda old: None,
    "text": lambda old: "x",
    "-1": lambda old: -1,
    "1e999": lambda old: float("inf"),
    "nan": lambda old: float("nan"),
    "a list": lambda old: [1, 2],
    "a dict": lambda old: {"x": 1},
    "another shape": lambda old: torch.ones(3, 2, 1),
    "integers": lambda old: old.to(torch.int64) if isinstance(old, torch.Tensor) else 7,
    "complex": lambda old: old.to(torch.complex64) if isinstance(old, torch.Tensor) else 1.5,
    "doubles": lambda old: old.double() if isinstance(old, torch.Tensor) else 2.5,
    "NaNs": lambda old: old * float("nan") if isinstance(old, torch.Tensor) else float("nan"),
    "sparse": lambda old: old.to_sparse() if isinstance(old, torch.Tensor) else 0,
    "2**70": lambda old: 2**70,
}


def _sealed(changes: list[tuple[str, int, str]]) -> Case:
    def act(play: Play) -> None:
        run = _begin(play)
        path = run / "checkpoints/step-00000002.h5"
        state, facts = read(path)
        for which, number, what in changes:
            _change(state if which == "state" else facts, number, what)
        path.unlink()
        try:
            write(path, state, facts)
        except Exception:  # noqa: BLE001  not even our own writer writes it
            return
        if play.hpc_train("train", "job.toml", "--resume", "auto").code == 0:
            finite_losses(play, play.folder / "runs")

    return f"re-sealed: {changes}", act


def _change(told: dict[str, Any], number: int, what: str) -> None:
    places = [place for place in _places(told) if place]
    *way, last = places[number % len(places)]
    holder: Any = told
    for key in way:
        holder = holder[key]
    if what == "lost" and isinstance(holder, dict):
        del holder[last]
    else:
        holder[last] = _VALUES[what](holder[last])


_changes = st.tuples(st.sampled_from(["state", "state", "facts"]), st.integers(0, 60), st.sampled_from(sorted(_VALUES)))
cases: st.SearchStrategy[Case] = st.one_of(
    st.builds(_damaged, st.sampled_from(["", "", "state.pt"]), st.lists(byte_damages, min_size=1, max_size=2)),
    st.builds(_damaged, st.just("checkpoint.json"), st.lists(text_damages, min_size=1, max_size=2)),
    st.builds(_sealed, st.lists(_changes, min_size=1, max_size=2)),
    st.builds(_sealed, st.lists(_changes, min_size=1, max_size=1)),
)

"""Run directories: copies of real ones with files lost, changed or exchanged."""

import shutil
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.damage import Damage, text_damages
from tests.fuzz.play import Case, Play

_FILES = [
    "config.toml",
    "meta.json",
    "metrics.csv",
    "summary.json",
    "timings/rank-00000.csv",
    "timings/rank-00001.csv",
    "energy/vm.csv",
]
_WORDS = [
    ["--format", "json"],
    ["--format", "csv"],
    ["--format", "md"],
    [],
    ["--target-loss", "1.0"],
    ["--pue", "1.2", "--co2-g-per-kwh", "300"],
]


def _act_on(path: Path, how: str, damages: list[Damage]) -> None:
    if path.is_dir():  # what an earlier change made
        return
    if how == "lost":
        path.unlink(missing_ok=True)
    elif how == "a folder":
        path.unlink(missing_ok=True)
        path.mkdir(exist_ok=True)
    elif how == "a loop":
        path.unlink(missing_ok=True)
        path.symlink_to(path.name)
    elif path.is_file():
        for _, damage in damages:
            path.write_bytes(damage(path.read_bytes()))


def _case(size: int, changes: list[tuple[str, str, list[Damage]]], words: list[str], command: str) -> Case:
    def act(play: Play) -> None:
        for run in (play.materials / "measured").iterdir():
            shutil.copytree(run, play.folder / "runs" / run.name)
        (broken,) = (play.folder / "runs").glob(f"*-np{size}")
        for file, how, damages in changes:
            _act_on(broken / file, how, damages)
        if command == "plan":
            play.hpc_train("plan", "runs", "--predict", "8,16", codes=(0, 1, 2))
        elif command == "compare":
            whole = next(run for run in (play.materials / "measured").iterdir() if run.name == broken.name)
            play.hpc_train("compare", whole, broken, "--save", "baseline.json", codes=(0, 1, 2))
            play.hpc_train("compare", broken, whole, "--json", codes=(0, 1, 2))
        elif command == "trace":
            play.hpc_train("report", broken, "--trace", "trace.json")
        else:
            play.hpc_train("report", "runs", *words)

    told = "; ".join(
        f"{file}: {how if how != 'damaged' else ', '.join(what for what, _ in damages)}"
        for file, how, damages in changes
    )
    return f"{command} {' '.join(words)}, np{size}: {told}", act


_changes = st.lists(
    st.tuples(
        st.sampled_from(_FILES),
        st.sampled_from(["damaged"] * 8 + ["lost", "a folder", "a loop"]),
        st.lists(text_damages, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=2,
)
cases: st.SearchStrategy[Case] = st.builds(
    _case,
    st.sampled_from([1, 2, 2, 4]),
    _changes,
    st.sampled_from(_WORDS),
    st.sampled_from(["report"] * 3 + ["plan", "compare", "trace"]),
)

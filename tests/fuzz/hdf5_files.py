"""HDF5 files: real ones with damaged bytes, and valid ones with wrong content."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import strategies as st

from tests.fuzz.damage import Damage, byte_damages
from tests.fuzz.materials import LAYOUTS, SHAPE
from tests.fuzz.play import Case, Fault, Play, finite_losses

_NAMES = ["train/inputs", "train/targets", "test/inputs", "test/targets"]
_ATTRIBUTES = [
    "scale_factor",
    "add_offset",
    "complete",
    "tokenizer",
    "vocab_size",
    "num_rows",
    "block_rows",
    "algorithm",
]
_ATTRIBUTE_VALUES: list[Any] = [
    0.0,
    -1.0,
    4e227,
    1e-310,
    float("nan"),
    float("inf"),
    "x",
    [1.0, 2.0],
    np.zeros(0),
    2**63 - 1,
    True,
    b"\xff",
    np.zeros((2, 2)),
]
_DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i8", ">i2", "u8", "bool", "c8", "S3", "V4"]
_SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (48,),
    (47, *SHAPE),
    (49, *SHAPE),
    (48, 0),
    (48, 1),
    (0, *SHAPE),
    (48, 30),
    (16, 5, 6),
    (1, *SHAPE),
]
Change = tuple[str, Callable[[h5py.File], None]]


def _attribute(name: str, attribute: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        (file if attribute in ("complete", "tokenizer") else file[name]).attrs[attribute] = value

    return f"{name}@{attribute} = {value!r}", change


def _replaced(name: str, what: str, make: Callable[[h5py.Group, str], None]) -> Change:
    def change(file: h5py.File) -> None:
        del file[name]
        make(file, name)

    return f"{name} is {what}", change


def _typed(name: str, dtype: str, shape: tuple[int, ...]) -> Change:
    return _replaced(name, f"{dtype} {shape}", lambda file, name: file.create_dataset(name, data=np.ones(shape, dtype)))


def _odd(name: str, what: str) -> Change:
    def make(file: h5py.Group, name: str) -> None:
        if what == "vlen":
            file.create_dataset(name, (48,), h5py.vlen_dtype(np.int32))[3] = [1, 2]
        elif what == "text":
            file.create_dataset(name, (48,), h5py.string_dtype())[:] = "a"
        elif what == "compound":
            file.create_dataset(name, (48,), [("a", "f4"), ("b", "i4")])
        elif what == "a group":
            file.create_group(name)
        elif what == "a soft link to itself":
            file[name] = h5py.SoftLink(f"/{name}")
        elif what == "external":
            file[name] = h5py.ExternalLink("nowhere.h5", "x")
        elif what == "a reference":
            file.create_dataset(name, (48,), h5py.ref_dtype)
        elif what == "huge":
            file.create_dataset(name, (2**40, 2**20), "f4", chunks=(1, 1024))
        elif what == "empty":
            file[name] = h5py.Empty("f4")
        elif what == "never written":
            file.create_dataset(name, (48, *SHAPE), "f4")
        elif what == "an enumeration":
            file.create_dataset(name, (48,), h5py.enum_dtype({"a": 1, "b": 2}))

    return _replaced(name, what, make)


def _values(name: str, row: int, value: float) -> Change:
    def change(file: h5py.File) -> None:
        data = file[name][...].astype("f8" if "inputs" in name else "i8")
        data[row % len(data)] = value if "inputs" in name or np.isfinite(value) else -1
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = data
        file[name].attrs.update(attributes)

    return f"{name}[{row}] = {value}", change


_ODD = [
    "vlen",
    "text",
    "compound",
    "a group",
    "a soft link to itself",
    "external",
    "a reference",
    "huge",
    "empty",
    "never written",
    "an enumeration",
]
_names = st.sampled_from(_NAMES)
_changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(_attribute, _names, st.sampled_from(_ATTRIBUTES[:2]), st.sampled_from(_ATTRIBUTE_VALUES)),
    st.builds(_attribute, _names, st.sampled_from(_ATTRIBUTES), st.sampled_from(_ATTRIBUTE_VALUES)),
    st.builds(_typed, _names, st.sampled_from(_DTYPES), st.sampled_from(_SHAPES)),
    st.builds(_odd, _names, st.sampled_from(_ODD)),
    st.builds(
        _values, _names, st.integers(0, 60), st.sampled_from([float("nan"), float("inf"), -5.0, 1e300, 1e30, 0.0, 7.0])
    ),
)


def _use(play: Play) -> None:
    """A file that passes `data check` trains to finite numbers; any other is refused or trains anyway."""
    (play.folder / "job.toml").write_bytes((play.materials / "job.toml").read_bytes())
    play.hpc_train("data", "info", "data.h5", codes=(0, 1, 2), numbers=False)
    checked = play.hpc_train("data", "check", "data.h5", codes=(0, 1, 2), numbers=False)
    ended = play.hpc_train("train", "job.toml")
    if ended.code == 0:
        finite_losses(play, play.folder / "runs")
    elif checked.code == 0 and ended.err.count("data.") == 0:  # a key of the job may be what does not fit
        raise Fault(f"`data check` finds no fault, and `train` says:\n{ended.err}")


def _damaged(layout: str, damages: list[Damage]) -> Case:
    def act(play: Play) -> None:
        data = (play.materials / layout).read_bytes()
        for _, damage in damages:
            data = damage(data)
        (play.folder / "data.h5").write_bytes(data)
        _use(play)

    return f"{layout}: {', '.join(what for what, _ in damages)}", act


def _changed(layout: str, changes: list[Change]) -> Case:
    def act(play: Play) -> None:
        path = Path(shutil.copy(play.materials / layout, play.folder / "data.h5"))
        with h5py.File(path, "r+") as file:
            for _, change in changes:
                try:
                    change(file)
                except (
                    LookupError,
                    TypeError,
                    ValueError,
                    ArithmeticError,
                    OSError,
                    AttributeError,
                ):  # of an earlier change
                    continue
        _use(play)

    return f"{layout}: {', '.join(what for what, _ in changes)}", act


_layouts = st.sampled_from([*(f"data-{name}.h5" for name in LAYOUTS), "prepared.h5"])
cases: st.SearchStrategy[Case] = st.one_of(
    st.builds(_damaged, _layouts, st.lists(byte_damages, min_size=1, max_size=3)),
    st.builds(_changed, _layouts, st.lists(_changes, min_size=1, max_size=2)),
)

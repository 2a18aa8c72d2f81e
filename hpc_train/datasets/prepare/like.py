"""How a prepared table was made: what `prepare table --like FILE` makes another table by."""

from dataclasses import dataclass
from pathlib import Path

import h5py

from hpc_train.core.errors import UserError
from hpc_train.train.data.hdf5_faults import damage_as_user_error
from hpc_train.train.data.table import Table, table_of

_REMEDY = "Name the file that the run trained on, which prepare table wrote: --like TRAIN.h5"


@dataclass(frozen=True)
class Form:
    """See `Columns`."""

    inputs: list[str]
    targets: list[str]
    is_real: bool
    categories: dict[str, list[str]]
    one_hot: bool


def read_form(path: Path) -> Form:
    """The form of the prepared table at `path`. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"--like {path}: no such file", _REMEDY)
    with damage_as_user_error(path), h5py.File(path, "r") as file:
        table = table_of(path, file)
        targets = file.get("train/targets", file.get("test/targets"))
        if table is None or targets is None:
            raise UserError(f"--like {path} is no prepared table with targets", _REMEDY)
        inputs, one_hot = _without_texts(table)
        return Form(inputs, table.target, targets.dtype.kind == "f", table.texts, one_hot)


def _without_texts(table: Table) -> tuple[list[str], bool]:
    """(colour for the columns colour=blue and colour=red, whether there are such)."""
    ones = {name: [f"{name}={text}" for text in texts] for name, texts in table.texts.items()}
    found: list[str] = []
    rest = table.columns
    while rest:
        name = next((name for name, columns in ones.items() if rest[: len(columns)] == columns), None)
        found.append(rest[0] if name is None else name)
        rest = rest[1 if name is None else len(ones[name]) :]
    return found, any(name not in table.columns for name in found)

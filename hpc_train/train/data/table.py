"""What the numbers of a prepared table are: the columns of its inputs, and the texts that numbers stand for."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.train.data.files import Files
from hpc_train.train.data.hdf5_faults import damage_as_user_error

PREPARE_LIKE = "Prepare it with the columns of the training data: hpc-train prepare table NEW.h5 --from CSV --like {}"


@dataclass(frozen=True)
class Table:
    """columns: of the inputs, in order, such as weight and colour=red. target: the columns to learn. texts: of a column
    whose numbers stand for texts, all of them: number i is text i.
    """

    columns: list[str]
    target: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str] | None:
        """The text of each class number; None if the target is no text."""
        return self.texts.get(self.target[0]) if len(self.target) == 1 else None

    def differs(self, other: "Table") -> str:
        """The first column that is another one in `other`, in words; "" if a model takes the inputs of both."""
        for number, (mine, theirs) in enumerate(zip(self.columns, other.columns, strict=False)):
            if mine != theirs:
                return f"column {number + 1} of the inputs is '{theirs}', and '{mine}' in training"
        if len(self.columns) != len(other.columns):
            longer, where = (self, "training") if len(self.columns) > len(other.columns) else (other, "it")
            first = longer.columns[min(len(self.columns), len(other.columns))]
            return f"column '{first}' of the inputs is in {where} alone"
        for name in self.columns:
            if self.texts.get(name) != other.texts.get(name):
                mine, theirs = (_shown(table.texts.get(name)) for table in (self, other))
                return f"column '{name}' has {theirs}, and {mine} in training"
        return ""

    def classes_differ(self, other: "Table") -> str:
        """How the classes of `other` differ, in words; "" if class numbers mean the same in both."""
        if self.classes == other.classes:
            return ""
        mine, theirs = (_shown(table.classes) for table in (self, other))
        return f"the target has {theirs}, and {mine} in training"


def _shown(texts: list[str] | None) -> str:
    if texts is None:
        return "numbers"
    return f"the texts {', '.join(texts[:5])}{', ...' * (len(texts) > 5)}"


def read_table(files: Files, inputs: str) -> Table | None:
    """The table that data set `inputs` was prepared from; None without one. Raises `UserError` if files disagree."""
    width = files.datasets(inputs, "data.inputs")[0].shape[1:]
    first: Table | None = None
    for number, (path, file) in enumerate(zip(files.paths, files.opened, strict=True)):
        found = table_of(path, file)
        found = found if found is not None and (len(found.columns),) == width else None
        if number and found != first:
            why = first.differs(found) if first and found else "one is no prepared table"
            raise UserError(
                f"the files of data.file disagree, {path} and {files.paths[0]}: {why or 'their targets differ'}",
                f"Prepare them alike: hpc-train prepare table FILE --from CSV --like {files.paths[0]}",
            )
        first = found
    return first


def table_of(path: Path, file: h5py.File) -> Table | None:
    """The table that an open file was prepared from; None if it says of none."""
    with damage_as_user_error(path, "attribute columns"):
        attributes = file.attrs
        if "columns" not in attributes or "target" not in attributes:
            return None
        texts = json.loads(attributes["categories"]) if "categories" in attributes else {}
        return Table(_names(attributes["columns"]), _names(attributes["target"]), texts)


def _names(stored: object) -> list[str]:
    """A text, several, or many as one text in JSON."""
    if isinstance(stored, str) and stored.startswith("[") and stored.endswith("]"):
        try:
            listed = json.loads(stored)
        except ValueError:
            listed = None
        if isinstance(listed, list):
            return [str(each) for each in listed]
    return [each.decode() if isinstance(each, bytes) else str(each) for each in np.ravel(np.asarray(stored))]

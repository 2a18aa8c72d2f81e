"""Which data sets belong together, to train on and to test on: by their names, or as a job says."""

import re
from dataclasses import dataclass, field

from hpc_train.core.settings import Config
from hpc_train.datasets.inspect.structure import DatasetInfo

INPUT_WORDS = {"inputs", "input", "x", "data", "images", "image", "features", "samples", "signals"}
TARGET_WORDS = {"targets", "target", "labels", "label", "y", "class", "classes", "outputs", "output"}


def words(name: str) -> set[str]:
    """Of a data set's name, in lower case."""
    return set(re.split(r"[\W_]+", name.lower()))


@dataclass(frozen=True)
class Names:
    """The data sets of a job. Without one, all of a file are looked at, and their names say what they are.

    roles: by name, see `statistics.role_of`; "" if the data set itself shows it. parts: by name, alike for data sets of
    the same meaning, such as inputs to train on and to test on. training: those to train on.
    elsewhere: those in files of their own, and the key that names these. Of data sets called as those to train on are,
    only training's own checks are made: what is counted is kept by name.
    """

    roles: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    elsewhere: dict[str, str] = field(default_factory=dict)

    def has(self, name: str, key: str = "file") -> bool:
        """Whether data set `name` is looked at in the files of data.`key`."""
        return not self.roles or (name in self.roles and self.elsewhere.get(name, "file") == key)

    def role(self, info: DatasetInfo) -> str:
        """As the job says, if the data set is such; "" otherwise."""
        role = self.roles.get(info.name, "")
        are_rows = len(info.shape) > 1
        if role == "labels" and (are_rows or info.dtype.kind not in "iu"):
            return "values" if info.is_numeric else "other"
        return "values" if role == "samples" and not are_rows else role

    def part(self, name: str) -> str:
        return self.parts.get(name) or name.rpartition("/")[2]

    def is_training(self, name: str) -> bool:
        return name in self.training if self.roles else name.startswith("train")


def names_of(config: Config) -> Names:
    """Those that `config` reads."""
    data, kind = config.data, config.task.kind
    input_role = {"classification": "samples", "regression": "samples"}.get(kind, "")
    target_role = {"classification": "labels", "regression": "values"}.get(kind, "")
    if kind in ("language", "masked_language"):
        input_role = "tokens"
    roles, parts, elsewhere = dict[str, str](), dict[str, str](), dict[str, str]()
    training: list[str] = []
    sources: list[tuple[str | list[str], list[str | None], str]] = [(data.inputs, [data.targets, data.offsets], "file")]
    if config.validation.is_due and not data.hold_out:
        others = [data.validation_targets, data.validation_offsets]
        sources.append((data.validation_inputs, others, "validation_file"))
    sources.append((data.test_inputs, [data.test_targets, data.test_offsets], "test_file"))
    if data.hold_out_by is not None:
        roles[data.hold_out_by] = "values"
    for inputs, others, key in sources:
        names = [inputs] if isinstance(inputs, str) else inputs
        for number, name in enumerate(names):
            roles[name], parts[name] = input_role, f"inputs {number}"
        for part, other, role in zip(("targets", "offsets"), others, (target_role, "values"), strict=True):
            if other is not None:
                roles[other], parts[other] = role, part
        read = [*names, *filter(None, others)]
        training += read if key == "file" else []
        if getattr(data, key) is not None and key != "file":
            elsewhere |= dict.fromkeys((name for name in read if name not in training), key)
    return Names(roles, parts, frozenset(training), elsewhere)

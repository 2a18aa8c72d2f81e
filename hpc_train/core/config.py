"""Job files: TOML in, TOML out; every error names the key.

`settings.py` has the keys with their types and defaults, `key_rules.py` says which of them go together.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import broken_rules
from hpc_train.core.paths import read_small
from hpc_train.core.settings import IMPORT_PATTERN, RECORDED, Config, Text

_TABLES = (
    "data.options",
    "data.test_options",
    "data.validation_options",
    "task.options",
    "train.optimizer_options",
    "train.rates",
)  # keys whose values are tables with keys of their own
_LEAST_ALIKE = 0.5  # names of keys, for a guess
_MOST_SHOWN = 300  # characters of a value in a message
_ONE_OF = {
    **{"train.global_batch": "batch_per_rank", "train.batch_per_rank": "global_batch"},
    **{"train.steps": "epochs", "train.epochs": "steps"},
}


@dataclass(frozen=True)
class Loaded:
    """A configuration and, by dotted key, where its value came from: "default", "file NAME" or "--set".

    Keys without an origin do not apply, such as the learning rate of a recorded loop.
    """

    config: Config
    origin: dict[str, str]


def load(path: Path, overrides: tuple[str, ...] = ()) -> Loaded:
    """Defaults, then the TOML file, then `key=value` overrides. Raises `UserError` naming the key."""
    try:
        return _resolved(path, read_toml(path, "configs/softmax-mnist.toml"), overrides)
    except RecursionError:
        raise UserError(f"{path} and --set nest tables too deeply", "A job file has two levels.") from None


def _resolved(path: Path, tree: dict[str, Any], overrides: tuple[str, ...]) -> Loaded:
    origin = dict.fromkeys(flatten(tree), f"file {path.name}")
    for override in overrides:
        key, value = _parse_override(override)
        if key in _ONE_OF:  # --set train.batch_per_rank replaces the file's train.global_batch
            _section(tree, "train", key).pop(_ONE_OF[key], None)
        _set(tree, key, value)
        under = flatten(value, f"{key}.") if isinstance(value, dict) and key not in _TABLES else {key: value}
        origin.update(dict.fromkeys(under, "--set"))
        origin.update(dict.fromkeys((table for table in _TABLES if key.startswith(f"{table}.")), "--set"))
    remedy = "hpc-train config show CONFIG prints every key that a job file has."
    config = _validated(tree, path.name, origin, remedy)
    return Loaded(config, {key: origin.get(key, "default") for key in _known_keys()})


def _validated(tree: dict[str, Any], file: str, origin: dict[str, str], remedy: str) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, file, origin), remedy) from None
    if faults := broken_rules(config):
        remedies = " ".join(dict.fromkeys(fault.remedy for fault in faults))
        raise UserError("\n".join(f"{file}: {fault.what}" for fault in faults), remedies)
    return config


def read_toml(path: Path, example: str) -> dict[str, Any]:
    """The tables of a TOML file. `example` names a shipped file of that kind for messages. Raises `UserError`."""
    content = read_small(path, f"Name a TOML file such as {example}.")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # also for a number of more than 4,300 digits
        raise UserError(f"{path} is not TOML: {error}", f"See {example} for the form.") from None
    except RecursionError:
        raise UserError(f"{path} nests tables too deeply", f"See {example}.") from None


def from_values(values: dict[str, Any], source: str) -> Loaded:
    """The configuration that a program gives as nested values; `source` names that program. Raises `UserError`."""
    origin = dict.fromkeys(flatten(values), source)
    return Loaded(_validated(values, source, origin, f"See the docstring of {source}."), origin)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values without keys that are not set (TOML has no null).

    A recorded loop has only the keys that it gave: defaults of this program's loop say nothing about it.
    """
    tree = config.model_dump(exclude_none=True, exclude_unset=config.task.kind == RECORDED)
    if config.train.epochs is not None:
        del tree["train"]["steps"]  # not set, or made of the epochs
    return tree


def comparable(config: Config) -> dict[str, Any]:
    """The dotted keys that decide how long a step takes and what it computes. Runs are compared only if these agree.

    Runs that differ in their seed alone are repeats: they do the same work on other random numbers.
    """
    ignored = {
        "name",
        "seed",
        "train.log_every",
        "train.steps",
        "train.epochs",
        "train.peak_tflops",
        "reduce.autotune_log_file",
    }
    return {
        key: value
        for key, value in flatten(as_dict(config)).items()
        if key not in ignored and not key.startswith(("run.", "energy.", "checkpoint."))
    }


def dumps(loaded: Loaded) -> str:
    """The resolved configuration as TOML that `load` reads back, each key with where its value came from."""
    tree, origin = loaded.config.model_dump(), loaded.origin
    if loaded.config.train.epochs is not None:
        tree["train"]["steps"] = None
    lines = [_line(key, tree[key], origin[key]) for key in tree if not isinstance(tree[key], dict) and key in origin]
    for section, values in tree.items():
        if isinstance(values, dict):
            known = {key: origin[f"{section}.{key}"] for key in values if f"{section}.{key}" in origin}
            lines += ["", f"[{section}]"] * bool(known)
            lines += [_line(key, values[key], source) for key, source in known.items()]
    return "\n".join(lines) + "\n"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 0.5}} -> {"train.lr": 0.5}. `_TABLES` stay one value each."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key not in _TABLES
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def _line(key: str, value: Any, origin: str) -> str:
    if value is None:
        return f"# {key} =".ljust(40) + "  # not set"
    return f"{key} = {_inline(value)}".ljust(40) + f"  # {origin}"


def _inline(value: Any) -> str:
    """A TOML value in one line; tomli_w writes arrays over several."""
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(tomli_w.dumps({k: 0}).partition(' =')[0] + ' = ' + _inline(v) for k, v in value.items())}}}"
        )
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override}: no key=value", "Write --set train.steps=200")
    value = _toml_value(text)
    if _is_text_key(key):  # --set name=123 is the name "123", and --set name='"x"' the name x
        return key, value if isinstance(value, str) else text
    if value is not None:
        return key, value
    try:
        return key, float(text)  # .5 and 5. are no TOML, but people write them
    except ValueError:
        return key, text


def _toml_value(text: str) -> Any:
    """The value that `text` is in TOML; None if it is none."""
    try:
        # In a table of its own: a second line, a comment or another key is no part of a value.
        tree = tomllib.loads(f"set = {{ value = {text} }}")
    except (ValueError, RecursionError):
        return None
    is_one_value = tree.keys() == {"set"} and tree["set"].keys() == {"value"}
    return tree["set"]["value"] if is_one_value else None


def _is_text_key(key: str) -> bool:
    """Whether the type of the key is text."""
    model: Any = Config
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        model = field.annotation
    # `model is str` for annotated text, too: pydantic keeps constraints apart, except those inside `Text | None`.
    return model is str or model == Text | None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = _section(tree, section, key)
    tree[last] = value


def _section(tree: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    section = tree.setdefault(name, {})
    if not isinstance(section, dict):
        raise UserError(f"--set {key}: {name} is a value, not a section", "See hpc-train config show CONFIG.")
    return section


def _explain(error: ValidationError, file: str, origin: dict[str, str]) -> str:
    """One line for each wrong key."""
    lines: dict[str, list[str]] = {}  # a union reports the same key once for each of its types
    for fault in error.errors(include_url=False):
        if fault["type"] == "extra_forbidden":
            key = ".".join(str(part) for part in fault["loc"])
            what, why = f"{origin.get(key, f'file {file}')}: {unknown_key(key, _known_keys())}", ""
        elif fault["type"] == "missing":
            what, why = f"{file}: {_dotted(fault['loc'])} is required and not set", ""
        elif fault["type"] == "value_error":
            what, why = f"{file}: {fault['ctx']['error']}", ""
        else:
            key = _dotted(fault["loc"])
            what = f"{origin.get(key, f'file {file}')}: {key} = {shown(fault['input'])}"
            why = f"should be a table [{key}]" if fault["type"] == "model_type" else _lower_first(fault["msg"])
            if fault.get("ctx", {}).get("pattern") == IMPORT_PATTERN:
                why = "an import path, 'package.module:name'"
        lines.setdefault(what, []).append(why)
    return "\n".join(what + (f": {', or '.join(why)}" if all(why) else "") for what, why in lines.items())


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say about a key that nobody knows, with the known key whose own name, after the last dot, is nearest."""
    alike = difflib.SequenceMatcher(None, b=key.rpartition(".")[2])

    def likeness(other: str) -> tuple[float, float]:
        alike.set_seq1(other.rpartition(".")[2])
        return alike.ratio(), difflib.SequenceMatcher(None, other, key).ratio()

    near = max((each for each in known if "." in each or "." not in key), key=likeness, default=None)
    is_near = near is not None and likeness(near)[0] >= _LEAST_ALIKE
    return f"unknown key {key}" + (f"; did you mean {near}?" if is_near else "")


def shown(value: Any) -> str:
    """A value in a message, as Python writes it; the beginning of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no numbers of more than 4,300 digits
        return "a value too long to be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _dotted(location: tuple[int | str, ...]) -> str:
    """The key of a fault. pydantic appends the branch of a union to the location."""
    known = _known_keys()
    for end in range(len(location), 0, -1):
        key = ".".join(str(part) for part in location[:end])
        if key in known:
            return key
    return ".".join(str(part) for part in location)


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        keys.append(prefix + name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _known_keys(kind, f"{prefix}{name}.")
    return keys

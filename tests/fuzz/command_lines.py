"""Command lines: any number of existing options, with values that their types allow or forbid."""

import shutil
from collections.abc import Iterator

import click
from hypothesis import strategies as st

from hpc_train.cli.main import cli
from tests.fuzz.play import Case, Play

# These start jobs or examine the whole machine; `submit` has --dry-run.
_LEFT = {("scale",), ("doctor",), ("bench", "io"), ("bench", "allreduce")}
_VALUES = [
    "0",
    "1",
    "-1",
    "2",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "5e-324",
    "1e999",
    "9" * 40,
    "1,2,4",
    "8,16",
    "",
    " ",
    "\x1b[31m",
    "None",
]
_VALUES += [
    "6h",
    "1d12h",
    "12:00:00",
    "99999999:00:00",
    "40kWh",
    "1TWh",
    "0J",
    "json",
    "csv",
    "md",
    "table",
    "EUR",
    "x" * 2000,
    "a=b",
    "train.lr=0.1",
]
_VALUES += [
    "train.lr=nan",
    "train.steps=2\ntrain.lr=3",
    "=",
    "train=",
    ".=1",
    "seed=" + "9" * 5000,
    "1" + "0" * 29,
    "gzip:9",
    "gzip:99",
    "lzf",
    "bpe:300",
    "bytes",
]
_VALUES += [
    "\udcff",
    "é",
    "'",
    '"',
    "=1+1",
    "{",
    "[[[[",
    "train.options={a=",
    "mechanistic",
    "amdahl",
    "usl",
    "kind",
    "a",
    "0x10",
    "1_000",
    "٣",
]
_RIGHT = ["job.toml", "measured", "data.h5", "out.h5", "table", "table.csv", "there", "runs"]


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from _commands(each, (*path, name))
    elif path not in _LEFT:
        yield path, command


_COMMANDS = list(_commands(cli))


@st.composite
def _words(draw: st.DrawFn) -> list[str]:
    path, command = draw(st.sampled_from(_COMMANDS))
    words = list(path)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words += [draw(st.sampled_from(_RIGHT))] if draw(st.integers(0, 9)) else []
    options = [each for each in command.params if isinstance(each, click.Option) and each.name != "help"]
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        words += [option.opts[-1], *([] if option.is_flag else [draw(_value(option))])]
    words += ["--dry-run"] if path == ("submit",) else []
    return words


def _value(option: click.Option) -> st.SearchStrategy[str]:
    pool = st.sampled_from(_VALUES)
    if isinstance(option.type, click.Choice):
        return st.one_of(st.sampled_from(list(option.type.choices)), pool)
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
        return st.one_of(pool, st.integers().map(str), st.floats().map(str))
    return st.one_of(
        pool,
        st.sampled_from(_RIGHT),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
    )


def _case(words: list[str]) -> Case:
    def act(play: Play) -> None:
        (play.folder / "data.h5").symlink_to(play.materials / "data-plain.h5")
        for name in ("job.toml", "table.csv"):
            (play.folder / name).write_bytes((play.materials / name).read_bytes())
        shutil.copytree(play.materials / "measured", play.folder / "measured")
        codes = (0, 1, 2) if words[0] in ("data", "plan") or "--check" in words else (0, 2)
        play.hpc_train(*words, codes=codes)

    return " ".join(map(ascii, words))[:200], act


cases: st.SearchStrategy[Case] = _words().map(_case)

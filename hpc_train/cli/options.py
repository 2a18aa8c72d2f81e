"""Options and arguments that several commands share, and commands that run on one rank only."""

from collections.abc import Callable
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, ParamSpec, cast

import click

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import exists, expanded

P = ParamSpec("P")
MAX_RANKS = 10_000_000
MOST_SIMULATED = 1 << 18  # ranks: memory and time of a simulation grow with them
# configs/ inside an installed wheel, or of the checkout
_JOB_FILES = (Path(__file__).parents[1] / "shipped" / "configs", Path(__file__).parents[2] / "configs")

overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key of the job file, e.g. --set train.steps=200 (repeatable).",
)
site_option = click.option("--site", metavar="NAME", help="Site profile: a shipped name, or the path of your own.")
time_option = click.option("--time", metavar="TIME", help="Time limit, as sbatch takes it: 90, 12:00:00, 1-12:00:00.")


class CommandGroup(click.Group):
    """A group that lists its commands in the order of their definition, which is the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class FiniteNumber(click.FloatRange):
    """A finite number in a range: click alone accepts nan and inf."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class UserPath(click.Path):
    """A path with ~ filled in, which shells do not do in --output=~/x."""

    def __init__(self, file_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return expanded(cast(Path, super().convert(value, param, ctx)))


def sizes(ctx: click.Context, param: click.Parameter, words: str | None) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], as given; [] for None."""
    parts = [] if words is None else [part.strip() for part in words.split(",")]
    # The length first: Python refuses to convert thousands of digits.
    if not all(part.isdecimal() and len(part) < 9 and 0 < int(part) <= MAX_RANKS for part in parts):
        raise click.BadParameter(f"write numbers of ranks up to {MAX_RANKS:,}, such as 1,2,4,8")
    return [int(part) for part in parts]


def on_first_rank(command: Callable[P, None]) -> Callable[P, None]:
    """Runs a single-process command on the first rank only; under mpirun or srun the other ranks return at once."""

    @wraps(command)
    def once(*words: P.args, **options: P.kwargs) -> None:
        if JobEnvironment.current().is_first_rank:
            command(*words, **options)

    return once


def job_file(path: Path) -> Path:
    """`path`, or the job of that name in the package: configs/softmax-mnist.toml works in any folder."""
    if exists(path) or path.parent.name not in ("", "configs"):
        return path
    return next((folder / path.name for folder in _JOB_FILES if exists(folder / path.name)), path)

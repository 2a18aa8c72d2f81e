"""What options of several commands share: numbers that are numbers, lists of sizes, and who acts under mpirun."""

from collections.abc import Callable
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, ParamSpec, cast

import click

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import expanded

P = ParamSpec("P")
MOST_RANKS = 10_000_000


class Finite(click.FloatRange):
    """A number in a range; nan and inf, which click takes for numbers, are none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class Place(click.Path):
    """A path with ~ filled in, which shells leave alone in --output=~/x."""

    def __init__(self, file_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return expanded(cast(Path, super().convert(value, param, ctx)))


def sizes(ctx: click.Context, param: click.Parameter, words: str | None) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], as given; [] for None."""
    parts = [] if words is None else [part.strip() for part in words.split(",")]
    # Seven digits first: Python refuses to read thousands of them.
    if not all(part.isdecimal() and len(part) < 9 and 0 < int(part) <= MOST_RANKS for part in parts):
        raise click.BadParameter(f"write numbers of ranks up to {MOST_RANKS:,}, such as 1,2,4,8")
    return [int(part) for part in parts]


def by_first_rank(command: Callable[P, None]) -> Callable[P, None]:
    """Runs a command of one process on the first rank alone: under mpirun or srun the others return at once."""

    @wraps(command)
    def once(*words: P.args, **options: P.kwargs) -> None:
        if JobEnvironment.current().is_first_rank:
            command(*words, **options)

    return once

"""What a check is: something each rank looks at, and a judgement of what all of them saw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context

Status = Literal["ok", "warn", "fail", "n/a"]  # n/a: there is nothing here to check, and why
Values = dict[str, Any]  # what one rank saw; goes to JSON
_MOST_HOSTS = 4


@dataclass(frozen=True)
class Subject:
    """What is examined. `root` is where /sys and /proc lie, so that recorded trees can be read."""

    context: Context
    config: Config | None
    environ: Mapping[str, str]
    root: Path = Path("/")

    @property
    def folder(self) -> Path:
        """The run directory's file system: the nearest folder above `run.root` that exists."""
        place = Path(self.config.run.root if self.config else "runs").expanduser().absolute()
        return next(each for each in (place, *place.parents) if each.is_dir())

    @property
    def data_file(self) -> Path | None:
        """The first file of the data; the name as it stands where there is none yet. None: no job, or a URL."""
        told = self.config.data.file if self.config else None
        if told is None or "://" in told:
            return None
        path = Path(told).expanduser().absolute()
        return next(iter(sorted(map(Path, glob(str(path)))) if has_magic(str(path)) else ()), path)


@dataclass(frozen=True)
class Answer:
    """What one rank saw."""

    rank: int
    host: str
    local_rank: int
    values: Values


@dataclass(frozen=True)
class Finding:
    """The judgement of all answers: what was seen, the command that mends it, the ranks concerned (none: all)."""

    status: Status
    seen: str
    mend: str = ""
    ranks: tuple[int, ...] = ()

    def to_dict(self, name: str, answers: Sequence[Answer]) -> dict[str, Any]:
        """As plain values for JSON, with what each rank saw."""
        some = [answer for answer in answers if answer.rank in self.ranks]
        return {
            "check": name,
            **asdict(self),
            "where": places(some) if self.ranks and len(some) < len(answers) else "",
            "values": {
                str(answer.rank): {"host": answer.host, "local_rank": answer.local_rank, **answer.values}
                for answer in answers
            },
        }


@dataclass(frozen=True)
class Check:
    """`look` runs on every rank, all together where the others take part; `judge` on the root.

    limit_s: the longest that a look may take. needs: what must be installed. mend: where it does not end.
    """

    name: str
    look: Callable[[Subject], Values]
    judge: Callable[[Sequence[Answer]], Finding]
    needs: tuple[str, ...] = ()
    limit_s: float = 30.0
    mend: str = ""


def places(answers: Sequence[Answer]) -> str:
    """ "ranks 0-3 on c1, rank 5 on c2" """
    of_host: dict[str, list[int]] = {}
    for answer in answers:
        of_host.setdefault(answer.host, []).append(answer.rank)
    words = [f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} on {host}" for host, ranks in of_host.items()]
    more = len(words) - _MOST_HOSTS
    return ", ".join(words[:_MOST_HOSTS]) + (f" and {more} more host{'s' * (more > 1)}" if more > 0 else "")


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5" """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def by_host(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers of each host's ranks."""
    hosts: dict[str, list[Answer]] = {}
    for answer in answers:
        hosts.setdefault(answer.host, []).append(answer)
    return hosts


def ranks_of(answers: Sequence[Answer]) -> tuple[int, ...]:
    return tuple(answer.rank for answer in answers)


def counted(number: int, what: str) -> str:
    """ "1 rank", "2 ranks" """
    return f"{number} {what}{'s' * (number != 1)}"


def time_text(seconds: float) -> str:
    """ "3.2 ms" """
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

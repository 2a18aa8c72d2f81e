"""The parts of a check: a probe on every rank, and an evaluation of all their answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

from hpc_train.core.formatting import plural
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context

Status = Literal["ok", "warn", "fail", "n/a"]  # n/a: nothing to check here, for a stated reason
Values = dict[str, Any]  # what one rank saw; part of the JSON output
_MAX_HOSTS = 4


@dataclass(frozen=True)
class Subject:
    """What is checked. root: the folder that has /sys and /proc, so that tests can pass recorded trees."""

    context: Context
    config: Config | None
    environ: Mapping[str, str]
    root: Path = Path("/")

    @property
    def folder(self) -> Path:
        """The nearest folder above `run.root` that exists, which is on the run directory's file system."""
        root = Path(self.config.run.root if self.config else "runs").expanduser().absolute()
        return next(folder for folder in (root, *root.parents) if folder.is_dir())

    @property
    def data_file(self) -> Path | None:
        """The first file of the data, which need not exist yet; None without a job or with a URL."""
        file = self.config.data.file if self.config else None
        if file is None or "://" in file:
            return None
        path = Path(file).expanduser().absolute()
        matches = sorted(glob(str(path))) if has_magic(str(path)) else []
        return Path(matches[0]) if matches else path


@dataclass(frozen=True)
class Answer:
    """What one rank saw."""

    rank: int
    host: str
    local_rank: int
    values: Values


@dataclass(frozen=True)
class Finding:
    """The result of a check: what was seen, the command that fixes it, and the ranks concerned (none: all)."""

    status: Status
    seen: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()

    def to_dict(self, name: str, answers: Sequence[Answer]) -> dict[str, Any]:
        """As plain values for JSON, with what each rank saw."""
        concerned = [answer for answer in answers if answer.rank in self.ranks]
        is_partial = 0 < len(concerned) < len(answers)
        return {
            "check": name,
            **asdict(self),
            "mend": self.remedy,  # the key until version 0.1
            "where": places(concerned) if is_partial else "",
            "values": {
                str(answer.rank): {"host": answer.host, "local_rank": answer.local_rank, **answer.values}
                for answer in answers
            },
        }


def ok(seen: str) -> Finding:
    return Finding("ok", seen)


def not_applicable(seen: str, remedy: str = "") -> Finding:
    return Finding("n/a", seen, remedy)


def warn(seen: str, remedy: str, concerned: Sequence[Answer] = ()) -> Finding:
    return Finding("warn", seen, remedy, ranks_of(concerned))


def fail(seen: str, remedy: str, concerned: Sequence[Answer] = ()) -> Finding:
    return Finding("fail", seen, remedy, ranks_of(concerned))


@dataclass(frozen=True)
class Check:
    """`probe` runs on every rank and may be collective; `evaluate` runs on the root.

    limit_s: the longest that a probe may take. needs: modules that must be installed. remedy: for a probe that hangs.
    """

    name: str
    probe: Callable[[Subject], Values]
    evaluate: Callable[[Sequence[Answer]], Finding]
    remedy: str
    needs: tuple[str, ...] = ()
    limit_s: float = 30.0


def places(answers: Sequence[Answer]) -> str:
    """ "ranks 0-3 on c1, rank 5 on c2" """
    hosts = by_host(answers)
    texts = [f"rank{'s' * (len(ranks) > 1)} {spans(ranks_of(ranks))} on {host}" for host, ranks in hosts.items()]
    more = len(texts) - _MAX_HOSTS
    return ", ".join(texts[:_MAX_HOSTS]) + (f" and {plural(more, 'more host')}" if more > 0 else "")


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


def time_text(seconds: float) -> str:
    """ "3.2 ms" """
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

"""The form of a table in words, the same in the terminal and on the page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.scaling.compare import Row

MARK = "*"  # on the number of ranks of an incomplete row


@dataclass(frozen=True)
class Column:
    """A table's column. Text is aligned left and may be broken, numbers right and never."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """One table in words, the same in the terminal and on the page."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def made_sheets(guard: SectionGuard | None, makers: Mapping[str, Callable[[], list[Table]]]) -> list[Table]:
    """The tables of all makers, by what they tell; in the place of one that fails a table that says why."""
    guard = guard or SectionGuard()
    made = []
    for title, make in makers.items():
        made += guard.call(f"the table '{title}'", partial(_unmade, title), make)
    return made


def _unmade(title: str, why: str) -> list[Table]:
    return [Table(title, (Column("missing", is_text=True),), ((why,),))]


def ranks_text(row: Row) -> str:
    """ "4", a parameter server's "3+1" (workers + servers), marked where the runs are incomplete."""
    ranks = f"{row.size - row.num_servers}+{row.num_servers}" if row.num_servers else str(row.size)
    return ranks + MARK * row.incomplete

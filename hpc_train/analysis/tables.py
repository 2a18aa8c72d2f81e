"""The form of a table in words, the same in the terminal and on the page."""

from dataclasses import dataclass

from hpc_train.analysis.scaling import Row

MARK = "*"  # on the number of ranks of an incomplete row


@dataclass(frozen=True)
class Column:
    """A table's column. Text is aligned left and may be broken, numbers right and never."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table in words, the same in the terminal and on the page."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def ranks_text(row: Row) -> str:
    """ "4", a parameter server's "3+1" (workers + servers), marked where the runs are incomplete."""
    ranks = f"{row.size - row.num_servers}+{row.num_servers}" if row.num_servers else str(row.size)
    return ranks + MARK * row.incomplete

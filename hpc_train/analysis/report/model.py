"""What a report contains, as values: renderers show them as they are. No arithmetic and no drawing here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hpc_train.analysis.guard import SectionGuard
from hpc_train.core.formatting import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NoteKind = Literal["caution", "finding", "method"]
SectionKind = Literal["group", "comparison", "strategies", "target"]


@dataclass(frozen=True)
class Column:
    """A table's column. Text is left-aligned and may wrap; numbers are right-aligned and never wrap."""

    title: str
    is_text: bool = False


def number_columns(*titles: str) -> list[Column]:
    return [Column(title) for title in titles]


@dataclass(frozen=True)
class Table:
    """Cells are text: the terminal, Markdown and the page show the same digits."""

    id: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Note:
    """A sentence. caution: what limits a comparison; finding: an answer; method: how to read the tables."""

    id: str
    kind: NoteKind
    text: str


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure before it is drawn: only `paint` needs matplotlib."""

    id: str  # also in the names of its files: "speedup"
    caption: str
    description: str  # the figure in words, for readers who do not see it
    paint: Callable[["Axes"], None]
    height: float = 0.68  # relative to the width

    def __post_init__(self) -> None:
        for name in ("caption", "description"):  # they contain names of jobs and hosts
            object.__setattr__(self, name, plain(getattr(self, name)))


@dataclass(frozen=True)
class KeyNumber:
    """One of the few numbers that a page begins with. detail: what it holds for, and how sure it is."""

    title: str  # "speedup over 1 rank"
    value: str  # "3.31x"
    detail: str  # "83% efficiency on 4 ranks"


@dataclass(frozen=True, eq=False)
class Part:
    """One subject of a section, which a page folds under its title."""

    title: str
    tables: tuple[Table, ...] = ()
    notes: tuple[Note, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, eq=False)
class Section:
    """All about one group of runs, one comparison of strategies, or one comparison of times to a loss."""

    kind: SectionKind
    label: str
    headline: str = ""  # the answer in one sentence; "" if there is none
    numbers: tuple[KeyNumber, ...] = ()
    overview: Table | None = None  # the one table of a short report
    leading: tuple[str, ...] = ()  # ids of the plots that a page shows first, if it has them
    parts: tuple[Part, ...] = ()

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(table for part in self.parts for table in part.tables)

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(note for part in self.parts for note in part.notes)

    @property
    def plots(self) -> tuple[Plot, ...]:
        return tuple(plot for part in self.parts for plot in part.plots)


Metadata = list[tuple[str, str]]  # (name, value) of a run: when, where and with what it ran


@dataclass(frozen=True, eq=False)
class Report:
    """A whole report. `guard` collects what could not be made, while sections are built and while plots are painted."""

    job_names: tuple[str, ...]
    dates: tuple[str, ...]  # ISO dates on which runs started
    sections: tuple[Section, ...]
    notes: tuple[Note, ...]  # on all runs together
    assumptions: tuple[str, ...]  # of estimated energies
    shared_metadata: Metadata
    metadata: tuple[tuple[str, Metadata], ...]  # (run's label, what differs between runs)
    csv_columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]  # for scaling.csv, in base units; None is unknown
    summary: Mapping[str, Any]  # for summary.json
    guard: SectionGuard = field(default_factory=SectionGuard)

    @property
    def headlines(self) -> list[str]:
        return [section.headline for section in self.sections if section.headline]

    @property
    def table_ids(self) -> set[str]:
        return {table.id for section in self.sections for table in section.tables}

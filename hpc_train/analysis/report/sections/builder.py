"""Collects the content of one section. What cannot be made says why in its place and costs nothing else."""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Column, KeyNumber, Note, NoteKind, Part, Plot, Section, SectionKind, Table
from hpc_train.analysis.report.plots.canvas import unmade_plot

P = ParamSpec("P")


class SectionBuilder:
    """Each method calls `make(*args)` and keeps what it returns. `id` names it in a sentence about its failure."""

    def __init__(self, kind: SectionKind, label: str, guard: SectionGuard) -> None:
        self._kind, self._label, self._guard = kind, label, guard
        self._headline = ""
        self._numbers: list[KeyNumber] = []
        self._overview: Table | None = None
        self._leading: tuple[str, ...] = ()
        self._parts: list[Part] = []
        self._tables: list[Table] = []
        self._notes: list[Note] = []
        self._plots: list[Plot] = []
        self._title = label

    def headline(self, make: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the answer for {self._label}"
        self._headline = self._guard.call(what, _sentence, make, *args, **kwargs)

    def number(self, title: str, make: Callable[P, KeyNumber], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the number '{title}' of {self._label}"
        unmade = partial(KeyNumber, title, "missing")
        self._numbers.append(self._guard.call(what, unmade, make, *args, **kwargs))

    def lead(self, *ids: str) -> None:
        """The plots that a page shows first, in this order: as many as it has room for."""
        self._leading = ids

    def part(self, title: str) -> None:
        """What follows belongs to this part."""
        if self._tables or self._notes or self._plots:
            self._parts.append(Part(self._title, tuple(self._tables), tuple(self._notes), tuple(self._plots)))
        self._title, self._tables, self._notes, self._plots = title, [], [], []

    def overview(self, make: Callable[P, Table], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the overview of {self._label}"
        self._overview = self._guard.call(what, partial(_unmade_table, "overview"), make, *args, **kwargs)

    def table(self, id: str, make: Callable[P, Table | None], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the table '{id}' of {self._label}"
        table = self._guard.call(what, partial(_unmade_table, id), make, *args, **kwargs)
        self._tables += [table] if table is not None else []

    def notes(self, id: str, kind: NoteKind, make: Callable[P, list[str]], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the notes '{id}' of {self._label}"
        self._notes += [Note(id, kind, text) for text in self._guard.call(what, _one_note, make, *args, **kwargs)]

    def plot(self, id: str, make: Callable[P, Plot | None], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the figure '{id}' of {self._label}"
        plot = self._guard.call(what, partial(unmade_plot, id), make, *args, **kwargs)
        self._plots += [plot] if plot is not None else []

    def build(self) -> Section:
        self.part("")
        tables = (table for part in self._parts for table in part.tables)
        overview = self._overview or next(tables, None)
        first = (self._kind, self._label, self._headline, tuple(self._numbers), overview, self._leading)
        return Section(*first, tuple(self._parts))


def _sentence(why: str) -> str:
    return why


def _one_note(why: str) -> list[str]:
    return [f"{why}."]


def _unmade_table(id: str, why: str) -> Table:
    return Table(id, id, (Column("missing", is_text=True),), ((why,),))

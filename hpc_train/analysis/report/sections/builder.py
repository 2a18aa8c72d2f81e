"""Collects the content of one section. What cannot be made says why in its place and costs nothing else."""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Column, Note, NoteKind, Plot, Section, SectionKind, Table
from hpc_train.analysis.report.plots.canvas import unmade_plot

P = ParamSpec("P")


class SectionBuilder:
    """Each method calls `make(*args)` and keeps what it returns. `id` names it in a sentence about its failure."""

    def __init__(self, kind: SectionKind, label: str, guard: SectionGuard) -> None:
        self._kind, self._label, self._guard = kind, label, guard
        self._headline = ""
        self._overview: Table | None = None
        self._tables: list[Table] = []
        self._notes: list[Note] = []
        self._plots: list[Plot] = []

    def headline(self, make: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> None:
        what = f"the answer for {self._label}"
        self._headline = self._guard.call(what, _sentence, make, *args, **kwargs)

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
        overview = self._overview or next(iter(self._tables), None)
        contents = (tuple(self._tables), tuple(self._notes), tuple(self._plots))
        return Section(self._kind, self._label, self._headline, overview, *contents)


def _sentence(why: str) -> str:
    return why


def _one_note(why: str) -> list[str]:
    return [f"{why}."]


def _unmade_table(id: str, why: str) -> Table:
    return Table(id, id, (Column("missing", is_text=True),), ((why,),))

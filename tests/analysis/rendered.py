"""What a report shows, for tests: its sections by group, its tables by id, the terminal's text, the page's elements."""

import io
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from hpc_train.analysis.energy.cost import GroupEnergy, cost_of
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import Facts, gather
from hpc_train.analysis.report.model import Report, Section, Table
from hpc_train.analysis.report.renderers.files import write_report
from hpc_train.analysis.report.renderers.terminal import print_full, print_short
from hpc_train.analysis.report.report import build_report, make_report
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.energy import add_energy
from hpc_train.analysis.report.sections.group import group_section
from hpc_train.analysis.scaling.compare import Group
from tests.synthetic import Recipe, write_run

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; `problems` is what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.goes_on = False  # within a line: a <span> begins or ends nothing
        self.problems: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.goes_on = tag == "span"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.goes_on = tag == "span"
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        elif self.goes_on and self.words:
            self.words[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(root: Path, *recipes: Recipe) -> Report:
    for recipe in recipes:
        write_run(root, recipe)
    return make_report([root])


def report_and_facts(root: Path, *recipes: Recipe) -> tuple[Report, Facts]:
    for recipe in recipes:
        write_run(root, recipe)
    facts = gather([root])
    return build_report(facts), facts


def section_of(group: Group) -> Section:
    return group_section(cost_of(group), None, False, SectionGuard())


def energy_section(energy: GroupEnergy) -> Section:
    section = SectionBuilder("group", energy.group.label, SectionGuard())
    add_energy(section, energy)
    return section.build()


def table(section: Section, id: str) -> Table:
    (found,) = [table for table in section.tables if table.id == id]
    return found


def notes(section: Section | Report, id: str | None = None) -> list[str]:
    return [note.text for note in section.notes if id in (None, note.id)]


def printed(made: Report, width: int = 80, full: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    (print_full if full else print_short)(made, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def page(made: Report, root: Path) -> str:
    return write_report(made, root / "report").read_text()

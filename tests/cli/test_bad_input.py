"""A user's mistake: one message on one rank with the key or file and the remedy, exit code 2, nothing half-written."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result

from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError
from tests import jobs


def small(path: Path, **changes: object) -> None:
    """A data set of 20 samples in 3 classes, with one thing wrong."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["train/inputs"] = changes.get("inputs", rng.random((20, 4), np.float32))
        file["train/targets"] = changes.get("targets", np.arange(20) % 3)
        if "test_targets" in changes:
            file["test/inputs"] = rng.random((len(changes["test_targets"]), 4), np.float32)  # type: ignore[arg-type]
            file["test/targets"] = changes["test_targets"]
        if "complete" in changes:
            file.attrs["complete"] = changes["complete"]


def cut(path: Path) -> None:
    small(path, inputs=np.zeros((20, 4000), np.float32))
    path.write_bytes(path.read_bytes()[:-5000])


FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda path: None, ["does not exist", "hpc-train prepare"]),
    "truncated": (cut, ["is truncated", "again"]),
    "not HDF5": (lambda path: path.write_text("hello"), ["is not an HDF5 file"]),
    "never completed": (lambda path: small(path, complete=False), ["was never completed"]),
    "lengths": (
        lambda path: small(path, targets=np.zeros(19, int)),
        ["train/inputs has 20 samples", "train/targets has 19"],
    ),
    "negative label": (lambda path: small(path, targets=np.arange(20) - 1), ["label -1 in train/targets"]),
    "label in test": (
        lambda path: small(path, test_targets=np.array([0, 7])),
        ["label 7 in test/targets", "3 classes"],
    ),
    "float labels": (lambda path: small(path, targets=np.full(20, 0.5)), ["0.5 in train/targets", "row 0"]),
    "empty": (lambda path: small(path, inputs=np.zeros((0, 4)), targets=np.zeros(0, int)), ["hold no samples"]),
    "no such data set": (
        lambda path: h5py.File(path, "w").close(),
        ["data.inputs = 'train/inputs'", "no such data set"],
    ),
}


def only_one_message(done: jobs.Ended, words: list[str]) -> None:
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err + done.out
    assert done.err.count("hpc-train: ") == 1, done.err
    for word in words:
        assert word in done.err
    assert done.out == ""


@pytest.mark.parametrize("fault", FILES)
def test_data_files(tmp_path: Path, fault: str) -> None:
    make, words = FILES[fault]
    make(tmp_path / "data.h5")
    keys = jobs.settings(data__file="data.h5", train__steps=3, train__global_batch=4)
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, cwd=tmp_path)
    only_one_message(done, [*words, "data.h5"])
    assert not (tmp_path / "runs").exists(), "nothing is written before the data is known to be good"


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"train__step": 5}, ["unknown key train.step", "did you mean train.steps?"]),
        ({"train__global_batch": 1}, ["train.global_batch = 1", "2 ranks"]),
        ({"train__global_batch": 5000}, ["5000", "4000 samples"]),
        ({"task__model": "resnext"}, ["task.model = 'resnext'", "softmax"]),
        ({"task__options": "{width = 3}"}, ["task.options.width", "no such option"]),
        ({"task__kind": "nowhere:Task"}, ["task.kind = 'nowhere:Task'", "no module nowhere"]),
        ({"task__num_classes": 5}, ["label 5", "task.num_classes"]),
        ({"reduce__strategy": "local"}, ["reduce.strategy = 'local'", "2 ranks"]),
        ({"run__root": "/proc/nowhere"}, ["run.root = '/proc/nowhere'"]),
    ],
)
def test_keys(tmp_path: Path, digits: Path, keys: dict[str, object], words: list[str]) -> None:
    more = jobs.settings(data__file=digits, train__steps=3, **keys)
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *more, cwd=tmp_path)
    only_one_message(done, words)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_the_job_file_itself(tmp_path: Path) -> None:
    only_one_message(jobs.run(2, "train", "no-such-job.toml", cwd=tmp_path), ["no-such-job.toml does not exist"])


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    done = jobs.run(2, "trian", cwd=tmp_path)
    assert done.code == 2 and done.err.count("Did you mean 'train'?") == 1 and "Traceback" not in done.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["prepare", "mnist-5k", "/proc/nowhere/x.h5"], "/proc/nowhere/x.h5 cannot be written"),
        (["prepare", "mnist-5k", "."], "is a folder"),
        (["prepare", "mnist", "x.h5"], "prepare mnist needs --from"),
        (["prepare", "mnist", "x.h5", "--from", "nowhere"], "nowhere/train-images-idx3-ubyte (or .gz) does not exist"),
        (["prepare", "fashion-mnist", "x.h5", "--from", "."], "train-images-idx3-ubyte (or .gz) does not exist"),
        (["prepare", "mnist-5k", "x.h5", "--from", "notes.whl"], "--from notes.whl does not exist"),
    ],
)
def test_prepare(tmp_path: Path, words: list[str], message: str) -> None:
    only_one_message(jobs.run(2, *words, cwd=tmp_path), [message])
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_a_full_disk_is_told_before_work_starts(tmp_path: Path) -> None:
    """The file size limit of the process stands in for a full disk: the system refuses the room either way."""
    line = " ".join(map(shlex.quote, jobs.command(0, "prepare", "mnist-5k", "x.h5")))
    done = subprocess.run(
        ["sh", "-c", f"ulimit -f 1000; exec {line}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "x.h5 cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the command line

SOFTMAX = str(jobs.CONFIGS / "softmax-mnist.toml")


def refused(*words: str) -> str:
    """The message of a command that is refused, in this process."""
    done: Result = CliRunner().invoke(cli, words)
    if isinstance(done.exception, UserError):
        return str(done.exception)
    assert isinstance(done.exception, SystemExit) and done.exit_code == 2, (words, done.exception, done.output)
    return done.output


def options(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    for each in command.params:
        if isinstance(each, click.Option):
            yield path, each
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, (*path, name))


NUMBERS = [(path, option) for path, option in options(cli) if isinstance(option.type, click.types.FloatParamType)]
INTEGERS = [(path, option) for path, option in options(cli) if isinstance(option.type, click.types.IntParamType)]


def operands(path: tuple[str, ...]) -> list[str]:
    command: click.Command = cli
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    required = [each for each in command.params if isinstance(each, click.Argument) and each.required]
    return [{"config": SOFTMAX, "dataset": "mnist-5k"}.get(each.name or "", "x") for each in required]


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e400", "", "9" * 5000, "1e", "ten"])
@pytest.mark.parametrize("path, option", NUMBERS, ids=lambda each: each if isinstance(each, str) else "")
def test_every_number_is_a_finite_one(path: tuple[str, ...], option: click.Option, value: str) -> None:
    assert option.opts[0] in refused(*path, *operands(path), f"{option.opts[0]}={value}")


@pytest.mark.parametrize("value", ["9" * 5000, "-1", "1e3", "1.5", "nan", ""])
@pytest.mark.parametrize("path, option", INTEGERS, ids=lambda each: each if isinstance(each, str) else "")
def test_every_count_is_one(path: tuple[str, ...], option: click.Option, value: str) -> None:
    assert option.opts[0] in refused(*path, *operands(path), f"{option.opts[0]}={value}")


@pytest.mark.parametrize(
    "words",
    [
        ["submit", SOFTMAX, "--nodes", "1" + "0" * 29],
        ["stage", "x", ".", "--wait", "inf"],
        ["report", ".", "--pue", "0.5"],
        ["report", ".", "--pue", "1e9"],
        ["scale", SOFTMAX, "--ranks", "9" * 5000],
        ["scale", SOFTMAX, "--ranks", "1,,2"],
        ["scale", SOFTMAX, "--ranks", ""],
        ["plan", "--predict", "9" * 5000],
        ["plan", "--predict", "0"],
        ["plan", "--deadline", "9" * 4000 + ":00"],
        ["plan", "--deadline", "9" * 100_000],
        ["plan", "--energy", "9" * 400 + "J"],
        ["bench", "allreduce", "--max", "9" * 5000],
    ],
    ids=lambda words: " ".join(words)[-30:],
)
def test_numbers_that_nobody_means(words: list[str]) -> None:
    assert "Invalid value for" in refused(*words)


@pytest.mark.parametrize(
    "value", ["200#0", "200 # 0", "200\nlr = 5", "200}\nx = {", "200, x = 1", "200,", "[200]", "nan"]
)
def test_nothing_of_a_set_value_is_dropped(value: str) -> None:
    assert "train.steps = " in refused("config", "show", SOFTMAX, "--set", f"train.steps={value}")


HEX = "0x" + "f" * 5000
TREES = {
    "deep arrays": "x = " + "[" * 5000 + "]" * 5000,
    "deep tables": "x = " + "{a = " * 5000 + "1" + "}" * 5000,
    "a deep key": "[" + "a." * 5000 + "a]\n",
    "5,000 digits": "seed = " + "9" * 5000,
    "5,000 hexadecimal digits": f"seed = {HEX}",
    "no UTF-8": b"name = '\xff'",
    "a NUL": b"name = '\0'",
    "a NUL in a value": 'name = "a\\u0000b"',
    "4 MB": "# " + "x" * 4_000_000,
    "nothing": "",
    "a table for a value": "name = {a = 1}\nseed = [[1]]\ndata = 3\ntrain = []\n",
}


@pytest.mark.parametrize("what", TREES)
def test_job_files_and_site_profiles_that_are_none(tmp_path: Path, what: str) -> None:
    text = TREES[what]
    file = tmp_path / "x.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert len(refused("config", "show", str(file))) < 3000
    if what != "nothing":  # a profile of defaults
        assert len(refused("submit", SOFTMAX, "--nodes", "1", "--dry-run", "--site", str(file))) < 3000


OVERRIDES = [
    *("a." * 5000 + "a=1", "task.options=" + "[" * 5000, f"seed={HEX}", "seed=" + "9" * 5000, "name=" + "x" * 100_000),
    *("train=3", "train.steps.x=3", "=3", "train.steps", ".=3", "..=3", "train=[]", "data.file=\0", "name=\udcff"),
]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:20])
def test_overrides_that_are_none(override: str) -> None:
    assert len(refused("config", "show", SOFTMAX, "--set", override)) < 3000


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with what is no file to read."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["fifo", "folder", "loop", "device", "x" * 5000, "x/" * 3000, "none", "\udcff", "folder/../none"]
)
def test_files_that_cannot_be_read(places: Path, name: str) -> None:
    path = str(places / name)
    for words in (
        ["config", "show", path],
        ["train", path],
        ["doctor", path],
        ["submit", path, "--nodes", "1"],
        ["submit", SOFTMAX, "--nodes", "1", "--dry-run", "--site", f"{path}/" if name == "folder" else f"{path}"],
        ["scale", path, "--ranks", "1"],
    ):  # fmt: skip
        refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["train", SOFTMAX, "--set", "run.root=~nosuchuser/x"],
        ["train", SOFTMAX, "--set", "data.file=~nosuchuser/x"],
        ["train", SOFTMAX, "--resume", "~nosuchuser/x"],
        ["submit", SOFTMAX, "--nodes", "1", "--set", "run.root=~nosuchuser/x"],
        ["submit", SOFTMAX, "--nodes", "1", "--dry-run", "--set", "run.root=~nosuchuser/x"],
        ["scale", SOFTMAX, "--ranks", "1", "--set", "run.root=~nosuchuser/x"],
        ["doctor", SOFTMAX, "--set", "run.root=~nosuchuser/x"],
        ["data", "check", "~nosuchuser/x"],
        ["data", "info", "~nosuchuser/x"],
        ["report", ".", "--output=~nosuchuser/data"],
        ["plan", "--table=~nosuchuser/data"],
    ],
)
def test_homes_of_nobody(tmp_path: Path, digits: Path, words: list[str]) -> None:
    data = [] if "data" in words[0] + words[-1] else jobs.settings(data__file=digits)
    only_one_message(jobs.run(0, *words, *data, cwd=tmp_path), ["~nosuchuser"])
    assert not list(tmp_path.iterdir())


def test_commands_of_one_process_act_once_under_mpirun(tmp_path: Path) -> None:
    """submit queues one job, and what prints prints once."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho x >>$RECORD\necho 41\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path / "calls")}
    done = jobs.run(3, "submit", SOFTMAX, "--nodes", 1, cwd=tmp_path, **env)
    assert done.code == 0 and done.out.count("Job 41") == 1
    assert (tmp_path / "calls").read_text() == "x\n" and len(list(tmp_path.glob("runs/*/*/config.toml"))) == 1
    shown = jobs.run(2, "config", "show", SOFTMAX, cwd=tmp_path)
    assert shown.code == 0 and shown.out.count("name = ") == 1
    only_one_message(jobs.run(2, "plan", cwd=tmp_path), ["plan needs run directories or --table"])
    nested = jobs.run(2, "scale", SOFTMAX, "--ranks", "1", cwd=tmp_path)
    assert nested.code == 2 and nested.err.count("hpc-train scale") == 1


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be looked into."""
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv, which makes root ask for permission")
    (tmp_path / "closed").mkdir()
    (tmp_path / "file.toml").write_text(Path(SOFTMAX).read_text())
    for path in (tmp_path / "closed", tmp_path / "file.toml"):
        path.chmod(0)
    yield tmp_path
    (tmp_path / "closed").chmod(0o755)


@pytest.mark.parametrize(
    "ranks, words",
    [
        (0, ["submit", SOFTMAX, "--nodes", "1", "--site", "file.toml"]),
        (0, ["submit", SOFTMAX, "--nodes", "1", "--set", "run.root=closed"]),
        (0, ["submit", SOFTMAX, "--nodes", "1", "--site", "closed/x.toml"]),
        (0, ["scale", SOFTMAX, "--ranks", "1", "--set", "run.root=closed/x"]),
        (0, ["train", SOFTMAX, "--set", "data.file=closed/x"]),
        (2, ["train", SOFTMAX, "--set", "run.root=closed"]),
        pytest.param(2, ["train", SOFTMAX, "--set", "run.root=closed", "--resume", "auto"], marks=pytest.mark.thorough),
        pytest.param(0, ["generate", "closed/x"], marks=pytest.mark.thorough),
        (0, ["report", "closed/x"]),
        (0, ["plan", "closed/x"]),
        (2, ["data", "check", "closed/x"]),
        (0, ["prepare", "mnist-5k", "closed/x.h5"]),
    ],
)
def test_places_without_permission(closed: Path, digits: Path, ranks: int, words: list[str]) -> None:
    data = jobs.settings(data__file=digits) if words[0] == "train" and "data.file" not in words[-1] else []
    line = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *jobs.command(ranks, *words, *data)]
    done = subprocess.run(line, cwd=closed, env=jobs.environment(), capture_output=True, text=True, timeout=120)
    only_one_message(jobs.Ended(done.returncode, done.stdout, done.stderr, 0.0), ["ermission denied"])


ASCII = {"PYTHONIOENCODING": "ascii"}
NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "name, env",
    [
        ("é", ASCII),
        ("\udcff", NO_LOCALE),
        pytest.param("é", NO_LOCALE, marks=pytest.mark.thorough),
        pytest.param("\udcff", ASCII, marks=pytest.mark.thorough),
    ],
)
def test_terminals_and_names_of_few_letters(tmp_path: Path, name: str, env: dict[str, str]) -> None:
    """What cannot be printed is written in ASCII, and ends nothing."""
    shutil.copytree(jobs.ROOT / "tests/runs/mlp-mnist", tmp_path / name)
    for words in (["report", name, "--currency", "€", "--price-per-kwh", "1"], ["report", name, "--format", "md"]):
        done = jobs.run(0, *words, cwd=tmp_path, **env)
        assert done.code == 0 and "Traceback" not in done.err, done.err
    only_one_message(jobs.run(0, "config", "show", f"{name}.toml", cwd=tmp_path, **env), ["does not exist"])

"""Language models on any number of ranks: the same files, masks, losses and measures as one process."""

import json
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.world import World
from hpc_train.datasets.prepare import layout, writer
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.train.comm.context import Context
from hpc_train.train.loop import train
from hpc_train.train.tasks.baselines import count_bigrams

JOB = """
name = "tiny"
[data]
file = "{file}"
[task]
kind = "{kind}"
model = "{model}"
options = {{ layers = 2, heads = 2, width = 32, context = 24 }}
[train]
steps = 12
global_batch = 22
optimizer = "adamw"
lr = 0.003
threads = 1
[reduce]
strategy = "{strategy}"
[run]
root = "{root}"
progress = "plain"
"""
CONFIGS = Path(__file__).parents[2] / "configs"
ALONE = Context(World())


@pytest.fixture(scope="session")
def texts(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty real documents; each is a link, which counts as a file."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("texts")
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"), key=lambda p: p.stat().st_size)[
            :20
        ]:
            (folder / path.name).symlink_to(path)
        return folder

    return context.on_root(make)


@pytest.fixture(scope="session", params=["bytes", "bpe:400"])
def tokens(
    request: pytest.FixtureRequest, context: Context, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = context.on_root(lambda: tmp_path_factory.mktemp("tokens") / "text.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK_BYTES", 5000)  # many writes, which end within documents
        patch.setattr(writer, "_WRITE_BYTES", 5000)
        prepare("text", texts, path, context, options=Options(tokenizer=request.param))
    return path


def test_the_tokens_are_those_of_one_process(context: Context, texts: Path, tokens: Path) -> None:
    def compare() -> None:
        with h5py.File(tokens) as file, tempfile.TemporaryDirectory() as folder:
            alone = Path(folder) / "alone.h5"
            prepare("text", texts, alone, ALONE, options=Options(tokenizer=str(file.attrs["tokenizer"])))
            with h5py.File(alone) as other:
                assert dict(file.attrs) == dict(other.attrs)
                names = {"train/inputs", "test/inputs", *(["tokenizer"] if "tokenizer" in other else [])}
                for name in names:
                    assert file[name].dtype == other[name].dtype
                    assert file[name][:].tobytes() == other[name][:].tobytes()

    context.on_root(compare)


def test_a_document_that_one_rank_cannot_read_is_named_by_all(context: Context, shared_path: Path) -> None:
    def make() -> None:
        for number in range(9):
            (shared_path / f"{number}.txt").write_bytes(b"some text" + b"\0" * (number == 7))

    context.on_root(make)
    for tokenizer in ("bytes", "bpe:260"):
        with pytest.raises(UserError, match=r"7\.txt holds a zero byte"):
            prepare("text", shared_path, shared_path / "out.h5", context, options=Options(tokenizer=tokenizer))
    context.barrier()
    assert not list(shared_path.glob("*.h5")) and not list(shared_path.glob(".*"))


def test_bigrams_counted_by_all_are_those_of_one(context: Context) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.geometric(0.1, 3001) % 50, rng.geometric(0.1, 501) % 60
    together, alone = count_bigrams(train, test, 60, context), count_bigrams(train, test, 60, ALONE)
    assert np.array_equal(together.codes, alone.codes) and np.array_equal(together.losses, alone.losses)


def run(context: Context, root: Path, file: Path, kind: str, strategy: str) -> tuple[np.ndarray, dict[str, float]]:
    """(losses, measures of the test) of a few steps."""
    job, model = root / "job.toml", {"language": "gpt", "masked_language": "bert"}[kind]
    context.on_root(lambda: job.write_text(JOB.format(file=file, kind=kind, model=model, strategy=strategy, root=root)))
    train(load(job), context)
    context.barrier()
    (ended,) = rundir.find([root])
    return np.array(read_metrics(ended.metrics)[1]), json.loads(ended.summary.read_text())["test"]


@lru_cache(maxsize=4)
def alone(file: Path, kind: str) -> tuple[np.ndarray, dict[str, float]]:
    with tempfile.TemporaryDirectory() as root:
        return run(ALONE, Path(root), file, kind, "local")


@pytest.mark.parametrize("strategy", ["horovod", "mpi"])
@pytest.mark.parametrize("kind", ["language", "masked_language"])
def test_losses_and_measures_are_those_of_one_process(
    context: Context, shared_path: Path, tokens: Path, kind: str, strategy: str
) -> None:
    losses, measures = run(context, shared_path, tokens, kind, strategy)
    expected, of_one = context.on_root(lambda: alone(tokens, kind))
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert np.abs(losses / expected - 1).max() < 1e-5
    # One token more or less may be guessed right where two are as likely to the last bit.
    tolerance = {name: 2e-3 if name == "accuracy" else 1e-5 for name in of_one}
    assert measures == {name: pytest.approx(value, rel=tolerance[name]) for name, value in of_one.items()}

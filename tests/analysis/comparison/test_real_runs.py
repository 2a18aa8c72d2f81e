"""Two real trainings compared from the command line."""

import json
from pathlib import Path

import pytest

from tests import jobs


def train(folder: Path, digits: Path, name: str, hidden: str) -> tuple[Path, float]:
    """(the folder of its runs, seconds of the job)"""
    settings = jobs.settings(data__file=digits, train__steps=40, run__root=name, task__options=f"{{hidden = {hidden}}}")
    done = jobs.run(2, "train", jobs.CONFIGS / "mlp-mnist.toml", *settings, cwd=folder)
    assert done.code == 0, done.err
    return folder / name, done.seconds


def test_a_larger_model_is_a_regression_and_a_run_is_none_against_itself(tmp_path: Path, digits: Path) -> None:
    small, _ = train(tmp_path, digits, "a", "[16]")
    large, took_s = train(tmp_path, digits, "b", "[1024, 512]")
    saved = jobs.run(0, "compare", small, "--save", "baseline.json", cwd=tmp_path)
    assert saved.code == 0 and "Three repeats" in saved.err, saved.err
    alike = jobs.run(0, "compare", "baseline.json", small, "--json", cwd=tmp_path)
    tree = json.loads(alike.out)
    assert alike.code == 0 and not tree["is_regression"] and not tree["differences"]
    assert {metric["relative"] for metric in tree["metrics"]} == {0.0}
    slower = jobs.run(0, "compare", "baseline.json", large, "--json", cwd=tmp_path)
    tree = json.loads(slower.out)
    metrics = {metric["name"]: metric for metric in tree["metrics"]}
    assert slower.code == 1 and metrics["step time"]["verdict"] == metrics["samples/s"]["verdict"] == "regression"
    assert metrics["step time"]["interval"][0] > 0.15 and metrics["peak memory of a rank"]["relative"] > 0
    recorded = json.loads(next(large.glob("*/*/meta.json")).read_text())["start_up_s"]
    assert metrics["start-up (s)"]["after"] == pytest.approx(max(recorded)) and 0 < min(recorded) < took_s
    told = {each["name"]: (each["before"], each["after"]) for each in tree["differences"]}
    assert told["task.options"] == ("{'hidden': [16]}", "{'hidden': [1024, 512]}")
    assert "parameters" in told
    text = jobs.run(0, "compare", "baseline.json", large, cwd=tmp_path, COLUMNS="80")
    assert text.code == 1 and "more time a step" in text.out and max(map(len, text.out.splitlines())) <= 80

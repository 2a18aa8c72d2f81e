"""Metrics are scikit-learn's, whatever the batches and the ranks that saw the samples."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.validation_log import best_of, read_validation
from hpc_train.train.metrics import finished, of_classes, of_numbers, sums_of, tables, total
from tests import jobs

HERE = __name__
NUM, CLASSES = 301, 7


def hits(said: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (said.argmax(1) == targets).float()


def mean_of_all(said: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return hits(said, targets).mean()


def raises(said: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise KeyError("nowhere")


def of_all_classes(said: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return said.sum(0)


class NoMetric:
    """No state."""


@pytest.fixture(scope="module")
def said() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, CLASSES - 1, (NUM,), generator=generator)  # the last class never occurs
    logits = torch.randn(NUM, CLASSES, generator=generator) + 2 * torch.nn.functional.one_hot(targets, CLASSES)
    return logits.softmax(1), targets


def measured(metrics: Any, said: torch.Tensor, targets: torch.Tensor, cuts: list[int]) -> tuple[Any, Any]:
    """Of the samples in parts, as ranks and batches see them."""
    edges = [0, *cuts, len(targets)]
    parts = [sums_of(metrics, said[a:b], targets[a:b]) for a, b in pairwise(edges)]
    sums = total(parts)
    return finished(sums, len(targets)), tables(sums)


@pytest.mark.parametrize("cuts", [[], [100, 200], [1, 1, 150], [300]])
def test_of_classes_they_are_scikit_learns(said: tuple[torch.Tensor, torch.Tensor], cuts: list[int]) -> None:
    scores = pytest.importorskip("sklearn.metrics")
    pytest.importorskip("torchmetrics")
    module = "torchmetrics.classification:"
    names = ["top3", "f1", "confusion", f"{HERE}:hits"]
    names += [f"{module}{each}" for each in ("MulticlassAUROC", "MulticlassCohenKappa", "MulticlassStatScores")]
    (probabilities, targets), metrics = said, of_classes(names, CLASSES)
    found, shown = measured(metrics, probabilities, targets, cuts)
    true, predicted, labels = targets.numpy(), probabilities.argmax(1).numpy(), range(CLASSES)
    assert found["f1"] == pytest.approx(scores.f1_score(true, predicted, average="macro"), abs=1e-12)
    top3 = scores.top_k_accuracy_score(true, probabilities.numpy(), k=3, labels=labels)
    assert found["top3_accuracy"] == pytest.approx(top3, abs=1e-12)
    assert np.array_equal(shown["confusion"], scores.confusion_matrix(true, predicted, labels=labels))
    assert found["hits"] == pytest.approx(scores.accuracy_score(true, predicted), abs=1e-12)
    assert found["MulticlassCohenKappa"] == pytest.approx(scores.cohen_kappa_score(true, predicted), abs=1e-6)
    occurring = probabilities[:, : CLASSES - 1]
    per_class = [scores.roc_auc_score(true == each, occurring[:, each]) for each in range(CLASSES - 1)]
    assert found["MulticlassAUROC"] == pytest.approx(np.mean([*per_class, 0]), abs=1e-6), "0 of a class without samples"
    assert found.keys() >= {f"MulticlassStatScores_{number}" for number in range(5)} and "confusion" not in found


@pytest.mark.parametrize("cuts", [[], [1, 150]])
def test_of_numbers_they_are_in_the_targets_units(cuts: list[int]) -> None:
    scores = pytest.importorskip("sklearn.metrics")
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(1)
    targets = 50 + 10 * torch.randn(NUM, generator=generator)
    predictions = targets + torch.randn(NUM, generator=generator)
    names = ["torchmetrics:MeanSquaredError", "torchmetrics:SpearmanCorrCoef", "scatter"]
    metrics = of_numbers(names, (), torch.tensor(50.0), torch.tensor(10.0))
    found, shown = measured(metrics, predictions, targets, cuts)
    assert found["MeanSquaredError"] == pytest.approx(scores.mean_squared_error(targets, predictions), rel=1e-5)
    order = [np.argsort(np.argsort(each.numpy())) for each in (targets, predictions)]
    assert found["SpearmanCorrCoef"] == pytest.approx(np.corrcoef(*order)[0, 1], abs=1e-5)
    counts = shown["scatter"]
    assert counts.shape == (64, 64) and counts.sum() == NUM
    bins = np.clip(((targets.numpy() - 50) / 10 + 4) * 8, 0, 63).astype(int)
    assert np.array_equal(counts.sum(1), np.bincount(bins, minlength=64))


@pytest.mark.parametrize(
    "name, words",
    [
        ("top", ("task.metrics = 'top' is unknown", "Known: top5, f1, confusion")),
        (f"top{CLASSES + 1}", (f"there are {CLASSES} classes",)),
        (f"{HERE}:raises", ("fails for predictions (64, ", "KeyError: 'nowhere'", f"at {__file__}:")),
        (f"{HERE}:of_all_classes", (f"returned ({CLASSES},) for 64 samples", "a value for each sample")),
        ("torchmetrics.regression:MeanSquaredError", ("fails for predictions (64, ", "and targets (64,)")),
        ("os:remove", ("os is a part of Python",)),
        (f"{HERE}:nothing", ("has no metric nothing",)),
        (f"{HERE}:NUM", ("is int", "a function of (predictions, targets)")),
        (f"{HERE}:NoMetric", ("is a class, and no metric of torchmetrics",)),
        (f"{HERE}:mean_of_all", ("returned () for 64 samples", "a value for each sample")),
        ("torchmetrics.regression:PearsonCorrCoef", ("reduced over ranks by None, and does not add up",)),
        ("torchmetrics.classification:MulticlassFBetaScore", ("cannot be made: ", "'beta'")),
    ],
)
def test_what_does_not_add_up_is_refused(name: str, words: tuple[str, ...]) -> None:
    if name.startswith("torchmetrics"):
        pytest.importorskip("torchmetrics")
    with pytest.raises(UserError) as caught:
        of_classes([name], CLASSES)  # before any sample is read
    for word in words:
        assert word in str(caught.value)


def test_a_metric_of_another_shape_than_the_targets_is_refused() -> None:
    pytest.importorskip("torchmetrics")
    with pytest.raises(UserError, match=r"fails for predictions \(3, 2, 4\) and targets \(3, 2, 4\)"):
        of_numbers(["torchmetrics:SpearmanCorrCoef"], (2, 4), torch.zeros(2, 4), torch.ones(2, 4))


def test_metrics_of_tasks_that_make_their_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"task\.metrics = \['f1'\] goes with classification and regression, not 'dqn'"):
        load(jobs.CONFIGS / "dqn-cartpole.toml", ('task.metrics=["f1"]',))


def test_the_best_score_is_the_highest() -> None:
    rows = [{"step": 1, "MulticlassAUROC": 0.5, "f1": 0.9}, {"step": 2, "MulticlassAUROC": 0.8, "f1": math.nan}]
    assert best_of(rows, "MulticlassAUROC")["step"] == 2 and best_of(rows, "f1")["step"] == 1


def test_they_are_in_validations_the_test_and_evaluate_alike(tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("torchmetrics")
    names = '["top2", "f1", "confusion", "torchmetrics.classification:MulticlassAUROC"]'
    keys = {"data__file": digits, "train__steps": 4, "train__global_batch": 30, "data__hold_out": 0.1}
    keys |= {"validation__every_steps": 4, "task__metrics": names, "reduce__strategy": "mpi"}
    found = []
    for ranks in (1, 3):
        words = jobs.settings(**keys, run__root=tmp_path / str(ranks))
        done = jobs.run(ranks, "train", "configs/softmax-mnist.toml", *words, cwd=jobs.ROOT)
        assert done.code == 0, done.err
        (run,) = rundir.find([tmp_path / str(ranks)])
        counts = np.loadtxt(run.test_table("confusion"), delimiter=",", skiprows=1)[:, 1:]
        test = json.loads(run.summary.read_text())["test"]
        assert test.keys() == {"loss", "accuracy", "top2_accuracy", "f1", "MulticlassAUROC"}
        assert counts.sum() == 1000 and np.trace(counts) / 1000 == pytest.approx(test["accuracy"])
        told = jobs.run(ranks, "evaluate", run.path, "--json", cwd=tmp_path)
        assert told.code == 0, told.err
        assert json.loads(told.out)["measures"] == pytest.approx(test, abs=1e-6)
        found.append((test, read_validation(run.validation)[-1]))
    (test, row), (other, other_row) = found
    assert test == pytest.approx(other, abs=1e-5)
    assert {name: row[name] for name in test} == pytest.approx({name: other_row[name] for name in test}, abs=1e-5)

"""`make bench-plan`: published series, extrapolated by our models, by Extra-P itself and by a + b log2 N.

Extra-P wants an older NumPy than ours: it runs in a virtual environment of its own, under `runs/bench-plan`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hpc_train.analysis.models import predict as prediction
from tests.analysis.models.test_predict import (  # the same series, read alike
    is_disturbed,
    log_law,
    measurements,
    published,
)

FOLDER = Path("runs/bench-plan")
EXTRAP = "extrap==4.2.5"
# Run by Extra-P's own Python: [[sizes], [step times]] on stdin, its model's step time at 32 on stdout, one a series.
PEER = """
import contextlib, json, sys
from extrap.entities.callpath import Callpath
from extrap.entities.coordinate import Coordinate
from extrap.entities.experiment import Experiment
from extrap.entities.measurement import Measurement
from extrap.entities.metric import Metric
from extrap.entities.parameter import Parameter
from extrap.modelers.model_generator import ModelGenerator
found = []
for sizes, times in json.load(sys.stdin):
    experiment, callpath, metric = Experiment(), Callpath("step"), Metric("time")
    experiment.add_parameter(Parameter("ranks"))
    experiment.add_callpath(callpath)
    experiment.add_metric(metric)
    for size, time in zip(sizes, times):
        experiment.add_coordinate(Coordinate(size))
        experiment.add_measurement(Measurement(Coordinate(size), callpath, metric, [time]))
    generator = ModelGenerator(experiment)
    with contextlib.redirect_stdout(sys.stderr):
        generator.model_all()
    found.append(float(generator.models[callpath, metric].hypothesis.function.evaluate(32)))
json.dump(found, sys.stdout)
"""


def extra_p(series: list[tuple[list[int], list[float]]]) -> list[float]:
    """Extra-P's predictions at 32, by its default modeler."""
    python = FOLDER / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", EXTRAP], check=True)
    ran = subprocess.run(
        [python, "-c", PEER], input=json.dumps(series), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    ran.check_returncode()
    return list(json.loads(ran.stdout))


def errors(name: str, most: int, per_node: int) -> dict[str, np.ndarray]:
    """{model: (series,) |predicted / measured - 1| at 32 GPUs}, fitted to the sizes up to `most`."""
    truth, series, guesses = [], [], []
    for measured in published(name).values():
        sizes = [size for size in sorted(measured) if size <= most]
        known = measurements(sizes, [64 * size / measured[size] for size in sizes], ranks_per_node=per_node)
        made = prediction.predict(known)
        fits = [made.chosen, *made.candidates]
        there = [float(each.fit(np.array([32]))[0]) if each.fit else float("nan") for each in fits]
        guesses.append([*there, log_law(known, 32)])
        series.append((sizes, known.step_s.tolist()))
        truth.append(64 * 32 / measured[32])
    names = ["chosen by hpc-train plan", *(f"  {name}" for name in prediction.MODELS), "a + b log2 N", "Extra-P"]
    columns = [*np.array(guesses).T, np.array(extra_p(series))]
    return {name: np.abs(column / np.array(truth) - 1) for name, column in zip(names, columns, strict=True)}


def main() -> None:
    prediction.NUM_RESAMPLES = 2  # the middle alone is looked at
    for name, most, per_node in (("horovod-azure", 8, 4), ("horovod-azure", 16, 4), ("dlperf", 16, 8)):
        sound = np.array([name != "horovod-azure" or not is_disturbed(key) for key in published(name)])
        title = f"{name}: step time at 32 GPUs from {most} and fewer, {len(sound)} series, {sound.sum()} undisturbed"
        table = Table("model", "median", "90th percentile", "median, undisturbed", "90th, undisturbed", title=title)
        for model, each in errors(name, most, per_node).items():
            cells = [np.quantile(part, q) for part in (each, each[sound]) for q in (0.5, 0.9)]
            table.add_row(model, *(f"{100 * cell:.1f}%" for cell in cells))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()

"""Regression: losses and measures against numpy's, targets of any shape, and what is refused."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.prepare.mlxtend_wheel import auto_mpg
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.regression import Regression

ALONE = Context(World())
RNG = np.random.default_rng(0)


def opened(path: Path, loss: str = "mse", model: str = "linear", **data: object) -> Regression:
    job = {
        "name": "a",
        "task": {"kind": "regression", "model": model, "loss": loss},
        "data": {"file": str(path), **data},
        "train": {"steps": 1, "global_batch": 4},
    }
    return Regression(config.from_values(job, "test").config, ALONE)


def write(path: Path, targets: np.ndarray, test: np.ndarray | None = None, scale: float | None = None) -> Path:
    with h5py.File(path, "w") as file:
        for part, rows in (("train", targets), ("test", targets[:10] if test is None else test)):
            file[f"{part}/inputs"], file[f"{part}/targets"] = RNG.random((len(rows), 5), np.float32), rows
            if scale:
                file[f"{part}/targets"].attrs["scale_factor"] = scale
    return path


def measures(task: Regression, model: nn.Module) -> dict[str, float]:
    count, sums = 0, dict[str, float]()
    with torch.no_grad():
        for batch in task.test_batches(World()):
            num, found = task.test(model, batch)
            count += num
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
    return {name: value / count for name, value in sums.items()}


def test_measures_of_least_squares_on_real_cars_are_numpys(tmp_path: Path) -> None:
    path = tmp_path / "cars.h5"
    arrays = {name: array.read(0, array.shape[0]) for name, array in auto_mpg(None).arrays.items()}
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    x, y, test_x, test_y = (
        arrays[f"{part}/{name}"].astype(float) for part in ("train", "test") for name in ("inputs", "targets")
    )
    assert (len(x), len(test_x), x.shape[1]) == (314, 78, 7)
    task = opened(path, normalize="standardize")
    standard = (x - x.mean(0)) / x.std(0)
    weights, *_ = np.linalg.lstsq(np.c_[standard, np.ones(len(x))], (y - y.mean()) / y.std(), rcond=None)
    model = task.model()
    (linear,) = (each for each in model.modules() if isinstance(each, nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weights[None, :-1]))
        linear.bias.copy_(torch.tensor(weights[-1:]))
    predicted = np.c_[(test_x - x.mean(0)) / x.std(0), np.ones(len(test_x))] @ weights * y.std() + y.mean()
    errors = predicted - test_y
    found = measures(task, model)
    assert found["mse"] == pytest.approx((errors**2).mean(), rel=1e-4)
    assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert found["r2"] == pytest.approx(1 - (errors**2).sum() / ((test_y - test_y.mean()) ** 2).sum(), rel=1e-4)
    assert found["loss"] == pytest.approx((errors**2).mean() / y.var(), rel=1e-4)
    assert 0.8 < found["r2"] < 0.9


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 6)])
def test_targets_of_any_shape_have_a_loss_of_deviation_one(loss: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    targets = RNG.normal(size=(40, *shape)) * 1000 + 7e5
    task = opened(write(tmp_path / "a.h5", targets.astype("f4")), loss)
    batch = task.batch(np.arange(40), 0)
    model = task.model()
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
    axis = None if len(shape) == 2 else 0
    standard = (targets - targets.mean(axis)) / targets.std(axis)
    size = np.abs(standard)
    expected = {"mse": size**2, "mae": size, "huber": np.where(size < 1, size**2 / 2, size - 0.5)}[loss]
    assert task.loss(model, batch).item() / 40 == pytest.approx(expected.mean(), rel=1e-3)
    assert measures(task, model)["mse"] == pytest.approx(np.mean((targets[:10] - targets.mean(axis)) ** 2), rel=1e-2)


def test_measures_are_in_the_units_that_stored_targets_mean(tmp_path: Path) -> None:
    targets = RNG.integers(0, 100, (40, 2)).astype("i2")
    plain = opened(write(tmp_path / "a.h5", targets))
    scaled = opened(write(tmp_path / "b.h5", targets, scale=0.1))
    with torch.no_grad():
        models = [task.model() for task in (plain, scaled)]
        for weights in (each for model in models for each in model.parameters()):
            weights.zero_()
    one, other = measures(plain, models[0]), measures(scaled, models[1])
    assert other["mae"] == pytest.approx(one["mae"] / 10) and other["mse"] == pytest.approx(one["mse"] / 100)
    assert other["r2"] == pytest.approx(one["r2"])


def test_small_and_constant_targets_have_an_honest_r2(tmp_path: Path) -> None:
    """Their squares are 0 in 32 bits; a constant output explains nothing."""
    targets = np.c_[RNG.normal(size=40) * 1e-25, np.full(40, 3.0)]
    task = opened(write(tmp_path / "a.h5", targets))
    model = task.model()
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
    found = measures(task, model)
    expected = 1 - np.mean((targets[:10, 0] - targets[:, 0].mean()) ** 2) / targets[:10, 0].var()
    assert found["r2"] == pytest.approx((expected + 0) / 2, abs=1e-3)
    assert 0 < found["mae"] < 1e-24


def test_what_cannot_be_aimed_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train/targets holds strings"):
        opened(write(tmp_path / "a.h5", np.array([b"a", b"b"] * 10)))
    with pytest.raises(UserError, match=r"test/targets has targets of \(2,\), not \(3,\)"):
        opened(write(tmp_path / "b.h5", np.ones((20, 3), "f4"), test=np.ones((5, 2), "f4")))
    with pytest.raises(UserError, match=r"task\.loss = 'mae' is for task\.kind = 'regression'"):
        job = {"name": "a", "data": {"file": "x"}, "train": {"steps": 1, "global_batch": 4}, "task": {"loss": "mae"}}
        config.from_values(job, "test")
    with pytest.raises(UserError, match=r"task\.model = 'softmax' is unknown"):
        opened(write(tmp_path / "c.h5", np.ones(20, "f4")), model="softmax").model()


# ------------------------------------------------------------------------------------------------ fields

NUM, GRID = 30, (8, 12)


def write_fields(path: Path, inputs: np.ndarray, targets: np.ndarray, units: Sequence[str | None] = ()) -> Path:
    """The last ten are to test on. units: of inputs and targets."""
    with h5py.File(path, "w") as file:
        for name, values, unit in zip(("inputs", "targets"), (inputs, targets), units or (None, None), strict=True):
            for part, rows in (("train", values[:-10]), ("test", values[-10:])):
                file[f"{part}/{name}"] = rows
                file[f"{part}/{name}"].attrs.update({"units": unit} if unit else {})
    return path


class Same(nn.Module):
    """Predicts `share` of the standardised inputs."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.share


@pytest.mark.parametrize("shape", [(2, *GRID), (2, 4, *GRID), GRID])
def test_skill_is_that_over_the_field_that_stays_as_it_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    """By numpy; of two channels in units of their own, each counts by its deviation."""
    units = np.array([1e5, 3.0]).reshape(2, *[1] * (len(shape) - 1)) if len(shape) > 2 else np.float64(7)
    inputs = RNG.normal(size=(NUM, *shape)) * units + 5 * units
    targets = inputs + RNG.normal(size=inputs.shape) * units / 3
    path = write_fields(tmp_path / "a.h5", inputs.astype("f4"), targets.astype("f4"), ("m s-1", "m s-1"))
    task = opened(path, model="unet", normalize="standardize")
    found = measures(task, Same(0.9))
    axes = (0, *range(2 if len(shape) > 2 else 1, len(shape) + 1))
    (x_mean, x_std), (y_mean, y_std) = (
        (each[:-10].mean(axes, keepdims=True), each[:-10].std(axes, keepdims=True)) for each in (inputs, targets)
    )
    predicted = 0.9 * (inputs - x_mean) / x_std * y_std + y_mean
    mse, persistence = (np.mean(((each - targets)[-10:] / y_std) ** 2) for each in (predicted, inputs))
    assert found["persistence_skill"] == pytest.approx(1 - mse / persistence, rel=1e-3)
    assert found["loss"] == pytest.approx(mse, rel=1e-3) and -1 < found["persistence_skill"] < 0


def test_persistence_speaks_of_what_stored_numbers_mean(tmp_path: Path) -> None:
    stored = RNG.integers(0, 100, (NUM, *GRID))
    path = write_fields(tmp_path / "a.h5", stored.astype("i2"), (stored * 10 + 50).astype("i4"))
    with h5py.File(path, "r+") as file:
        for part in ("train", "test"):
            file[f"{part}/inputs"].attrs.update(scale_factor=0.1, add_offset=3.0)
            file[f"{part}/targets"].attrs.update(scale_factor=0.01, add_offset=2.0)
    task = opened(path, model="unet", normalize="standardize")
    # Inputs mean 0.1 s + 3, targets 0.1 s + 2.5: the same but for half a unit.
    expected = (0.5 / (0.1 * stored[:-10].std())) ** 2
    (found,) = (each.persistence_mse for each in task._references.values())
    assert found == pytest.approx(expected)


def test_only_fields_of_one_quantity_persist(tmp_path: Path) -> None:
    fields = RNG.random((NUM, 2, *GRID)).astype("f4")
    for units, is_told in ((("K", "K"), True), (("K", "Pa"), False), (("K", None), True)):
        task = opened(write_fields(tmp_path / "a.h5", fields, fields + 1, units), model="unet")
        assert ("persistence_skill" in measures(task, Same(1.0))) is is_told
    task = opened(write_fields(tmp_path / "b.h5", fields, fields[:, :1]), model="linear")
    assert "persistence_skill" not in measures(task, task.model())
    table = RNG.random((NUM, 3)).astype("f4")
    assert "persistence_skill" not in measures(opened(write_fields(tmp_path / "c.h5", table, table)), Same(1.0))


def test_each_channel_of_a_field_has_its_own_scale(tmp_path: Path) -> None:
    """However many there are, and however small the grid is; a field without channels has one scale."""
    inputs = RNG.normal(size=(NUM, 6, 4, 5, 4)) * 10.0 ** np.arange(6).reshape(6, 1, 1, 1)
    task = opened(write_fields(tmp_path / "a.h5", inputs, inputs[:, 3]), model="unet", normalize="standardize")
    values = task.batch(np.arange(NUM - 10), 0).floats()
    assert np.allclose(values.std((0, 2, 3, 4)), 1, atol=1e-2)
    facts = task.facts["targets_standardized"]
    assert np.size(facts["std"]) == 1 and np.squeeze(facts["std"]) == pytest.approx(inputs[:-10, 3].std())


def several(path: Path, lacks: float, fill: float | None = None) -> np.ndarray:
    """Three targets of unlike size, of which a share lacks values; returns those to test on, NaN where none is."""
    targets = (RNG.normal(size=(80, 3)) * [1, 10, 100] + [0, 5, 1000]).astype("f4")
    targets[RNG.random((80, 3)) < lacks] = np.nan
    targets[0] = np.nan if lacks else targets[0]
    stored = targets if fill is None else np.where(np.isnan(targets), fill, np.round(targets)).astype("i4")
    write(path, stored[:60], stored[60:])
    with h5py.File(path, "r+") as file:
        file["train/targets"].attrs["names"] = ["speed", "wind force", "load"]
        for part in ("train", "test"):
            if fill is not None:
                file[f"{part}/targets"].attrs["_FillValue"] = np.int32(fill)
    return targets[60:] if fill is None else np.round(targets[60:])


@pytest.mark.parametrize(("lacks", "fill"), [(0.0, None), (0.3, None), (0.3, -999)])
def test_each_target_is_measured_and_only_what_is_there_counts(
    lacks: float, fill: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    wanted = several(path, lacks, fill)
    keys = {"missing": "drop"} if lacks else {}
    if lacks:
        with pytest.raises(UserError, match="lack values"):
            opened(path)
    task = opened(path, **keys)
    if lacks:
        assert task.num_samples <= 59 and "lack some of train/targets: the others count" in task.reading
    model, predicted = task.model(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # it begins with zeros, whose R2 is 0
        for batch in task.test_batches(World()):
            predicted.append(task._scale.predicted(model(batch.floats())).numpy())
    wanted = wanted[~np.isnan(wanted).all(axis=1)]
    errors = np.concatenate(predicted) - wanted
    found = measures(task, model)
    assert found["mae"] == pytest.approx(np.nanmean(np.abs(errors)), rel=1e-4)
    assert found["mse"] == pytest.approx(np.nanmean(errors**2), rel=1e-4)
    r2 = 1 - np.nanmean(errors**2, axis=0) / np.nanvar(wanted, axis=0)
    assert found["r2"] == pytest.approx(r2.mean(), rel=1e-4)
    for column, name in enumerate(("speed", "wind_force", "load")):
        assert found[f"{name}_r2"] == pytest.approx(r2[column], rel=1e-4)
        assert found[f"{name}_mae"] == pytest.approx(np.nanmean(np.abs(errors[:, column])), rel=1e-4)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_a_missing_target_has_neither_loss_nor_gradient(loss: str, tmp_path: Path) -> None:
    several(tmp_path / "a.h5", 0.3)
    task = opened(tmp_path / "a.h5", loss, missing="drop")
    model = task.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    rows = np.arange(task.num_samples)
    halves = [task.loss(model, task.batch(part, 0)) for part in np.array_split(rows, 2)]
    whole = task.loss(model, task.batch(rows, 0))
    assert sum(half.item() for half in halves) == pytest.approx(whole.item(), rel=1e-5), (
        "the same on any number of ranks"
    )
    (whole / len(rows)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    batch = task.batch(rows, 0)
    targets = task._scale.standardized(batch.targets)
    is_there = torch.isfinite(targets)
    model.zero_grad()
    outputs = model(batch.floats())[is_there]
    {"mse": torch.nn.MSELoss, "mae": torch.nn.L1Loss, "huber": torch.nn.HuberLoss}[loss]()(
        outputs, targets[is_there]
    ).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_targets_have_the_names_of_a_tables_columns(tmp_path: Path) -> None:
    several(tmp_path / "a.h5", 0.0)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["train/targets"].attrs["names"]
        assert opened(tmp_path / "a.h5").facts["target_names"] == ["target0", "target1", "target2"]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["target"] = ["a", "b", "c"]
    assert opened(tmp_path / "a.h5").facts["target_names"] == ["a", "b", "c"]

"""Inputs at a scale at which models train: standardised by the training samples, or named."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core import config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data import moments as moments_module
from hpc_train.train.data.moments import moments
from hpc_train.train.data.readers import MmapReader
from hpc_train.train.tasks.classification import Classification

ALONE = Context(World())
RNG = np.random.default_rng(0)


def opened(folder: Path, inputs: np.ndarray, scale: float | None = None, **data: object) -> Classification:
    with h5py.File(folder / "a.h5", "w") as file:
        for part, rows in (("train", inputs), ("test", inputs[:10])):
            file[f"{part}/inputs"], file[f"{part}/targets"] = rows, np.arange(len(rows)) % 3
            if scale is not None:
                file[f"{part}/inputs"].attrs["scale_factor"] = scale
    job = {"name": "a", "data": {"file": str(folder / "a.h5"), **data}, "train": {"steps": 1, "global_batch": 4}}
    return Classification(config.from_values(job, "test").config, ALONE)


def floats(task: Classification) -> torch.Tensor:
    return torch.cat([task.batch(np.arange(task.num_samples), 0).floats()])


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((5,), (0,)),
        ((8, 6), (0, 1, 2)),
        ((3, 16, 16), (0, 2, 3)),
        ((16, 16, 3), (0, 1, 2)),
        ((8, 8, 4), (0, 1, 2)),
        ((40, 3), (0, 1)),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_features_and_channels_are_standardised(
    shape: tuple[int, ...], axes: tuple[int, ...], scale: float | None, tmp_path: Path
) -> None:
    inputs = (RNG.random((60, *shape)) * 90 + 10 * np.arange(np.prod(shape)).reshape(shape) % 70).astype("u1")
    task = opened(tmp_path, inputs, scale, normalize="standardize")
    found = floats(task).double().numpy()
    expected = (inputs - inputs.mean(axes, keepdims=True)) / inputs.std(axes, keepdims=True)
    assert np.allclose(found, expected, atol=1e-5) and "standardised" in task.reading
    (held_out,) = task.test_batches(World())
    assert np.allclose(held_out.floats().numpy(), expected[:10], atol=1e-5), "by the training samples' numbers"
    assert np.allclose(np.ravel(task.facts["standardized"]["mean"]), np.ravel(inputs.mean(axes)))


@pytest.mark.parametrize("dtype", ["f8", "i8", "i4"])
def test_large_numbers_keep_what_tells_them_apart(dtype: str, tmp_path: Path) -> None:
    """Such as times in seconds since 1970: float32 tells them apart by 128 s."""
    times = (1_700_000_000 + np.arange(60)[:, None] * np.array([1, 7])).astype(dtype)
    found = floats(opened(tmp_path, times, normalize="standardize")).numpy()
    assert np.allclose(found, (times - times.mean(0)) / times.std(0), atol=1e-5)


def test_a_constant_feature_becomes_zero(tmp_path: Path) -> None:
    inputs = RNG.random((30, 3)).astype("f4")
    inputs[:, 1] = 7e8
    found = floats(opened(tmp_path, inputs, normalize="standardize"))
    assert found[:, 1].abs().max() == 0 and found[:, 0].std() > 0.9


def test_attributes_are_left_out_where_a_job_says_so(tmp_path: Path) -> None:
    inputs = RNG.integers(0, 9, (30, 3)).astype("u1")
    assert floats(opened(tmp_path, inputs, 0.5, normalize="none")).tolist() == inputs.tolist()
    assert floats(opened(tmp_path, inputs, 0.5)).tolist() == (inputs / 2).tolist()


@pytest.mark.parametrize(
    "inputs, scale, says",
    [
        (RNG.integers(0, 256, (300, 28, 28)).astype("u1"), None, "train/inputs are large numbers, 0 to 255"),
        (RNG.integers(0, 256, (300, 28, 28)).astype("u1"), 1 / 255, ""),
        (RNG.normal(size=(300, 4)) * [1, 1, 1, 1e-4], None, "has features of unlike scale: one varies"),
        (RNG.normal(size=(300, 4)) * [1, 2, 3, 0], None, ""),
    ],
)
def test_an_unusual_scale_is_named(
    inputs: np.ndarray, scale: float | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path, inputs, scale)
    said = capsys.readouterr().err
    assert says in said and bool(says) == ('data.normalize = "standardize" mends it' in said)
    opened(tmp_path, inputs, scale, normalize="standardize")
    assert not capsys.readouterr().err


def test_moments_of_large_samples_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank holds the sums of all blocks: of large samples there are few blocks."""
    values, read = RNG.normal(size=(50, 400)), []
    monkeypatch.setattr(moments_module, "_SUMS_BYTES", 3 * 8 * 400 * 4)
    rank_span = moments_module.rank_span
    monkeypatch.setattr(moments_module, "rank_span", lambda *span: read.append(span) or rank_span(*span))
    found = moments(MmapReader(values), (), ALONE)
    assert {count for _, _, count in read} == {1, 4}, "four blocks, of one rank"
    assert np.allclose(found.mean, values.mean(0)) and np.allclose(found.std, values.std(0))


def test_moments_keep_their_digits_and_leave_out_what_is_missing() -> None:
    values = RNG.normal(size=(1000, 2)) + np.array([1e9, 0])
    stored = values.copy()
    stored[::7, 0], stored[5, 1] = -999, np.nan
    known = np.isfinite(stored) & (stored != -999)
    found = moments(MmapReader(stored), (-999.0,), ALONE)
    for place in range(2):
        rows = known[:, place]
        assert found.mean[place] == pytest.approx(values[rows, place].mean(), rel=1e-12)
        assert found.std[place] == pytest.approx(values[rows, place].std(), rel=1e-6)

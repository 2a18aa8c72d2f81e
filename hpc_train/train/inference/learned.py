"""What a run found in its training data, by which a trained model reads other data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.labels import Classes
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Standard
from hpc_train.train.data.table import Table
from hpc_train.train.run.meta_reader import read_meta
from hpc_train.train.tasks import open_task
from hpc_train.train.tasks.regression import TargetScale


@dataclass(frozen=True)
class Learned:
    """shape, dtype, scale: of the training inputs, as stored; scale is (scale_factor, add_offset).

    standard, mean_for_missing: see data.normalize = "standardize" and data.missing = "mean". classes: of
    classification. target_shape, targets: of regression. table: of samples that were prepared from one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    scale: tuple[float, float]
    standard: Standard | None
    mean_for_missing: torch.Tensor | None
    classes: Classes | None
    target_shape: tuple[int, ...]
    targets: TargetScale | None
    table: Table | None


_FACTS = (
    *("samples", "standardized", "classes", "num_classes"),
    *("targets_standardized", "target_shape", "target_scale", "target_names", "target_missing", "target_known"),
)


def read_learned(run: RunDir, config: Config, context: Context, log: Callable[[str], None]) -> Learned:
    """Collective. From meta.json; of a run of an earlier version, from its training data. Raises UserError."""
    facts = context.on_root(lambda: {key: value for key, value in read_meta(run).items() if key in _FACTS})
    if "samples" not in facts:
        log(f"{run.path} is of an earlier version: its training data are read to find their classes and scales")
        facts = open_task(config, context).facts or {}
    return context.on_all(partial(_checked, run, facts))


def _checked(run: RunDir, facts: dict[str, Any]) -> Learned:
    try:
        return _learned(facts)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.meta} does not say what the run trained on: {error!r:.80}", "Restore it: no model is used blindly."
        ) from None


def _learned(meta: dict[str, Any]) -> Learned:
    samples, standard, mean = meta["samples"], meta.get("standardized"), meta["samples"]["mean_for_missing"]
    classes, targets = None, None
    if "num_classes" in meta:
        values = meta["classes"]
        classes = Classes(int(meta["num_classes"]), None if values is None else np.asarray(values))
    else:
        found = meta["targets_standardized"]
        scale, offset = map(float, meta["target_scale"])
        missing, known = tuple(meta.get("target_missing", ())), float(meta.get("target_known", 1.0))
        names = tuple(meta.get("target_names", ()))
        targets = TargetScale(_float32(found["mean"]), _float32(found["std"]), scale, offset, missing, known, names)
    return Learned(
        shape=tuple(map(int, samples["shape"])),
        dtype=np.dtype(samples["dtype"]),
        scale=(float(samples["scale"][0]), float(samples["scale"][1])),
        standard=None if standard is None else Standard(_float64(standard["mean"]), _float64(standard["std"])),
        mean_for_missing=None if mean is None else _float32(mean),
        classes=classes,
        target_shape=tuple(map(int, meta.get("target_shape", ()))),
        targets=targets,
        table=Table(**samples["table"]) if samples.get("table") else None,
    )


def _float32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _float64(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float64))

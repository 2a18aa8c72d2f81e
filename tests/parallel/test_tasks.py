"""A batch that does not fit on one rank is reported on every rank, before anything is trained."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.first_batch import checked_loss


def test_one_ranks_batch_is_refused_by_all(context: Context) -> None:
    config, model = load(Path(__file__).parents[1] / "own-task.toml").config, nn.Linear(8, 2)
    task = SimpleNamespace(loss=lambda model, batch: model(batch).sum())
    width = 8 if context.world.rank < context.world.size - 1 else 7
    with pytest.raises(UserError) as caught:
        context.on_all(partial(checked_loss, config, task, model, torch.zeros(3, width)))  # type: ignore[arg-type]
    assert "batch: float32 (3, 7)" in caught.value.what and "is (2, 8)" in caught.value.what
    assert caught.value.joint, "no rank need be aborted, and one speaks"

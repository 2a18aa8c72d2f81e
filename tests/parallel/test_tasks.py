"""A batch that does not fit on one rank is told alike on every rank, before anything is trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_train.config import load
from hpc_train.errors import UserError
from hpc_train.train.context import Context
from hpc_train.train.tasks import check_task


def test_one_ranks_batch_is_refused_by_all(context: Context) -> None:
    config, model = load(Path(__file__).parents[1] / "own-task.toml").config, nn.Linear(8, 2)
    last = context.world.size - 1
    batch = torch.zeros(3, 8 if context.world.rank < last else 7)
    check_task(config, model, batch[:, :7].repeat(1, 2)[:, :8], lambda batch: model(batch).sum(), context)
    with pytest.raises(UserError) as caught:
        check_task(config, model, batch, lambda batch: model(batch).sum(), context)
    assert "batch: float32 (3, 7)" in caught.value.what and "is (2, 8)" in caught.value.what
    assert caught.value.joint, "no rank need be aborted, and one speaks"

"""train.freeze and train.rates: what is trained, with every strategy and stage, and what is refused in words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import find
from hpc_train.core.settings import Train
from hpc_train.train.trainable import limited
from tests import jobs

KEYS = {
    "train__steps": 5,
    "train__global_batch": 12,
    "train__optimizer": "adamw",
    "task__options": "{hidden = [24, 16]}",
}
WAYS = [(1, "local", 1), (3, "mpi", 1), (3, "sharded", 1), (3, "sharded", 3), (3, "parameter_server", 1)]


def weights(
    root: Path, folder: Path, ranks: int, digits: Path, **keys: object
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses of a run."""
    words = jobs.settings(data__file=digits, run__root=root, **KEYS, **keys)
    done = jobs.run(ranks, "train", "configs/mlp-mnist.toml", *words, cwd=jobs.ROOT)
    assert done.code == 0, done.err
    (run,) = rundir.find([root])
    done = jobs.run(0, "export", run.path, folder / f"{root.name}.safetensors", cwd=jobs.ROOT)
    assert done.code == 0, done.err
    return load_file(folder / f"{root.name}.safetensors"), list(read_metrics(run.metrics)[1])


def test_frozen_weights_stay_as_they_were_loaded_and_all_strategies_agree(digits: Path, tmp_path: Path) -> None:
    begun, _ = weights(tmp_path / "begin", tmp_path, 1, digits, reduce__strategy="local")
    found = []
    for ranks, strategy, stage in WAYS:
        keys = {"reduce__strategy": strategy, "reduce__stage": stage, "train__freeze": '["layers.0.*", "*.1.bias"]'}
        keys |= {"train__init_from": tmp_path / "begin.safetensors", "seed": 1}
        if strategy != "parameter_server":
            keys["train__rates"] = '{"layers.2.*" = 3.0}'
        found.append(weights(tmp_path / f"{strategy}-{stage}", tmp_path, ranks, digits, **keys))
        frozen = {name for name in begun if torch.equal(begun[name], found[-1][0][name])}
        assert frozen == {"layers.0.weight", "layers.0.bias", "layers.1.bias"}, strategy
    (alone, losses), *others = found
    for other, other_losses in others[:-1]:  # a server's weights have no rates of their own
        np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
        for name, value in alone.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
        self.head.weight = self.tokens.weight


def settings(**keys: object) -> Train:
    return Train.model_validate({"steps": 1, "global_batch": 1, **keys})


def test_a_tied_weight_is_frozen_by_each_of_its_names() -> None:
    for pattern in ("tokens.weight", "head.weight", "h*t"):
        model = limited(Tied, settings(freeze=[pattern]))
        assert [name for name, each in model.named_parameters() if each.requires_grad] == ["head.bias"]


@pytest.mark.parametrize(
    "keys, words",
    [
        (
            {"freeze": ["conv*"]},
            ("train.freeze = ['conv*']", "no weight that is trained is called 'conv*'", "head.bias"),
        ),
        ({"freeze": ["*"]}, ("leaves nothing to train", "Leave out some of: tokens.weight, head.weight, head.bias")),
        ({"rates": {"tail.*": 2.0}}, ("train.rates = {'tail.*': 2.0}", "There are tokens.weight, head.bias")),
        ({"rates": {"head.bias": 2.0}, "freeze": ["head.bias"]}, ("train.rates", "There are tokens.weight.")),
    ],
)
def test_a_pattern_without_a_weight_is_told_with_the_names(keys: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        limited(Tied, settings(**keys))
    for word in words:
        assert word in str(caught.value)


def test_a_resumed_job_is_told_first_what_may_not_change_and_a_folder_means_its_newest_run(
    tmp_path: Path, digits: Path
) -> None:
    rates = 'train.rates={"layers.1.*" = 2.0}'
    keys = {"data__file": digits, "train__global_batch": 8, "task__options": "{hidden = [4, 4]}", "run__root": tmp_path}
    keys |= {"reduce__strategy": "local", "train__schedule": "constant"}

    def train(num_steps: int, *words: object) -> jobs.Ended:
        settings = jobs.settings(train__steps=num_steps, **keys)
        return jobs.run(0, "train", jobs.CONFIGS / "mlp-mnist.toml", *settings, "--set", rates, *words, cwd=tmp_path)

    first = train(2)
    assert first.code == 0, first.err
    (run,) = find([tmp_path])
    refused = train(3, "--resume", run.path, "--set", 'train.freeze=["layers.1.*"]')
    assert refused.code == 2 and "train.freeze = ['layers.1.*'] here, [] in the run" in refused.err, refused.err
    assert train(3, "--resume", run.path.parent).code == 0
    assert find([tmp_path]) == [run] and len(read_metrics(run.metrics)[1]) == 3


def test_rates_are_refused_where_many_weights_are_updated_as_one() -> None:
    with pytest.raises(UserError, match=r"train\.rates = .* does not go with reduce\.strategy = 'parameter_server'"):
        load(jobs.CONFIGS / "mlp-mnist.toml", ('train.rates={"layers.1.*" = 2.0}', "reduce.strategy=parameter_server"))
    for rate in ("-1.0", '"fast"'):
        with pytest.raises(UserError, match=r"train\.rates"):
            load(jobs.CONFIGS / "mlp-mnist.toml", (f'train.rates={{"layers.1.*" = {rate}}}',))

"""Keys that do not go together, and numbers of ranks that a job cannot train on."""

import pytest

from hpc_train.core.config import Loaded, from_values
from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.settings import UNKNOWN_STEPS

DQN = {"task.kind": "dqn", "train.global_batch": 40, "rl.replay_size": 60, "rl.replay_start": 60, "rl.num_envs": 2}
SERVER = {"reduce.strategy": "parameter_server"}


def job(keys: dict[str, object]) -> Loaded:
    values: dict[str, dict[str, object]] = {"data": {"file": "x.h5"}, "train": {"steps": 1}}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    if "batch_per_rank" not in values["train"]:
        values["train"].setdefault("global_batch", 8)
    return from_values({"name": "job", **values}, "test")


@pytest.mark.parametrize(
    "keys",
    [
        {"train.global_batch": 4, "train.batch_per_rank": 4},
        {"data.file": "s3://bucket/x.h5"},
        {"task.kind": "recorded"},
        {"reduce.strategy": "own"},
        {"data.inputs": ["a", "b"]},
        {"task.kind": "language", "data.read": "memory"},
        {"task.kind": "regression", "task.num_classes": 3},
        {"task.loss": "mae"},
        {"task.kind": "policy_gradient", "test.samples": 100},
        {"task.kind": "mytask:MyTask", "test.samples": 100},
        {"data.options": {"train": True}},
        {"data.threads": 2},
        {"data.dataset": "a:B"},  # besides data.file
        {"data.file": None, "data.dataset": "a:B", "task.kind": "language"},
        {"data.file": None, "data.dataset": "a:B", "data.inputs": "x"},
        {"data.file": None, "data.dataset": "a:B", "data.missing": "drop"},
        {"data.file": None, "data.dataset": "a:B", "validation.every_steps": 5},
        {"data.file": None, "data.dataset": "a:B", "data.validation_options": {"train": False}},
        {"validation.every_steps": 5, "validation.every_epochs": 1.0},
        {"validation.every_steps": 5, "task.kind": "policy_gradient"},
        {"data.hold_out": 0.1, "task.kind": "language"},
        {"data.hold_out_by": "patient"},
        {"data.validation_file": "x.h5"},
        {"data.validation_inputs": "x", "data.hold_out": 0.1, "validation.every_steps": 5},
        {"train.epochs": 2.0},
        {"train.steps": UNKNOWN_STEPS},
        {"train.steps": UNKNOWN_STEPS, "train.epochs": 2.0, "task.kind": "dqn"},
        {"validation.every_steps": 5, "data.hold_out": 0.1, **SERVER},
        {"train.stop_after": 2},
        {"checkpoint.keep_best": "validation.loss"},
        {"task.kind": "policy_gradient", "train.accumulate": 2},
        DQN | {"rl.replay_start": 61},
        SERVER | {"train.optimizer": "lamb"},
        SERVER | {"train.rates": {"layers.1.*": 2.0}},
        {"task.kind": "dqn", "task.metrics": ["f1"]},
        {"reduce.strategy": "sharded", "reduce.compression": "fp16"},
        {"reduce.strategy": "mpi", "reduce.stage": 3},
        {"reduce.strategy": "mpi", "reduce.shard_within": "node"},
        {"reduce.strategy": "horovod", "reduce.shard_within": 1},
        {"reduce.strategy": "horovod", "reduce.transport": "mpi"},
        {"reduce.strategy": "sharded", "reduce.shard_blocks": ["a"]},
        {"reduce.strategy": "sharded", "reduce.stage": 2, "train.compile": True},
        DQN | {"reduce.strategy": "sharded", "reduce.stage": 3},
        SERVER | {"train.precision": "fp16"},
        SERVER | {"train.check_weights_every": 5},
        SERVER | {"train.clip_norm": 1.0, "reduce.asynchronous": True},
        SERVER | {"data.read": "memory"},
        {"reduce.strategy": "mpi", "reduce.adasum": True},
        {"reduce.adasum": True, "reduce.compression": "bf16"},
        {"energy.idle_s": 1.0, "energy.idle_w": 100.0},
        {"energy.price_per_kwh": 0.3},
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        job(keys)
    assert any(key in caught.value.what for key in keys), caught.value
    assert "config show" not in caught.value.remedy  # which would not say what to do


@pytest.mark.parametrize("value", [0, "foo"])
def test_a_key_of_two_types_is_named_once(value: object) -> None:
    with pytest.raises(UserError) as caught:
        job({"reduce.strategy": "sharded", "reduce.shard_within": value})
    (line,) = caught.value.what.splitlines()
    assert f"reduce.shard_within = {value!r}: input should be 'job' or 'node', or input should be" in line


def test_every_broken_rule_is_named() -> None:
    with pytest.raises(UserError) as caught:
        job({"energy.price_per_kwh": 0.3, "reduce.adasum": True, "reduce.strategy": "mpi"})
    assert len(caught.value.what.splitlines()) == 2


@pytest.mark.parametrize(
    "keys, num_ranks, words",
    [
        ({"reduce.strategy": "local"}, 2, "reduce.strategy = 'local'"),
        (SERVER | {"reduce.servers": 2}, 2, "reduce.servers = 2"),
        ({"reduce.adasum": True}, 6, "6 ranks are no power of two"),
        ({"train.global_batch": 3}, 4, "train.global_batch = 3"),
        (DQN, 3, "rl.num_envs = 2"),
        (DQN | {"train.global_batch": 61}, 1, "rl.replay_size = 60"),
    ],
)
def test_ranks_that_a_job_cannot_train_on(keys: dict[str, object], num_ranks: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_ranks(job(keys).config, num_ranks)
    assert words in caught.value.what


def test_weak_batches_grow_with_the_workers() -> None:
    weak = {key: value for key, value in DQN.items() if key != "train.global_batch"} | {"train.batch_per_rank": 31}
    check_ranks(job(weak).config, 1)
    with pytest.raises(UserError, match="global batch of 62"):
        check_ranks(job(weak).config, 2)
    check_ranks(job(SERVER | {"train.global_batch": 3}).config, 4)

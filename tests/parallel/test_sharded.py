"""Stages 2 and 3 of the strategy sharded: the numbers of an all-reduce, and an error where ranks would hang."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import JointFailure, UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Reduce
from hpc_train.core.timing_log import read_timings
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import open_mesh
from hpc_train.train.loop import train
from hpc_train.train.reduce.block_weights import BlockWeights, Buffers
from hpc_train.train.reduce.fully_sharded import FullySharded
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.reduce.transports import MpiTransport, SplittingTransport
from hpc_train.train.tasks.classification import Classification
from tests import checkpoints
from tests.parallel.test_train import CONFIGS, losses, run

STEPS = 8


class Layers(Classification):
    """Residual blocks under tied weights, a frozen layer, a buffer, and a part that is named in no `blocks`."""

    def model(self) -> nn.Module:
        return Residual()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(784, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, 48))
            for _ in range(3)
        )
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.leave = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.leave(self.second(torch.relu_(self.first(self.frozen(x)))))


KEYS: dict[str, object] = {
    "train__steps": STEPS,
    "train__threads": 1,
    "train__optimizer": "adamw",
    "train__lr": 0.0003,  # AdamW follows signs: at a higher rate rounding grows by a factor of ten in eight steps
    "train__weight_decay": 0.1,
    "task__kind": f"{__name__}:Layers",
    "train__global_batch": 96,
}
SMALL = {"task__kind": "classification", "task__options": "{hidden=[64, 48]}"}


def sharded(stage: int, transport: str = "mpi") -> dict[str, object]:
    return {"reduce__strategy": "sharded", "reduce__stage": stage, "reduce__transport": transport}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"train__clip_norm": 0.5},
        {"train__precision": "bf16"},
        {"train__activation_checkpointing": "true"},
        {"train__precision": "bf16", "train__activation_checkpointing": "true"},
        SMALL,
        {**SMALL, "train__accumulate": 3},
        {**SMALL, "train__precision": "fp16"},
    ],
    ids=str,
)
def test_all_stages_train_as_an_all_reduce_does(
    context: Context, shared_path: Path, digits: Path, keys: dict[str, object]
) -> None:
    """On two ranks: to the bit, unless a norm or parts of a batch are added up in another order."""
    if context.world.size == 1:
        pytest.skip("one rank shares nothing")
    keys = KEYS | keys
    expected = losses(run(context, shared_path / "mpi", digits, "mlp-mnist.toml", **keys, reduce__strategy="mpi"))
    is_exact = context.world.size == 2 and "train__clip_norm" not in keys
    for stage in (1, 2, 3):
        path = shared_path / str(stage)
        found = losses(run(context, path, digits, "mlp-mnist.toml", **keys, **sharded(stage)))
        if is_exact and (stage == 1 or "train__accumulate" not in keys):
            assert found.tolist() == expected.tolist(), stage
        else:
            # 16 bits round at other places when sums differ in their last bits.
            most = 1e-5 if keys.get("train__precision", "fp32") == "fp32" else 1e-2
            assert np.abs(found / expected - 1).max() < most, stage


@pytest.mark.parametrize("stage", [2, 3])
def test_horovod_and_torch_carry_it_as_mpi_does(context: Context, shared_path: Path, digits: Path, stage: int) -> None:
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    found = [
        losses(run(context, shared_path / name, digits, "mlp-mnist.toml", **KEYS, **sharded(stage, name)))
        for name in ("mpi", "horovod", "torch")
    ]
    assert np.abs(found[0] / found[1] - 1).max() < 1e-5
    assert np.abs(found[0] / found[2] - 1).max() < 1e-5


@pytest.mark.parametrize("before, after", [(3, 1), (1, 3), (3, 2), (2, 3)])
def test_a_run_continues_at_another_stage_to_the_bit(
    context: Context, shared_path: Path, digits: Path, before: int, after: int
) -> None:
    whole = run(context, shared_path / "whole", digits, "mlp-mnist.toml", **KEYS, **sharded(before))
    begun = run(
        context, shared_path / "begun", digits, "mlp-mnist.toml", **KEYS | {"train__steps": 5}, **sharded(before)
    )
    context.on_root(begun.summary.unlink)
    keys = {**KEYS, **sharded(after), "data__file": digits, "run__root": shared_path / "begun"}
    settings = tuple(f"{key.replace('__', '.')}={value}" for key, value in keys.items())
    assert train(load(CONFIGS / "mlp-mnist.toml", settings), context, str(begun.path)) == 0
    context.barrier()
    is_exact = context.world.size <= 2
    assert np.abs(losses(begun) / losses(whole) - 1).max() <= (0 if is_exact else 1e-5)


# ------------------------------------------------------------------------------------------- paths through a model


class OtherPath(Layers):
    """From step 4 on, or in the first batch already, the last rank leaves a block out."""

    FROM_STEP = 4

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.is_last = context.world.rank == context.world.size - 1

    def batch(self, rows: np.ndarray, step: int) -> Any:
        self.leaves_out = self.is_last and step >= self.FROM_STEP
        return super().batch(rows, step)

    in_step = True

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        blocks = list(model.blocks)
        if self.leaves_out:
            model.blocks = nn.ModuleList([blocks[0], blocks[2]])
        loss = super().loss(model, batch)
        model.blocks = nn.ModuleList(blocks)
        return loss


class OtherPathAtOnce(OtherPath):
    FROM_STEP = 0


def test_ranks_that_differ_in_the_first_batch_are_told(context: Context, shared_path: Path, digits: Path) -> None:
    """On all ranks at once: none is left waiting."""
    if context.world.size == 1:
        pytest.skip("one rank agrees with itself")
    last = context.world.size - 1
    said = rf"rank 0 is at blocks.1 \(forward\) while rank {last} is at blocks.2 \(forward\)"
    with pytest.raises((UserError, JointFailure), match=said):
        keys = KEYS | {"task__kind": f"{__name__}:OtherPathAtOnce"}
        run(context, shared_path, digits, "mlp-mnist.toml", **keys, **sharded(3))


class Twice(Layers):
    """Calls the model twice before backward."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) + super().loss(model, batch)


class Repeats(Layers):
    """Uses a block twice."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        blocks = list(model.blocks)
        model.blocks = nn.ModuleList([blocks[0], blocks[0]])
        return super().loss(model, batch)


@pytest.mark.parametrize("kind, said", [(Twice, "calls the model twice"), (Repeats, "blocks.0 is used twice")])
def test_models_that_cannot_be_cut_are_refused(
    context: Context, shared_path: Path, digits: Path, kind: type, said: str
) -> None:
    if context.world.size == 1:
        pytest.skip("one rank shares nothing")
    with pytest.raises(UserError, match=said):
        keys = KEYS | {"task__kind": f"{__name__}:{kind.__name__}"}
        run(context, shared_path, digits, "mlp-mnist.toml", **keys, **sharded(3))


class UnlikeTests(Layers):
    """Rank 0 has two batches to test on, the others none."""

    def test_batches(self, world: World) -> Iterator[Any]:
        if world.rank == 0:
            for batch in super().test_batches(World()):
                yield batch
                yield batch
                return


def test_ranks_without_test_samples_join_the_test(context: Context, shared_path: Path, digits: Path) -> None:
    keys = KEYS | {"task__kind": f"{__name__}:UnlikeTests"}
    tested = run(context, shared_path, digits, "mlp-mnist.toml", **keys, **sharded(3))
    assert '"accuracy"' in tested.summary.read_text()


# ------------------------------------------------------------------------------------------------ memory and bytes


class Counting(MpiTransport):
    """Counts what a ring of this rank sends for each collective."""

    num_bytes = 0.0

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Any:
        self.num_bytes += 2 * message.nbytes * (self.size - 1) / self.size
        return super().sum(message, name, is_last)

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Any:
        self.num_bytes += message.nbytes * (self.size - 1) / self.size
        return super().reduce_scatter(message, name, into)

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Any:
        self.num_bytes += part.nbytes * (self.size - 1)
        return super().all_gather(part, name, into)


class NoFlags:
    stop = save = False


@contextmanager
def stage_3(
    model: nn.Module, context: Context, within: int | str = "job"
) -> Iterator[tuple[FullySharded, Counting, Counting]]:
    """The reducer, and what counts the bytes between the ranks of a copy and between the copies."""
    settings = Reduce(strategy="sharded", stage=3, shard_within=within)
    with open_mesh(settings, context) as mesh:
        shards, replicas = Counting(mesh.shard.context), Counting(mesh.replica.context)
        between = SplittingTransport(replicas) if mesh.replica.size > 1 else None
        yield FullySharded(SplittingTransport(shards), between, settings, model, mesh, NoFlags()), shards, replicas


def test_a_step_sends_three_times_the_weights_and_holds_two_blocks(context: Context) -> None:
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(6)])
    model.forward = lambda x: model.blocks(x)
    num_bytes = sum(each.nbytes for each in model.parameters())
    block_bytes = num_bytes / 6
    alive: list[int] = []
    with stage_3(model, context) as (reducer, transport, _):

        def step() -> None:
            loss = model(torch.ones(8, 64)).sum()
            alive.append(sum(block.weights is not None for block in reducer.shards.blocks))
            reducer.begin_step(loss.detach())
            loss.backward()
            reducer.reduce_gradients()

        step()
        transport.num_bytes = 0
        step()
    size = context.world.size
    # The last block is still there when backward begins: it is gathered once.
    expected = (3 * num_bytes - block_bytes) * (size - 1) / size
    assert abs(transport.num_bytes / expected - 1) < 0.02
    assert alive == [0, 1]
    held = sum(len(buffer) for buffer in reducer._buffers._free) * 4
    assert held <= 4.01 * block_bytes, "two blocks' weights, and two blocks' gradients on their way"
    assert sum(each.untyped_storage().nbytes() for each in {p.data_ptr(): p for p in model.parameters()}.values()) < 100


class Normed(nn.Module):
    """Of 8 million weights that autocast casts, and a few that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.LayerNorm(1024), nn.Linear(1024, 4096), nn.Linear(4096, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.leave(torch.relu(self.enter(self.norm(x))))


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def test_under_autocast_weights_travel_in_16_bits_and_none_is_kept_for_backward(context: Context) -> None:
    """Autograd would keep autocast's copy of every weight, 67 MB: the first forward pass added 102 MB, not 27."""
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.Sequential(*[Normed() for _ in range(4)])
    model.forward = lambda x: model.blocks(x)
    num_weights, size = sum(each.numel() for each in model.parameters()), context.world.size
    kept = []
    with stage_3(model, context) as (reducer, transport, _):
        for _ in range(3):
            transport.num_bytes = 0
            before = anonymous_bytes()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.ones(2, 1024)).sum()
            kept.append(anonymous_bytes() - before)
            reducer.begin_step(loss.detach())
            loss.backward()
            reducer.reduce_gradients()
    # Two gathers of 2 bytes, but one of the last block, and a reduce-scatter of 4.
    expected = (2 * 2 - 2 / 4 + 4) * num_weights * (size - 1) / size
    assert abs(transport.num_bytes / expected - 1) < 0.02
    assert kept[0] < 50e6, "two buffers of a block; the C library keeps what was used once"
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_without_a_gradient_of_their_own_ranks_send_zeros(context: Context) -> None:
    """The last rank does not use the last layer of each block; its peers wait for nothing."""
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x) if context.world.rank < context.world.size - 1 else x

    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.Sequential(Some(), Some())
    model.forward = lambda x: model.blocks(x)
    with stage_3(model, context) as (reducer, _, _):
        for _ in range(3):
            loss = model(torch.ones(4, 8)).sum()
            reducer.begin_step(loss.detach())
            loss.backward()
            reducer.reduce_gradients()
    assert all(torch.isfinite(owned.parameter.grad).all() for owned in reducer.shards.owned)


def test_buffers_are_as_many_as_are_used_at_a_time() -> None:
    blocks = [BlockWeights(str(n), {"w": nn.Parameter(torch.zeros(n))}, 1, 0) for n in (10, 40, 20, 80)]
    buffers = Buffers()
    for block in blocks * 3:
        one, other = buffers.take(block), buffers.take(block)
        assert len(one) == len(other) == block.length and one.data_ptr() != other.data_ptr()
        buffers.give(one)
        buffers.give(other)
    assert [len(each) for each in buffers._free] == [80, 80]


def test_blocks_are_found_by_attribute_name_and_size() -> None:
    model = Residual()
    assert list(find_blocks(model, None)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_blocks(model, ["enter", "blocks.*"])) == ["enter", "blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(UserError, match="no module of Residual is called 'layers"):
        find_blocks(model, ["layers.*"])
    with pytest.raises(UserError, match=r"blocks.0 is part of another block"):
        find_blocks(model, ["blocks.0", "blocks"])
    by_size = nn.Sequential(nn.Linear(8, 100), nn.Sequential(nn.Linear(100, 2), nn.Linear(2, 2)), nn.Linear(2, 1))
    assert list(find_blocks(by_size, None)) == ["0", "1.0", "1.1", "2"]
    groups = parameters_of(model, find_blocks(model, ["first", "second", "blocks.*"]))
    assert "first.weight" in groups[""] and list(groups["second"]) == ["second.bias"], "tied weights are in no block"
    assert not any(name.startswith("frozen") for group in groups.values() for name in group)


def test_a_checkpoint_of_stage_3_is_read_without_mpi(context: Context, shared_path: Path, digits: Path) -> None:
    keys = KEYS | {"reduce__strategy": "local"} if context.world.size == 1 else KEYS | sharded(3)
    made = run(context, shared_path, digits, "mlp-mnist.toml", **keys)
    assert isinstance(made, RunDir)
    state = checkpoints.state(made.checkpoint(STEPS))
    model = Residual()
    model.load_state_dict(state["model"])
    assert torch.equal(state["model"]["second.weight"], state["model"]["first.weight"])
    assert all(torch.isfinite(each).all() for each in model.parameters())


class Late(Layers):
    """The last rank comes late to every forward pass."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.is_last = context.world.rank == context.world.size - 1

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.is_last:
            time.sleep(LATE_S)
        return super().loss(model, batch)


LATE_S, PASSES = 0.2, ("forward", "backward")


def test_waiting_for_weights_is_exposed_communication(context: Context, shared_path: Path, digits: Path) -> None:
    if context.world.size == 1:
        pytest.skip("one rank waits for nobody")
    keys = KEYS | {"task__kind": f"{__name__}:Late"}
    made = run(context, shared_path, digits, "mlp-mnist.toml", **keys, **sharded(3))
    timings = read_timings(made.timings(context.world.rank))
    reduce_s, forward_s, backward_s = (np.median(timings[f"{each}_ns"]) / 1e9 for each in ("reduce", *PASSES))
    durations = timings.phases_ns.sum(axis=1)
    assert (timings["start_ns"][1:] == timings["start_ns"][:-1] + durations[:-1]).all()
    assert (timings.phases_ns >= 0).all()
    if context.world.rank < context.world.size - 1:
        assert reduce_s > 0.9 * LATE_S and forward_s + backward_s < 0.5 * LATE_S
    else:
        assert forward_s > LATE_S

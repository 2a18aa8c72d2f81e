"""Several copies of divided weights (`reduce.shard_within`): the numbers of one copy, and little between the copies."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import open_mesh
from hpc_train.train.loop import train
from hpc_train.train.reduce.block_weights import BlockWeights
from tests.parallel.test_sharded import KEYS, Layers, sharded, stage_3
from tests.parallel.test_train import CONFIGS, losses, run

BF16: dict[str, object] = {"train__precision": "bf16"}


def group_sizes(context: Context) -> list[int]:
    """How many ranks may share one copy such that there are several copies."""
    return [each for each in range(1, context.world.size) if context.world.size % each == 0]


def hybrid(stage: int, within: int) -> dict[str, object]:
    return {**sharded(stage), "reduce__shard_within": within}


def test_the_mesh_has_two_axes(context: Context) -> None:
    rank, size = context.world.rank, context.world.size
    for within in group_sizes(context):
        first = rank - rank % within
        with open_mesh(Reduce(strategy="sharded", shard_within=within), context) as mesh:
            assert (mesh.data.size, mesh.replica.size, mesh.shard.size) == (size, size // within, within)
            assert mesh.shard.context.all_gather(rank) == list(range(first, first + within))
            assert mesh.replica.context.all_gather(rank) == list(range(rank % within, size, within))


def test_torch_distributed_sums_within_copies_and_between_them(
    context: Context, shared_path: Path, digits: Path
) -> None:
    for within in group_sizes(context):
        found = [
            losses(
                run(
                    context,
                    shared_path / f"{within}-{name}",
                    digits,
                    "mlp-mnist.toml",
                    **KEYS | hybrid(3, within) | {"reduce__transport": name},
                )
            )
            for name in ("mpi", "torch")
        ]
        assert np.abs(found[0] / found[1] - 1).max() < 1e-5, within


def on_host(context: Context, host: str) -> Context:
    return replace(context, world=replace(context.world, host=host))


def test_nodes_are_found_by_the_names_of_hosts(context: Context) -> None:
    """Ranks that the launcher dealt out to the nodes in turn."""
    rank, size = context.world.rank, context.world.size
    if size % 2:
        pytest.skip("two nodes")
    with open_mesh(Reduce(strategy="sharded", shard_within="node"), on_host(context, f"node{rank % 2}")) as mesh:
        assert mesh.shard.context.all_gather(rank) == list(range(rank % 2, size, 2))
        assert mesh.replica.size == 2


def test_nodes_of_unlike_size_are_refused(context: Context) -> None:
    rank, size = context.world.rank, context.world.size
    if size < 3:
        pytest.skip("two nodes of unlike size")
    host = "last" if rank == size - 1 else "first"
    with (
        pytest.raises(UserError, match=f"'node': first has {size - 1} ranks and last 1,") as raised,
        open_mesh(Reduce(strategy="sharded", shard_within="node"), on_host(context, host)),
    ):
        pass
    assert raised.value.joint


def test_ranks_that_make_no_whole_groups_are_refused(context: Context, shared_path: Path, digits: Path) -> None:
    size = context.world.size
    with pytest.raises(UserError, match=f"reduce.shard_within = {size + 1}: {size} rank.* cannot be divided"):
        run(context, shared_path, digits, "mlp-mnist.toml", **KEYS, **hybrid(2, size + 1))


@pytest.mark.parametrize("keys", [{}, {"train__clip_norm": 0.5}, {"train__accumulate": 3}, BF16], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_several_copies_train_as_one_does(
    context: Context, shared_path: Path, digits: Path, stage: int, keys: dict[str, object]
) -> None:
    keys = KEYS | keys
    expected = losses(run(context, shared_path / "flat", digits, "mlp-mnist.toml", **keys, **sharded(stage)))
    for within in group_sizes(context):
        path = shared_path / str(within)
        found = losses(run(context, path, digits, "mlp-mnist.toml", **keys, **hybrid(stage, within)))
        adds_up_alike = "train__clip_norm" not in keys and (stage == 1 or "train__accumulate" not in keys)
        most = 1e-2 if BF16.items() <= keys.items() else 1e-5
        assert np.abs(found / expected - 1).max() <= (0 if context.world.size == 2 and adds_up_alike else most), within


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("to_flat", [True, False])
def test_a_run_continues_with_another_number_of_copies(
    context: Context, shared_path: Path, digits: Path, stage: int, to_flat: bool
) -> None:
    if context.world.size == 1:
        pytest.skip("one rank shares nothing")
    pair = sharded(stage), hybrid(stage, group_sizes(context)[-1])
    before, after = reversed(pair) if to_flat else pair
    whole = run(context, shared_path / "whole", digits, "mlp-mnist.toml", **KEYS, **sharded(stage))
    begun = run(context, shared_path / "begun", digits, "mlp-mnist.toml", **KEYS | {"train__steps": 5}, **before)
    context.on_root(begun.summary.unlink)
    keys = {**KEYS, **after, "data__file": digits, "run__root": shared_path / "begun"}
    settings = tuple(f"{key.replace('__', '.')}={value}" for key, value in keys.items())
    assert train(load(CONFIGS / "mlp-mnist.toml", settings), context, str(begun.path)) == 0
    context.barrier()
    is_exact = context.world.size == 2
    assert np.abs(losses(begun) / losses(whole) - 1).max() <= (0 if is_exact else 1e-5)


def test_only_sums_of_parts_leave_a_copy(context: Context) -> None:
    """Between n copies, 2 (n-1)/n times the bytes of a rank's part; within a copy of s ranks, 3 (s-1)/s of all."""
    for within in group_sizes(context):
        torch.manual_seed(0)
        model = nn.Module()
        blocks = [nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(6)]
        model.blocks = nn.Sequential(*blocks)
        model.forward = lambda x, model=model: model.blocks(x)
        num_bytes = sum(each.nbytes for each in model.parameters())
        with stage_3(model, context, within) as (reducer, shards, replicas):
            for _ in range(2):
                shards.num_bytes = replicas.num_bytes = 0
                loss = model(torch.ones(8, 64)).sum()
                reducer.begin_step(loss.detach())
                loss.backward()
                reducer.reduce_gradients()
        num_copies = context.world.size // within
        assert replicas.num_bytes == pytest.approx(2 * (num_copies - 1) / num_copies * num_bytes / within, rel=0.02)
        sent_within = (3 - 1 / 6) * (within - 1) / within * num_bytes  # the last block is gathered once
        assert shards.num_bytes == pytest.approx(sent_within, rel=0.02)


# ------------------------------------------------------------------------------- weights that should be alike


class BrokenMemory(Layers):
    """In step 5 a bit flips in what the last rank holds of a block."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.is_last = context.world.rank == context.world.size - 1

    def batch(self, rows: np.ndarray, step: int) -> Any:
        self.breaks = self.is_last and step == 5
        return super().batch(rows, step)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.breaks:
            self.flip(model)
        return super().loss(model, batch)

    def flip(self, model: nn.Module) -> None:
        blocks = [each for each in gc.get_objects() if isinstance(each, BlockWeights)]
        (block,) = [each for each in blocks if each.parameters.get("enter.weight") is model.enter.weight]
        block.own.view(torch.int32)[7] ^= 1


class BrokenFrozenWeight(BrokenMemory):
    def flip(self, model: nn.Module) -> None:
        model.frozen.weight.view(torch.int32)[0, 0] ^= 1


@pytest.mark.parametrize("kind", [BrokenMemory, BrokenFrozenWeight])
def test_a_rank_whose_part_differs_from_that_of_another_copy_is_named(
    context: Context, shared_path: Path, digits: Path, kind: type
) -> None:
    size = context.world.size
    keys = KEYS | {"task__kind": f"{__name__}:{kind.__name__}", "train__check_weights_every": 4}
    for within in group_sizes(context):
        with pytest.raises(UserError, match=f"weights after 8 steps differ between ranks: rank {size - 1} on .* from"):
            run(context, shared_path / str(within), digits, "mlp-mnist.toml", **keys, **hybrid(3, within))


def test_what_is_alike_at_stage_3_passes(context: Context, shared_path: Path, digits: Path) -> None:
    keys = KEYS | {"train__check_weights_every": 1}
    for within in [*group_sizes(context), context.world.size]:
        found = losses(run(context, shared_path / str(within), digits, "mlp-mnist.toml", **keys, **hybrid(3, within)))
        assert len(found) == keys["train__steps"]

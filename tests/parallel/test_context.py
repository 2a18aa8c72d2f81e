import time
from dataclasses import replace

import numpy as np
import pytest

from hpc_train.core.errors import JointFailure, UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm.clocks import clock_offsets_ns, compare_clocks
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import open_mesh


def test_on_root_gives_every_rank_the_roots_value(context: Context) -> None:
    assert context.on_root(lambda: context.world.rank) == 0


def test_a_users_mistake_on_the_root_is_raised_alike_everywhere(context: Context) -> None:
    def fail() -> None:
        raise UserError("train.lr = -1", "Set it above 0.")

    with pytest.raises(UserError, match=r"train.lr = -1\n  Set it above 0\.") as caught:
        context.on_root(fail)
    assert caught.value.joint


def test_a_bug_on_the_root_is_its_own_there_and_a_joint_failure_elsewhere(context: Context) -> None:
    with pytest.raises(ZeroDivisionError if context.world.is_root else JointFailure):
        context.on_root(lambda: 1 // 0)


def test_on_all_raises_the_lowest_failing_ranks_error_everywhere(context: Context) -> None:
    def fail_on_last() -> str:
        if context.world.rank == context.world.size - 1:
            raise UserError(f"node of rank {context.world.rank}", "Fix it.")
        return "fine"

    with pytest.raises(UserError, match=f"node of rank {context.world.size - 1}"):
        context.on_all(fail_on_last)


def test_a_bug_on_all_ranks_is_raised_by_the_lowest(context: Context) -> None:
    with pytest.raises(ZeroDivisionError if context.world.is_root else JointFailure):
        context.on_all(lambda: 1 // 0)


def test_sums_and_maxima_over_ranks(context: Context) -> None:
    rank, size = context.world.rank, context.world.size
    assert context.sum(np.array([rank, 1.0])).tolist() == [size * (size - 1) / 2, size]
    assert context.max(np.array([rank, -rank])).tolist() == [size - 1, 0]
    assert context.max(np.array([rank == size - 1, False])).tolist() == [True, False]
    assert context.gather(rank) == (list(range(size)) if rank == 0 else [])
    assert context.all(rank) == context.all_gather(rank) == list(range(size)), "the former name, too"


def test_clocks_of_one_machine_are_found_equal(context: Context) -> None:
    offsets = clock_offsets_ns(context)
    if context.world.is_root:
        assert len(offsets) == context.world.size and offsets[0] == 0
        assert max(map(abs, offsets)) < 20_000_000, "one machine has one monotonic clock: 20 ms is scheduling noise"
    else:
        assert offsets == []


def test_hosts_clocks_are_compared_along_a_tree(context: Context) -> None:
    """As if each rank had a host of its own, whose clock is its rank in seconds ahead."""
    rank = context.world.rank
    apart = replace(context, world=replace(context.world, node_root=rank))
    found = compare_clocks(apart, lambda: time.perf_counter_ns() + rank * 1_000_000_000)
    if context.world.is_root:
        assert len(found) == context.world.size and found[0] == (0, 0)
        for number, (offset_ns, error_ns) in enumerate(found):
            assert abs(offset_ns - number * 1_000_000_000) <= error_ns + 1_000_000
    else:
        assert found == []


def test_an_error_of_one_rank_reaches_the_others_by_itself(context: Context) -> None:
    """on_all sends one number where nothing fails: no list of what all ranks have to say."""
    sent = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            sent.append(name)
            return getattr(context.comm, name)

    assert replace(context, comm=Counting()).on_all(lambda: 7) == 7
    assert [name for name in sent if name != "MAX"] == ["Allreduce"]


def test_a_collective_waits_for_the_slowest(context: Context) -> None:
    context.barrier()
    began = time.perf_counter()
    if context.world.rank == context.world.size - 1:
        time.sleep(0.2)
    context.barrier()
    assert time.perf_counter() - began > 0.19


def test_a_split_joins_the_ranks_of_one_color(context: Context) -> None:
    rank, size = context.world.rank, context.world.size
    is_last = rank == size - 1
    with context.split(int(is_last)) as part:
        assert part.all_gather(rank) == ([rank] if is_last else list(range(size - 1)))
        assert part.world.host == context.world.host and part.waiting is context.waiting


MESHES = {  # (data, replica, shard) of N ranks
    "mpi": lambda size: (size, size, 1),
    "horovod": lambda size: (size, size, 1),
    "sharded": lambda size: (size, 1, size),
    "parameter_server": lambda size: (size - 1, size - 1, 1),
}


@pytest.mark.parametrize("strategy", MESHES)
def test_the_mesh_says_who_shares_data_and_who_shares_weights(context: Context, strategy: str) -> None:
    rank, size = context.world.rank, context.world.size
    if strategy == "parameter_server" and size == 1:
        pytest.skip("a server alone")
    is_server = strategy == "parameter_server" and rank == size - 1
    with open_mesh(Reduce(strategy=strategy), context) as mesh:
        assert (mesh.data.size, mesh.replica.size, mesh.shard.size) == MESHES[strategy](size)
        assert mesh.trains is not is_server
        assert mesh.ranks.all_gather(rank) == list(range(size))
        assert mesh.peers.all_gather(rank) == ([rank] if is_server else list(range(mesh.data.size)))
        for axis in (mesh.data, mesh.replica, mesh.shard):
            if axis.context is not None:
                assert axis.context.world.size == axis.size == len(axis.context.all_gather(rank))
        on_axes = [mesh.data, mesh.replica] if strategy == "parameter_server" else []
        assert all((axis.context is None) is is_server for axis in on_axes)

"""Of `hpc-train doctor`, what ranks do with each other."""

from dataclasses import replace
from time import time_ns

import pytest

from hpc_train.doctor import network
from hpc_train.doctor.__main__ import _answers
from hpc_train.doctor.check import Answer, Subject
from hpc_train.train.comm.clocks import compare_clocks
from hpc_train.train.comm.context import Context


def test_ranks_that_do_not_answer_are_named(context: Context) -> None:
    world = context.world
    mine = Answer(world.rank, world.host, world.local_rank, {"seen": world.rank})
    late = world.size - 1 if world.size > 1 else None
    if world.rank == late:
        context.barrier()
    answers, lost = _answers(mine, 7, context, 0.3)
    if world.rank != late:
        context.barrier()
    if world.is_root:
        assert [answer.rank for answer in answers] == [rank for rank in range(world.size) if rank != late]
        assert lost == ([] if late is None else [late])
        if late is not None:
            assert context.comm.recv(source=late, tag=7).rank == late


def test_a_clock_that_is_ahead_is_told(context: Context) -> None:
    ahead_ns = context.world.rank * 5 * 10**9
    apart = replace(context, world=replace(context.world, node_root=context.world.rank))  # a host each
    found = context.all_gather(compare_clocks(apart, lambda: time_ns() + ahead_ns))[0]
    for rank, (offset_ns, error_ns) in enumerate(found):
        assert offset_ns == pytest.approx(rank * 5 * 10**9, abs=max(error_ns, 10**6))


def test_sums_are_right_and_something_carries_them(context: Context) -> None:
    if context.comm is None:
        return
    subject = Subject(context, None, {})
    looks = {network.probe_all_reduce: network.evaluate_all_reduce, network.probe_transport: network.evaluate_transport}
    for look, judge in looks.items():
        values = look(subject)
        world = context.world
        answers = context.gather(Answer(world.rank, world.host, world.local_rank, values))
        if world.is_root:
            assert judge(answers).status in ("ok", "warn", "n/a"), judge(answers)

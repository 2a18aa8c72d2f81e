"""Memory for the weights, gradients and optimizer state of a job."""

from collections.abc import Sequence
from functools import partial

from hpc_train.core.formatting import amount
from hpc_train.core.settings import Config, Train
from hpc_train.core.world import World
from hpc_train.doctor.check import Answer, Finding, Subject, Values, fail, not_applicable, ok, warn
from hpc_train.train.comm.context import Context

_MOST_USED = 0.75  # of a rank's memory: the rest is for activations and messages


def probe_memory(subject: Subject) -> Values:
    """Collective. What each rank may have at least; on the root, what the job certainly takes of it."""
    from hpc_train.train.device import open_device
    from hpc_train.train.memory import room_bytes

    train = subject.config.train if subject.config else Train(steps=1, batch_per_rank=1)
    device = open_device(train, subject.context.world)
    values: Values = {"available": room_bytes(subject.context, device), "needed": None}
    if subject.config is not None and subject.context.world.is_root:
        values["needed"] = needed_bytes(subject.config, subject.context.world)
    return values


def needed_bytes(config: Config, world: World) -> int | None:
    """Of a rank; None for a job that cannot be made here, which the check of disk space explains."""
    from hpc_train.train.initial_weights import build
    from hpc_train.train.memory import Division, certain_bytes, num_bytes
    from hpc_train.train.reduce.buckets import trainable_parameters
    from hpc_train.train.tasks import open_task
    from hpc_train.train.trainable import limited

    try:
        task = open_task(config, Context(World()))
        model = build(partial(limited, task.model, config.train), config.seed).model
    except Exception:  # noqa: BLE001  a user's task may raise anything
        return None
    divided = Division.of(config.reduce, world.size, world.local_size)
    return sum(vars(certain_bytes(config, num_bytes(trainable_parameters(model).values()), divided)).values())


def evaluate_memory(answers: Sequence[Answer]) -> Finding:
    """Whether weights, gradients and optimizer state fit a rank."""
    needed, available = answers[0].values["needed"], answers[0].values["available"]
    if needed is None:
        return not_applicable(f"{amount(available, 'B')} for each rank; no job named: hpc-train doctor CONFIG")
    seen = f"weights, gradients and optimizer take {amount(needed, 'B')} of {amount(available, 'B')} a rank"
    if needed > available:
        return fail(seen, "hpc-train memory CONFIG --node-memory SIZE   # which stage of 'sharded', and how many ranks")
    if needed > _MOST_USED * available:
        return warn(f"{seen}: little is left for activations", "hpc-train memory CONFIG   # all parts")
    return ok(seen)

"""Cores, GPUs and energy meters: what this rank can really use."""

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, sleep, thread_time
from typing import Any

from hpc_train.core.formatting import plural
from hpc_train.doctor.check import Answer, Finding, Subject, Values, by_host, fail, not_applicable, ok, warn
from hpc_train.train.energy.sensors.choose import choose_meters

_ALONE_S, _TOGETHER_S = 0.1, 0.3
_ENOUGH = 0.6  # of a core per thread: two hyper-threads of one core compute at 0.6 to 0.7 of its speed each
_BLOCK = bytes(1 << 16)  # large enough that hashlib releases the GIL
_METER_S, _POLL_S = 1.0, 0.05  # some GPUs update their energy counter only every 0.05 s
_NVIDIA = Path("proc/driver/nvidia/gpus")
_AMD = Path("sys/class/kfd/kfd/topology/nodes")
_RAPL = Path("sys/class/powercap")

# ---------------------------------------------------------------------------------------- cores


def probe_cores(subject: Subject) -> Values:
    """Collective. This rank's threads and cores, and what a thread gets while all ranks compute.

    share: CPU time per thread and wall time. speed: relative to one thread that computes alone on the host.
    """
    context, cores = subject.context, sorted(os.sched_getaffinity(0))
    threads = _threads(subject, len(cores))
    alone = _compute(1, _ALONE_S) if context.world.local_rank == 0 else None
    context.idle_barrier()
    together = _compute(threads, _TOGETHER_S)
    context.idle_barrier()
    all_alone = context.all_gather((context.world.host, alone))
    alone_on_host = next(work for host, work in all_alone if host == context.world.host and work is not None)
    return {
        "cores": cores,
        "threads": threads,
        "share": together.share,
        "speed": together.blocks_per_s / threads / alone_on_host.blocks_per_s,
    }


def _threads(subject: Subject, num_cores: int) -> int:
    """Collective. The number of threads that training would use."""
    configured = subject.config.train.threads if subject.config else 0
    if find_spec("torch") is None:
        return configured or num_cores
    from hpc_train.train.comm.placement import place_ranks

    return place_ranks(subject.context, configured)[subject.context.world.rank].threads


@dataclass(frozen=True)
class _Work:
    blocks_per_s: float
    share: float  # of a core, per thread


def _compute(num_threads: int, seconds: float) -> _Work:
    done: list[tuple[int, float]] = []

    def work() -> None:
        count, began, end = 0, thread_time(), perf_counter() + seconds
        while perf_counter() < end:
            hashlib.sha256(_BLOCK)
            count += 1
        done.append((count, thread_time() - began))

    began, threads = perf_counter(), [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent_s = perf_counter() - began
    return _Work(sum(count for count, _ in done) / spent_s, sum(used for _, used in done) / num_threads / spent_s)


def evaluate_cores(answers: Sequence[Answer]) -> Finding:
    """Whether each thread has a core of its own."""
    hosts = by_host(answers)
    crowded = [words for host, ranks in hosts.items() if (words := _crowded(host, ranks))]
    slow = [answer for answer in answers if min(answer.values["share"], answer.values["speed"]) < _ENOUGH]
    worst = min(answers, key=lambda answer: float(answer.values["share"])).values
    seen = f"while all ranks compute, a thread gets {worst['share']:.0%} of a core"
    if crowded and slow:
        remedy = "mpirun --bind-to none ...   # srun: export SRUN_CPUS_PER_TASK=N; or fewer threads: OMP_NUM_THREADS=1"
        return fail(f"{crowded[0]}: {seen}", remedy, slow)
    if slow:
        speed = min(answer.values["speed"] for answer in slow)
        seen += f" at {speed:.2f} of the speed of one alone: other programs compute there, or a CPU quota applies"
        remedy = "top; cat /sys/fs/cgroup/cpu.max; lscpu | grep Thread   # Slurm: --exclusive --hint=nomultithread"
        return warn(seen, remedy, slow)
    per_rank = f"{plural(worst['threads'], 'thread')} and {plural(len(worst['cores']), 'core')} per rank"
    return ok(f"{per_rank}: {seen} at {worst['speed']:.2f} of the speed of one alone")


def _crowded(host: str, ranks: Sequence[Answer]) -> str:
    """How the ranks of a host use more threads than it has cores; "" if they do not."""
    cores = {core for answer in ranks for core in answer.values["cores"]}
    threads = sum(answer.values["threads"] for answer in ranks)
    if threads > len(cores):
        return (
            f"{plural(len(ranks), 'rank')} on {host} have {plural(threads, 'thread')} on {plural(len(cores), 'core')}"
        )
    for answer in ranks:
        if answer.values["threads"] > len(answer.values["cores"]):
            num_threads, num_cores = answer.values["threads"], len(answer.values["cores"])
            return f"rank {answer.rank} has {plural(num_threads, 'thread')} and is bound to {plural(num_cores, 'core')}"
    # Several ranks bound to the same few cores, on a host that has enough cores in total.
    for answer in ranks:
        mine = set(answer.values["cores"])
        within = [each for each in ranks if set(each.values["cores"]) <= mine]
        if sum(each.values["threads"] for each in within) > len(mine):
            return f"{len(within)} ranks on {host} are bound to the same {plural(len(mine), 'core')}"
    return ""


# ---------------------------------------------------------------------------------------- convolutions


def probe_convolutions(subject: Subject) -> Values:
    """How the convolution of oneDNN's bug 6035 ended, tried in a child process by one rank of each host."""
    import torch

    from hpc_train.train.onednn import try_kernel

    asked = subject.config.train.device if subject.config else "auto"
    on_cpu = asked == "cpu" or not torch.cuda.is_available()
    tries = on_cpu and subject.context.world.local_rank == 0
    return {"on_cpu": on_cpu, "fault": try_kernel() if tries else None, "torch": torch.__version__}


def evaluate_convolutions(answers: Sequence[Answer]) -> Finding:
    """Whether convolutions on these CPUs write outside their memory."""
    if not any(answer.values["on_cpu"] for answer in answers):
        return not_applicable("ranks compute on GPUs")
    broken = [answer for answer in answers if answer.values["fault"]]
    if not broken:
        return ok("20 backward passes of a channels_last 1x1 convolution with stride 2 over 8 channels")
    values = broken[0].values
    seen = (
        f"torch {values['torch']} has oneDNN's bug 6035: a process {values['fault']} in the backward pass of a "
        "channels_last 1x1 convolution with a stride over 8 channels. The shipped models avoid it"
    )
    remedy = "x = x.contiguous()   # in your own model, before such a layer: images in the default layout"
    return warn(seen, remedy, broken)


# ---------------------------------------------------------------------------------------- GPUs


def probe_gpu(subject: Subject) -> Values:
    """The GPU that this rank would train on, tested with a sum, and how many GPUs the driver has."""
    import torch

    has = _of_driver(subject.root)
    asked = subject.config.train.device if subject.config else "auto"
    values: Values = {"asked": asked, "of_driver": has, "visible": 0, "torch": torch.__version__, "error": None}
    if asked == "cpu" or not torch.cuda.is_available():
        return values
    values["visible"] = torch.cuda.device_count()
    index = subject.context.world.local_rank % values["visible"]  # as device.open_device does
    try:
        device = torch.device("cuda", index)
        values["error"] = None if float(torch.ones(1000, device=device).sum()) == 1000 else "a sum on it is wrong"
        found = torch.cuda.get_device_properties(index)
        return {**values, "gpu": str(getattr(found, "uuid", index)), "name": found.name}
    except RuntimeError as error:
        return {**values, "error": str(error).splitlines()[0]}


def _of_driver(root: Path) -> int:
    """Number of GPUs that an NVIDIA or AMD driver has. AMD's driver also lists CPUs, with gpu_id 0."""
    num = len(list((root / _NVIDIA).glob("*")))
    for path in (root / _AMD).glob("*/gpu_id"):
        with suppress(OSError):  # a GPU that this job may not use
            num += path.read_text().strip() != "0"
    return num


def evaluate_gpu(answers: Sequence[Answer]) -> Finding:
    """Whether each rank has a GPU of its own that computes."""
    values = answers[0].values
    broken = [answer for answer in answers if answer.values["error"]]
    if broken:
        return fail(
            f"the GPU does not compute: {broken[0].values['error']}",
            "nvidia-smi   # its state, and who uses it",
            broken,
        )
    without = [answer for answer in answers if not answer.values["visible"]]
    if without and values["asked"] == "cuda":
        remedy = "Ask the scheduler for GPUs (--gpus-per-task=1), or --set train.device=auto"
        return fail(f"train.device = 'cuda', but torch {values['torch']} finds no GPU", remedy, without)
    if without and len(without) < len(answers):
        return fail("some ranks find a GPU, but these do not", "srun --gpus-per-task=1 --gpu-bind=closest ...", without)
    unused = [answer for answer in answers if answer.values["of_driver"] and not answer.values["visible"]]
    if unused and values["asked"] != "cpu":
        num = unused[0].values["of_driver"]
        seen = f"the driver has {plural(num, 'GPU')}, but torch {values['torch']} uses none"
        return warn(
            seen, "TORCH=torch make install   # with a torch built for GPUs; unset CUDA_VISIBLE_DEVICES", unused
        )
    if without:
        return not_applicable("train.device = 'cpu'" if values["asked"] == "cpu" else "no GPU here")
    return _bound(answers)


def _bound(answers: Sequence[Answer]) -> Finding:
    """Whether each rank has a GPU of its own."""
    seen: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        seen.setdefault((answer.host, answer.values["gpu"]), []).append(answer)
    shared = [answer for ranks in seen.values() if len(ranks) > 1 for answer in ranks]
    if shared:
        most = max(len(ranks) for ranks in seen.values())
        remedy = "srun --gpus-per-task=1 ...   # or as many ranks on a host as it has GPUs"
        return fail(f"{most} ranks share one GPU ({shared[0].values['name']})", remedy, shared)
    return ok(f"{answers[0].values['name']}, one for each rank; a sum on it is right")


# ---------------------------------------------------------------------------------------- energy meters


def probe_meters(subject: Subject) -> Values:
    """The energy meters that this user can read, and whether they count. One rank of each host."""
    if subject.context.world.local_rank:
        return {}
    choice = choose_meters(subject.root)
    meters = choice.meters
    try:
        still = [(meter, meter.read()) for meter in meters]
        end_s = perf_counter() + _METER_S
        while still and perf_counter() < end_s:
            sleep(_POLL_S)
            still = [(meter, was) for meter, was in still if meter.read() <= was]
        stuck = [f"{meter.domain} ({meter.source})" for meter, _ in still]
        broken = next(iter(choice.unreadable), None)
    except OSError as error:
        stuck, broken = [], str(error)
    # RAPL adds nothing where another meter already measures the processors.
    rapl = [] if choice.has_processors else (subject.root / _RAPL).glob("intel-rapl:*/energy_uj")
    zones = sorted(str(path.parent.name) for path in rapl)
    found: list[dict[str, Any]] = [{"domain": meter.domain, "source": meter.source} for meter in meters]
    return {"meters": found, "stuck": stuck, "error": broken, "rapl_zones": zones}


def evaluate_meters(answers: Sequence[Answer]) -> Finding:
    """Whether energy can be measured here, and with which meters."""
    looked = [answer for answer in answers if answer.values]
    locked = [answer for answer in looked if answer.values["rapl_zones"]]
    if locked:
        seen = f"{len(locked[0].values['rapl_zones'])} RAPL counters exist, but this user may not read them"
        return warn(
            seen,
            "sudo chmod o+r /sys/class/powercap/intel-rapl:*/energy_uj   # until the next boot; ask the centre",
            locked,
        )
    broken = [answer for answer in looked if answer.values["error"]]
    if broken:
        return warn(f"a meter cannot be read: {broken[0].values['error']}", "nvidia-smi -q -d POWER", broken)
    bare = [answer for answer in looked if not answer.values["meters"]]
    if bare:
        seen = "no energy meter here: reports show an estimate and call it one"
        return warn(
            seen,
            "--set energy.watts_per_core=W   # the estimate's assumption; sacct -o ConsumedEnergy if Slurm has meters",
            bare,
        )
    stuck = [answer for answer in looked if answer.values["stuck"]]
    if stuck:
        return warn(
            f"meters that do not count: {', '.join(stuck[0].values['stuck'])}", "dmesg | grep -i -e rapl -e nvrm", stuck
        )
    return ok(", ".join(f"{each['domain']} ({each['source']})" for each in looked[0].values["meters"]))

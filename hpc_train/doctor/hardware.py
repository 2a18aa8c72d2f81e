"""Cores, GPUs and energy meters, as this rank can really use them."""

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

from hpc_train.doctor.check import Answer, Finding, Subject, Values, by_host, counted, ranks_of
from hpc_train.train.energy.sensors.choose import choose_meters

_ALONE_S, _TOGETHER_S = 0.1, 0.3
_ENOUGH = 0.6  # of a core for each thread: two hyper-threads of one core compute at 0.6 to 0.7 each
_BLOCK = bytes(1 << 16)  # hashing it lets go of Python's lock
_METER_S, _LOOK_S = 1.0, 0.05  # a GPU's counter of joules was seen to stand still for 0.05 s
_NVIDIA = Path("proc/driver/nvidia/gpus")
_AMD = Path("sys/class/kfd/kfd/topology/nodes")
_RAPL = Path("sys/class/powercap")

# ---------------------------------------------------------------------------------------- cores


def look_cores(subject: Subject) -> Values:
    """Collective. Threads this rank asks for, cores it may use, and what a thread gets when all ranks compute.

    share: of a core, by the system's count of its time. speed: of a thread that computes alone on the host.
    """
    context, cores = subject.context, sorted(os.sched_getaffinity(0))
    threads = _threads(subject, len(cores))
    alone = _compute(1, _ALONE_S) if context.world.local_rank == 0 else None
    context.idle_barrier()
    together = _compute(threads, _TOGETHER_S)
    context.idle_barrier()
    rates = {host: work.rate for host, work in context.all_gather((context.world.host, alone)) if work is not None}
    return {
        "cores": cores,
        "threads": threads,
        "share": together.share,
        "speed": together.rate / threads / rates[context.world.host],
    }


def _threads(subject: Subject, num_cores: int) -> int:
    """Collective. As many as a training would take."""
    asked = subject.config.train.threads if subject.config else 0
    if find_spec("torch") is None:
        return asked or num_cores
    from hpc_train.train.comm.placement import place_ranks

    return place_ranks(subject.context, asked)[subject.context.world.rank].threads


@dataclass(frozen=True)
class _Work:
    rate: float  # blocks a second
    share: float  # of a core for each thread


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


def judge_cores(answers: Sequence[Answer]) -> Finding:
    """Whether threads have cores of their own."""
    hosts = by_host(answers)
    crowded = [words for host, ranks in hosts.items() if (words := _crowded(host, ranks))]
    slow = [answer for answer in answers if min(answer.values["share"], answer.values["speed"]) < _ENOUGH]
    worst = min(answers, key=lambda answer: float(answer.values["share"])).values
    told = f"computing together, a thread gets {worst['share']:.0%} of a core"
    if crowded and slow:
        mend = "mpirun --bind-to none ...   # srun: export SRUN_CPUS_PER_TASK=N; or fewer threads: OMP_NUM_THREADS=1"
        return Finding("fail", f"{crowded[0]}: {told}", mend, ranks_of(slow))
    if slow:
        speed = min(answer.values["speed"] for answer in slow)
        seen = f"{told}, at {speed:.2f} of the speed of one alone: others compute there, or a quota holds"
        mend = "top; cat /sys/fs/cgroup/cpu.max; lscpu | grep Thread   # Slurm: --exclusive --hint=nomultithread"
        return Finding("warn", seen, mend, ranks_of(slow))
    what = f"{counted(worst['threads'], 'thread')} a rank, {counted(len(worst['cores']), 'core')}"
    return Finding("ok", f"{what}: {told}, at {worst['speed']:.2f} of the speed of one alone")


def _crowded(host: str, ranks: Sequence[Answer]) -> str:
    """How the ranks of a host ask for more threads than there are cores; "" where they do not."""
    cores = {core for answer in ranks for core in answer.values["cores"]}
    threads = sum(answer.values["threads"] for answer in ranks)
    if threads > len(cores):
        asked, there = counted(threads, "thread"), counted(len(cores), "core")
        return f"{counted(len(ranks), 'rank')} on {host} ask for {asked} on {there}"
    for answer in ranks:
        if answer.values["threads"] > len(answer.values["cores"]):
            asked, own = answer.values["threads"], len(answer.values["cores"])
            return f"rank {answer.rank} asks for {counted(asked, 'thread')} and is bound to {counted(own, 'core')}"
    # Ranks that are bound to fewer cores than they are, while others of the host have theirs.
    for answer in ranks:
        mine = set(answer.values["cores"])
        within = [each for each in ranks if set(each.values["cores"]) <= mine]
        if sum(each.values["threads"] for each in within) > len(mine):
            return f"{len(within)} ranks on {host} are bound to the same {counted(len(mine), 'core')}"
    return ""


# ---------------------------------------------------------------------------------------- convolutions


def look_convolutions(subject: Subject) -> Values:
    """How the convolution of oneDNN's bug 6035 ended in a process of its own; one rank of a host tries it."""
    import torch

    from hpc_train.train.onednn import try_kernel

    asked = subject.config.train.device if subject.config else "auto"
    on_cpu = asked == "cpu" or not torch.cuda.is_available()
    tries = on_cpu and subject.context.world.local_rank == 0
    return {"on_cpu": on_cpu, "fault": try_kernel() if tries else None, "torch": torch.__version__}


def judge_convolutions(answers: Sequence[Answer]) -> Finding:
    """Whether convolutions on these CPUs write where they may."""
    if not any(answer.values["on_cpu"] for answer in answers):
        return Finding("n/a", "ranks compute on GPUs")
    broken = [answer for answer in answers if answer.values["fault"]]
    if not broken:
        return Finding("ok", "a channels_last 1x1 convolution of stride 2 over 8 channels, backward, twenty times")
    values = broken[0].values
    seen = (
        f"oneDNN's bug 6035 is in torch {values['torch']}: a process {values['fault']} in the backward pass of a 1x1 "
        "convolution with a stride over 8 channels, channels_last. The models that come with hpc-train avoid it"
    )
    mend = "x = x.contiguous()   # in a model of your own, before such a layer: pictures as planes, not channels_last"
    return Finding("warn", seen, mend, ranks_of(broken))


# ---------------------------------------------------------------------------------------- GPUs


def look_gpu(subject: Subject) -> Values:
    """The GPU that this rank would train on, after a sum on it; and how many the driver has."""
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
    """NVIDIA's and AMD's GPUs that a driver has; for AMD's, processors are nodes, too, with gpu_id 0."""
    num = len(list((root / _NVIDIA).glob("*")))
    for path in (root / _AMD).glob("*/gpu_id"):
        with suppress(OSError):  # not of this job
            num += path.read_text().strip() != "0"
    return num


def judge_gpu(answers: Sequence[Answer]) -> Finding:
    """Whether each rank has a GPU of its own, and it computes."""
    values = answers[0].values
    broken = [answer for answer in answers if answer.values["error"]]
    if broken:
        return Finding(
            "fail",
            f"the GPU does not compute: {broken[0].values['error']}",
            "nvidia-smi   # its state, and who uses it",
            ranks_of(broken),
        )
    without = [answer for answer in answers if not answer.values["visible"]]
    if without and values["asked"] == "cuda":
        mend = "Ask the scheduler for GPUs (--gpus-per-task=1), or --set train.device=auto"
        return Finding(
            "fail", f"train.device = 'cuda', and torch {values['torch']} finds no GPU", mend, ranks_of(without)
        )
    if without and len(without) < len(answers):
        return Finding(
            "fail",
            "some ranks find a GPU and these do not",
            "srun --gpus-per-task=1 --gpu-bind=closest ...",
            ranks_of(without),
        )
    unused = [answer for answer in answers if answer.values["of_driver"] and not answer.values["visible"]]
    if unused and values["asked"] != "cpu":
        num = unused[0].values["of_driver"]
        there = f"{counted(num, 'GPU')} {'is' if num == 1 else 'are'} there"
        seen = f"{there}, and torch {values['torch']} uses none"
        return Finding(
            "warn",
            seen,
            "TORCH=torch make install   # a torch built for them; unset CUDA_VISIBLE_DEVICES",
            ranks_of(unused),
        )
    if without:
        return Finding("n/a", "train.device = 'cpu'" if values["asked"] == "cpu" else "no GPU here")
    return _bound(answers)


def _bound(answers: Sequence[Answer]) -> Finding:
    """Whether each rank has a GPU of its own."""
    seen: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        seen.setdefault((answer.host, answer.values["gpu"]), []).append(answer)
    shared = [answer for ranks in seen.values() if len(ranks) > 1 for answer in ranks]
    if shared:
        most = max(len(ranks) for ranks in seen.values())
        mend = "srun --gpus-per-task=1 ...   # or as many ranks on a host as it has GPUs"
        return Finding("fail", f"{most} ranks share one GPU ({shared[0].values['name']})", mend, ranks_of(shared))
    return Finding("ok", f"{answers[0].values['name']}, one for each rank, and it computes")


# ---------------------------------------------------------------------------------------- energy meters


def look_meters(subject: Subject) -> Values:
    """Meters that this user can read, and whether they count; one rank of each host looks."""
    if subject.context.world.local_rank:
        return {}
    choice = choose_meters(subject.root)
    meters = choice.meters
    try:
        still = [(meter, meter.read()) for meter in meters]
        end_s = perf_counter() + _METER_S
        while still and perf_counter() < end_s:
            sleep(_LOOK_S)
            still = [(meter, was) for meter, was in still if meter.read() <= was]
        stuck = [f"{meter.domain} ({meter.source})" for meter, _ in still]
        broken = next(iter(choice.faults), None)
    except OSError as error:
        stuck, broken = [], str(error)
    # What a node's own meter or another of the processors measures, need not be measured again.
    rapl = [] if choice.has_processors else (subject.root / _RAPL).glob("intel-rapl:*/energy_uj")
    zones = sorted(str(path.parent.name) for path in rapl)
    found: list[dict[str, Any]] = [{"domain": meter.domain, "source": meter.source} for meter in meters]
    return {"meters": found, "stuck": stuck, "error": broken, "rapl_zones": zones}


def judge_meters(answers: Sequence[Answer]) -> Finding:
    """Whether energy can be measured here, and by what."""
    looked = [answer for answer in answers if answer.values]
    locked = [answer for answer in looked if answer.values["rapl_zones"]]
    if locked:
        seen = f"{len(locked[0].values['rapl_zones'])} RAPL counters are there, and this user may not read them"
        return Finding(
            "warn",
            seen,
            "sudo chmod o+r /sys/class/powercap/intel-rapl:*/energy_uj   # until the next boot; ask the centre",
            ranks_of(locked),
        )
    broken = [answer for answer in looked if answer.values["error"]]
    if broken:
        return Finding(
            "warn", f"a meter cannot be read: {broken[0].values['error']}", "nvidia-smi -q -d POWER", ranks_of(broken)
        )
    bare = [answer for answer in looked if not answer.values["meters"]]
    if bare:
        seen = "no meter here: energy would be an estimate, and is called one"
        return Finding(
            "warn",
            seen,
            "--set energy.watts_per_core=W   # the assumption; sacct -o ConsumedEnergy where Slurm has meters",
            ranks_of(bare),
        )
    stuck = [answer for answer in looked if answer.values["stuck"]]
    if stuck:
        return Finding(
            "warn",
            f"does not count: {', '.join(stuck[0].values['stuck'])}",
            "dmesg | grep -i -e rapl -e nvrm",
            ranks_of(stuck),
        )
    return Finding("ok", ", ".join(f"{each['domain']} ({each['source']})" for each in looked[0].values["meters"]))

"""An all-reduce: whether its sum is right, how fast it is, and which transport it uses."""

from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np

from hpc_train.core.formatting import binary_size
from hpc_train.doctor import transport_counters
from hpc_train.doctor.check import Answer, Finding, Subject, Values, by_host, fail, not_applicable, ok, time_text, warn
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context

_SIZES_BYTES = (1 << 18, 1 << 22, 1 << 24)  # up to the first that takes longer than:
_MAX_S = 0.1
_REPEAT = 5
_SLOW_BYTES_PER_S = 1e8  # bus bandwidth below about 1 Gbit/s
_COUNTED_BYTES, _COUNTED_TIMES = 1 << 21, 4


def probe_all_reduce(subject: Subject) -> Values:
    """Collective. Latency of 8 bytes, bandwidth of the largest message that takes about 0.1 s, and wrong sums.

    Bus bandwidth as nccl-tests defines it: 2 (N-1)/N x bytes / time, which is what each link of a ring carries.
    """
    context, size = subject.context, subject.context.world.size
    latency_s = min(_all_reduce(context, 8)[0] for _ in range(10))
    wrong, num_bytes, time_s = 0, 0, 0.0
    for num_bytes in _SIZES_BYTES:
        times = []
        for _ in range(_REPEAT):
            spent_s, num_wrong = _all_reduce(context, num_bytes)
            times.append(spent_s)
            wrong += num_wrong
        time_s = float(context.max(np.array([sorted(times)[_REPEAT // 2]]))[0])
        if time_s > _MAX_S / 4:
            break
    bus = 2 * (size - 1) / size * num_bytes / time_s
    return {"latency_s": latency_s, "bytes": num_bytes, "time_s": time_s, "bus_bytes_per_s": bus, "num_wrong": wrong}


def _all_reduce(context: Context, num_bytes: int) -> tuple[float, int]:
    """Collective. (seconds, number of wrong elements). The values are whole numbers, which fp32 adds exactly."""
    world, index = context.world, np.arange(num_bytes // 4, dtype=np.float32) % 1000
    total = np.empty_like(index)
    mine = index * (world.rank % 8 + 1)
    context.barrier()
    began = perf_counter()
    messages.all_reduce(context.comm, mine, total)
    spent_s = perf_counter() - began
    factor = sum(rank % 8 + 1 for rank in range(world.size))
    return spent_s, int(np.count_nonzero(np.abs(total - index * factor) > 1e-6 * factor * 1000))


def evaluate_all_reduce(answers: Sequence[Answer]) -> Finding:
    """Whether sums are right, and how fast."""
    wrong = [answer for answer in answers if answer.values["num_wrong"]]
    if wrong:
        values = wrong[0].values
        seen = f"the sum is wrong in {values['num_wrong']:,} elements of up to {binary_size(values['bytes'])}"
        return fail(seen, "export OMPI_MCA_coll=^tuned,han   # then report it: no result is trustworthy", wrong)
    if len(answers) == 1:
        return not_applicable("one rank: no messages", "mpirun -n 2 hpc-train doctor")
    values = answers[0].values
    rate = values["bus_bytes_per_s"]
    latency_s = max(answer.values["latency_s"] for answer in answers)
    large = f"{binary_size(values['bytes'])} in {time_text(values['time_s'])}, {rate / 1e9:.3g} GB/s bus bandwidth"
    seen = f"the sum is right; {large}; 8 bytes in {time_text(latency_s)}"
    if rate < _SLOW_BYTES_PER_S:
        remedy = "hpc-train doctor   # check transport and cores, then the link: ethtool INTERFACE"
        return warn(f"{seen}: less than 1 Gbit/s", remedy)
    return ok(seen)


# ---------------------------------------------------------------------------------------- transport


def probe_transport(subject: Subject) -> Values:
    """Collective. Bytes received over TCP and adapters during an all-reduce, and the transports that are loaded."""
    context = subject.context
    _all_reduce(context, _COUNTED_BYTES)  # the first one opens connections
    context.barrier()
    before = transport_counters.count(subject.root)
    context.barrier()  # no rank sends before all have counted
    for _ in range(_COUNTED_TIMES):
        _all_reduce(context, _COUNTED_BYTES)
    moved = transport_counters.between(before, transport_counters.count(subject.root))
    return {
        **moved,
        "payload": _COUNTED_BYTES * _COUNTED_TIMES,
        "parts": transport_counters.loaded_parts(),
        "devices": transport_counters.open_devices(),
        "adapters": [asdict(each) for each in transport_counters.adapters(subject.root)],
    }


def evaluate_transport(answers: Sequence[Answer]) -> Finding:
    """Which transport was used, and whether a faster one is available."""
    if len(answers) == 1:
        return not_applicable("one rank: no messages")
    # Each link of a ring carries the whole payload; a tenth of it separates links in use from other traffic.
    least = answers[0].values["payload"] / 10
    hosts = by_host(answers)
    over_tcp = [answer for answer in answers if sum(answer.values["tcp"].values()) > least]
    local_tcp = [answer for answer in over_tcp if answer.values["tcp_local"] > least]
    words = _carried(answers, over_tcp, least)
    used, loaded = " and ".join(words), f" (loaded: {', '.join(answers[0].values['parts']) or 'nothing known'})"
    fast, idle = (
        [each for one in answers for each in one.values["adapters"] if each["active"] is is_active]
        for is_active in (True, False)
    )
    if fast and over_tcp:
        return warn(f"{used}, but {_named(fast)} is available{loaded}", _use(fast, answers), over_tcp)
    if local_tcp:
        seen = f"{used} between ranks of one host, instead of shared memory{loaded}"
        remedy = "unset OMPI_MCA_btl UCX_TLS   # or include shared memory: OMPI_MCA_btl=self,vader,tcp"
        return warn(seen, remedy, local_tcp)
    if not words:
        seen = f"{len(hosts)} hosts, and no counter shows what carries their messages{loaded}"
        return warn(seen, "mpirun --mca pml_base_verbose 10 --mca btl_base_verbose 30 hpc-train doctor")
    if idle and over_tcp:
        seen = f"{used}, and {_named(idle)} is not active{loaded}"
        return warn(seen, "ibstat   # a cable, or no subnet manager", over_tcp)
    return ok(f"{used}{loaded}")


def _carried(answers: Sequence[Answer], over_tcp: Sequence[Answer], least: float) -> list[str]:
    """ "shared memory within hosts", "TCP (eth0)", "RDMA (mlx5_0:1)": the transports that carried messages."""
    hosts, words = by_host(answers), []
    rdma = sorted({name for each in answers for name, came in each.values["rdma"].items() if came > least})
    held = sorted({name for each in answers for name in each.values["devices"] if name.startswith(("cxi", "hfi"))})
    local_tcp = any(answer.values["tcp_local"] > least for answer in over_tcp)
    if any(len(ranks) > 1 for ranks in hosts.values()) and not local_tcp and not (len(hosts) == 1 and (rdma or held)):
        words.append("shared memory" + " within hosts" * (len(hosts) > 1))
    if over_tcp:
        names = sorted({name for answer in over_tcp for name in answer.values["tcp"]})
        num_bytes = max(sum(answer.values["tcp"].values()) for answer in over_tcp)
        words.append(f"TCP ({', '.join(names)}: {binary_size(num_bytes)} received by a rank)")
    if rdma:
        words.append(f"RDMA ({', '.join(rdma)})")
    elif held and not over_tcp and len(hosts) > 1:
        words.append(f"libfabric or PSM over {', '.join(held)}")
    return words if len(hosts) == 1 or over_tcp or rdma or held else []


def _named(some: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        sorted({f"{each['kind']} {each['name']}" + f" ({each['rate']})" * bool(each["rate"]) for each in some})
    )


def _use(fast: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> str:
    if any(each["kind"] == "Slingshot" for each in fast):
        return "module load cray-mpich   # or an MPI on libfabric's cxi provider: FI_PROVIDER=cxi"
    if any(each["kind"] == "Omni-Path" for each in fast):
        return "export OMPI_MCA_pml=cm OMPI_MCA_mtl=psm2   # or ofi"
    device = fast[0]["name"]
    known = any("UCX" in answer.values["parts"] for answer in answers)
    hint = "" if known else "   # needs an MPI with UCX: ompi_info | grep ucx"
    return f"unset UCX_TLS; export OMPI_MCA_pml=ucx UCX_NET_DEVICES={device}{hint}"

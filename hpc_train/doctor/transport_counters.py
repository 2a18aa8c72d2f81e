"""The transports that carry messages: bytes that the kernel counts per socket and adapters count per port.

The configuration says which transport should be used; counters show which one was. Sockets are counted one by one
(TCP_INFO), because an interface's counter includes the traffic of file systems and of other jobs.
"""

import fcntl
import os
import re
import socket
import stat
import struct
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info, since Linux 4.1
_SIOCGIFADDR = 0x8915
_RDMA = Path("sys/class/infiniband")
_SLINGSHOT = Path("sys/class/cxi")
# Receive counters of adapters: file below ports/N, bytes per count. Soft-RoCE counts packets, of up to 1024 bytes.
_PORT_COUNTERS = {"counters/port_rcv_data": 4, "hw_counters/rx_bytes": 1, "hw_counters/rcvd_pkts": 1024}
# Libraries and components that are loaded only while in use, and their names.
_PARTS = {
    r"mca_pml_(\w+)\.so": "pml {}",
    r"mca_btl_(\w+)\.so": "btl {}",
    r"mca_mtl_(\w+)\.so": "mtl {}",
    r"libuc[pt]\.so": "UCX",
    r"libfabric\.so": "libfabric",
    r"libpsm2\.so": "PSM2",
    r"libibverbs\.so": "verbs",
}
_DEVICES = re.compile(r"/dev/(cxi\d+|infiniband/uverbs\d+|hfi1_\d+|knem|xpmem)")


@dataclass(frozen=True)
class Adapter:
    """A port of InfiniBand, RoCE, Omni-Path or Slingshot."""

    name: str
    kind: str
    active: bool
    rate: str = ""


@dataclass(frozen=True)
class Counts:
    """Bytes received so far. tcp: by inode of a socket: (interface, whether the peer is this host, bytes)."""

    tcp: dict[int, tuple[str, bool, int]] = field(default_factory=dict)
    rdma: dict[str, int] = field(default_factory=dict)


def count(root: Path = Path("/")) -> Counts:
    """Received by this process over TCP, and by each adapter of this host for all processes."""
    return Counts(_sockets(), _ports(root))


def between(before: Counts, after: Counts) -> dict[str, Any]:
    """Bytes received between two counts, by interface and by adapter."""
    tcp: dict[str, int] = {}
    local_bytes = 0
    for inode, (interface, is_local, num_bytes) in after.tcp.items():
        received = num_bytes - before.tcp.get(inode, ("", False, 0))[2]
        tcp[interface] = tcp.get(interface, 0) + received
        local_bytes += received * is_local
    rdma = {name: num_bytes - before.rdma.get(name, 0) for name, num_bytes in after.rdma.items()}
    return {
        "tcp": {name: received for name, received in tcp.items() if received},
        "tcp_local": local_bytes,
        "rdma": rdma,
    }


def adapters(root: Path = Path("/")) -> list[Adapter]:
    """The fast adapters of this host, from /sys."""
    found = []
    for port in sorted((root / _RDMA).glob("*/ports/*")):
        device = port.parents[1].name
        link = _read(port / "link_layer")
        kind = "RoCE" if link == "Ethernet" else "Omni-Path" if device.startswith("hfi1") else link or "RDMA"
        found.append(Adapter(f"{device}:{port.name}", kind, "ACTIVE" in _read(port / "state"), _read(port / "rate")))
    found += [Adapter(each.name, "Slingshot", True) for each in sorted((root / _SLINGSHOT).glob("cxi*"))]
    return found


def loaded_parts() -> list[str]:
    """Transport libraries and Open MPI components in this process. Open MPI unloads components that it does not use."""
    names = {line.split()[-1].rpartition("/")[2] for line in _read(Path("/proc/self/maps")).splitlines() if "/" in line}
    found = {
        words.format(*match.groups())
        for name in names
        for how, words in _PARTS.items()
        if (match := re.match(how, name))
    }
    return sorted(found)


def open_devices() -> list[str]:
    """Devices of fast networks that this process holds open."""
    links = [_link(Path("/proc/self/fd") / name) for name in os.listdir("/proc/self/fd")]
    return sorted({match[1] for link in links if (match := _DEVICES.fullmatch(link))})


def _sockets() -> dict[int, tuple[str, bool, int]]:
    names, found = _interfaces(), {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            handle = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(handle).st_mode):
                os.close(handle)
                continue
            with closing(socket.socket(fileno=handle)) as one:
                if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                facts = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                (num_bytes,) = struct.unpack_from("Q", facts, _BYTES_RECEIVED)
                here, there = (str(end[0]).removeprefix("::ffff:") for end in (one.getsockname(), one.getpeername()))
                found[os.fstat(handle).st_ino] = (names.get(here, here), here == there, num_bytes)
    return found


def _interfaces() -> dict[str, str]:
    """IPv4 address -> name of the interface that has it."""
    found = {"127.0.0.1": "lo", "::1": "lo"}
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # no IPv4 address
                address = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[socket.inet_ntoa(address[20:24])] = name
    return found


def _ports(root: Path) -> dict[str, int]:
    found = {}
    for port in sorted((root / _RDMA).glob("*/ports/*")):
        for name, num_bytes in _PORT_COUNTERS.items():
            if (count := _read(port / name)).isdecimal():
                found[f"{port.parents[1].name}:{port.name}"] = int(count) * num_bytes
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""

"""The bytes of data in RoCE packets between the guests, by test case and sender."""

import struct
from collections import defaultdict
from pathlib import Path

_ROCE, _MARK = 4791, 9  # ports of UDP
# Opcodes of reliable connections that carry data (InfiniBand Architecture Specification 1, 9.2), and what stands before
# it besides the 12 bytes of the base header.
_SEND, _WRITE, _READ = {0: 0, 1: 0, 2: 0, 3: 4, 4: 0, 5: 4}, {6: 16, 7: 0, 8: 0, 9: 4, 10: 16, 11: 20}, {13: 4, 14: 0}
_CARRIES = _SEND | _WRITE | _READ | {15: 4, 16: 4}


def roce_bytes(path: Path) -> dict[str, dict[str, int]]:
    """{test case: {sender's address: bytes of data}} of a capture in pcap format.

    A datagram to port 9 names the test case that follows.
    """
    data = path.read_bytes()
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    name, place = "", 24
    while place + 16 <= len(data):
        length = struct.unpack_from("<I", data, place + 8)[0]
        packet, place = data[place + 16 : place + 16 + length], place + 16 + length
        if len(packet) < 43 or packet[12:14] != b"\x08\x00" or packet[23] != 17:  # IPv4, UDP
            continue
        port, num_bytes = struct.unpack_from(">HH", packet, 36)
        if port == _MARK:
            name = packet[42 : 34 + num_bytes].decode().strip()
        elif port == _ROCE and packet[42] in _CARRIES:
            padding = packet[43] >> 4 & 3
            sender = ".".join(map(str, packet[26:30]))
            found[name][sender] += num_bytes - 8 - 12 - _CARRIES[packet[42]] - padding - 4  # 4: its checksum
    return found

"""Damage to files: strategies of functions from bytes to bytes."""

from collections.abc import Callable

from hypothesis import strategies as st

Damage = tuple[str, Callable[[bytes], bytes]]


def _place(share: float, data: bytes) -> int:
    return min(int(share * len(data)), max(0, len(data) - 1))


def _flip(share: float, bit: int) -> Damage:
    def damage(data: bytes) -> bytes:
        at = _place(share, data)
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] if data else data

    return f"bit {bit} at {share:.4f} flipped", damage


def _cut(share: float) -> Damage:
    return f"cut at {share:.4f}", lambda data: data[: _place(share, data)]


def _filled(share: float, length: int, value: int) -> Damage:
    def damage(data: bytes) -> bytes:
        at = _place(share, data)
        return data[:at] + bytes([value]) * min(length, len(data) - at) + data[at + length :]

    return f"{length} bytes at {share:.4f} set to {value}", damage


def _moved(share: float, length: int, to: float) -> Damage:
    def damage(data: bytes) -> bytes:
        at, there = _place(share, data), _place(to, data)
        part = data[at : at + length]
        return (data[:there] + part + data[there + len(part) :])[: len(data)]

    return f"{length} bytes at {share:.4f} copied to {to:.4f}", damage


def _longer(more: bytes) -> Damage:
    return f"{len(more)} bytes more", lambda data: data + more


_shares = st.floats(0, 1, exclude_max=True)
# Most files have their structure at the beginning.
_early = st.one_of(_shares, st.floats(0, 0.1), st.floats(0, 0.02))
_lengths = st.sampled_from([1, 2, 4, 8, 16, 64, 512])

byte_damages: st.SearchStrategy[Damage] = st.one_of(
    st.builds(_flip, _early, st.integers(0, 7)),
    st.builds(_flip, _early, st.integers(0, 7)),
    st.builds(_cut, _shares),
    st.builds(_filled, _early, _lengths, st.sampled_from([0, 255, 128, 1])),
    st.builds(_moved, _early, _lengths, _early),
    st.builds(_longer, st.binary(max_size=64)),
)

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e308", "5e-324", "1e999", "9" * 30, "10000000", "-0.0", "1.5", "True", ""]


def _number_replaced(index: int, value: str) -> Damage:
    def damage(data: bytes) -> bytes:
        import re

        found = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", data))
        if not found:
            return data
        match = found[index % len(found)]
        return data[: match.start()] + value.encode() + data[match.end() :]

    return f"number {index} set to {value!r}", damage


def _line_changed(index: int, what: str) -> Damage:
    def damage(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        if not lines:
            return data
        at = index % len(lines)
        new = {"doubled": lines[at] * 2, "lost": b"", "swapped": b",".join(lines[at].split(b",")[::-1])}[what]
        return b"".join([*lines[:at], new, *lines[at + 1 :]])

    return f"line {index} {what}", damage


text_damages: st.SearchStrategy[Damage] = st.one_of(
    byte_damages,
    st.builds(_number_replaced, st.integers(0, 200), st.sampled_from(NUMBERS)),
    st.builds(_number_replaced, st.integers(0, 200), st.sampled_from(NUMBERS)),
    st.builds(_line_changed, st.integers(0, 80), st.sampled_from(["doubled", "lost", "swapped"])),
    st.builds(
        lambda text: (f"replaced by {text[:20]!r}", lambda data: text),
        st.sampled_from(
            [b"", b"\0" * 100, b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe\xfd", b"3", b'"\\ud800"', b"1e999"]
        ),
    ),
)

"""Numbers as text: units, digits and intervals, the same in messages, in the terminal and on the page."""

import re
from collections.abc import Sequence
from math import floor, isfinite, log10

from hpc_train.core.redaction import printable


def plain(text: str) -> str:
    """Text from a file, on one line and safe for a terminal: control characters are replaced."""
    return re.sub(r"[\n\t]", "\N{REPLACEMENT CHARACTER}", printable(text))


def listed(names: Sequence[str], most: int) -> str:
    """ "a, b and 7 more": a long list ends with the number of others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def sentence(text: str) -> str:
    """Ends with a full stop; a text that ends with "est." has it."""
    return text if text.endswith(".") else f"{text}."


def plural(count: int, noun: str) -> str:
    """ "1 rank", "4,096 ranks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; integers with more keep all of them."""
    if value is None:
        return "-"
    if not isfinite(value) or value == 0:
        return f"{value:g}"
    rounded = f"{value:.{digits - 1}e}"
    if not 1e-4 <= abs(value) < 1e12:
        return rounded
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(float(rounded)))))}f}"  # 9.996 has the digits of 10.0


def percent(share: float | None, decimals: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{decimals}f}%"


def ms_text(seconds: float | None) -> str:
    return "-" if seconds is None else significant(seconds * 1e3, 4)


def ratio_text(speedup: float) -> str:
    return f"{speedup:.2f}x" if speedup >= 0.1 else f"{significant(speedup, 2)}x"


def ratio_interval_text(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else "-".join(ratio_text(end).removesuffix("x") for end in interval)


def interval_text(interval: tuple[float, float] | None, scale: float) -> str:
    """ "4.81-5.02", both ends with the decimals of four significant digits of the larger."""
    if interval is None:
        return "-"
    low, high = (value * scale for value in interval)
    decimals = max(0, 3 - floor(log10(high))) if high > 0 else 3
    return f"{low:.{min(decimals, 6)}f}-{high:.{min(decimals, 6)}f}"


def energy_text(joules: float | None, quality: str) -> str:
    """ "123 J", "123 J est." or "missing": a figure is always followed by its quality."""
    if joules is None or quality == "missing":
        return "missing"
    return amount(joules, "J") + (" est." if quality == "estimated" else "")


def amount(value: float | None, unit: str) -> str:
    """ "1.23 MB": three digits and the SI prefix."""
    if value is None:
        return "missing"
    scales = (1e15, 1e12, 1e9, 1e6, 1e3, 1.0, 1e-3, 1e-6, 1e-9)
    powers = zip(scales, ("P", "T", "G", "M", "k", "", "m", "u", "n"), strict=True)
    power, prefix = next((pair for pair in powers if abs(value) >= pair[0]), (1.0, ""))
    return f"{significant(value / power)} {prefix}{unit}"


def binary_size(num_bytes: float) -> str:
    """ "64 KiB": powers of two, the unit of memory, messages and chunks."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.4g} {unit}"
    return f"{num_bytes:g} B"


def duration_text(seconds: float | None, interval: tuple[float, float] | None = None) -> str:
    """ "5.20 h", or "5.20 h (4.9-5.6)": three digits in the unit that people plan in."""
    if seconds is None:
        return "-"
    units = (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, length = next((each for each in units if seconds >= 2 * each[1]), units[-1])
    return f"{significant(seconds / length)} {unit}{_between(interval, length)}"


def watt_hours_text(joules: float | None, interval: tuple[float, float] | None = None) -> str:
    """ "12.3 kWh", or "12.3 kWh (11.0-13.8)"; joules below a watt-hour."""
    if joules is None:
        return "missing"
    units = (("GWh", 3.6e12), ("MWh", 3.6e9), ("kWh", 3.6e6), ("Wh", 3600.0), ("J", 1.0))
    unit, size = next((each for each in units if joules >= each[1]), units[-1])
    return f"{significant(joules / size)} {unit}{_between(interval, size)}"


def with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    """ "83.1 (79.9-86.0)"."""
    return significant(value) + _between(interval, 1.0)


def _between(interval: tuple[float, float] | None, unit: float) -> str:
    return "" if interval is None else f" ({significant(interval[0] / unit)}-{significant(interval[1] / unit)})"

"""The results of `bench allreduce` as tables, sentences and a figure: bus bandwidth against message size."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.analysis.report.plots.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    saved,
    styled,
)
from hpc_train.core import rundir
from hpc_train.core.allreduce_times import COMPRESSED, LIMITS, OURS, PEERS, Fit, Row, fits, pair_ratios
from hpc_train.core.formatting import binary_size, percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[int, int, int]  # ranks, nodes, ranks per node
JUDGED_BYTES = (64 << 10, 64 << 20)
JUDGED = ("mpi", "horovod")
GOAL = 0.9

_NAMES = {
    "plain_mpi": "MPI_Allreduce",
    "ddp_gloo": "gloo",
    "memory": "memory copy",
    "convert": "to bf16",
    "link": "ping-pong",
}
_LINES: dict[str, tuple[str, str, str]] = {  # colour, dashes, marker
    "horovod": (BLUE, "-", "o"),
    "mpi": (VERMILLION, "-", "s"),
    "horovod_bf16": (BLUE, "-.", "o"),
    "mpi_bf16": (VERMILLION, "-.", "s"),
    "parameter_server": (GREEN, "-", "^"),
    "sharded": (PURPLE, "-", "D"),
    "plain_mpi": (BLACK, "--", "x"),
    "ddp_gloo": (ORANGE, "--", "+"),
    "memory": (GREY, ":", ""),
    "convert": (GREY, "-.", ""),
    "link": (SKY, ":", ""),
}
_TICKS = [4 << power for power in range(0, 32, 4)]  # 4 B, 64 B ... 1 GiB
_PANEL_INCHES = (3.3, 3.4)


def name_of(strategy: str) -> str:
    return _NAMES.get(strategy, strategy.replace("_", " "))


def place_text(place: Place) -> str:
    ranks, nodes, per_node = place
    if nodes == 1:
        return f"{ranks} ranks on one node"
    return f"{ranks} ranks on {nodes} nodes" + (", one on each" if per_node == 1 else "")


def places(rows: Sequence[Row]) -> list[Place]:
    return list(dict.fromkeys(row.place for row in rows))


def limits(rows: Sequence[Row], place: Place) -> list[Row]:
    """The limits of a placement's all-reduces: copies, conversions, and messages between two ranks as far apart."""
    between = place[1] > 1
    here = [row for row in rows if row.strategy in ("memory", "convert") and row.place == place]
    return [*here, *(row for row in rows if row.strategy == "link" and (row.nodes > 1) == between)]


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each placement times and bus bandwidths; then what was fitted."""
    made = []
    for place in places(rows):
        here = {(row.strategy, row.message_bytes): row for row in rows if row.place == place}
        beside = {(row.strategy, row.message_bytes): row for row in limits(rows, place)}
        made += [_time_table(place, here), _bandwidth_table(place, here, here | beside)]
    found = fits(rows)
    return [*made, _fit_table(found)] if found else made


def _sizes_and_strategies(rows: dict[tuple[str, int], Row]) -> tuple[list[int], list[str]]:
    sizes = sorted({size for _, size in rows})
    return sizes, [name for name in (*OURS, *COMPRESSED, *PEERS) if (name, sizes[0]) in rows]


def _time_table(place: Place, rows: dict[tuple[str, int], Row]) -> Table:
    sizes, strategies = _sizes_and_strategies(rows)
    columns = (Column("size", True), *number_columns(*map(name_of, strategies)))
    lines = []
    for size in sizes:
        lines.append((binary_size(size), *(_time_text(rows.get((name, size))) for name in strategies)))
    title = f"{place_text(place)}: time in us, ± half the interquartile range"
    return Table("allreduce-time", title, columns, tuple(lines))


def _bandwidth_table(place: Place, rows: dict[tuple[str, int], Row], with_limits: dict[tuple[str, int], Row]) -> Table:
    sizes, strategies = _sizes_and_strategies(rows)
    strategies += LIMITS
    columns = (Column("size", True), *number_columns(*map(name_of, strategies)))
    lines = [
        (binary_size(size), *(_speed_text(with_limits.get((name, size))) for name in strategies)) for size in sizes
    ]
    title = f"{place_text(place)}: bus bandwidth in GB/s, with its limits"
    return Table("allreduce-bandwidth", title, columns, tuple(lines))


def _time_text(row: Row | None) -> str:
    if row is None:
        return "-"
    low, middle, high = row.quartiles_s
    return f"{significant(middle * 1e6)} ±{percent((high - low) / 2 / middle, 0)}"


def _speed_text(row: Row | None) -> str:
    return "-" if row is None else significant(row.bytes_per_s / 1e9)


def _fit_table(found: Sequence[Fit]) -> Table:
    titles = ("latency (us)", "interval", "bandwidth (GB/s)", "interval", "error")
    columns = (Column("ranks", True), Column("strategy", True), *number_columns(*titles))
    rows = []
    for fit in found:
        cells = [place_text((fit.ranks, fit.nodes, fit.ranks_per_node)), name_of(fit.strategy)]
        latencies, betas = fit.alpha_interval_s or (), fit.beta_interval_s_per_byte or ()
        cells += [significant(fit.alpha_s * 1e6), "-".join(significant(end * 1e6) for end in latencies) or "-"]
        cells += [_inverse(fit.beta_s_per_byte), "-".join(_inverse(end) for end in reversed(betas)) or "-"]
        rows.append((*cells, percent(fit.error, 0)))
    title = "T = 2 (N-1) latency + 2 (N-1)/N bytes / bandwidth, fitted; error: the median over sizes"
    return Table("allreduce-fit", title, columns, tuple(rows))


def _inverse(beta_s_per_byte: float) -> str:
    return significant(1 / beta_s_per_byte / 1e9) if beta_s_per_byte > 0 else "inf"


def ratio_notes(rows: Sequence[Row]) -> list[str]:
    """The speed of our all-reduces over that of one MPI_Allreduce, at the sizes in `JUDGED_BYTES`."""
    notes = []
    for num_bytes in JUDGED_BYTES:
        for strategy in JUDGED:
            for place, ratios in pair_ratios(rows, strategy, num_bytes).items():
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                verdict = "" if middle >= GOAL else f", below {GOAL}"
                notes.append(
                    f"{binary_size(num_bytes)}, {place_text(place)}: {strategy} runs at {middle:.2f} of plain "
                    f"MPI_Allreduce (quartiles {low:.2f}-{high:.2f} of {len(ratios)} pairs{verdict})."
                )
    return notes


# ------------------------------------------------------------------------------------------------- the figure


def write_figure(rows: Sequence[Row], path: Path) -> list[Path]:
    """Bus bandwidth against message size, one panel a placement, as `path` with the endings .svg, .pdf and .png."""
    chosen = _largest(places(rows))
    width, height = _PANEL_INCHES
    with styled((width * len(chosen) + 0.4, height), 8, {"svg.hashsalt": path.name}) as figure:
        panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for axes, place in zip(panels, chosen, strict=True):
            paint(axes, rows, place)
        panels[0].set_ylabel("bus bandwidth (GB/s)")
        lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=4)
        contents = {path.with_suffix(f".{ending}"): saved(figure, ending, dpi=200) for ending in ("svg", "pdf", "png")}
    for file, content in contents.items():
        rundir.write_atomic(file, content)
    return list(contents)


def _largest(found: list[Place]) -> list[Place]:
    """The largest placement on one node, the largest with one rank a node, and the largest of all."""
    kinds = ([p for p in found if p[1] == 1], [p for p in found if p[1] > 1 and p[2] == 1], found)
    return list(dict.fromkeys(max(kind) for kind in kinds if kind))


def paint(axes: "Axes", rows: Sequence[Row], place: Place) -> None:
    """One placement's bus bandwidths on log axes, medians with quartiles; its limits are dotted."""
    limits_here = limits(rows, place)
    for name, style in _LINES.items():
        candidates = limits_here if name in LIMITS else [row for row in rows if row.place == place]
        line = sorted((row for row in candidates if row.strategy == name), key=lambda row: row.message_bytes)
        if line:
            _paint_line(axes, line, name_of(name), style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    measured = [row.message_bytes for row in rows]
    ticks = [size for size in _TICKS if min(measured) <= size <= max(measured)]
    axes.set_xticks(ticks, [binary_size(size) for size in ticks], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="message size", title=place_text(place))


def _paint_line(axes: "Axes", rows: Sequence[Row], label: str, style: tuple[str, str, str]) -> None:
    color, dashes, marker = style
    sizes, speeds = [row.message_bytes for row in rows], np.array([row.bytes_per_s / 1e9 for row in rows])
    axes.plot(sizes, speeds, color=color, linestyle=dashes, marker=marker, markersize=3.5, label=label)
    fastest_s, median_s, slowest_s = np.array([row.quartiles_s for row in rows]).T
    low, high = speeds * median_s / slowest_s, speeds * median_s / fastest_s
    axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)

"""A run's state in words and tables for a terminal, and as a record for scripts."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpc_train.analysis.live.status import RunStatus
from hpc_train.core.energy_records import COUNTED_NOTHING
from hpc_train.core.formatting import amount, duration_text, percent, plural, significant
from hpc_train.core.progress import duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 48
_STYLES = {"training": "green", "complete": "green", "failed": "red", "killed": "red", "silent": "red"}
_MISSING = "-"


def record(status: RunStatus) -> dict[str, Any]:
    """What --json prints: null for what is not known."""
    pace, slowest = status.pace, status.pace.slowest if status.pace else None
    return {
        "path": str(status.path),
        "name": status.name,
        "state": status.state,
        "why": status.why,
        "ranks": status.size,
        "hosts": status.num_hosts,
        "slurm_job": status.job,
        "attempts": status.num_attempts,
        "steps_done": status.num_steps_done,
        "steps": status.num_steps,
        "loss": status.losses[-1][1] if status.losses else None,
        "step_s": pace.step_s if pace else None,
        "samples_per_s": pace.samples_per_s if pace else None,
        "exposed_communication": pace.exposed_share if pace else None,
        "slowest_rank": slowest.rank if slowest else None,
        "slowest_host": slowest.host if slowest else None,
        "slowest_above_mean": slowest.above_mean if slowest else None,
        "left_s": status.left_s,
        "power_w": status.power_w,
        "joules": status.energy.joules,
        "energy_quality": status.energy.quality,
        "checkpoints": status.checkpoints,
        "validation": status.validation and status.validation | {"step": int(status.validation["step"])},
        "updated_s": status.updated_s,
    }


def runs_table(statuses: Sequence[RunStatus]) -> Table:
    """A line for each run."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("ranks", "state", "steps", "loss", "samples/s", "left"):
        table.add_column(title, justify="left" if title == "state" else "right")
    for each in statuses:
        table.add_row(
            f"{each.path.parent.name}/{each.path.name}",
            str(each.size),
            Text(each.state, _STYLES.get(each.state, "yellow")),
            _steps_text(each),
            f"{each.losses[-1][1]:.4g}" if each.losses else _MISSING,
            significant(each.pace.samples_per_s) if each.pace else _MISSING,
            _MISSING if each.left_s is None else duration(each.left_s),
        )
    return table


def _steps_text(status: RunStatus) -> str:
    return f"{status.num_steps_done}" + (f"/{status.num_steps}" if status.num_steps else "")


def screen(status: RunStatus, width: int, has_blocks: bool) -> RenderableType:
    """One run on some twelve lines. has_blocks: the terminal shows the characters of a curve."""
    job = f", Slurm job {status.job}" if status.job else ""
    ranks = f"{plural(status.size, 'rank')} on {plural(status.num_hosts, 'host')}{job}"
    head = Text.assemble(
        (status.state, f"bold {_STYLES.get(status.state, 'yellow')}"), f"  {status.name}, {ranks}, {status.path}"
    )
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    for name, text in _rows(status, has_blocks):
        rows.add_row(name, text)
    parts: list[RenderableType] = [head]
    if status.why:
        parts.append(Text(status.why, "red" if status.state != "stopped" else "yellow"))
    if status.num_steps:
        parts.append(_bar(status.num_steps_done, status.num_steps, min(width - 6, 72)))
    return Group(*parts, rows)


def _bar(done: int, total: int, width: int) -> Table:
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=total, completed=done, width=width), f"{done / total:.0%}")
    return bar


def _rows(status: RunStatus, has_blocks: bool) -> list[tuple[str, str]]:
    rows = [("steps", _steps_text(status) + _attempts_text(status))]
    if status.left_s is not None:
        rows[0] = ("steps", f"{rows[0][1]}, {duration(status.left_s)} left")
    if status.losses:
        curve = f"  {_curve([loss for _, loss in status.losses])}" if has_blocks else ""
        rows.append(("loss", f"{status.losses[-1][1]:.5g}{curve}"))
    if status.validation:
        measures = ", ".join(
            f"{name.replace('_', ' ')} {value:.5g}"
            for name, value in status.validation.items()
            if name not in ("step", "seconds")
        )
        rows.append(("validation", f"{measures} after {status.validation['step']:.0f} steps"))
    if status.pace:
        speed = f", {significant(status.pace.samples_per_s)} samples/s" if status.pace.samples_per_s else ""
        rows.append(("step", f"{amount(status.pace.step_s, 's')}{speed}"))
        rows.append(("exposed communication", f"{percent(status.pace.exposed_share)} of a step"))
        if slowest := status.pace.slowest:
            late = f"rank {slowest.rank} on {slowest.host}: {percent(slowest.above_mean)} above the mean"
            rows.append(("slowest to compute", late))
    is_early = not status.is_over and status.energy.source.endswith(COUNTED_NOTHING)
    rows.append(("energy", "not yet" if is_early else str(status.energy).removeprefix("energy ")))
    if status.power_w is not None:
        rows.append(("power", f"{significant(status.power_w)} W"))
    kept = f"after step {status.checkpoints[-1]}, {len(status.checkpoints)} kept" if status.checkpoints else "none yet"
    rows.append(("newest checkpoint", kept))
    if status.updated_s is not None and not status.is_over:
        rows.append(("last record", f"{duration_text(status.updated_s)} ago"))
    return rows


def _attempts_text(status: RunStatus) -> str:
    return f", started {status.num_attempts} times" if status.num_attempts > 1 else ""


def _curve(losses: Sequence[float]) -> str:
    """The losses as blocks, each the mean of as many: the lowest is the lowest block."""
    finite = [loss for loss in losses if abs(loss) < float("inf")]
    if len(finite) < 2:
        return ""
    num_each = -(-len(finite) // _CURVE_WIDTH)
    groups = [finite[begin : begin + num_each] for begin in range(0, len(finite), num_each)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)

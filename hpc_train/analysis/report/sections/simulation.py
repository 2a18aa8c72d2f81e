"""A simulation as sentences, tables and plain values."""

from dataclasses import asdict
from typing import Any

from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import crowding_text, foreign_work_text
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.simulation.simulate import SimulatedStep
from hpc_train.analysis.simulation.study import Check, Simulation
from hpc_train.core.formatting import amount, percent, plural, significant, with_interval

SCHEMA = 1


def simulation_answer(simulation: Simulation) -> list[str]:
    """The largest size in a sentence, how far to trust it, and a better algorithm if there is one."""
    largest, base = simulation.steps[-1], simulation.baseline
    batch = simulation.batch_per_rank
    with_batch = f" with {plural(batch, 'sample')} each" if batch else ""
    lines = [
        f"Simulated, not measured: {plural(largest.ranks, 'rank')} on {plural(largest.nodes, 'node')}{with_batch}"
        f" {'takes' if largest.ranks == 1 else 'take'} {_step_text(largest)} ms a step,"
        f" {percent(efficiency(simulation, largest), 0)} efficiency against {plural(base.ranks, 'rank')} simulated on"
        " the same network.",
        *_disturbed_texts(simulation),
        _check_text(simulation),
    ]
    fastest = min(simulation.by_algorithm.items(), key=lambda pair: pair[1].step_s, default=None)
    if fastest and fastest[1].step_s < 0.9 * largest.step_s:
        lines.append(
            f"An all-reduce by the algorithm {fastest[0]} in place of {simulation.job.algorithm} would take"
            f" {_step_text(fastest[1])} ms a step there."
        )
    return lines


def _check_text(simulation: Simulation) -> str:
    if not simulation.checks:
        return "Not checked: the links between the measured ranks are unknown."
    if len(simulation.checks) < len(simulation.measurements.ranks):
        return (
            f"On 1 rank the simulation is off by {100 * simulation.checks[0].error:+.0f}%. It is not checked on more:"
            " the links between the measured ranks are unknown."
        )
    errors = [each.error for each in simulation.checks]
    fitted = f" (its overlap was {simulation.overlap_source})" if "fitted" in simulation.overlap_source else ""
    return (
        f"At the measured sizes the simulation is off by {100 * min(errors):+.0f} to {100 * max(errors):+.0f}%{fitted}."
    )


def _disturbed_texts(simulation: Simulation) -> list[str]:
    """Which measured sizes do not drive it, or should not, since their ranks waited for cores."""
    if not simulation.disturbed:
        return []
    sizes = "; ".join(
        f"{plural(row.size, 'rank')} ({crowding_text(row) or foreign_work_text([row])})" for row in simulation.disturbed
    )
    if not simulation.only_disturbed:
        return [f"Left out, since ranks waited for cores: {sizes}."]
    return [f"Do not rely on it: ranks waited for cores, which makes their computation too slow: {sizes}."]


def samples_per_s(step: SimulatedStep) -> float:
    return step.samples / step.step_s


def efficiency(simulation: Simulation, step: SimulatedStep) -> float:
    """Samples/s per rank, relative to the smallest measured size, simulated on the same machine."""
    base = simulation.baseline
    return samples_per_s(step) / step.ranks / (samples_per_s(base) / base.ranks)


def simulation_tables(simulation: Simulation) -> list[Table]:
    tables = [_steps_table(simulation)]
    if simulation.checks:
        tables.append(_checks_table(simulation))
    if simulation.by_algorithm:
        tables.append(_algorithms_table(simulation))
    return tables


def _steps_table(simulation: Simulation) -> Table:
    columns: list[CellColumn[SimulatedStep]] = [
        number("ranks", lambda step: f"{step.ranks:,}"),
        number("nodes", lambda step: f"{step.nodes:,}"),
        number("step (ms)", _step_text),
        number("compute", lambda step: _ms(step.computation_s)),
        number("input", lambda step: _ms(step.input_s)),
        number("imbalance", lambda step: _ms(step.imbalance_s)),
        number("network", lambda step: _ms(step.transfer_s)),
        number("efficiency", lambda step: percent(efficiency(simulation, step), 0)),
    ]
    title = "Simulated steps and what they are spent on, ms (95% of simulated runs)"
    return make_table("simulated-steps", title, simulation.steps, columns)


def _checks_table(simulation: Simulation) -> Table:
    columns: list[CellColumn[Check]] = [
        number("ranks", lambda each: str(each.simulated.ranks)),
        number("measured (ms)", lambda each: _ms(each.measured_s)),
        number("simulated (ms)", lambda each: _step_text(each.simulated)),
        number("error", lambda each: f"{100 * each.error:+.0f}%"),
        number("exposed, measured", lambda each: _ms(each.measured_exposed_s)),
        number("simulated", lambda each: _ms(each.simulated.exposed_s)),
    ]
    title = "The simulation against the measured sizes"
    return make_table("simulation-checks", title, simulation.checks, columns)


def _algorithms_table(simulation: Simulation) -> Table:
    columns: list[CellColumn[tuple[str, SimulatedStep]]] = [
        text("all-reduce", lambda pair: pair[0] + " <-" * (pair[0] == simulation.job.algorithm)),
        number("step (ms)", lambda pair: _step_text(pair[1])),
        number("network", lambda pair: _ms(pair[1].transfer_s)),
    ]
    title = f"Algorithms on {plural(simulation.steps[-1].ranks, 'rank')} (<- simulated above)"
    return make_table("simulation-algorithms", title, list(simulation.by_algorithm.items()), columns)


def simulation_notes(simulation: Simulation) -> list[str]:
    """What drives it and what it leaves out."""
    machine, job, noise = simulation.machine, simulation.job, simulation.noise
    links = [
        f"{where} {significant(1e6 * link.latency_s)} us and {_rate(link.s_per_byte)}"
        for where, link in (("within a node", machine.inside), ("between nodes", machine.between))
    ]
    return [
        f"Links ({simulation.links_source}): {', '.join(links)};"
        f" {significant(1e6 * machine.overhead_s)} us of each collective beside its messages.",
        f"Beside backward communication proceeds at {percent(job.overlap, 0)} of its rate"
        f" ({simulation.overlap_source}). Ranks differ by {percent(noise.of_ranks)} lastingly and by"
        f" {percent(float(noise.of_steps.std()) if len(noise.of_steps) else 0.0)} from step to step.",
        *(f"Assumed: {each}." for each in simulation.assumed),
        *_batch_notes(simulation),
        "Left out: other jobs on the network, its switches' limits, and stragglers that no run has met.",
    ]


def _batch_notes(simulation: Simulation) -> list[str]:
    """Where a global batch ends the sizes."""
    measured, largest = simulation.measurements, simulation.steps[-1]
    if measured.weak or simulation.batch_per_rank or 2 * largest.ranks <= largest.samples:
        return []
    most = plural(int(largest.samples), "sample")
    return [f"More ranks than the {most} of the global batch have nothing to do: --batch-per-rank lets the batch grow."]


def _rate(s_per_byte: float) -> str:
    return f"{amount(1 / s_per_byte, 'B')}/s" if s_per_byte else "no limit of bandwidth"


def _ms(seconds: float) -> str:
    return significant(1e3 * seconds)


def _step_text(step: SimulatedStep) -> str:
    low, high = step.step_interval_s
    return with_interval(1e3 * step.step_s, (1e3 * low, 1e3 * high))


# ---------------------------------------------------------------------------------------------- for programs


def simulation_record(simulation: Simulation) -> dict[str, Any]:
    """Plain values for JSON, in seconds and bytes."""
    noise = simulation.noise
    return {
        "schema": SCHEMA,
        "kind": "simulation",
        "quality": "estimated",
        "label": simulation.measurements.label,
        "answer": simulation_answer(simulation),
        "baseline": _record(simulation, simulation.baseline),
        "left_out": [] if simulation.only_disturbed else [row.size for row in simulation.disturbed],
        "steps": [_record(simulation, step) for step in simulation.steps],
        "checks": [
            {
                "measured_s": each.measured_s,
                "measured_exposed_s": each.measured_exposed_s,
                "error": each.error,
                **_record(simulation, each.simulated),
            }
            for each in simulation.checks
        ],
        "algorithms": {name: _record(simulation, step) for name, step in simulation.by_algorithm.items()},
        "job": asdict(simulation.job),
        "machine": asdict(simulation.machine),
        "noise": {"of_ranks": noise.of_ranks, "of_steps": float(noise.of_steps.std()) if len(noise.of_steps) else 0.0},
        "links_source": simulation.links_source,
        "overlap_source": simulation.overlap_source,
        "notes": simulation_notes(simulation),
    }


def _record(simulation: Simulation, step: SimulatedStep) -> dict[str, Any]:
    rates = {"samples_per_s": samples_per_s(step), "efficiency": efficiency(simulation, step)}
    return {**asdict(step), **rates}

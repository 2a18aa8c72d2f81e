"""The section of one group of runs: every subject in the order in which a reader needs it."""

from hpc_train.analysis.convergence.target import TargetStudy
from hpc_train.analysis.energy.cost import GroupEnergy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Section
from hpc_train.analysis.report.notes.headlines import headline
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.efficiency import add_efficiency
from hpc_train.analysis.report.sections.energy import add_energy
from hpc_train.analysis.report.sections.flops import add_flops
from hpc_train.analysis.report.sections.followed import add_followed_plans
from hpc_train.analysis.report.sections.inference import add_inference
from hpc_train.analysis.report.sections.next_run import add_next_run, next_run
from hpc_train.analysis.report.sections.node_use import add_node_use
from hpc_train.analysis.report.sections.numbers import add_numbers
from hpc_train.analysis.report.sections.result import add_result
from hpc_train.analysis.report.sections.scaling import add_scaling
from hpc_train.analysis.report.sections.step_time import add_step_time
from hpc_train.analysis.report.sections.target import add_target


def group_section(energy: GroupEnergy, study: TargetStudy | None, named: bool, guard: SectionGuard) -> Section:
    """study: times to a loss of this group alone. named: with the group's label, since there are several."""
    group = energy.group
    advice = next_run(group, guard)
    section = SectionBuilder("group", group.label, guard)
    section.headline(headline, group, named, advice.for_headline)
    add_numbers(section, group, advice)
    forecast = ("forecast",) if advice.trusted and not advice.as_measured else ()
    section.lead("speedup", "time-per-step", "energy-per-sample", *forecast, "rank-phases", "step-times")
    add_scaling(section, group)
    add_step_time(section, group)
    add_efficiency(section, group)
    add_flops(section, group)
    add_node_use(section, group)
    add_result(section, group)
    add_energy(section, energy)
    add_inference(section, group)
    add_followed_plans(section, group)
    add_next_run(section, advice)
    if study is not None:
        add_target(section, study)
    return section.build()

"""What a size costs: energy per run, per sample and per unit of speedup; with a centre's tariff CO2 and price."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean

from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount
from hpc_train.analysis.energy.run_energy import VALIDATION, RunEnergy, energy_of, unknown_energy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row, relative_speed
from hpc_train.analysis.stats.estimate import Estimate, of_value, over_runs, ratio
from hpc_train.core.formatting import plural
from hpc_train.core.timing_log import PHASES

J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Tariff:
    """Figures of a computing centre and its electricity. None is unknown: nothing is assumed."""

    pue: float | None = None  # power usage effectiveness: the centre's energy over its computers'
    co2_g_per_kwh: float | None = None
    price_per_kwh: float | None = None
    currency: str | None = None


UNKNOWN = Tariff()


def tariff_of(runs: Sequence[Run], given: Tariff = UNKNOWN) -> Tariff:
    """What was given, else what the runs' configurations ([energy]) state, if they agree."""
    figures = asdict(given)
    for name, value in figures.items():
        stated = {getattr(run.config.energy, name) for run in runs}
        if value is None and len(stated) == 1:
            figures[name] = stated.pop()
    return Tariff(**figures)


@dataclass(frozen=True, eq=False)
class RowEnergy:
    """The energy of one row, the mean over its runs. None is unknown."""

    row: Row
    runs: tuple[RunEnergy, ...]
    tariff: Tariff
    # For each unit of speedup gained over the row before, for the same number of samples; None if it is not measurably
    # faster.
    marginal: EnergyAmount | None = None
    speed: Estimate | None = None  # samples/s, over those of the row before
    change: Estimate | None = None  # joules times seconds per sample, over those of the row before

    @property
    def pays(self) -> bool | None:
        """Whether joules times seconds per sample fall against the row before; None if the interval leaves it open."""
        if self.change is None or self.change.interval is None:
            return None
        low, high = self.change.interval
        return True if high < 1 else False if low > 1 else None

    @property
    def is_slower(self) -> bool:
        """Measurably, than the row before."""
        return self.speed is not None and self.speed.interval is not None and self.speed.interval[1] < 1

    @property
    def joules(self) -> Estimate | None:
        """Gross, with its interval: a meter tells one number a run, so only repeats give it one."""
        totals = [run.gross.total for run in self.runs]
        return over_runs([of_value(total) for total in totals if total]) if all(totals) else None

    @property
    def gross(self) -> EnergyAmount:
        return self._mean([run.gross for run in self.runs])

    @property
    def net(self) -> EnergyAmount:
        return self._mean([run.net for run in self.runs])

    @property
    def loop(self) -> EnergyAmount:
        return self._mean([run.loop for run in self.runs])

    @property
    def outside(self) -> EnergyAmount:
        return self._mean([run.outside for run in self.runs])

    @property
    def per_sample(self) -> EnergyAmount:
        return self._per_sample(self.gross)

    @property
    def net_per_sample(self) -> EnergyAmount:
        return self._per_sample(self.net)

    @property
    def phases(self) -> dict[str, EnergyAmount]:
        return self._by_phase([run.phases for run in self.runs])

    @property
    def servers(self) -> dict[str, EnergyAmount]:
        return self._by_phase([run.servers for run in self.runs])

    @property
    def mean_w(self) -> float | None:
        return _mean([run.mean_w for run in self.runs])

    @property
    def peak_w(self) -> float | None:
        """The highest of any run."""
        peaks = [run.peak for run in self.runs]
        return max(peak[0] for peak in peaks if peak) if all(peaks) else None

    @property
    def edp_js(self) -> float | None:
        """Energy-delay product: energy of the loop times its duration (Gonzalez and Horowitz, "Energy dissipation in
        general purpose microprocessors", IEEE Journal of Solid-State Circuits 31(9), 1996).
        """
        products = [_product(run.loop.total, run.timeline.loop_s) for run in self.runs]
        return _mean(products)

    @property
    def facility_j(self) -> float | None:
        """Joules of the centre, including cooling and losses: gross times its PUE."""
        return _product(self.gross.total, self.tariff.pue)

    @property
    def _paid_kwh(self) -> float | None:
        """What CO2 and price are computed from: the centre's energy if its PUE is known, else the computers' alone."""
        joules = self.facility_j if self.tariff.pue is not None else self.gross.total
        return None if joules is None else joules / J_PER_KWH

    @property
    def co2_g(self) -> float | None:
        return _product(self._paid_kwh, self.tariff.co2_g_per_kwh)

    @property
    def price(self) -> float | None:
        return _product(self._paid_kwh, self.tariff.price_per_kwh)

    def _mean(self, parts: list[EnergyAmount]) -> EnergyAmount:
        return sum(parts, NONE) * (1 / len(parts))

    def _per_sample(self, joules: EnergyAmount) -> EnergyAmount:
        num_samples = fmean(run.summary.num_samples for run in self.row.runs)
        return joules * (1 / num_samples) if num_samples else EnergyAmount(lacking=("no sample",))

    def _by_phase(self, of_runs: list[dict[str, EnergyAmount]]) -> dict[str, EnergyAmount]:
        known = [phase for phase in (*PHASES, VALIDATION) if any(phase in one for one in of_runs)]
        return {phase: self._mean([one.get(phase, NONE) for one in of_runs]) for phase in known}


@dataclass(frozen=True, eq=False)
class GroupEnergy:
    """The energy of all rows of a group, in its order."""

    group: Group
    rows: tuple[RowEnergy, ...]

    @property
    def known(self) -> bool:
        """Whether anything was read at all."""
        return any(row.gross.known > 0 for row in self.rows)


def cost_of(group: Group, given: Tariff = UNKNOWN, guard: SectionGuard | None = None) -> GroupEnergy:
    """Reads the energy files of a group's runs. Raises `BadRecord` naming path:line."""
    guard = guard or SectionGuard()
    rows = [_row_energy(row, given, guard) for row in group.rows]
    before: RowEnergy | None = None
    for index, row in enumerate(rows):
        if row.row.incomplete or row.row.speedup is None:
            continue
        if before is not None:
            what = f"what speed costs at {plural(row.row.size, 'rank')} ({group.label})"
            rows[index] = guard.call(what, partial(_unchanged, row), _with_marginal, row, before, group)
        before = row
    return GroupEnergy(group, tuple(rows))


def _row_energy(row: Row, given: Tariff, guard: SectionGuard) -> RowEnergy:
    runs = [guard.call(f"the energy of {run.label}", partial(unknown_energy, run), energy_of, run) for run in row.runs]
    return RowEnergy(row, tuple(runs), tariff_of(row.runs, given))


def _unchanged(row: RowEnergy, why: str) -> RowEnergy:
    return row


def _with_marginal(row: RowEnergy, before: RowEnergy, group: Group) -> RowEnergy:
    """The row with what its gain in speed over the row before has cost.

    Both are scaled to the baseline's number of samples, since runs may differ in their steps and weak scaling does more
    work. Energy x time per sample falls as long as the energy grows by a smaller factor than the speedup.
    """
    assert group.baseline is not None and row.row.speedup is not None and before.row.speedup is not None
    num_samples = fmean(run.summary.num_samples for run in group.baseline.runs)
    gained = row.row.speedup - before.row.speedup
    more = (row.per_sample - before.per_sample) * num_samples
    after, earlier = _joule_seconds(row), _joule_seconds(before)
    if not after or not earlier:
        return row
    speed = relative_speed(row.row, before.row)
    is_faster = speed is not None and speed.interval is not None and speed.interval[0] > 1
    return replace(row, marginal=more * (1 / gained) if is_faster else None, speed=speed, change=ratio(after, earlier))


def _joule_seconds(row: RowEnergy) -> list[Estimate]:
    """Joules per sample times seconds per sample of each run; [] if any is unknown."""
    found = []
    for each in row.runs:
        joules, summary = each.gross.total, each.run.summary
        if not joules or not summary.num_samples or not each.run.step_s.any():
            return []
        seconds = float(each.run.step_s.mean()) / summary.global_batch
        found.append(of_value(joules / summary.num_samples * seconds))
    return found


def _mean(values: list[float | None]) -> float | None:
    """None if any is unknown."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other

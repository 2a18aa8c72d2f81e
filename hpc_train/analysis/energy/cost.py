"""What a size costs: joules a run, a sample and a further unit of speedup; with a centre's figures CO2 and money."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from statistics import fmean

from hpc_train.analysis.energy.energy import RunEnergy, energy_of, unknown_energy
from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import plural
from hpc_train.core.records import PHASES

J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Tariff:
    """Of a centre and its electricity. None is unknown: nothing is assumed."""

    pue: float | None = None  # power usage effectiveness: joules of the centre for each of its computers
    co2_g_per_kwh: float | None = None
    price_per_kwh: float | None = None
    currency: str | None = None


UNKNOWN = Tariff()


def tariff_of(runs: Sequence[Run], given: Tariff = UNKNOWN) -> Tariff:
    """What was given, else what the runs' configurations ([energy]) say, where they agree."""
    fields = ("pue", "co2_g_per_kwh", "price_per_kwh", "currency")
    told = {}
    for field, value in zip(fields, astuple(given), strict=True):
        values = {getattr(run.config.energy, field, None) for run in runs}
        told[field] = value if value is not None else values.pop() if len(values) == 1 else None
    return Tariff(**told)


@dataclass(frozen=True, eq=False)
class RowEnergy:
    """One row's energy, the mean over its runs. None is unknown."""

    row: Row
    runs: tuple[RunEnergy, ...]
    tariff: Tariff
    # Joules for each unit that the speedup grows by from the row before, for the same number of samples.
    marginal: EnergyAmount | None = None
    pays: bool | None = None  # whether the joules times the seconds for a sample are fewer than at the row before

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
        """Energy-delay product: joules of the loop times its seconds (Gonzalez and Horowitz, "Energy dissipation in
        general purpose microprocessors", IEEE Journal of Solid-State Circuits 31(9), 1996).
        """
        return _mean([None if r.loop.total is None else r.loop.total * r.timeline.loop_s for r in self.runs])

    @property
    def facility_j(self) -> float | None:
        """Joules of the centre, cooling and losses included: gross times its PUE."""
        joules = self.gross.total
        return joules * self.tariff.pue if joules is not None and self.tariff.pue is not None else None

    @property
    def _paid_kwh(self) -> float | None:
        """What CO2 and price are for: the centre's energy where its PUE is known, else the computers' alone."""
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
        known = [phase for phase in PHASES if any(phase in one for one in of_runs)]
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

    def energy(run: Run) -> RunEnergy:
        return guard.call(f"the energy of {run.label}", partial(unknown_energy, run), energy_of, run)

    rows = [RowEnergy(row, tuple(map(energy, row.runs)), tariff_of(row.runs, given)) for row in group.rows]
    before: RowEnergy | None = None
    for index, row in enumerate(rows):
        if row.row.incomplete or row.row.speedup is None:
            continue
        if before is not None:
            what = f"what speed costs at {plural(row.row.size, 'rank')} ({group.label})"
            rows[index] = guard.call(what, partial(_as_it_is, row), _against, row, before, group)
        before = row
    return GroupEnergy(group, tuple(rows))


def _as_it_is(row: RowEnergy, why: str) -> RowEnergy:
    return row


def _against(row: RowEnergy, before: RowEnergy, group: Group) -> RowEnergy:
    """With what the speedup since the row before has cost.

    Both are set to the number of samples of the baseline, since runs may differ in their steps and weak scaling does
    more work. Joules times seconds per sample fall as long as the joules grow by a smaller factor than the speedup.
    """
    assert group.baseline is not None and row.row.speedup is not None and before.row.speedup is not None
    num_samples = fmean(run.summary.num_samples for run in group.baseline.runs)
    gained = row.row.speedup - before.row.speedup
    more = (row.per_sample - before.per_sample) * num_samples
    after_j, before_j = row.per_sample.total, before.per_sample.total
    if after_j is None or before_j is None:
        return row
    pays = after_j / row.row.speedup < before_j / before.row.speedup
    return replace(row, marginal=more * (1 / gained) if gained > 0 else None, pays=pays)


def _mean(values: list[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other

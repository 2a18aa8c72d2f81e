"""What limits the energy of one run: contained domains, shared nodes, meters that ran before the loop."""

from collections.abc import Iterator

from hpc_train.analysis.energy.readings import ALL_NODES
from hpc_train.analysis.energy.run_energy import RunEnergy
from hpc_train.analysis.runs.meta_json import dict_at
from hpc_train.core.energy_records import OWN_CORES
from hpc_train.core.formatting import listed

_MOST_HOSTS = 3  # named one by one
_NOTICEABLE_LEAD_S = 1.0


def meter_notes(energy: RunEnergy) -> list[str]:
    """Without a full stop: the report adds the sizes."""
    return (
        [energy.failure] if energy.failure else [*_domain_notes(energy), *_shared_notes(energy), *_lead_notes(energy)]
    )


def _domain_notes(energy: RunEnergy) -> Iterator[str]:
    if energy.contained_domains:
        domains = ", ".join(energy.contained_domains)
        yield f"Not added, since another domain of the node contains their energy: {domains}"


def _shared_notes(energy: RunEnergy) -> Iterator[str]:
    if shared := sorted({reading.host for reading in energy.readings if reading.shared}):
        hosts = listed(shared, _MOST_HOSTS)
        yield f"Shared: other jobs may have used {hosts} at the same time: a node's energy is not this job's alone"
    metered = {reading.host for reading in energy.readings if reading.trace.domain != OWN_CORES} - {ALL_NODES}
    known = dict_at(dict_at(energy.run.meta, "energy"), "shared")
    if unknown := sorted(host for host in metered if known.get(host) is None):
        yield f"Whether other jobs used {listed(unknown, _MOST_HOSTS)} at the same time is not known"


def _lead_notes(energy: RunEnergy) -> Iterator[str]:
    lead_s = max((reading.lead_s for reading in energy.readings), default=0.0)
    if lead_s > _NOTICEABLE_LEAD_S:
        yield f"The meters ran {lead_s:.1f} s before the loop, which count in gross and not in the loop"

"""The energy of a use of a trained model, in its record's folder, as a run's energy lies in its run directory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hpc_train.core.energy_records import DomainEnergy, Energy, Trace, energy_of_run, read_traces
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Energy as Settings
from hpc_train.train.comm.context import Context
from hpc_train.train.energy.node_energy import NodeEnergy
from hpc_train.train.inference.trained import Log, Place


def make_folder(run: RunDir, kind: str, log: Log) -> Path | None:
    """A new folder for the record of this use; None, with a line that says so, where none can be made."""
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{kind}"
    try:
        for attempt in range(100):
            folder = run.inference_dir / (stem if attempt == 0 else f"{stem}.{attempt}")
            try:
                (folder / "energy").mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        log(f"warning: no record is kept, and no energy: {run.inference_dir} cannot be written: {error.strerror}")
    return None


class UseEnergy:
    """The meters of this rank's node while a model is used."""

    def __init__(
        self, settings: Settings, place: Place, folder: Path | None, attempt: int, context: Context, log: Log
    ) -> None:
        """Collective. folder: of the record; None records nothing."""
        awake = settings.model_copy(update={"idle_s": 0.0})
        self._node = NodeEnergy(awake, context, place.placements, log)
        self._folder, self._attempt, self._context = folder, attempt, context
        self._is_shared = False

    def recorded(self) -> AbstractContextManager[None]:
        if self._folder is None:
            return nullcontext()
        return self._node.recorded(self._folder / "energy" / f"{self._context.world.host}.csv", self._attempt)

    def read(self) -> Energy:
        """Collective, after `recorded`. What all starts of this use took, on the root."""
        if self._folder is None:
            return Energy()
        end = self._node.metadata_at_end()  # a gather: each node's file is closed by now
        self._is_shared = True in end["shared"].values()
        return self._context.on_root(lambda: self._sum(lambda trace: trace.energy))

    def between(self, begin_s: float, end_s: float) -> Energy:
        """After `read`, on the root. What was drawn between two times of day, interpolated between readings."""

        def part(trace: Trace) -> Energy:
            if trace.energy.joules is None or not len(trace.time_s):
                return trace.energy
            first_j, last_j = np.interp((begin_s, end_s), trace.time_s, trace.joules).tolist()
            return replace(trace.energy, joules=last_j - first_j)

        return self._sum(part)

    def _sum(self, part: Callable[[Trace], Energy]) -> Energy:
        if self._folder is None:
            return Energy()
        try:
            by_host = {
                path.stem: [DomainEnergy(trace.domain, part(trace)) for trace in read_traces(path)]
                for path in sorted((self._folder / "energy").glob("*.csv"))
            }
        except UserError as error:
            return Energy(source=error.what)
        return energy_of_run(by_host, by_host, self._is_shared)

"""The energy of a use of a trained model, in its record's folder, as a run's energy lies in its run directory."""

from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from hpc_train.core.energy_records import DomainEnergy, Energy, energy_of_run, read_traces
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
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

    def __init__(self, config: Config, place: Place, folder: Path | None, attempt: int, context: Context, log: Log):
        """Collective. folder: of the record; None records nothing."""
        awake = config.energy.model_copy(update={"idle_s": 0.0})
        self._node = NodeEnergy(awake, context, place.placements, log)
        self._folder, self._attempt, self._context = folder, attempt, context

    def recorded(self) -> AbstractContextManager[None]:
        if self._folder is None:
            return nullcontext()
        return self._node.recorded(self._folder / "energy" / f"{self._context.world.host}.csv", self._attempt)

    def read(self) -> Energy:
        """Collective, after `recorded`. What all starts of this use took, on the root."""
        if self._folder is None:
            return Energy()
        end = self._node.metadata_at_end()  # a gather: each node's file is closed by now
        return self._context.on_root(partial(_read, self._folder, True in end["shared"].values()))


def _read(folder: Path, is_shared: bool) -> Energy:
    try:
        by_host = {
            path.stem: [DomainEnergy(trace.domain, trace.energy) for trace in read_traces(path)]
            for path in sorted((folder / "energy").glob("*.csv"))
        }
    except UserError as error:
        return Energy(source=error.what)
    return energy_of_run(by_host, by_host, is_shared)

"""What `evaluate`, `predict` and its `--latency` have in common: a run's model, opened on the rows of a file."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hpc_train import __version__
from hpc_train.core.config import as_dict
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.unwritten import rows_without_chunks
from hpc_train.train.inference.blocks import Blocks
from hpc_train.train.inference.learned import read_learned
from hpc_train.train.inference.outputs import Meaning, make_model, meaning
from hpc_train.train.inference.pass_over import Pass
from hpc_train.train.inference.samples import Samples, open_samples
from hpc_train.train.inference.trained import Log, Place, load_model, open_place
from hpc_train.train.inference.unseen import choose_unseen, held_out_of, role_in_training

PROGRAM = f"hpc-train {__version__}"
_MOST_ROWS = 256  # in a block, unless it is asked for
_MOST_BYTES = 32 << 20  # of inputs in a block


@dataclass(frozen=True)
class Request:
    """What a user asks for. data: a file or a pattern of files; None for that of the run. inputs, targets: names of
    data sets; without them and without data those that `choose_unseen` finds. rows: [begin, end) of them, either of
    which may be left out. batch: rows that are computed at once. checkpoint: see `choose_step`.
    """

    data: str | None = None
    checkpoint: str | None = None
    inputs: str | None = None
    targets: str | None = None
    rows: tuple[int | None, int | None] = (None, None)
    batch: int | None = None


@dataclass(frozen=True)
class Use:
    """A model whose weights are still to be loaded: see `load`."""

    run: RunDir
    config: Config
    data: str
    place: Place
    work: Pass
    role: str  # of the rows in training: see `role_in_training`

    @property
    def samples(self) -> Samples:
        return self.work.samples

    @property
    def meaning(self) -> Meaning:
        return self.work.meaning

    @property
    def blocks(self) -> Blocks:
        return self.work.blocks

    def warn_of_role(self, log: Log) -> None:
        """Measures of rows that were trained on say nothing of others."""
        if self.role == "trained on":
            log("warning: these rows were trained on" + ", but for those held out" * bool(self.config.data.hold_out))

    def load(self, step: int | None, context: Context, log: Log) -> int:
        """Collective. See `load_model`."""
        found = load_model(self.run, self.work.model, step, self.place, context, log)
        log(f"Step {found} of {self.run.path}")
        return found


def open_use(run: RunDir, config: Config, request: Request, needs_targets: bool, context: Context, log: Log) -> Use:
    """Collective. Opens the rows that are asked for, and makes the model. Raises UserError."""
    if config.data.dataset is not None and request.data is None:
        raise joint(
            UserError(
                f"{run.path} read {config.data.in_words}, and rows are read from HDF5",
                "Name a file of such samples: --data FILE.",
            )
        )
    context.on_root(lambda: _require_no_table(request.data or "", config))
    place = open_place(config, context, log)
    learned = read_learned(run, config, context, log)
    is_held_out = False
    if needs_targets and request.data is None and request.inputs is None:
        file, inputs, targets, is_held_out = choose_unseen(run, config, context)
        request = replace(request, data=file, inputs=inputs, targets=request.targets or targets)
    data = request.data or str(config.data.file)
    there = config.model_copy(update={"data": config.data.model_copy(update={"file": data})})
    names = request.inputs, request.targets
    samples = open_samples(there, learned, str(config.data.file), names, needs_targets, context, log)
    samples = held_out_of(samples, config, context) if is_held_out else samples
    role = role_in_training(samples, config, context) if samples.targets_name else ""
    rows = context.on_all(partial(_rows, request.rows, samples))
    if not is_held_out:
        context.on_root(partial(_require_written, samples, rows))
    batch = request.batch or max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, samples.split.inputs[0].row_bytes)))
    edges = samples.split.inputs[0].chunk_edges
    chunk_rows = 1 if edges is None else int(np.diff(edges).max())
    blocks = Blocks(rows, batch, max(1, round(chunk_rows / batch)))
    model = context.on_all(partial(make_model, config, learned))
    targets = f", with {samples.targets_name}" if samples.targets_name else ""
    log(f"Data: {samples.reading}{targets}; rows {rows.start:,} to {rows.stop:,}")
    if is_held_out:
        log(f"These are the {len(samples):,} samples that data.hold_out = {config.data.hold_out:g} kept from training")
    found = meaning(config, learned, samples, context)
    return Use(run, config, data, place, Pass(model, samples, found, blocks, place), role)


def _require_no_table(data: str, config: Config) -> None:
    if Path(data).suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise UserError(
            f"{data} is a table of text, and rows are read from HDF5",
            f"Prepare it: hpc-train prepare table NEW.h5 --from {data} --like {config.data.file}, and name NEW.h5.",
        )


def _rows(asked: tuple[int | None, int | None], samples: Samples) -> range:
    begin, end = asked[0] or 0, len(samples) if asked[1] is None else asked[1]
    if not 0 <= begin < end <= len(samples):
        raise UserError(
            f"--rows {begin}:{end}: {samples.name} has rows 0:{len(samples)}",
            "Name rows that exist, the second number larger than the first.",
        )
    return range(begin, end)


def _require_written(samples: Samples, rows: range) -> None:
    """Raises UserError if one of the rows was never written: predictions would be of fill values."""
    begin = 0
    for path, dataset in zip(samples.files.paths, samples.files.datasets(samples.name, "--inputs"), strict=True):
        found = begin + rows_without_chunks(path, dataset)
        unwritten = found[(found >= rows.start) & (found < rows.stop)]
        if len(unwritten):
            raise UserError(
                f"{path}: {len(unwritten):,} rows of {samples.name}, from {unwritten[0]:,} on, were never written",
                "Write them, or name the rows that are there: --rows A:B.",
            )
        begin += len(dataset)


def digest(config: Config) -> str:
    """Of what decides what a model computes: not where its data and its runs lie."""
    values = as_dict(config)
    values.pop("data", None)  # what it says of scales is in the data set of the run
    for section in ("run", "energy", "checkpoint"):
        values.pop(section, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def state_of(paths: list[Path]) -> list[list[int]]:
    """Size and time of change of each file, by which a changed one is noticed."""
    return [[status.st_size, status.st_mtime_ns] for status in (path.stat() for path in paths)]
